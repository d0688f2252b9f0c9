"""SparseGPT against least squares solved again at each input, in float64."""

import numpy as np
import pytest

from folding.compression import oneshot


@pytest.fixture
def layer():
  """Returns correlated inputs [T, I] and weights [I, O]."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(24, 24)) / 24**0.5 + 0.3 * np.eye(24)
  return rng.normal(size=(400, 24)) @ mix, rng.normal(size=(24, 7))


def _moment(x):
  return x.T @ x / len(x)


def _in_order(x, w, keep):
  """Fixes the weights of one input after another, the later ones by least squares.

  A removed weight becomes 0. A kept weight gets its value in the least-squares
  solution for itself and all later inputs, given the weights fixed so far.
  """
  out = np.zeros_like(w)
  for o in range(w.shape[1]):
    rest = x @ w[:, o]
    for i in range(len(w)):
      if keep[i, o]:
        out[i, o] = np.linalg.lstsq(x[:, i:], rest, rcond=None)[0][0]
      rest = rest - x[:, i] * out[i, o]
  return out


@pytest.mark.parametrize("block", [1, 5, 100])
@pytest.mark.parametrize("fraction", [0.25, 0.7])
def test_sparsegpt_equals_least_squares_in_order(layer, block, fraction):
  x, w = layer
  pruned = oneshot.sparsegpt(w, _moment(x), fraction, block=block, damping=0.0)
  np.testing.assert_allclose(
    pruned, _in_order(x, w, pruned != 0), rtol=1e-9, atol=1e-10
  )
  assert np.count_nonzero(pruned == 0) == int(fraction * w.size)


def test_sparsegpt_refits_all_after_the_first_inputs(layer):
  x, w = layer
  w[:6] *= 1e-6  # so that exactly these are removed
  pruned = oneshot.sparsegpt(w, _moment(x), 6 / 24, damping=0.0)
  assert (pruned[:6] == 0).all()
  best = np.linalg.lstsq(x[:, 6:], x @ w, rcond=None)[0]
  np.testing.assert_allclose(pruned[6:], best, rtol=1e-9)


def test_sparsegpt_removes_the_weight_of_least_loss(layer):
  x, w = layer
  w = w[:, :1]
  pruned = oneshot.sparsegpt(w, _moment(x), 1 / 24, damping=0.0)
  # If one weight is removed, those before it stay and those after it adapt.
  losses = []
  for i in range(24):
    rest = x @ w[:, 0] - x[:, :i] @ w[:i, 0]
    after = x[:, i + 1 :]
    fit = np.linalg.lstsq(after, rest, rcond=None)[0] if i < 23 else []
    losses.append(np.sum((rest - after @ fit) ** 2))
  assert np.flatnonzero(pruned == 0).tolist() == [int(np.argmin(losses))]


def test_sparsegpt_loses_less_than_wanda_than_magnitude(layer):
  x, w = layer
  x = x * np.geomspace(0.2, 3, 24)
  moment = _moment(x)

  def error(pruned):
    return np.mean((x @ (w - pruned)) ** 2)

  ours = error(oneshot.sparsegpt(w, moment, 0.5))
  theirs = error(oneshot.wanda(w, moment, 0.5))
  plain = error(oneshot.magnitude(w, 0.5))
  assert ours < 0.8 * theirs < 0.64 * plain


def test_sparsegpt_needs_damping_for_a_dead_input():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(50, 8))
  x[:, 3] = 0
  w = rng.normal(size=(8, 4))
  with pytest.raises(ValueError, match="cannot be inverted"):
    oneshot.sparsegpt(w, _moment(x), 0.5, damping=0.0)
  pruned = oneshot.sparsegpt(w, _moment(x), 0.125, damping=1e-6)
  assert (pruned[3] == 0).all()
  assert np.isfinite(pruned).all()


def test_sparsegpt_without_inputs_removes_the_least_weights():
  w = np.random.default_rng(2).normal(size=(8, 4))
  pruned = oneshot.sparsegpt(w, np.zeros((8, 8)), 0.5)
  np.testing.assert_array_equal(pruned, oneshot.magnitude(w, 0.5))


# 22 * (15 / 22) is below 15.
@pytest.mark.parametrize(
  ("rounds", "inputs", "removed"),
  [(1, 24, 14), (4, 24, 14), (32, 24, 14), (1, 22, 7)],
)
def test_remove_inputs_refits_the_rest_by_least_squares(
  layer, rounds, inputs, removed
):
  x, w = layer[0][:, :inputs], layer[1][:inputs]
  pruned = oneshot.remove_inputs(
    w, _moment(x), removed / inputs, rounds=rounds, damping=0.0
  )
  stays = pruned.any(axis=1)
  assert (~stays).sum() == removed
  oracle = np.linalg.lstsq(x[:, stays], x @ w, rcond=None)[0]
  np.testing.assert_allclose(pruned[stays], oracle, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_remove_inputs_removes_the_inputs_of_least_loss(layer, is_weighted):
  x, w = layer[0][:100], layer[1]
  root = np.eye(w.shape[1])
  if is_weighted:
    root[:, 1:] = 0.1 * np.random.default_rng(4).normal(size=root[:, 1:].shape)
  w[0] = 100 * w[0]  # large, but its input follows from the others
  x[:, 0] = x[:, 1] - x[:, 2] + 1e-3 * x[:, 0]

  def loss(stays):
    fit = np.linalg.lstsq(x[:, stays], x @ w, rcond=None)[0]
    return np.square((x[:, stays] @ fit - x @ w) @ root).sum()

  left, oracle = set(range(len(w))), []
  for _ in range(len(w) // 2):
    without = {i: loss(sorted(left - {i})) for i in left}
    oracle.append(min(without, key=without.get))
    left.remove(oracle[-1])
  for count in (1, 2, len(w) // 2):
    fraction = count / len(w)
    pruned = oneshot.remove_inputs(
      w,
      _moment(x),
      fraction,
      rounds=1000,
      damping=0.0,
      sensitivity_OO=root @ root.T if is_weighted else None,
    )
    gone = np.flatnonzero(~pruned.any(axis=1))
    np.testing.assert_array_equal(gone, sorted(oracle[:count]))


def test_round_that_removes_nothing_keeps_the_weights(layer, capfd):
  x, w = layer
  found = oneshot.removals(w, _moment(x), [24, 20, 20])
  first, second, third = found
  np.testing.assert_array_equal(first, w)
  np.testing.assert_array_equal(second, third)
  assert capfd.readouterr() == ("", "")  # not of LAPACK


def test_an_input_of_large_energy_hides_no_other(layer):
  x, w = layer
  usual = oneshot.remove_inputs(w, _moment(x), 0.5)
  sign = np.resize([1.0, -1.0], len(x)) - np.resize([1.0, -1.0], len(x)).mean()
  sign -= x @ np.linalg.lstsq(x, sign, rcond=None)[0]  # tells nothing of others
  large = np.concatenate([x, 1e4 * sign[:, None]], 1)
  w_large = np.concatenate([w, np.ones((1, w.shape[1]))])
  beside = oneshot.remove_inputs(w_large, _moment(large), 0.5)
  np.testing.assert_allclose(beside[:-1], usual, atol=0.01)


def test_removals_of_units_remove_those_of_least_loss(layer):
  x, w = layer
  units = np.arange(len(w)).reshape(-1, 4)
  x[:, units[2]] = 0.1 * x[:, units[2]] + x[:, units[4]] @ np.diag(
    [1, -2, 3, 1]
  )

  def loss(stays):
    rows = np.concatenate(units[sorted(stays)])
    fit = np.linalg.lstsq(x[:, rows], x @ w, rcond=None)[0]
    return np.square(x[:, rows] @ fit - x @ w).sum()

  left = set(range(len(units)))
  goals = range(len(units) - 1, 0, -1)
  for new in oneshot.removals(w, _moment(x), goals, unit=4, damping=0.0):
    left.remove(min(left, key=lambda n: loss(left - {n})))
    stays = new.reshape(len(units), -1).any(axis=1)
    assert left == set(np.flatnonzero(stays))


def test_wanda_ranks_within_each_output(layer):
  x, w = layer
  pruned = oneshot.wanda(w, _moment(x), 0.5)
  rms = np.sqrt(np.mean(x**2, axis=0))
  for o in range(w.shape[1]):
    score = np.abs(w[:, o]) * rms
    kept = np.flatnonzero(pruned[:, o])
    assert set(kept) == set(np.argsort(score)[12:])
    np.testing.assert_array_equal(pruned[kept, o], w[kept, o])


def test_wanda_prunes_the_weights_of_an_input_that_is_always_zero():
  x = np.random.default_rng(3).normal(size=(50, 8))
  x[:, 3] = 0
  w = np.ones((8, 4))
  w[3] = 1000  # its score is still 0
  pruned = oneshot.wanda(w, _moment(x), 1 / 8)
  np.testing.assert_array_equal(np.flatnonzero(~pruned.any(1)), [3])


def test_wanda_refuses_a_moment_of_other_inputs(layer):
  x, w = layer
  with pytest.raises(ValueError, match="does not fit the 24 inputs"):
    oneshot.wanda(w, _moment(x)[1:, 1:], 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("prune", [oneshot.sparsegpt, oneshot.remove_inputs])
def test_moment_that_is_none_is_refused(layer, prune, value):
  x, w = layer
  moment = _moment(x)
  moment[0, 0] = value
  with pytest.raises(ValueError, match="not finite or has a negative"):
    prune(w, moment, 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("prune", [oneshot.sparsegpt, oneshot.remove_inputs])
def test_fraction_out_of_range_is_refused(layer, prune, fraction):
  x, w = layer
  with pytest.raises(ValueError, match="fraction"):
    prune(w, _moment(x), fraction)


def test_magnitude_counts_a_fraction_that_rounds_down_as_whole():
  assert 0.29 * 100 < 29
  pruned = oneshot.magnitude(np.arange(1.0, 101.0), 0.29)
  assert np.flatnonzero(pruned == 0).tolist() == list(range(29))


def test_magnitude_removes_the_first_of_equal_weights():
  w = np.float32([[2, -1], [1, 1], [-2, 1]])
  pruned = oneshot.magnitude(w, 0.5)
  np.testing.assert_array_equal(pruned, [[2, 0], [0, 0], [-2, 1]])
  assert pruned.dtype == w.dtype
