"""Runs from the outside: train, stop, kill, damage, resume."""

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

from folding import config as config_lib
from folding import paths, schema
from folding.training import evaluate, loop
from folding.training.checkpoint import Checkpoints
from tests.training.conftest import tiny_config, write_text

ROOT = pathlib.Path(__file__).parents[2]

_CONFIG_FILE = """
from tests.training.conftest import tiny_config

def get_config(path):
  return tiny_config(path)
"""


def last_state(config, workdir):
  """Returns the newest checkpoint's state, on the host."""
  this, checkpoints = loop.open_run(str(workdir))
  with checkpoints:
    step, state = checkpoints.restore_latest(this.like)
  return step, jax.device_get(state)


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
  """Returns (config, run directory, result) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  config = tiny_config(text_file)
  return config, workdir, loop.run(config, str(workdir))


def command(workdir, text_file, *flags):
  """Returns the command line that trains the tiny config."""
  config_file = workdir.parent / "tiny.py"
  config_file.write_text(_CONFIG_FILE, encoding="utf-8")
  return [
    sys.executable,
    str(ROOT / "train.py"),
    f"--config={config_file}:{text_file}",
    f"--workdir={workdir}",
    *flags,
  ]


def start(workdir, text_file, *flags, **popen):
  """Starts train.py in a process of its own, with this test's devices."""
  return subprocess.Popen(
    command(workdir, text_file, *flags),
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **popen,
  )


def test_loss_falls_and_zeros_are_exact(finished):
  config, workdir, result = finished
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  losses = [r["loss"] for r in map(json.loads, lines) if r["split"] == "train"]
  assert len(losses) == 10
  assert losses[-1] < losses[0] - 0.3
  _, state = last_state(config, workdir)
  pruned = {
    name: w
    for name, w in paths.flatten(state.params).items()
    if re.fullmatch(r"blocks.*(o|up|down)/kernel|embed/embedding", name)
  }
  assert len(pruned) == 7
  for name, w in pruned.items():
    assert np.count_nonzero(w == 0) == int(0.7 * w.size), name


def test_result_counts_what_is_stored(finished):
  config, workdir, result = finished
  _, state = last_state(config, workdir)
  leaves = paths.flatten(state.params)
  nonzero = sum(np.count_nonzero(w) for w in leaves.values())
  assert result["parameters"]["overall"]["stored"] == nonzero
  qkv = [w for name, w in leaves.items() if re.search("/[qkv]/[kd]", name)]
  # D=16, H=4: two kernels [16, 4, 1] and a diagonal [16] for each of 2 layers.
  assert sum(w.size for w in qkv) == 2 * (64 + 64 + 16)
  assert result["parameters"]["qkv"] == {"dense": 2 * 3 * 256, "stored": 288}


def test_test_figure_is_that_of_evaluate(finished):
  _, workdir, result = finished
  figures = loop.evaluate_run(str(workdir), "test")
  for name in ("loss", "bits_per_byte", "num_tokens", "checkpoint_step"):
    assert figures[name] == result["test"][name], name
  bits = figures["loss"] * figures["num_tokens"] / np.log(2)
  size = loop.open_run(str(workdir))[0].data.num_bytes["test"]
  assert figures["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)


def test_a_limit_evaluates_the_start_and_its_share_of_bytes(finished):
  config, workdir, _ = finished
  this, checkpoints = loop.open_run(str(workdir))
  with checkpoints:
    _, state = checkpoints.restore_latest(this.like)
  eval_step = evaluate.make_eval_step(this.model)
  part = this.evaluate(state.params, "valid", 1)
  assert part["num_tokens"] == 8 * 16  # of one batch
  batch = next(this.data.eval_batches("valid"))
  nats = float(eval_step(state.params, batch)["nats"])
  assert part["loss"] == pytest.approx(nats / 128, rel=1e-6)
  size = this.data.num_bytes["valid"] * 8 / this.data.num_examples["valid"]
  bits = nats / np.log(2) / size
  assert part["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_tests_a_checkpoint_after_pruning(finished):
  config, _, result = finished
  assert result["test"]["checkpoint_step"] > 0.7 * config.train.steps


def test_dense_twin_has_no_zeros_and_counts_as_dense(text_file, tmp_path):
  config = tiny_config(text_file, steps=2)
  config.dense = True
  result = loop.run(config, str(tmp_path))
  matrices = [x for x in result["layers"] if x["group"] != "other"]
  assert all(x["zeros"] == 0 for x in matrices)
  assert all(x["stored"] == x["dense"] for x in matrices)


def test_finished_run_trains_no_further(finished, tmp_path):
  config, workdir, result = finished
  copy = shutil.copytree(workdir, tmp_path / "copy")
  before = last_state(config, copy)
  again = loop.run(config, str(copy))
  assert again == result  # its seconds and tokens per second too
  chex.assert_trees_all_equal(last_state(config, copy), before)


def test_killed_run_resumes_bit_for_bit(finished, text_file, tmp_path):
  config, whole, _ = finished
  workdir = tmp_path / "killed"
  process = start(workdir, text_file)
  checkpoint = workdir / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
  deadline = time.monotonic() + 240
  while not checkpoint.exists() and time.monotonic() < deadline:
    time.sleep(0.01)  # no event tells of another process's file
    assert process.poll() is None, process.stderr.read()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  loop.run(config, str(workdir))
  chex.assert_trees_all_equal(
    last_state(config, workdir), last_state(config, whole)
  )
  assert _steps(workdir) == _steps(whole)


def _steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [(r["split"], r["step"], r["loss"]) for r in map(json.loads, lines)]


def test_sigterm_saves_and_exits_0(text_file, tmp_path):
  workdir = tmp_path / "stopped"
  process = start(workdir, text_file, "--config.train.steps=1000000")
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (
    metrics.exists() and metrics.stat().st_size > 0
  ):
    time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=240)
  assert process.returncode == 0, err
  step = int(re.search(r"saved at step (\d+) of 1000000", out)[1])
  with Checkpoints(str(workdir)) as checkpoints:
    assert checkpoints.steps()[-1] == step
  assert "Unfinished" in (workdir / "report.md").read_text()


def test_damaged_checkpoint_falls_back(finished, tmp_path, caplog):
  config, workdir, _ = finished
  copy = shutil.copytree(workdir, tmp_path / "copy")
  whole = last_state(config, workdir)
  for file in (copy / "checkpoints" / "10").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  loop.run(config, str(copy))
  assert "checkpoint 10 is damaged" in caplog.text
  assert "going back to 5" in caplog.text
  chex.assert_trees_all_equal(last_state(config, copy), whole)


def test_no_readable_checkpoint_is_an_error(finished, tmp_path):
  config, workdir, _ = finished
  copy = shutil.copytree(workdir, tmp_path / "copy")
  for file in (copy / "checkpoints").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(schema.TrainingError, match="can be read"):
    loop.run(config, str(copy))


def test_non_finite_loss_stops_with_the_step(text_file, tmp_path):
  config = tiny_config(text_file, learning_rate=1e38, clip_norm=1e38)
  with pytest.raises(
    schema.TrainingError,
    match=r"loss is \w+ at step \d+; intact checkpoints: none",
  ):
    loop.run(config, str(tmp_path / "run"))


def test_what_cannot_be_reported_is_no_result(text_file, tmp_path):
  options = {"learning_rate": 1e38, "clip_norm": 1e38, "warmup": 0.0}
  config = tiny_config(text_file, steps=1, **options)
  message = "the loss of validation at step 1 is not finite: nan"
  with pytest.raises(schema.TrainingError, match=message):
    loop.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run" / "result.json").exists()


def test_other_config_is_refused_by_field(finished):
  config, workdir, _ = finished
  other = config_lib.from_dict(config_lib.to_dict(config))
  other.train.learning_rate = 0.5
  with pytest.raises(schema.ConfigError, match=r"train.learning_rate: 0.01"):
    loop.run(other, str(workdir))


def test_other_devices_are_no_other_config(finished):
  config, workdir, result = finished
  other = config_lib.from_dict(config_lib.to_dict(config))
  other.mesh = config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  other.train.accumulate = 2
  assert loop.run(other, str(workdir)) == result


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"fpp": {"exclude": "nope"}}, "matches no parameter"),
    ({"data": {"path": "nowhere.txt"}}, "nowhere.txt"),
    ({"data": {"batch_size": 100_000}}, "fewer than one batch"),
    ({"mesh": {"data": 3}}, "does not multiply"),
    ({"mesh": {"rules": "nope=fsdp"}}, "'nope' matches no parameter"),
    ({"fpp": {"overall": 0.99}}, "cannot be reached"),
    ({"fpp": {"overall": 0.3, "linear": 0.9}}, "or fpp.linear, not both"),
    ({"fpp": {"overall": 0.3, "embedding": 0.9}}, "or fpp.embedding, not"),
    (  # a number of the preset's own
      {"fpp": {"overall": 0.3, "linear": 0.7, "embedding": None}},
      "or fpp.linear, not both",
    ),
    ({"compress": {"qkv": 0.9}}, "compress.qkv is for compress.plan='auto'"),
    ({"distill": {"noise": 0.3}}, "do nothing where distill.logits and"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_leave_nothing_behind(text_file, tmp_path, change, message):
  values = config_lib.to_dict(tiny_config(text_file))
  for section, fields in change.items():
    values[section] |= fields
  workdir = tmp_path / "run"
  with pytest.raises(schema.ConfigError, match=message):
    loop.run(config_lib.from_dict(values), str(workdir))
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.model.widht=3"], "'model.widht'; did you mean model.width"),
    (["--config.model.norm=batch"], "layernorm|rmsnorm"),
    (["--config.model.width=18"], "18 is not divisible by model.num_heads 4"),
    (["--config.fpp.linear=1.2"], "fpp.linear is a fraction to remove"),
    (["stray"], "'stray' is neither"),
  ],
  ids=["field", "choice", "divisor", "range", "argument"],
)
def test_command_line_mistakes_are_one_line(
  text_file, tmp_path, flags, message
):
  workdir = tmp_path / "run"
  process = start(workdir, text_file, *flags)
  out, err = process.communicate(timeout=240)
  assert process.returncode == 2
  assert out == ""
  assert err.startswith("folding: error: ")
  assert err.count("\n") == 1
  assert message in err
  assert not workdir.exists()


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
    this, checkpoints = loop.open_run(str(workdir))
    with checkpoints:
      step, _ = checkpoints.restore_latest(this.like)
    assert str(step) == found[1].split(", ")[-1]
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def test_classification_learns_and_reports_accuracy(tmp_path, capsys):
  rows = [
    f"{i % 2}\t{'good fine nice' if i % 2 else 'bad poor sad'} film {i}"
    for i in range(400)
  ]
  file = tmp_path / "reviews.tsv"
  file.write_text("\n".join(rows) + "\n", encoding="utf-8")
  config = tiny_config(write_text(tmp_path / "unused.txt"), steps=40)
  config.task = "classify"
  config.data.path = str(file)
  config.model.causal = False
  result = loop.run(config, str(tmp_path / "run"))
  assert "100% of the training texts fill data" in capsys.readouterr().out
  assert result["test"]["num_examples"] == 40
  assert result["test"]["accuracy"] > 0.9
  config.data.length, config.train.steps = 64, 1  # which is more than any has
  loop.run(config, str(tmp_path / "long"))
  assert "training texts" not in capsys.readouterr().out
