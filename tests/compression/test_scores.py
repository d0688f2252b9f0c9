import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import config
from folding.compression.fpp import fpp
from folding.compression.scores import SCORES, Score, get_score
from folding.compression.sites import Rule, make_sites

_KEY = jax.random.key(0)


def _normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def _score(name, w, average=None, key=_KEY):
  if average is not None:
    average = jnp.asarray(average, jnp.float32)
  return np.asarray(SCORES[name].score(jnp.asarray(w), average, key))


def _update(name, average, statistic, weight):
  update = SCORES[name].update
  assert update is not None
  arrays = (jnp.asarray(x, jnp.float32) for x in (average, statistic))
  return update(*arrays, jnp.float32(weight))


def test_every_score_is_an_option_of_a_config():
  assert set(get_args(config.Score)) == SCORES.keys()


def test_activation_is_the_magnitude_times_the_rms_of_the_input():
  w, square = _normal((3, 4, 5)), _normal((3, 4), 1) ** 2
  expected = np.empty_like(w)
  for i, j, k in np.ndindex(w.shape):
    expected[i, j, k] = abs(w[i, j, k]) * square[i, j] ** 0.5
  found = _score("activation", w.astype(np.float32), square)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_relative_divides_the_magnitude_by_the_means_of_row_and_column():
  w, square = _normal((3, 4, 5)), _normal((3, 4), 1) ** 2
  a, expected = np.abs(w), np.empty_like(w)
  for i, j, k in np.ndindex(w.shape):
    row = sum(a[i, j, m] for m in range(5)) / 5
    column = sum(a[m, n, k] for m in range(3) for n in range(4)) / 12
    term = a[i, j, k] / row + a[i, j, k] / column
    expected[i, j, k] = term * square[i, j] ** 0.25
  found = _score("relative", w.astype(np.float32), square)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_relative_of_zero_rows_and_columns_is_zero():
  w = np.ones((3, 4), np.float32)
  w[1], w[:, 2] = 0, 0
  found = _score("relative", w, np.ones(3))
  np.testing.assert_array_equal(found == 0, w == 0)
  assert np.isfinite(found).all()


def test_magnitude_of_bfloat16_is_float32():
  w = jnp.asarray(_normal((4, 3)), jnp.bfloat16)
  found = _score("magnitude", w)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, np.abs(np.asarray(w, np.float32)))


def test_random_is_uniform_and_fixed_by_its_key():
  w = jnp.zeros((100, 200))
  first, again, other = (
    _score("random", w, key=jax.random.key(seed)) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert np.mean(first == other) < 0.01
  # Of 20,000 uniform numbers the deciles hold 2,000 +- 42 each.
  counts, _ = np.histogram(first, bins=10, range=(0, 1))
  assert counts.sum() == w.size
  assert np.abs(counts - 2000).max() < 250


@pytest.mark.parametrize(
  "name", [n for n, score in SCORES.items() if score.score]
)
def test_score_without_evidence_ranks_equal_weights_alike(name):
  w, score = jnp.ones((4, 3, 2)), SCORES[name]
  average = None if score.init is None else score.init(w)
  found = np.asarray(score.score(w, average, _KEY))
  assert found.shape == w.shape
  assert name == "random" or len(np.unique(found)) == 1


def test_activation_without_statistics_is_the_magnitude():
  w = jnp.asarray(_normal((3, 2)), jnp.float32)
  found = _score("activation", w, SCORES["activation"].init(w))
  np.testing.assert_allclose(found, np.abs(w), rtol=1e-6)


def test_activation_broadcasts_statistics_over_missing_axes():
  average, stat = _normal((4, 3)) ** 2, _normal(4, 1) ** 2
  found = _update("activation", average, stat, 0.25)
  expected = 0.75 * average + 0.25 * np.stack([stat] * 3, axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_activation_starts_with_the_first_statistic():
  average = SCORES["activation"].init(jnp.zeros((2, 3)))
  average = _update("activation", average, [4.0, 2.0], 0.1)
  np.testing.assert_array_equal(average, [4.0, 2.0])


def test_activation_of_an_input_that_was_0_is_a_mean():
  average = _update("activation", [0.0, 4.0], [2.0, 0.0], 0.5)
  np.testing.assert_array_equal(average, [1.0, 2.0])


@pytest.mark.parametrize("shape", [(), (3,), (4, 4), (4, 3, 1)])
def test_activation_refuses_a_statistic_of_another_shape(shape):
  with pytest.raises(ValueError, match=r"does not fit the inputs .*\(4, 3\)"):
    _update("activation", np.zeros((4, 3)), np.zeros(shape), 1)


_SHAPES = {"up": (4, 6), "bias": (6,), "down": (6, 3)}
_NEURONS = Rule("up", 0.5, "neuron", {"bias": 0, "down": 0})


def _of_units(elements):
  """Returns the sum over each neuron, from {member: array of its shape}."""
  return (
    elements["up"].sum(0) + elements["bias"] + np.sum(elements["down"], axis=1)
  )


@pytest.mark.parametrize("rule", [Rule("up", 0.5), _NEURONS], ids=str)
@pytest.mark.parametrize("name", ["saliency", "movement"])
def test_gradient_averages_equal_their_sum_over_the_past(name, rule):
  tx = fpp(optax.sgd(0.0), rule, begin=9, end=9, every=1, score=name, decay=0.8)
  steps, terms = [], []
  for step in range(5):
    w, g = (
      {n: _normal(s, 10 * step + 5 * k + i) for i, (n, s) in shapes}
      for k, shapes in enumerate([list(enumerate(_SHAPES.items()))] * 2)
    )
    steps.append(jax.tree.map(jnp.float32, (w, g)))
    each = {n: -w[n] * g[n] for n in w}
    if rule is not _NEURONS:
      each = each["up"]
    elif name == "movement":
      each = _of_units(each)
    else:
      each = np.sqrt(_of_units({n: x**2 for n, x in each.items()}))
    terms.append(np.abs(each) if name == "saliency" else each)
  state = tx.init(steps[0][0])
  for w, g in steps:
    _, state = jax.jit(tx.update)(g, state, w)
  expected = sum(0.2 * 0.8 ** (4 - s) * terms[s] for s in range(5))
  (average,) = state.averages.values()
  np.testing.assert_allclose(
    average.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6
  )


def test_movement_of_neurons_has_the_masks_of_summed_averages_per_weight():
  """All products and sums are exact in float32, so ties are the same, too."""
  tx = fpp(
    optax.sgd(0.0),
    _NEURONS,
    begin=6,
    end=6,
    every=1,
    score="movement",
    decay=0.5,
  )
  rng = np.random.default_rng(0)
  shapes = {"up": (4, 600), "bias": (600,), "down": (600, 3)}
  params = {n: rng.integers(1, 4, s) / 1.0 for n, s in shapes.items()}
  averages = {n: np.zeros(s) for n, s in shapes.items()}
  state = tx.init(jax.tree.map(jnp.float32, params))
  for _ in range(7):
    grads = {n: rng.integers(-2, 3, s) / 4 for n, s in shapes.items()}
    updates, state = jax.jit(tx.update)(
      jax.tree.map(jnp.float32, grads), state, jax.tree.map(jnp.float32, params)
    )
    for n, g in grads.items():
      averages[n] = 0.5 * averages[n] - 0.5 * params[n] * g
  scores = _of_units(averages)
  assert len(np.unique(scores)) < 600
  pruned = np.zeros(600, bool)
  pruned[np.argsort(scores, kind="stable")[:300]] = True
  np.testing.assert_array_equal(updates["bias"] != 0, pruned)
  np.testing.assert_array_equal((updates["up"] != 0).all(0), pruned)


@pytest.mark.parametrize(
  "name", [n for n, score in SCORES.items() if score.score]
)
def test_score_of_a_neuron_is_the_root_of_the_sum_of_squares(name):
  leaves = {
    n: jnp.asarray(_normal(s, i), jnp.float32)
    for i, (n, s) in enumerate(_SHAPES.items())
  }
  (site,) = make_sites([_NEURONS], leaves)
  averages = {
    n: jnp.abs(_normal(x.shape, 9)).astype(jnp.float32)
    for n, x in SCORES[name].first_averages(site, leaves).items()
  }
  found = SCORES[name].score_site(site, leaves, averages, _KEY)
  # "relative" compares single weights: neurons take "activation".
  kind = "activation" if name == "relative" else name
  e = {n: _score(kind, w, averages.get(n)) for n, w in leaves.items()}
  expected = np.sqrt(_of_units({n: np.float64(x) ** 2 for n, x in e.items()}))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [None, 0], ids=["plain", "stacked"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("name", ["relative", "saliency"])
def test_kernels_out_in_have_the_masks_of_their_transpose(
  name, granularity, layers
):
  """Square kernels, as Equinox and PyTorch store them."""
  shape = (4, 4) if layers is None else (2, 4, 4)
  is_neuron = granularity == "neuron"
  params = {n: np.float32(_normal(shape, i)) for i, n in enumerate("vw")}
  stats = {
    n: np.float32(_normal(shape[:-1], i) ** 2) for i, n in enumerate("vw")
  }

  def pruned(params, reads, **options):
    tied = {"v": reads} if is_neuron else {}
    rule = Rule(
      "w" if is_neuron else "[vw]",
      0.5,
      granularity,
      tied,
      layers=layers,
      **options,
    )
    tx = fpp(optax.sgd(0.0), rule, begin=0, end=0, every=1, score=name)

    @jax.jit
    def run(params):
      grads = jax.tree.map(jnp.sin, params)
      updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
      return optax.apply_updates(params, updates)

    return jax.device_get(run(params))

  transposed = jax.tree.map(lambda w: np.swapaxes(w, -1, -2), params)
  expected = pruned(params, reads=0)
  found = pruned(transposed, reads=1, inputs=1)
  for n, w in expected.items():
    assert (w == 0).any()
    np.testing.assert_array_equal(found[n], np.swapaxes(w, -1, -2))


def test_score_without_a_rule_is_refused():
  with pytest.raises(ValueError, match="needs `score` or `term`"):
    Score()


def test_get_score_refuses_an_unknown_name():
  with pytest.raises(ValueError, match="'size'"):
    get_score("size")


def test_fpp_takes_a_custom_score():
  """It prunes the largest weights; one rule has another score."""
  largest = Score(score=lambda w, average, key: -jnp.abs(w))
  tx = fpp(
    optax.sgd(0.0),
    [Rule("a", 0.5), Rule("b", 0.5, score=SCORES["magnitude"])],
    begin=0,
    end=0,
    every=1,
    score=dataclasses.replace(largest, is_signed=True),
  )
  params = {n: jnp.array([1.0, -4.0, 2.0, -3.0]) for n in "ab"}
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  pruned = optax.apply_updates(params, updates)
  assert pruned["a"].tolist() == [1.0, 0.0, 2.0, 0.0]
  assert pruned["b"].tolist() == [0.0, -4.0, 0.0, -3.0]


def test_saliency_that_overflows_keeps_its_average():
  params = {"w": jnp.array([[1e30, 1.0], [2.0, 3.0]])}
  tx = fpp(
    optax.sgd(0.0), [Rule("w", 0.5)], begin=0, end=9, every=9, score="saliency"
  )
  update = jax.jit(tx.update)
  _, state = update({"w": jnp.ones((2, 2))}, tx.init(params), params)
  before = state.averages["w"]
  _, state = update({"w": jnp.full((2, 2), 1e30)}, state, params)
  after = state.averages["w"]
  assert after[0, 0] == before[0, 0]  # 1e30 * 1e30 is infinite in float32
  assert (after > before).sum() == 3
