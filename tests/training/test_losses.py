import jax.numpy as jnp
import numpy as np
import pytest

from folding import tasks
from folding.tasks import TASKS
from folding.training import losses


def oracle(logits, labels, weights):
  """Returns the sums in float64, by the definition of cross entropy."""
  z = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  one_hot = np.eye(z.shape[-1])[labels.reshape(-1)]
  w = np.asarray(weights, np.float64).reshape(-1)
  return {
    "loss": w @ -(one_hot * np.log(p)).sum(-1),
    "weight": w.sum(),
  }


def example(shape, num_classes):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (*shape, num_classes)).astype(np.float32)
  labels = rng.integers(0, num_classes, shape).astype(np.int32)
  weights = rng.choice([0, 1, 0.5], shape).astype(np.float32)
  return logits, labels, weights


@pytest.mark.parametrize(
  ("task", "name", "shape"),
  [("lm", "targets", (3, 5)), ("classify", "labels", (6,))],
)
def test_sums_are_those_of_float64(task, name, shape):
  logits, labels, weights = example(shape, 7)
  batch = {name: jnp.asarray(labels), "weights": jnp.asarray(weights)}
  sums = losses.summed_loss(TASKS[task], jnp.asarray(logits), batch)
  expected = oracle(logits, labels, weights)
  assert sums.keys() == expected.keys()
  for key, value in expected.items():
    # A few float32 roundings per term.
    np.testing.assert_allclose(sums[key], value, rtol=2e-6, err_msg=key)


def test_scores_and_several_labels_have_the_losses_of_float64():
  logits, _, weights = example((6,), 3)
  rng = np.random.default_rng(1)
  hot = rng.integers(0, 2, (6, 3)).astype(np.float32)
  scores = rng.normal(size=6).astype(np.float32)
  z, w = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
  p = 1 / (1 + np.exp(-z))
  nats = -(hot * np.log(p) + (1 - hot) * np.log(1 - p)).sum(-1)
  for task, labels, out, each in (
    ("multilabel", hot, logits, nats),
    ("regress", scores, logits[:, :1], np.square(z[:, 0] - scores)),
  ):
    batch = {"labels": jnp.asarray(labels), "weights": jnp.asarray(weights)}
    sums = losses.summed_loss(TASKS[task], jnp.asarray(out), batch)
    np.testing.assert_allclose(sums["loss"], w @ each, rtol=2e-6)
    assert sums["weight"] == w.sum()
  with pytest.raises(AssertionError):  # would broadcast to [6, 3]
    losses.summed_loss(TASKS["regress"], jnp.asarray(logits), batch)


def test_bfloat16_logits_are_summed_in_float32():
  logits, labels, weights = example((6,), 7)
  narrow = jnp.asarray(logits, jnp.bfloat16)
  batch = {"labels": jnp.asarray(labels), "weights": jnp.asarray(weights)}
  sums = losses.summed_loss(TASKS["classify"], narrow, batch)
  expected = oracle(narrow.astype(jnp.float32), labels, weights)
  for key, value in expected.items():
    np.testing.assert_allclose(sums[key], value, rtol=2e-6, err_msg=key)
    assert sums[key].dtype == jnp.float32


def test_large_logits_do_not_overflow():
  logits = jnp.array([[1e4, 0.0], [0.0, -3e4]])
  found = tasks.cross_entropy(logits, jnp.array([1, 0]))
  np.testing.assert_array_equal(found, [1e4, 0.0])


def test_soft_loss_is_the_divergence_of_float64():
  logits, _, weights = example((3, 5), 7)
  taught = example((3, 5), 7)[0][::-1] * 0.5
  T = 2.0

  def softmax(z):
    e = np.exp(np.asarray(z, np.float64) / T)
    return e / e.sum(-1, keepdims=True)

  p, q = softmax(taught), softmax(logits)
  nats = (p * np.log(p / q)).sum(-1)
  expected = T**2 * (nats * weights).sum()
  z, t, w = (jnp.asarray(x) for x in (logits, taught, weights))
  found = losses.summed_soft_loss(TASKS["lm"], z, t, w, T)
  np.testing.assert_allclose(found, expected, rtol=2e-6)
  same = losses.summed_soft_loss(TASKS["lm"], z, z, w, T)
  np.testing.assert_allclose(same, 0, atol=1e-6)


def test_soft_loss_of_scores_and_several_labels_is_that_of_float64():
  logits, _, weights = example((6,), 3)
  taught, T = logits[::-1] * 0.5, 2.0
  z, t, w = (np.asarray(x, np.float64) for x in (logits, taught, weights))
  q, p = (1 / (1 + np.exp(-x / T)) for x in (z, t))
  nats = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  expected = {
    "multilabel": T**2 * (nats.sum(-1) @ w),
    "regress": np.square(z - t)[:, 0] @ w,
  }
  for task, value in expected.items():
    width = 1 if task == "regress" else 3
    given = (jnp.asarray(x[:, :width]) for x in (logits, taught))
    found = losses.summed_soft_loss(TASKS[task], *given, jnp.asarray(w), T)
    np.testing.assert_allclose(found, value, rtol=2e-6)


def test_hidden_loss_is_the_mean_share_of_tokens_that_count():
  rng = np.random.default_rng(0)
  theirs = rng.normal(size=(2, 4, 3)).astype(np.float32)
  theirs[:, 0] *= 1e3  # a first token outweighs the others in sums of squares
  ours = theirs * rng.uniform(0.5, 1.5, (2, 4, 1)).astype(np.float32)
  mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
  share = np.square(np.float64(ours) - theirs).sum(-1)
  share /= np.square(np.float64(theirs)).sum(-1)
  hidden = {"a": jnp.asarray(ours), "b": jnp.asarray(theirs)}
  taught = {"a": jnp.asarray(theirs), "b": jnp.asarray(theirs)}
  found = losses.hidden_loss(hidden, taught, jnp.asarray(mask))
  np.testing.assert_allclose(found, share[mask].mean() / 2, 1e-5)  # b is right
  everything = losses.hidden_loss({"a": hidden["a"]}, {"a": taught["a"]}, None)
  np.testing.assert_allclose(everything, share.mean(), rtol=1e-5)
