"""Runs whose arrays shrink while training, against runs whose arrays do not."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from folding import config as c
from folding.models.transformer import make_model, param_shapes
from folding.training import loop, run_dir, shrink_run
from folding.training.checkpoint import load_run
from folding.typed import edited
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.slow  # test_shrink_run.py has a short run

# Mask updates at 0, 3, 6, 9 and 12, so that the last arrays leave at step 13.
STEPS, EVERY = 16, 4


def _config(path, **train):
  """Returns a classifier that loses 70% of its neurons and heads."""
  config = tiny_config(path, steps=STEPS, eval_every=EVERY, **train)
  config = edited(config, {"task": "classify"})
  # A bias of keys adds the same to all logits, so what moves it is rounding.
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, num_layers=1, causal=False, mlp_width=64, qkv_bias=False
    ),
    fold=c.FoldConfig(groups=1, values="dense"),
    fpp=c.FPPConfig(
      linear=0.7,
      begin=0.0,
      end=0.8,
      checks=4,
      granularity="neuron",
      attention="heads",
    ),
  )
  return config


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory):
  """Returns the directory of a run whose arrays stay."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  loop.run(_config(labelled), str(workdir))
  return workdir


@pytest.fixture(scope="module")
def compact(labelled, tmp_path_factory):
  """Returns the directory of the same run with `train.compact`."""
  workdir = tmp_path_factory.mktemp("runs") / "compact"
  loop.run(_config(labelled, compact=0.35), str(workdir))
  return workdir


def _records(workdir):
  return run_dir.read_metrics(str(workdir / "metrics.jsonl"))


def _sizes(workdir):
  """Returns {step: (neurons, heads) of a checkpoint}."""
  sizes = {}
  for path in (workdir / "checkpoints").glob("[0-9]*/model.json"):
    model = json.loads(path.read_text())
    heads = len(model["heads"][0]) if model["heads"] else 4
    sizes[int(path.parent.name)] = model["mlp_width"], heads
  return sizes


def _assert_same_training(workdir, other):
  assert len(_records(workdir)) == len(_records(other))
  for ours, theirs in zip(_records(workdir), _records(other), strict=True):
    for name in ("split", "step", "sparsity", "frozen", "trainable"):
      assert ours.get(name) == theirs.get(name), (name, ours)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_compact_run_trains_as_one_whose_arrays_stay(whole, compact):
  _assert_same_training(compact, whole)
  before, after = (run_dir.read_result(str(w)) for w in (whole, compact))
  assert after["test"] == pytest.approx(before["test"], rel=1e-4)
  assert after["parameters"]["linear"] == before["parameters"]["linear"]
  # Of 64 neurons 44 are zero, rounded up to a multiple of 8; of 4 heads 2.
  sizes = _sizes(compact)
  assert sizes[STEPS] == (24, 2)
  assert sizes[12] > sizes[STEPS]


def test_older_checkpoint_of_larger_arrays_resumes_bit_for_bit(
  compact, tmp_path
):
  copy = tmp_path / "copy"
  shutil.copytree(compact, copy)
  result = run_dir.read_result(str(copy)) | {"finished": False, "test": None}
  run_dir.write_result(str(copy), result)
  newest = copy / "checkpoints" / str(STEPS)
  (newest / "model.json").write_text("{}")  # damaged, so it is skipped
  loop.resume_run(str(copy))
  assert (copy / "checkpoints" / f"damaged-{STEPS}").is_dir()
  assert _sizes(copy)[STEPS] == _sizes(compact)[STEPS]
  jax.tree.map(
    np.testing.assert_array_equal,
    *(load_run(str(w)).params for w in (copy, compact)),
  )


def test_resume_without_the_option_keeps_the_arrays(
  labelled, compact, tmp_path
):
  copy = tmp_path / "copy"
  shutil.copytree(compact, copy)
  result = run_dir.read_result(str(copy)) | {"finished": False, "test": None}
  run_dir.write_result(str(copy), result)
  shutil.rmtree(copy / "checkpoints" / str(STEPS))
  loop.run(_config(labelled), str(copy))
  _assert_same_training(copy, compact)
  assert _sizes(copy)[STEPS] == _sizes(compact)[12]


def test_readers_take_the_shapes_of_the_checkpoint(compact, tmp_path):
  result = run_dir.read_result(str(compact))
  metrics = loop.evaluate_run(str(compact))
  assert metrics["loss"] == result["test"]["loss"]
  found = load_run(str(compact))
  [layer] = found.shape.layers
  assert (layer.mlp_width, layer.whole_mlp_width) == (24, 64)
  model = make_model(found.shape, found.tokenizer.vocab_size, 2)
  chex.assert_trees_all_equal_shapes(found.params, param_shapes(model))
  output = tmp_path / "small"
  shrink_run.shrink_run(str(compact), str(output))
  assert load_run(str(output)).shape.layers[0].mlp_width == 20
  small = run_dir.read_result(str(output))
  assert small["test"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_compact_run_on_a_mesh_trains_as_on_one_device(
  labelled, compact, tmp_path
):
  config = _config(labelled, compact=0.35)
  config = dataclasses.replace(
    config,
    mesh=c.MeshConfig(
      data=2,
      fsdp=2,
      tensor=2,
      rules=(
        ("blocks_.*/mlp/up/kernel", ("fsdp", "tensor")),
        ("blocks_.*/mlp/down/kernel", ("tensor", "fsdp")),
        ("blocks_.*/attn/[qk]/kernel", ("fsdp", "tensor")),
      ),
    ),
  )
  workdir = tmp_path / "mesh"
  loop.run(config, str(workdir))
  _assert_same_training(workdir, compact)
  # Heads of an even count on two devices, so the sizes before may differ.
  assert _sizes(workdir)[STEPS] == _sizes(compact)[STEPS]
