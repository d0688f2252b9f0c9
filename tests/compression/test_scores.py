import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.compression import scores

_KEY = jax.random.key(0)


def _normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def _score(name, w, average=None):
  if average is not None:
    average = jnp.asarray(average, jnp.float32)
  return scores.element_scores(name, jnp.asarray(w), average, _KEY)


def test_activation_weighs_magnitude_by_the_rms_of_the_input():
  w, square = _normal((3, 4, 5)), _normal((3, 4), 1) ** 2
  expected = np.empty_like(w)
  for i, j, k in np.ndindex(w.shape):
    expected[i, j, k] = abs(w[i, j, k]) * square[i, j] ** 0.5
  found = _score("activation", w.astype(np.float32), square)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_relative_weighs_magnitude_against_its_row_and_column():
  w, square = _normal((3, 4, 5)), _normal((3, 4), 1) ** 2
  a, expected = np.abs(w), np.empty_like(w)
  for i, j, k in np.ndindex(w.shape):
    row = sum(a[i, j, m] for m in range(5)) / 5
    column = sum(a[m, n, k] for m in range(3) for n in range(4)) / 12
    term = a[i, j, k] / row + a[i, j, k] / column
    expected[i, j, k] = term * square[i, j] ** 0.25
  found = _score("relative", w.astype(np.float32), square)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_relative_of_rows_and_columns_that_are_zero_is_zero():
  w = np.ones((3, 4), np.float32)
  w[1], w[:, 2] = 0, 0
  found = np.asarray(_score("relative", w, np.ones(3)))
  np.testing.assert_array_equal(found == 0, w == 0)
  assert np.isfinite(found).all()


def test_activation_of_a_vector_is_its_magnitude():
  w = _normal(5).astype(np.float32)
  average = scores.init_average("activation", jnp.asarray(w))
  found = _score("activation", w, average)
  np.testing.assert_array_equal(found, np.abs(w))


def test_magnitude_is_exact_and_float32():
  w = jnp.asarray(_normal((4, 3)), jnp.bfloat16)
  found = _score("magnitude", w)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, np.abs(np.asarray(w, np.float32)))


@pytest.mark.parametrize("name", ["saliency", "movement"])
def test_averaged_scores_are_their_average(name):
  average = _normal((4, 3)).astype(np.float32)
  found = _score(name, _normal((4, 3), 1), average)
  np.testing.assert_array_equal(found, average)


def test_random_is_uniform_and_fixed_by_its_key():
  w = jnp.zeros((100, 200))
  first = scores.element_scores("random", w, None, jax.random.key(1))
  again = scores.element_scores("random", w, None, jax.random.key(1))
  other = scores.element_scores("random", w, None, jax.random.key(2))
  np.testing.assert_array_equal(first, again)
  assert np.mean(np.asarray(first) == np.asarray(other)) < 0.01
  # Of 20,000 uniform numbers the deciles hold 2,000 +- 42 each.
  counts, _ = np.histogram(first, bins=10, range=(0, 1))
  assert counts.sum() == w.size
  assert np.abs(counts - 2000).max() < 250


@pytest.mark.parametrize("name", scores.SCORES)
def test_before_any_statistics_no_element_is_special(name):
  w = jnp.ones((4, 3, 2))
  average = scores.init_average(name, w)
  found = np.asarray(scores.element_scores(name, w, average, _KEY))
  assert found.shape == w.shape
  assert name == "random" or len(np.unique(found)) == 1


def test_a_statistic_of_leading_axes_is_spread_over_the_others():
  average, stat = _normal((4, 3)) ** 2, _normal(4, 1) ** 2
  found = scores.observe_stat(
    jnp.asarray(average), jnp.asarray(stat), jnp.float32(0.25)
  )
  expected = 0.75 * average + 0.25 * np.stack([stat] * 3, axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (4, 4), (4, 3, 1)])
def test_a_statistic_of_another_shape_is_told(shape):
  average, stat = jnp.zeros((4, 3)), jnp.zeros(shape)
  with pytest.raises(ValueError, match=r"does not fit the inputs .*\(4, 3\)"):
    scores.observe_stat(average, stat, jnp.float32(1))


@pytest.mark.parametrize("name", ["saliency", "movement"])
def test_gradient_averages_equal_their_sum_over_the_past(name):
  w, g = _normal((5, 4, 3)), _normal((5, 4, 3), 1)
  average = jnp.zeros((4, 3))
  for step in range(5):
    average = scores.observe_gradient(
      name, average, jnp.asarray(w[step]), jnp.asarray(g[step]), 0.8
    )
  terms = np.abs(w * g) if name == "saliency" else -w * g
  expected = sum(0.2 * 0.8 ** (4 - s) * terms[s] for s in range(5))
  np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


def test_movement_is_negative_where_a_step_of_descent_shrinks_the_weight():
  w, g = jnp.array([2.0, 2.0, -2.0]), jnp.array([1.0, -1.0, 1.0])
  moved = scores.observe_gradient("movement", jnp.zeros(3), w, g, 0.0)
  grows = np.abs(w - 0.1 * g) > np.abs(w)
  np.testing.assert_array_equal(np.asarray(moved) > 0, grows)


def test_the_first_statistic_that_is_a_number_has_all_of_the_weight():
  average = scores.init_average("activation", jnp.zeros((3, 2)))
  assert average is not None
  w = jnp.asarray(_normal((3, 2)))
  for unknown in (average, jnp.ones(3)):  # they count alike
    found = scores.element_scores("activation", w, unknown, jax.random.key(0))
    np.testing.assert_allclose(found, np.abs(w), rtol=1e-6)
  stats = [jnp.array([np.nan, 4.0, np.inf]), jnp.array([1e-4, 8.0, 2e-4])]
  for stat, weight in zip(stats, (0.5, 0.25), strict=True):  # late
    average = scores.observe_stat(average, stat, jnp.float32(weight))
  np.testing.assert_allclose(average, [1e-4, 5.0, 2e-4], rtol=1e-6)


def test_a_step_that_is_not_finite_leaves_averages_as_they_were():
  average, w = _normal((3, 4)).astype(np.float32), jnp.asarray(_normal((3, 4)))
  bad = np.zeros((3, 4), bool)
  bad[0, 1], bad[2] = True, True
  for value in (np.nan, np.inf):
    g = jnp.where(bad, value, 1.5)
    for name in ("saliency", "movement"):
      found = scores.observe_gradient(name, jnp.asarray(average), w, g, 0.9)
      sign = np.abs(w) if name == "saliency" else -w
      expected = np.where(bad, average, 0.9 * average + 0.1 * 1.5 * sign)
      np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    stat = jnp.where(bad[:, 0], value, jnp.arange(1.0, 4.0))
    found = scores.observe_stat(
      jnp.ones(3), stat.at[0].set(value), jnp.array(0.25)
    )
    np.testing.assert_allclose(found, [1, 1.25, 1], rtol=1e-6)
