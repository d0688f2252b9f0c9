import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import cli
from folding import config as c
from folding.config import MeshConfig
from folding.training import loop, sharding
from folding.training.evaluate import evaluate, make_eval_step
from folding.training.metrics import read_metrics
from tests.training import tiny
from tests.training.conftest import tiny_config


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def classifier():
  """Returns (model, params) of a classifier with dropout."""
  model = c.ModelConfig(
    num_layers=1, width=32, num_heads=4, causal=False, dropout=0.5
  )
  run = tiny.make(tiny.config(task="classify", model=model))
  return run.model, run.init().params


def rows(num, length, pad_id=0):
  """Returns a batch of texts of 1 to 5 tokens in rows of `length`."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, tiny.VOCAB, (num, 5)).astype(np.int32)
  tokens = np.pad(tokens, ((0, 0), (0, length - 5)))
  mask = np.arange(length) < rng.integers(1, 6, num)[:, None]
  return {
    "tokens": np.where(mask, tokens, np.int32(pad_id)),
    "mask": mask,
    "labels": rng.integers(0, 3, num).astype(np.int32),
    "weights": np.ones(num, np.float32),
  }


def test_classification_is_that_of_one_batch_in_float64(mesh, classifier):
  model, params = classifier
  whole = jax.tree.map(jnp.asarray, rows(10, 5))
  logits = model.apply({"params": params}, whole["tokens"], whole["mask"])
  z = np.asarray(logits, np.float64)
  nats = np.log(np.exp(z).sum(-1)) - z[np.arange(10), whole["labels"]]
  accuracy = float((z.argmax(-1) == whole["labels"]).mean())

  # The same ten in batches of four, wider, with other padding, and rows that
  # do not count.
  wide = rows(10, 8, pad_id=7)
  parts = []
  for start in (0, 4, 8):
    part = {name: x[start : start + 4] for name, x in wide.items()}
    missing = 4 - len(part["labels"])
    for name, x in part.items():
      fill = np.zeros if name == "weights" else np.ones
      extra = fill((missing, *x.shape[1:]), x.dtype)
      part[name] = np.concatenate([x, extra])
    parts.append(part)
  figures = evaluate(make_eval_step(model), params, parts, mesh)
  assert figures.keys() == {"loss", "accuracy", "num_examples"}
  assert figures["loss"] == pytest.approx(nats.mean(), rel=1e-5)
  assert figures["accuracy"] == pytest.approx(accuracy, rel=1e-6)
  assert 0 < accuracy < 1
  assert figures["num_examples"] == 10


def test_what_does_not_count_has_no_influence(mesh):
  run = tiny.make(tiny.config())
  params = tiny.noise(tiny.shapes(run.config))
  batch = tiny.batch(0)
  other = dict(batch)
  other["targets"] = np.where(batch["weights"] == 1, batch["targets"], 5)
  assert (other["targets"] != batch["targets"]).any()
  step = make_eval_step(run.model)
  figures = [
    evaluate(step, params, [b], mesh, num_bytes=9.0) for b in (batch, other)
  ]
  assert figures[0] == figures[1]


def test_uniform_guess_in_closed_form(mesh):
  run = tiny.make(tiny.config())
  params = jax.tree.map(jnp.zeros_like, tiny.noise(tiny.shapes(run.config)))
  batches = [tiny.batch(seed) for seed in range(2)]
  count = sum(b["weights"].sum() for b in batches)
  figures = evaluate(
    make_eval_step(run.model), params, batches, mesh, num_bytes=300.0
  )
  assert figures == {
    "loss": pytest.approx(math.log(tiny.VOCAB), rel=1e-6),
    "perplexity": pytest.approx(tiny.VOCAB, rel=1e-5),
    # 128 = 2^7: seven bits a token.
    "bits_per_byte": pytest.approx(7 * count / 300, rel=1e-6),
    "num_tokens": count,
  }


def test_the_same_on_eight_devices(mesh, classifier):
  model, params = classifier
  step, batch = make_eval_step(model), rows(16, 5)
  eight = sharding.make_mesh(MeshConfig(2, 4))
  placed = jax.device_put(params, sharding.tree_shardings(eight, params))
  one = evaluate(step, params, [batch], mesh)
  assert evaluate(step, placed, [batch], eight) == {
    **one,
    "loss": pytest.approx(one["loss"], rel=1e-6),
  }


def test_a_hopeless_loss_has_a_finite_perplexity(mesh):
  def eval_step(params, batch):
    return {"nats": params, "weight": 1.0, "correct": 0.0}

  figures = evaluate(eval_step, 1e4, [tiny.batch(0)], mesh, num_bytes=1.0)
  assert figures["loss"] == 1e4
  assert math.isfinite(figures["perplexity"])


def test_evaluate_prints_what_training_wrote_of_a_split(
  text_file, tmp_path, capsys
):
  workdir = tmp_path / "run"
  result = loop.run(tiny_config(text_file), str(workdir))
  capsys.readouterr()
  assert cli.main(["evaluate", str(workdir), "--split=valid"]) == 0
  found = json.loads(capsys.readouterr().out)
  best = result["test"]["checkpoint_step"]
  assert (found["split"], found["checkpoint_step"]) == ("valid", best)
  (written,) = (
    r
    for r in read_metrics(str(workdir / "metrics.jsonl"))
    if (r["split"], r["step"]) == ("valid", best)
  )
  for name in ("loss", "bits_per_byte", "num_tokens"):
    assert found[name] == written[name], name
