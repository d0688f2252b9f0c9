"""Real processes on loopback, four simulated CPU devices each."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from folding import config as config_lib
from folding import paths
from folding.training import loop, run_dir
from folding.training.checkpoint import load_run
from folding.typed import edited
from tests.training.conftest import tiny_config, write_text

ROOT = pathlib.Path(__file__).parents[2]
MESH = config_lib.MeshConfig(data=2, fsdp=4)
_CONFIG_FILE = """
from folding import config as c
from tests.training.conftest import tiny_config

def get_config(path):
  return c.edited(tiny_config(path), {"mesh.data": 2, "mesh.fsdp": 4})
"""
# Runs several commands in one process, and prints statuses, outputs and errors.
COMMANDS = """
import contextlib, io, json, sys
from folding import cli
found = []
for words in json.loads(sys.argv[1]):
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    status = cli.main(words)
  found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def free_address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def start(command, devices=4):
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ
    | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def train_words(workdir, text_file, *flags):
  """Returns a command that trains in one of two processes."""
  config_file = workdir.parent / "mesh.py"
  config_file.write_text(_CONFIG_FILE, encoding="utf-8")
  path = f"{config_file}:{text_file}"
  return ["train", f"--config={path}", f"--workdir={workdir}", *flags]


def distributed_flags():
  """Returns the flag of each of two processes."""
  address = free_address()
  return [f"--config.distributed={address},{process},2" for process in range(2)]


def run_in_two(commands):
  """Returns [status, output, errors] of commands, and stderr, of two processes."""
  processes = [
    start([sys.executable, "-c", COMMANDS, json.dumps(words)])
    for words in commands
  ]
  outputs = [process.communicate(timeout=500) for process in processes]
  for process, (_, err) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, err
  found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
  return found, [err for _, err in outputs]


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def last_state(workdir):
  this, checkpoints = loop.open_run(str(workdir))
  with checkpoints:
    step, state = checkpoints.restore_latest(this.like)
  return step, jax.device_get(state)


def config_of_one(text_file, **train):
  """Returns the config of the same training in one process."""
  return dataclasses.replace(tiny_config(text_file, **train), mesh=MESH)


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
  """Returns {run: (directory, output of each process)} of two processes."""
  folder = tmp_path_factory.mktemp("two")
  flags = {
    "plain": [],
    "compact": [
      "--config.train.compact=0.1",
      "--config.fpp.granularity=neuron",
      "--config.model.mlp_width=64",
    ],
  }
  found, _ = run_in_two(
    [
      [train_words(folder / n, text_file, flag, *flags[n]) for n in flags]
      for flag in distributed_flags()
    ]
  )
  runs = {}
  for name, results in zip(flags, zip(*found, strict=True), strict=True):
    for status, _, err in results:
      assert status == 0, err
    runs[name] = folder / name, [out for _, out, _ in results]
  return runs


@pytest.mark.slow
def test_two_processes_train_as_one(trained, text_file, tmp_path):
  two, outputs = trained["plain"]
  assert "test" in outputs[0]
  assert "step" not in outputs[1]  # only process 0 prints
  one = tmp_path / "one"
  loop.run(config_of_one(text_file), str(one))
  assert len(records(two)) == len(records(one))
  for ours, theirs in zip(records(two), records(one), strict=True):
    assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours.get("trainable") == theirs.get("trainable")
  # Saved by two processes, read by one on a mesh of eight devices.
  (step, ours), (_, theirs) = last_state(two), last_state(one)
  assert step == 10
  chex.assert_trees_all_equal(
    ours.opt_state.suspected, theirs.opt_state.suspected
  )
  zeros = 0
  for name, w in paths.flatten(theirs.params).items():
    np.testing.assert_array_equal(paths.flatten(ours.params)[name] == 0, w == 0)
    zeros += np.count_nonzero(w == 0)
  assert zeros > 1000
  report = json.loads((two / "result.json").read_text())
  assert report["finished"]
  assert config_lib.load(str(two / "config.json")).distributed == "none"


@pytest.mark.slow
def test_two_processes_compact_as_one(trained, text_file, tmp_path):
  two, one = trained["compact"][0], tmp_path / "one"
  config = config_of_one(text_file, compact=0.1)
  config = edited(config, {"model.mlp_width": 64, "fpp.granularity": "neuron"})
  loop.run(config, str(one))
  for ours, theirs in zip(records(two), records(one), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours.get("trainable") == theirs.get("trainable")
  ours, theirs = (load_run(str(w)) for w in (two, one))
  assert ours.shape == theirs.shape
  # Of 64 neurons 44 are zero, rounded up to a multiple of 8.
  kernel = ours.params["blocks_0"]["mlp"]["down"]["kernel"]
  assert kernel.shape == (24, 16)


@pytest.mark.slow
def test_signal_to_one_process_stops_both_at_the_same_step(text_file, tmp_path):
  workdir = tmp_path / "run"
  words = train_words(workdir, text_file, "--config.train.steps=1000000")
  processes = [
    start([sys.executable, "-m", "folding", *words, flag])
    for flag in distributed_flags()
  ]
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 400
  while time.monotonic() < deadline and not (
    metrics.exists() and metrics.stat().st_size > 0
  ):
    time.sleep(0.1)  # no event tells of another process's file
    assert [process.poll() for process in processes] == [None, None]
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=400) for process in processes]
  for process, (_, err) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, err
  saved = re.search(r"saved at step (\d+) of 1000000", outputs[0][0])
  assert saved, outputs[0][0]
  assert last_state(workdir)[0] == int(saved[1])


@pytest.mark.slow
def test_mistake_of_one_process_ends_both(text_file, tmp_path):
  other = write_text(tmp_path / "other.txt", 399)
  missing, rate = tmp_path / "missing.txt", "--config.train.learning_rate=0.5"
  failed = "another process failed"
  cases = {  # data and flags of process 1, messages of both
    "text": (other, [], ["process 1 has another text or tokenizer"] * 2),
    "config": (text_file, [rate], ["process 1 has another config"] * 2),
    "missing": (missing, [], [failed, "missing.txt"]),
    "held": (text_file, [], ["another process trains in", failed]),
  }
  commands = [[], []]
  addresses = distributed_flags()
  for name, (path, flags, _) in cases.items():
    workdir = tmp_path / name
    commands[0].append(train_words(workdir, text_file, addresses[0]))
    commands[1].append(train_words(workdir, path, addresses[1], *flags))
  with run_dir.held(str(tmp_path / "held")):
    found, errors = run_in_two(commands)
  assert errors == ["", ""]  # all were caught by the commands
  for rank, results in enumerate(found):
    for name, (status, _, err) in zip(cases, results, strict=True):
      assert status == 2, (name, err)
      assert cases[name][2][rank] in err
      assert err.count("folding: error:") == err.count("\n") == 1
  for name in cases:
    assert not (tmp_path / name / "config.json").exists()


@pytest.mark.parametrize(
  "text", ["always", "host,0,2", "host:1,2,2", "host:1,0", "host:x,0,2"]
)
def test_address_that_is_not_valid_is_refused(text):
  with pytest.raises(ValueError, match="distributed is 'none', 'auto' or 'HO"):
    config_lib.resolve(config_lib.Config(distributed=text))
