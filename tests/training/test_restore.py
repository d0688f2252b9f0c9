import logging
import shutil

import jax
import numpy as np
import pytest

from folding import config as c
from folding import paths
from folding.data.tokenizers import train_tokenizer
from folding.schema import ConfigError
from folding.training import restore
from folding.training.checkpoint import Checkpoints
from tests.training import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns a run directory, its config, and its states at steps 5 and 10."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.config(data=c.DataConfig(tokenizer="bytes", length=8))
  made = tiny.make(config)
  states = {step: made.init(seed=step) for step in (5, 10)}
  with Checkpoints(str(workdir)) as checkpoints:
    for step, loss in ((5, 1.0), (10, 2.0)):
      checkpoints.save(step, states[step], loss)
  train_tokenizer(config.data, []).save(str(workdir / "tokenizer.json"))
  c.save(config, str(workdir / "config.json"))
  return workdir, config, jax.device_get(states)


@pytest.fixture
def copy(finished, tmp_path):
  """Returns a copy of the run that a test may damage."""
  return shutil.copytree(finished[0], tmp_path / "copy")


def assert_is_step(found, finished, step):
  expected = paths.flatten(finished[2][step].params)
  found = paths.flatten(found)
  assert found.keys() == expected.keys()
  for name, w in expected.items():
    assert isinstance(found[name], np.ndarray)
    np.testing.assert_array_equal(found[name], w, err_msg=name)


def set_loss(workdir, step, text):
  path = workdir / "checkpoints" / str(step) / "metrics" / "metrics"
  path.write_text(text)


@pytest.mark.parametrize(
  ("losses", "step"),
  [
    ({5: '{"loss": 1.0}', 10: '{"loss": 2.0}'}, 5),
    ({5: '{"loss": 2.0}', 10: '{"loss": 1.0}'}, 10),
    ({5: '{"loss": Infinity}', 10: '{"loss": Infinity}'}, 10),
    ({5: "{", 10: '{"loss": NaN}'}, 10),
    ({5: '{"loss": 1.0}', 10: '{"loss": NaN}'}, 5),
    ({5: '{"loss": 1.0}', 10: '{"loss": 1.0}'}, 5),  # as a run tests
  ],
  ids=["first", "last", "none", "damaged", "nan", "equal"],
)
def test_the_best_checkpoint_is_read_else_the_newest(
  finished, copy, losses, step
):
  for at, text in losses.items():
    set_loss(copy, at, text)
  config, params, tokenizer = restore.load_run(str(copy))
  assert config == finished[1]
  assert tokenizer.vocab_size == 258
  assert_is_step(params, finished, step)


def test_the_best_is_what_checkpoints_say(finished):
  with Checkpoints(str(finished[0])) as checkpoints:
    assert checkpoints.best_step() == 5
  _, params, _ = restore.load_run(str(finished[0]))
  assert_is_step(params, finished, 5)


def test_nothing_is_changed(copy):
  before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
  restore.load_run(str(copy))
  assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_a_damaged_checkpoint_is_passed_over(finished, copy, caplog):
  set_loss(copy, 10, '{"loss": 1.0}')
  set_loss(copy, 5, '{"loss": 2.0}')
  for file in (copy / "checkpoints" / "10" / "default").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with caplog.at_level(logging.WARNING):
    _, params, _ = restore.load_run(str(copy))
  assert_is_step(params, finished, 5)
  assert "checkpoint 10 of" in caplog.text


def test_a_run_without_a_readable_checkpoint_is_one_line(copy):
  for step in ("5", "10"):
    shutil.rmtree(copy / "checkpoints" / step / "default")
  with pytest.raises(ConfigError, match="none of the checkpoints in .* can"):
    restore.load_run(str(copy))
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(ConfigError, match="has no checkpoint yet"):
    restore.load_run(str(copy))
  (copy / "config.json").unlink()
  with pytest.raises(ConfigError, match="is no run"):
    restore.load_run(str(copy))


def test_data_of_other_classes_or_text_are_refused(tmp_path):
  restore.save_data(("neg", "pos"), "a1", str(tmp_path))
  restore.require_data(str(tmp_path), ("neg", "pos"), "a1")
  with pytest.raises(ConfigError, match="data are pos, neg, and .* neg, pos;"):
    restore.require_data(str(tmp_path), ("pos", "neg"), "a1")
  with pytest.raises(ConfigError, match="the text is not that which the run"):
    restore.require_data(str(tmp_path), ("neg", "pos"), "a2")
  (tmp_path / restore.LABELS).write_text("{}")
  with pytest.raises(
    ConfigError, match="labels.json is damaged: it is no list"
  ):
    restore.load_labels(str(tmp_path))


def test_labels_come_back(tmp_path):
  assert restore.load_labels(str(tmp_path)) == ()
  labels = ("a\nb", "é", "")
  restore.save_data(labels, "a1", str(tmp_path))
  assert restore.load_labels(str(tmp_path)) == labels
  restore.save_data((), "a1", str(tmp_path))  # as of a run that never began
  assert not (tmp_path / restore.LABELS).exists()
  assert restore.load_labels(str(tmp_path)) == ()
