import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding.config import MeshConfig
from folding.errors import TrainingError
from folding.tasks import TASKS
from folding.training import losses, sharding
from folding.training.evaluate import evaluate, make_eval_step
from tests import jaxprs
from tests.training import tiny

LM, CLASSIFY = TASKS["lm"], TASKS["classify"]


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


def test_evaluate_of_padded_batches_equals_one_batch_in_float64(
  mesh, classifier
):
  model, params = classifier
  whole = jax.tree.map(jnp.asarray, rows(10, 5))
  logits = jax.jit(model.apply)(
    {"params": params}, whole["tokens"], whole["mask"]
  )
  z = np.asarray(logits, np.float64)
  nats = np.log(np.exp(z).sum(-1)) - z[np.arange(10), whole["labels"]]
  accuracy = float((z.argmax(-1) == whole["labels"]).mean())

  # The same ten rows in batches of four: longer, with another pad token, and with
  # rows of weight 0 in the last batch.
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
  step = make_eval_step(model, CLASSIFY)
  figures = evaluate(step, params, parts, mesh, task=CLASSIFY)
  kinds = {"accuracy", "macro_f1", "matthews"}
  assert figures.keys() == {"loss", "num_examples", *kinds}
  assert figures["loss"] == pytest.approx(nats.mean(), rel=1e-5)
  assert figures["accuracy"] == pytest.approx(accuracy, rel=1e-6)
  assert 0 < accuracy < 1
  assert figures["num_examples"] == 10


def test_metrics_are_those_of_their_definitions():
  labels = np.array([0, 0, 0, 1, 1, 2], np.int32)
  found = np.array([0, 0, 1, 1, 2, 2])
  metrics = TASKS["classify"].labels.measure(np.eye(3)[found], labels)
  # F1 of a class is 2 hits / (its rows + its predictions).
  f1 = np.mean([4 / 5, 2 / 4, 2 / 3])
  # The correlation of the one-hot labels and predictions (Gorodkin 2004).
  a, b = np.eye(3)[labels], np.eye(3)[found]
  a, b = a - a.mean(0), b - b.mean(0)
  rk = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
  expected = {"accuracy": 4 / 6, "macro_f1": f1, "matthews": rk}
  assert metrics == pytest.approx(expected)

  hot = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
  logits = np.array([[2.0, -1], [3, -2], [-1, -1]])
  metrics = TASKS["multilabel"].labels.measure(logits, hot)
  assert metrics == pytest.approx({"accuracy": 2 / 3, "macro_f1": 0.5})

  scores = np.array([1, 2, 4, 8], np.float32)
  metrics = TASKS["regress"].labels.measure(
    np.array([[1.0], [4], [2], [9]]), scores
  )
  x, y = np.array([1, 4, 2, 9]), scores
  pearson = np.corrcoef(x, y)[0, 1]
  assert metrics == pytest.approx({"pearson": pearson, "spearman": 0.8})
  same = TASKS["regress"].labels.measure(np.ones((4, 1)), scores)
  assert same == {"pearson": 0.0, "spearman": 0.0}


def test_evaluate_of_a_uniform_model_has_its_closed_form(mesh):
  run = tiny.make(tiny.config())
  params = jax.tree.map(jnp.zeros_like, tiny.noise(tiny.shapes(run.config)))
  batches = [tiny.batch(seed) for seed in range(2)]
  count = sum(b["weights"].sum() for b in batches)
  figures = evaluate(
    make_eval_step(run.model, LM),
    params,
    batches,
    mesh,
    task=LM,
    num_bytes=300.0,
  )
  assert figures == {
    "loss": pytest.approx(math.log(tiny.VOCAB), rel=1e-6),
    "perplexity": pytest.approx(tiny.VOCAB, rel=1e-5),
    # 128 = 2^7: seven bits per token.
    "bits_per_byte": pytest.approx(7 * count / 300, rel=1e-6),
    "num_tokens": count,
  }


def test_evaluate_on_eight_devices_equals_one(mesh, classifier):
  model, params = classifier
  step, batch = make_eval_step(model, CLASSIFY), rows(16, 5)
  eight = sharding.make_mesh(MeshConfig(2, 4))
  placed = jax.device_put(params, sharding.tree_shardings(eight, params))
  one = evaluate(step, params, [batch], mesh, task=CLASSIFY)
  assert evaluate(step, placed, [batch], eight, task=CLASSIFY) == {
    **one,
    "loss": pytest.approx(one["loss"], rel=1e-6),
  }


def test_evaluate_over_blocks_of_tokens_equals_the_whole(mesh, monkeypatch):
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, mlp_width=64)
  run = tiny.make(tiny.config(model=model))
  params, batch = run.init().params, tiny.batch(0)
  whole = make_eval_step(run.model, LM, mesh)(params, batch)
  monkeypatch.setattr(losses, "LOGITS", 16 * tiny.VOCAB * 3)  # of 8 positions
  eval_step = make_eval_step(run.model, LM, mesh)
  program = eval_step.trace(params, batch).jaxpr.jaxpr
  assert 16 * tiny.VOCAB * 3 in jaxprs.sizes(program)
  assert 16 * tiny.VOCAB * tiny.LENGTH not in jaxprs.sizes(program)
  chex.assert_trees_all_close(eval_step(params, batch), whole, rtol=1e-5)


def evaluate_nats(mesh, nats):
  """Returns the metrics of one batch with a given loss."""

  def eval_step(params, batch):
    return {"loss": params, "weight": 1.0}

  batches = [tiny.batch(0)]
  return evaluate(eval_step, nats, batches, mesh, task=LM, num_bytes=1.0)


def test_evaluate_of_a_huge_loss_has_a_finite_perplexity(mesh):
  metrics = evaluate_nats(mesh, 1e4)
  assert metrics["loss"] == 1e4
  assert math.isfinite(metrics["perplexity"])


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_evaluate_raises_if_the_loss_is_not_finite(mesh, nats):
  with pytest.raises(TrainingError, match=str(nats)):
    evaluate_nats(mesh, nats)
