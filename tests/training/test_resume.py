"""What is in a run directory when a run begins, or goes on."""

import fcntl
import os
import shutil

import pytest

from folding import schema
from folding.training import loop
from folding.training.metrics import read_metrics
from tests.training.conftest import tiny_config


def test_a_resumed_run_knows_what_is_zero_already(text_file, tmp_path):
  config = tiny_config(text_file, eval_every=8)  # after the last check
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  loop.run(config, str(whole))
  shutil.copytree(whole, resumed)
  shutil.rmtree(resumed / "checkpoints" / "10")
  loop.run(config, str(resumed))

  def told(workdir):
    return {
      r["step"]: (r["sparsity"], r["frozen"], r["trainable"])
      for r in read_metrics(str(workdir / "metrics.jsonl"))
      if r["split"] == "train"
    }

  assert told(resumed) == told(whole)
  assert told(resumed)[10][0] > 0.6


def test_what_a_run_left_that_never_began_is_no_obstacle(text_file, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "labels.json").write_text("")  # killed while it was written
  (workdir / "asked.json").write_text("{}")
  assert loop.run(tiny_config(text_file, steps=2), str(workdir))["finished"]
  assert not (workdir / "asked.json").exists()


def test_a_folder_is_one_process_s_at_a_time(text_file, tmp_path):
  config = tiny_config(text_file, steps=2)
  workdir = tmp_path / "run"
  workdir.mkdir()
  handle = os.open(workdir, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)  # of this handle alone, as another's
  with pytest.raises(schema.ConfigError, match="another process trains in"):
    loop.run(config, str(workdir))
  assert not list(workdir.iterdir())
  os.close(handle)
  assert loop.run(config, str(workdir))["finished"]


def test_a_run_goes_on_with_the_text_that_it_began_with(text_file, tmp_path):
  text = tmp_path / "mine.txt"
  shutil.copy(text_file, text)
  config = tiny_config(str(text), steps=2)
  workdir = str(tmp_path / "run")
  found = loop.run(config, workdir)
  whole = text.read_text("utf-8")
  assert whole.isascii()
  text.write_text(whole[:-2] + chr(ord(whole[-2]) ^ 1) + whole[-1], "utf-8")
  with pytest.raises(schema.ConfigError, match="not that which the run in"):
    loop.run(config, workdir)
  with pytest.raises(schema.ConfigError, match="not that which the run in"):
    loop.evaluate_run(workdir)
  text.write_text(whole, "utf-8")
  assert loop.run(config, workdir) == found


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("gs://b/run", "gs://b/run is an address"),
    ("~/run", r"would be a folder called ~; write \$HOME"),
    ("a[1]/run", r"cannot be read from /.*/a\[1\]/run, because of the \["),
  ],
)
def test_what_is_no_place_for_a_run_is_refused(
  text_file, monkeypatch, tmp_path, path, message
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(schema.ConfigError, match=message):
    loop.run(tiny_config(text_file), path)
  assert not list(tmp_path.iterdir())


def _files(workdir):
  return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_what_a_run_of_a_lost_config_left_is_not_taken(text_file, tmp_path):
  workdir = tmp_path / "run"
  loop.run(tiny_config(text_file, steps=2), str(workdir))
  (workdir / "config.json").unlink()
  before = _files(workdir)
  for lost in ("", "checkpoints"):  # then its result is left
    if lost:
      shutil.rmtree(workdir / lost)
      before = _files(workdir)
    with pytest.raises(schema.ConfigError, match="of another config left"):
      loop.run(tiny_config(text_file, steps=3), str(workdir))
    assert _files(workdir) == before


def test_a_finished_run_without_checkpoints_is_not_trained_again(
  text_file, tmp_path
):
  config, workdir = tiny_config(text_file, steps=2), tmp_path / "run"
  found = loop.run(config, str(workdir))
  shutil.rmtree(workdir / "checkpoints")
  before = _files(workdir)
  assert loop.run(config, str(workdir)) == found
  assert _files(workdir) == before


def test_a_run_that_is_to_have_a_text_refuses_another(text_file, tmp_path):
  config, workdir = tiny_config(text_file, steps=2), tmp_path / "run"
  with pytest.raises(schema.ConfigError, match="not that of the other runs"):
    loop.run(config, str(workdir), "0" * 64)
  assert not workdir.exists()
  loop.run(config, str(workdir))
  digest = (workdir / "text.sha256").read_text()
  assert loop.run(config, str(tmp_path / "same"), digest)["finished"]
