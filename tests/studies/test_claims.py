"""Claims between real processes: exclusive, passed on, and never stuck."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from folding.studies import claims

# Loads the one file, which needs no library, and so starts at once.
_LOAD = f"""
import importlib.util, json, os, sys, time
spec = importlib.util.spec_from_file_location("claims", {claims.__file__!r})
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)
mine = claims.Claims(sys.argv[1])
"""
_TAKE_ALL = """
print("ready", flush=True)
sys.stdin.readline()
taken = []
for name in json.loads(sys.argv[2]):
  claim = mine.take(name)
  if claim is not None:
    taken.append(name)
print(json.dumps(taken), flush=True)
sys.stdin.readline()
"""
_HOLD = """
claim = mine.take("a")
print("held" if claim else "refused", flush=True)
sys.stdin.readline()
if len(sys.argv) > 2:
  claim.release()
  print("released", flush=True)
  sys.stdin.readline()
"""


@contextlib.contextmanager
def _process(code, *arguments):
  process = subprocess.Popen(
    [sys.executable, "-c", _LOAD + code, *map(str, arguments)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def _go_on(process):
  process.stdin.write("\n")
  process.stdin.flush()


def test_each_name_goes_to_one_of_many_processes(tmp_path):
  names = [f"run-{i}" for i in range(200)]
  with contextlib.ExitStack() as stack:
    processes = [
      stack.enter_context(_process(_TAKE_ALL, tmp_path, json.dumps(names)))
      for _ in range(4)
    ]
    for process in processes:
      assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
      _go_on(process)
    taken = [json.loads(process.stdout.readline()) for process in processes]
    assert sorted(sum(taken, [])) == sorted(names)
    assert claims.Claims(str(tmp_path)).held() == set(names)
    assert claims.Claims(str(tmp_path)).take("run-0") is None


def test_what_is_released_can_be_taken_again(tmp_path):
  mine = claims.Claims(str(tmp_path))
  with _process(_HOLD, tmp_path, "release") as process:
    assert process.stdout.readline() == "held\n"
    assert mine.take("a") is None
    _go_on(process)
    assert process.stdout.readline() == "released\n"
    assert mine.held() == set()
    assert mine.take("a") is not None
    assert mine.held() == {"a"}


def test_a_killed_holder_is_followed_at_once(tmp_path):
  mine = claims.Claims(str(tmp_path))
  with _process(_HOLD, tmp_path) as process:
    assert process.stdout.readline() == "held\n"
    assert mine.take("a") is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert mine.held() == set()
    assert mine.take("a") is not None


def test_a_suspended_holder_loses_its_claim(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, "BEAT_SECONDS", 0.0)
  suspended = claims.Claims(str(tmp_path)).take("a")
  others = claims.Claims(str(tmp_path), stale_seconds=0.2)
  assert others.take("a") is None
  time.sleep(0.3)
  assert suspended.beat()  # in time
  assert others.take("a") is None
  time.sleep(0.3)
  taken = others.take("a")
  assert taken is not None
  assert not suspended.beat()
  assert taken.beat()


def test_a_claim_of_another_machine_is_not_judged_by_its_process(tmp_path):
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  path = pathlib.Path(tmp_path, "a.0")
  path.write_text(json.dumps({"host": "another", "pid": gone.pid}))
  os.utime(path, (0, 0))  # nor by its clock
  others = claims.Claims(str(tmp_path), stale_seconds=0.2)
  assert others.take("a") is None
  time.sleep(0.3)
  assert others.take("a") is not None


@pytest.mark.parametrize("content", ["", '{"host": '])
def test_a_claim_that_was_not_written_to_its_end_is_held_for_a_while(
  tmp_path, content
):
  (tmp_path / "a.0").write_text(content)
  others = claims.Claims(str(tmp_path), stale_seconds=0.2)
  assert others.take("a") is None
  time.sleep(0.3)
  assert others.take("a") is not None


def test_names_with_dots_and_numbers_are_kept_apart(tmp_path):
  mine = claims.Claims(str(tmp_path))
  for name in ("a", "a.0", "a.1.2", "b--37.5--s0"):
    assert mine.take(name) is not None
  assert mine.held() == {"a", "a.0", "a.1.2", "b--37.5--s0"}
