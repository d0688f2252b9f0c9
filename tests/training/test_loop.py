"""Whole runs: train, stop, kill, damage, resume."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from folding import cli, paths
from folding import config as config_lib
from folding.data import corpus
from folding.data.batches import make_data
from folding.data.tokenizers import Tokenizer
from folding.errors import ConfigError, TrainingError
from folding.model import Model
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.training import energy, evaluate, loop, run_dir
from folding.training.checkpoint import Checkpoints
from folding.typed import edited
from tests.training.conftest import (
  save_run,
  set_loss,
  tiny_config,
  warnings_of,
)

ROOT = pathlib.Path(__file__).parents[2]


def last_state(workdir):
  """Returns (step, state on the host) of the newest checkpoint."""
  this, checkpoints = loop.open_run(str(workdir))
  with checkpoints:
    step, state = checkpoints.restore_latest(this.like)
  return step, jax.device_get(state)


@pytest.fixture(scope="module")
def tiny_state(tiny_run):
  """Returns the state of the last checkpoint of `tiny_run`."""
  step, state = last_state(tiny_run[1])
  assert step == 10
  return state


def records(workdir):
  """Returns the records of a run without its speeds and times."""
  found = run_dir.read_metrics(str(workdir / "metrics.jsonl"))
  timed = ("tokens_per_second", "seconds")
  return [{k: v for k, v in r.items() if k not in timed} for r in found]


def unfinished(workdir, copy):
  """Returns a copy of a finished run that has not been tested yet."""
  shutil.copytree(workdir, copy)
  result = run_dir.read_result(str(copy))
  result |= {"finished": False, "test": None}
  run_dir.write_result(str(copy), result)
  return copy


def modified(workdir):
  """Returns {file: time of its last change}."""
  return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_run_lowers_the_loss_and_prunes_to_the_target(tiny_run, tiny_state):
  _, workdir, result = tiny_run
  assert result["is_at_target"]
  losses = [r["loss"] for r in records(workdir) if r["split"] == "train"]
  assert len(losses) == 10
  assert losses[-1] < losses[0] - 0.3
  pruned = {
    name: w
    for name, w in paths.flatten(tiny_state.params).items()
    if re.fullmatch(r"blocks.*(o|up|down)/kernel|embed/embedding", name)
  }
  assert len(pruned) == 4
  for name, w in pruned.items():
    assert np.count_nonzero(w == 0) == int(0.7 * w.size), name


def test_result_counts_stored_parameters(tiny_run, tiny_state):
  _, _, result = tiny_run
  leaves = paths.flatten(tiny_state.params)
  nonzero = sum(np.count_nonzero(w) for w in leaves.values())
  assert result["parameters"]["overall"]["stored"] == nonzero
  # D=16, H=4: two kernels [16, 4, 1] and a diagonal [16].
  assert result["parameters"]["qkv"] == {"dense": 3 * 256, "stored": 144}


@pytest.fixture(scope="module")
def missed_run(text_file, tmp_path_factory):
  """Returns (run directory, result, output) of a run that prunes too little.

  Its mask updates are before the checkpoint at step 5.
  """
  config = edited(
    tiny_config(text_file),
    {
      "fpp.embedding": 0.0,
      "fpp.begin": 0.3,
      "fpp.end": 0.4,
      "fpp.checks": 1,
      "fpp.score": "random",
      "fpp.tolerance": 0.0,
    },
  )
  workdir = tmp_path_factory.mktemp("runs") / "missed"
  with contextlib.redirect_stdout(io.StringIO()) as out:
    result = loop.run(config, str(workdir))
  return workdir, result, out.getvalue()


@pytest.mark.slow
def test_run_that_misses_its_target_says_so(missed_run):
  _, result, out = missed_run
  assert result["is_at_target"] is False
  assert "zero and not 69.92%: fpp.tolerance" in out


@pytest.mark.slow
def test_checkpoint_after_the_last_mask_update_may_be_the_best(missed_run):
  this, checkpoints = loop.open_run(str(missed_run[0]))
  assert this.mask_updates.stop == 5
  with checkpoints:
    assert checkpoints.loss(5) is not None


def test_energy_is_not_estimated_unless_asked_for(tiny_run):
  _, workdir, _ = tiny_run
  assert not (workdir / energy.FILE).exists()


def test_result_is_the_test_of_the_best_pruned_checkpoint(tiny_run):
  config, workdir, result = tiny_run
  assert result["test"]["checkpoint_step"] > 0.7 * config.train.steps
  metrics = loop.evaluate_run(str(workdir), "test")
  assert metrics.pop("split") == "test"
  assert metrics == result["test"]
  size = loop.open_run(str(workdir))[0].data.num_bytes["test"]
  bits = metrics["loss"] * metrics["num_tokens"] / np.log(2) / size
  assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


@pytest.fixture(scope="module")
def drawn(tiny_run):
  """Returns a model with the parameters that `tiny_run` drew, and its data."""
  config = config_lib.resolve(tiny_run[0])
  shape, data = shape_of(config), make_data(config)
  module = make_model(shape, data.tokenizer.vocab_size)
  tokens = np.zeros((1, config.data.length), np.int32)
  drawn = jax.jit(module.init)(jax.random.key(config.seed), tokens)
  params = {**drawn["params"]}
  # Checkpoints have more rows than tokens.
  rows = np.pad(params["embed"]["embedding"], [(0, 3), (0, 0)])
  params["embed"] = {"embedding": rows}
  return Model(shape, "lm", params, data.tokenizer), data


@pytest.mark.slow
def test_model_in_memory_trains_as_the_run_of_its_config(
  tiny_run, drawn, tmp_path
):
  config, workdir, result = tiny_run
  found = loop.train(*drawn, config, str(tmp_path / "run"))
  assert found["test"] == result["test"]
  start, *others = records(tmp_path / "run")
  assert (start["split"], start["step"]) == ("valid", 0)
  assert others == records(workdir)
  jax.tree.map(np.asarray, drawn[0].params)  # not donated
  # It goes on from its checkpoints.
  copy = unfinished(tmp_path / "run", tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "10")
  assert loop.resume_run(str(copy))["test"] == result["test"]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"task": "embed"}, "the task of the model"),
    ({"labels": ("a", "b")}, "the labels of the model"),
    ({"params": {"x": np.zeros(2)}}, "is None, not"),
  ],
)
def test_model_in_memory_that_does_not_fit_is_refused(
  tiny_run, drawn, tmp_path, fields, message
):
  model, data = drawn
  model = dataclasses.replace(model, **fields)
  with pytest.raises(ConfigError, match=message):
    loop.train(model, data, tiny_run[0], str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_that_fills_zeros_is_told(drawn, tiny_run, tmp_path, capsys):
  model, data = drawn
  empty = jax.tree.map(np.zeros_like, model.params["blocks_0"])
  params = {**model.params, "blocks_0": empty}
  model = dataclasses.replace(model, params=params)
  loop.train(model, data, tiny_run[0], str(tmp_path / "held"))
  assert "are zero" not in capsys.readouterr().out
  fills = dataclasses.replace(
    tiny_run[0], preset="none", fpp=config_lib.FPPConfig()
  )
  loop.train(model, data, fills, str(tmp_path / "filled"))
  assert "training without fpp fills" in capsys.readouterr().out


@pytest.mark.parametrize("difference", ["tokenizer", "layers"])
def test_teacher_in_memory_that_does_not_fit_is_refused(
  tiny_run, drawn, tmp_path, difference
):
  model, data = drawn
  config = edited(
    tiny_run[0], {"distill.hidden": 1.0, "distill.teacher": "in memory"}
  )
  if difference == "tokenizer":
    inner = tokenizers.Tokenizer.from_str(model.tokenizer.to_json())
    inner.normalizer = tokenizers.normalizers.Lowercase()
    teacher = dataclasses.replace(model, tokenizer=Tokenizer(inner))
  else:
    deeper = edited(tiny_run[0], {"model.num_layers": 7})
    teacher = dataclasses.replace(
      model, shape=shape_of(config_lib.resolve(deeper))
    )
  with pytest.raises(ConfigError, match=f"the {difference}|has 7 {difference}"):
    loop.train(model, data, config, str(tmp_path / "run"), teacher)


def test_evaluate_verb_prints_what_training_wrote(tiny_run, capsys):
  _, workdir, result = tiny_run
  assert cli.main(["evaluate", str(workdir), "--split=valid"]) == 0
  found = json.loads(capsys.readouterr().out)
  best = result["test"]["checkpoint_step"]
  assert (found["split"], found["checkpoint_step"]) == ("valid", best)
  (written,) = (
    r for r in records(workdir) if (r["split"], r["step"]) == ("valid", best)
  )
  for name in ("loss", "bits_per_byte", "num_tokens"):
    assert found[name] == written[name], name


def test_evaluate_with_limit_takes_its_share_of_bytes(tiny_run):
  _, workdir, _ = tiny_run
  this, checkpoints = loop.open_run(str(workdir))
  with checkpoints:
    _, state = checkpoints.restore_latest(this.like)
  part = this.evaluate(state.params, "valid", limit=1)
  assert part["num_tokens"] == 8 * 16  # one batch
  batch = next(this.data.eval_batches("valid"))
  eval_step = evaluate.make_eval_step(this.model, this.task)
  nats = float(eval_step(state.params, batch)["loss"])
  assert part["loss"] == pytest.approx(nats / 128, rel=1e-6)
  size = this.data.num_bytes["valid"] * 8 / this.data.num_examples["valid"]
  bits = nats / np.log(2) / size
  assert part["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_finished_run_is_not_trained_again(tiny_run, tmp_path):
  config, workdir, result = tiny_run
  copy = shutil.copytree(workdir, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints")
  before = modified(copy)
  # Mesh and micro-batches may differ.
  other = config_lib.from_dict(config_lib.to_dict(config))
  other = dataclasses.replace(
    other, mesh=config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  )
  other = edited(other, {"train.accumulate": 2})
  assert loop.run(other, str(copy)) == result
  assert modified(copy) == before


def test_run_resumes_bit_for_bit_after_a_damaged_checkpoint_and_a_stop(
  tiny_run, tiny_state, tmp_path, caplog, capfd, monkeypatch
):
  config, workdir, result = tiny_run
  copy = unfinished(workdir, tmp_path / "copy")
  for file in (copy / "checkpoints" / "10").rglob("*"):
    if file.parent.name == "d":  # the arrays
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  take = loop.StepLog.step

  def stop_at_8(self, step, metrics, batch):
    take(self, step, metrics, batch)
    if step == 8:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop.StepLog, "step", stop_at_8)
    stopped = loop.run(config, str(copy))
  assert (stopped["finished"], stopped["test"]) == (False, None)
  assert stopped["steps"] == 8
  (line,) = warnings_of(caplog)
  assert "damaged checkpoint 10" in line
  out, err = capfd.readouterr()
  assert "resumed at step 5 of 10" in out
  assert f"folding resume {copy}" in out
  assert "Traceback" not in err
  found = loop.resume_run(str(copy))
  assert found["finished"]
  assert found["test"] == result["test"]
  chex.assert_trees_all_equal(last_state(copy), (10, tiny_state))
  assert records(copy) == records(workdir)  # also the counts of the stop


@pytest.mark.slow
def test_run_by_muon_on_a_mesh_prunes_and_resumes_bit_for_bit(
  text_file, tmp_path
):
  config = edited(tiny_config(text_file), {"train.optimizer": "muon"})
  mesh = config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  config = dataclasses.replace(config, mesh=mesh)
  whole = tmp_path / "whole"
  result = loop.run(config, str(whole))
  assert result["is_at_target"]
  copy = unfinished(whole, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "10")
  assert loop.resume_run(str(copy))["test"] == result["test"]
  chex.assert_trees_all_equal(last_state(copy), last_state(whole))


def test_run_tests_the_best_checkpoint_not_the_last(tiny_run, tmp_path):
  config, workdir, _ = tiny_run
  copy = unfinished(workdir, tmp_path / "copy")
  set_loss(copy, 5, '{"loss": 0.0}')
  test = loop.run(config, str(copy))["test"]
  assert test["checkpoint_step"] == 5
  this, checkpoints = loop.open_run(str(copy))
  with checkpoints:
    state = checkpoints.restore(5, this.like)
  assert test["loss"] == this.evaluate(state.params, "test")["loss"]


def test_compacted_keeps_the_arrays_of_single_weights(tiny_run):
  _, workdir, _ = tiny_run
  this, checkpoints = loop.open_run(str(workdir))
  this.order = edited(this.order, {"train.compact": 0.35})
  with checkpoints:
    step, state = checkpoints.restore_latest(this.like)
  assert this.compacted(state, step) is None


@pytest.fixture(scope="module")
def dense(tiny_run):
  """Returns the config of a run without mask updates."""
  return dataclasses.replace(tiny_run[0], dense=True)


def test_ctrl_c_while_the_log_opens_stops_at_the_first_step(
  dense, tmp_path, monkeypatch
):
  class Interrupted(loop.MetricsWriter):
    def __init__(self, *args):
      os.kill(os.getpid(), signal.SIGINT)
      super().__init__(*args)

  monkeypatch.setattr(loop, "MetricsWriter", Interrupted)
  stopped = loop.run(dense, str(tmp_path / "run"))
  assert (stopped["finished"], stopped["steps"]) == (False, 0)


def test_error_without_a_message_is_named(dense, tmp_path, monkeypatch):
  class Late(loop.MetricsWriter):
    def write(self, record):
      raise TimeoutError

  monkeypatch.setattr(loop, "MetricsWriter", Late)
  with pytest.raises(TrainingError, match="TimeoutError; intact"):
    loop.run(dense, str(tmp_path / "run"))


def test_non_finite_loss_stops_with_its_step(dense, tmp_path, monkeypatch):
  init = loop.Run.init

  def nan_init(self, params=None):
    state = init(self, params)
    params = jax.tree.map(
      lambda w: jax.device_put(np.full_like(w, np.nan), w.sharding),
      state.params,
    )
    return state._replace(params=params)

  monkeypatch.setattr(loop.Run, "init", nan_init)
  with pytest.raises(
    TrainingError, match=r"loss is \w+ at step \d+; intact checkpoints: none"
  ):
    loop.run(dense, str(tmp_path / "run"))
  assert not (tmp_path / "run" / "result.json").exists()


def test_failed_save_stops_with_its_cause(dense, tmp_path, monkeypatch):
  path = "/quota/" + "long/" * 60

  def save(*args):
    raise OSError(
      f'Error writing "{path}": "{path}": Disk quota exceeded [122]'
    )

  monkeypatch.setattr(Checkpoints, "save", save)
  with pytest.raises(
    TrainingError, match=r"cannot write to \S+: Disk quota exceeded \[122\]; "
  ):
    loop.run(dense, str(tmp_path / "run"))


def test_other_config_is_refused_with_its_field(tiny_run):
  config, workdir, _ = tiny_run
  other = config_lib.from_dict(config_lib.to_dict(config))
  other = edited(other, {"train.learning_rate": 0.5})
  with pytest.raises(
    ConfigError, match=r"train.learning_rate: 0.01.*folding resume"
  ):
    loop.run(other, str(workdir))


def test_checkpoints_without_a_config_are_refused(tiny_run, tmp_path):
  config, workdir, _ = tiny_run
  copy = shutil.copytree(workdir, tmp_path / "copy")
  (copy / "config.json").unlink()
  before = modified(copy)
  with pytest.raises(ConfigError, match="checkpoints of another config"):
    loop.run(config, str(copy))
  assert modified(copy) == before


def test_changed_text_is_refused(text_file, tiny_run, tmp_path):
  _, workdir, _ = tiny_run
  config = tiny_config(tmp_path / "text.txt")
  shutil.copy(text_file, tmp_path / "text.txt")
  copy = unfinished(workdir, tmp_path / "copy")
  digest = (copy / "text.sha256").read_text()
  tokenizer = run_dir.load_tokenizer(str(copy))
  config = config_lib.resolve(config)
  save_run(copy, config, tokenizer, digest=digest)
  loop.evaluate_run(str(copy))
  with open(tmp_path / "text.txt", "a", encoding="utf-8") as file:
    file.write("one line more\n")
  before = modified(copy)
  for call in (loop.evaluate_run, loop.resume_run):
    with pytest.raises(ConfigError, match="text or the labels changed"):
      call(str(copy))
  assert modified(copy) == before


def test_evaluate_writes_no_tokens_of_large_text(
  tiny_run, text_file, monkeypatch
):
  _, workdir, result = tiny_run
  monkeypatch.setattr(corpus, "LARGE", 0)
  found = loop.evaluate_run(str(workdir))
  assert found["loss"] == result["test"]["loss"]
  assert not (text_file.parent / corpus.FOLDER).exists()


def test_evaluate_of_a_run_without_a_digest_says_so(tiny_run, tmp_path, caplog):
  copy = shutil.copytree(tiny_run[1], tmp_path / "copy")
  (copy / "text.sha256").unlink()
  with pytest.raises(ConfigError, match=r"text\.sha256"):
    loop.evaluate_run(str(copy))
  (copy / "checksums.json").unlink()  # a run of an earlier version
  loop.evaluate_run(str(copy))
  *_, line = warnings_of(caplog)
  assert "the text cannot be verified" in line


def test_evaluate_verb_refuses_parameters_that_are_nan(
  tiny_run, tmp_path, capsys
):
  copy = shutil.copytree(tiny_run[1], tmp_path / "copy")
  this, checkpoints = loop.open_run(str(copy))
  with checkpoints:
    _, state = checkpoints.restore_latest(this.like)
    nan = jax.tree.map(
      lambda x: jax.device_put(np.full_like(x, np.nan), x.sharding),
      state.params,
    )
    checkpoints.save(11, state._replace(params=nan), -1.0)
  assert cli.main(["evaluate", str(copy)]) == 1
  out, err = capsys.readouterr()
  assert out == ""
  assert "nan" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["glue", "a:b"])
def test_run_that_is_read_back_prepares_no_data(
  tiny_run, tmp_path, name, capsys, monkeypatch
):
  copy = unfinished(tiny_run[1], tmp_path / "copy")
  config = run_dir.load_order(str(copy))
  config = edited(
    config,
    {
      "data.path": None,
      "data.name": name,
      "data.dir": str(tmp_path / "elsewhere"),
    },
  )
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", config.data.dir)
  tokenizer = run_dir.load_tokenizer(str(copy))
  save_run(copy, config, tokenizer)
  for verb in (["evaluate"], ["resume"], ["shrink", f"--output={tmp_path}/x"]):
    assert cli.main([verb[0], str(copy), *verb[1:]]) == 2
    assert "is not prepared" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_resume_refuses_metrics_without_a_speed(tiny_run, tmp_path, capsys):
  copy = unfinished(tiny_run[1], tmp_path / "copy")
  with open(copy / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"split": "train", "step": 1, "loss": 2.5}\n')
  assert cli.main(["resume", str(copy)]) == 2
  assert "metrics.jsonl is damaged" in capsys.readouterr().err


_SAVING = {"saving": 0.99, "linear": None, "embedding": None}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"data": {"path": "nowhere.txt"}}, "nowhere.txt"),
    ({"data": {"batch_size": 100_000}}, "fewer than one batch"),
    ({"data": {"valid_fraction": 1e-9}}, "valid split; raise .* text$"),
    ({"mesh": {"data": 3}}, "does not multiply"),
    ({"fpp": _SAVING}, "cannot be reached"),
    ({"pretrained": "nowhere/to/be/found"}, "nowhere/to/be/found"),
  ],
  ids=["path", "batch", "valid", "mesh", "saving", "pretrained"],
)
def test_mistakes_leave_nothing_behind(text_file, tmp_path, change, message):
  values = config_lib.to_dict(tiny_config(text_file))
  for name, value in change.items():
    values[name] = values[name] | value if isinstance(value, dict) else value
  workdir = tmp_path / "run"
  with pytest.raises(ConfigError, match=message):
    loop.run(config_lib.from_dict(values), str(workdir))
  assert not workdir.exists()


def test_labels_that_are_ids_are_refused(text_file, tmp_path):
  file = tmp_path / "reviews.tsv"
  file.write_text("".join(f"{i}\ta good film\n" for i in range(40)))
  config = tiny_config(text_file)
  config = edited(config, {"task": "classify", "data.path": str(file)})
  with pytest.raises(ConfigError, match="perhaps data.label_field is not"):
    loop.run(config, str(tmp_path / "run"))


def test_classifier_learns_and_reports_accuracy(text_file, tmp_path, capsys):
  rows = [
    f"{i % 2}\t{'good fine nice' if i % 2 else 'bad poor sad'} film {i}"
    for i in range(400)
  ]
  file = tmp_path / "reviews.tsv"
  file.write_text("\n".join(rows) + "\n", encoding="utf-8")
  config = tiny_config(text_file, steps=20)
  config = edited(
    config,
    {
      "task": "classify",
      "data.path": str(file),
      "dense": True,
      "model.causal": False,
    },
  )
  result = loop.run(config, str(tmp_path / "run"))
  assert "100% of the training texts fill data" in capsys.readouterr().out
  assert result["test"]["num_examples"] == 40
  assert result["test"]["accuracy"] > 0.9
  # Checkpoints are ranked by their errors; the loss breaks ties.
  (valid,) = (
    r
    for r in records(tmp_path / "run")
    if (r["split"], r["step"]) == ("valid", 20)
  )
  errors = 1 - valid["accuracy"]
  _, checkpoints = loop.open_run(str(tmp_path / "run"))
  with checkpoints:
    rank = checkpoints.loss(20)
  tie_break = 1e-6 * valid["loss"] / (1 + valid["loss"])
  assert rank == pytest.approx(errors + tie_break, rel=1e-9)
  assert run_dir.load_labels(str(tmp_path / "run")) == ("0", "1")


_CONFIG_FILE = """
from tests.training.conftest import tiny_config

def get_config(path):
  return tiny_config(path)
"""


def start(workdir, text_file, *flags):
  """Starts train.py in another process, with the devices of this test."""
  config_file = workdir.parent / "tiny.py"
  config_file.write_text(_CONFIG_FILE, encoding="utf-8")
  return subprocess.Popen(
    [
      sys.executable,
      str(ROOT / "train.py"),
      f"--config={config_file}:{text_file}",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(is_there, process):
  """Waits for a condition while another process runs."""
  deadline = time.monotonic() + 240
  while not is_there() and time.monotonic() < deadline:
    time.sleep(0.01)  # no event reports a file of another process
    assert process.poll() is None, process.stderr.read()


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(tiny_run, text_file, tmp_path):
  config, whole, _ = tiny_run
  workdir = tmp_path / "killed"
  process = start(workdir, text_file)
  checkpoint = workdir / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
  wait_for(checkpoint.exists, process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  loop.run(config, str(workdir))
  chex.assert_trees_all_equal(last_state(workdir), last_state(whole))
  assert records(workdir) == records(whole)


@pytest.mark.slow
def test_sigterm_saves_reports_and_exits_0(text_file, tmp_path):
  workdir = tmp_path / "stopped"
  process = start(workdir, text_file, "--config.train.steps=1000000")
  metrics = workdir / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and metrics.stat().st_size, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=240)
  assert process.returncode == 0, err
  step = int(re.search(r"saved at step (\d+) of 1000000", out)[1])
  with Checkpoints(str(workdir)) as checkpoints:
    assert checkpoints.steps()[-1] == step
  assert (workdir / "report.md").exists()


@pytest.mark.slow
def test_full_disk_stops_and_keeps_checkpoints(text_file, tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=3200k", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("needs the right to mount a small file system")
  try:
    workdir = disk / "run"
    process = start(
      workdir, text_file, "--config.train.steps=200", "--config.model.width=64"
    )
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1, err
    found = re.search(r"cannot write to .*; intact checkpoints: ([\d, ]+)", err)
    assert found, err
    step, _ = last_state(workdir)
    assert str(step) == found[1].split(", ")[-1]
  finally:
    subprocess.run(["umount", str(disk)], check=True)
