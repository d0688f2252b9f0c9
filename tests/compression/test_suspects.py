import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding.compression import rules, scores, select, suspects
from folding.compression.fpp import fpp
from folding.compression.rules import Rule
from tests import transforms_battery as battery

_RAMP = np.array([0.0, 0.5, 1.0])
_NEURON = Rule("up", 0.5, "neuron", {"bias": 0, "down": 0})


def _leaves(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"up": (4, 6), "bias": (6,), "down": (6, 3), "w": (5, 7)}
  return {
    n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
  }


def _averages(score, leaves, seed=1):
  rng = np.random.default_rng(seed)
  found = {}
  for name, w in leaves.items():
    average = scores.init_average(score, w)
    if average is not None:
      x = rng.normal(size=average.shape)
      x = np.abs(x) if score != "movement" else x
      found[name] = jnp.asarray(x, jnp.float32)
  return found


def _init(removed=None, pattern="[uw].*"):
  tx = fpp(
    optax.sgd(0.1),
    [Rule(pattern, 0.5)],
    begin=0,
    end=4,
    every=2,
    removed=removed,
  )
  size = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)
  return jax.eval_shape(tx.init, {"up": size, "w": size})


def test_more_units_than_can_be_ranked_are_told_of_before_training():
  _init()
  with pytest.raises(ValueError, match="2,147,483,648 units"):
    _init(removed={"up": 2**30})


def test_what_was_removed_of_no_site_is_told_of():
  _init(removed={"up": 8}, pattern="up")
  with pytest.raises(ValueError, match="'w', which is no site .* there are up"):
    _init(removed={"w": 8}, pattern="up")


@pytest.mark.parametrize("score", scores.SCORES)
def test_a_neuron_scores_the_root_of_its_sum_of_squares(score):
  leaves = _leaves()
  averages = _averages(score, leaves)
  named = [
    dataclasses.replace(r, score=score) for r in (Rule("w", 0.5), _NEURON)
  ]
  sites = rules.make_sites(named, leaves)
  found = suspects.unit_scores(sites, named, leaves, averages, seed=3)["up"]
  key = jax.random.fold_in(jax.random.key(3), 1)
  # "relative" is for single weights: neurons take "activation" instead.
  kind = "activation" if score == "relative" else score
  e = {
    n: np.float64(scores.element_scores(kind, leaves[n], averages.get(n), key))
    for n in ("up", "bias", "down")
  }
  if score == "movement":
    expected = e["up"].sum(0) + e["bias"] + e["down"].sum(1)
  else:
    expected = np.sqrt(
      (e["up"] ** 2).sum(0) + e["bias"] ** 2 + (e["down"] ** 2).sum(1)
    )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_weights_score_by_themselves():
  leaves = _leaves()
  named = [Rule("w", 0.5, score="magnitude")]
  sites = rules.make_sites(named, leaves)
  found = suspects.unit_scores(sites, named, leaves, {}, seed=0)["w"]
  np.testing.assert_array_equal(select.value(found), np.abs(leaves["w"]))


def test_random_scores_differ_between_parameters_but_not_between_checks():
  leaves = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
  named = [Rule(".", 0.5, score="random")]
  sites = rules.make_sites(named, leaves)
  first = suspects.unit_scores(sites, named, leaves, {}, seed=0)
  again = suspects.unit_scores(sites, named, leaves, {}, seed=0)
  np.testing.assert_array_equal(first["a"], again["a"])
  assert not np.any(np.asarray(first["a"]) == np.asarray(first["b"]))


def _lowest(x, k):
  chosen = np.zeros(x.size, bool)
  chosen[np.argsort(x.ravel(), kind="stable")[:k]] = True
  return chosen.reshape(x.shape)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_parameter_has_its_own_threshold(index):
  rule = Rule("a|b", 0.5)
  sites = rules.make_sites([rule], {"a": np.ones((3, 5)), "b": np.ones(9)})
  rng = np.random.default_rng(0)
  ranked = {"a": rng.normal(size=(3, 5)), "b": 10 + rng.normal(size=9)}
  found = suspects.suspects(
    sites,
    [rule],
    {n: jnp.asarray(x, jnp.float32) for n, x in ranked.items()},
    _RAMP,
    jnp.int32(index),
  )
  counts = {"a": [0, 3, 7], "b": [0, 2, 4]}  # floor of 7.5 and 4.5, and halves
  for name, x in ranked.items():
    np.testing.assert_array_equal(found[name], _lowest(x, counts[name][index]))


def test_units_that_were_removed_count_as_the_lowest():
  rule = Rule("a|b", 0.6)
  rng = np.random.default_rng(0)
  whole = {"a": rng.normal(size=20), "b": rng.normal(size=9)}
  gone = {"a": whole["a"] < -0.8, "b": np.zeros(9, bool)}
  assert gone["a"].sum() == 3

  def chosen(ranked, removed):
    sites = rules.make_sites([rule], ranked)
    ranked = {n: jnp.asarray(x, jnp.float32) for n, x in ranked.items()}
    return suspects.suspects(
      sites, [rule], ranked, _RAMP, jnp.int32(2), removed
    )

  before = chosen(whole, {})
  after = chosen({n: x[~gone[n]] for n, x in whole.items()}, {"a": 3})
  for name, is_gone in gone.items():
    assert before[name][is_gone].all()
    np.testing.assert_array_equal(after[name], before[name][~is_gone])


def test_member_masks_broadcast_to_every_array_of_a_neuron():
  leaves = _leaves()
  sites = rules.make_sites([_NEURON, Rule("w", 0.5)], leaves)
  units = np.array([True, False, False, True, True, False])
  weights = np.random.default_rng(0).random((5, 7)) < 0.5
  packed = {
    "up": rules.pack(jnp.asarray(units)),
    "w": rules.pack(jnp.asarray(weights)),
  }
  found = suspects.member_masks(sites, packed, leaves)
  full = {n: np.broadcast_to(m, leaves[n].shape) for n, m in found.items()}
  np.testing.assert_array_equal(full["up"], np.stack([units] * 4))
  np.testing.assert_array_equal(full["bias"], units)
  np.testing.assert_array_equal(full["down"], np.stack([units] * 3, axis=1))
  np.testing.assert_array_equal(full["w"], weights)


# Elements 0..15, of which 0..3 are harmless: the loss is the sum of squares of
# what is missing from the others, plus an offset.
_HARM = np.array([0.0] * 4 + [1.0] * 12, np.float32)


def _verified(tolerance, offset, value):
  params = {"w": jnp.ones(16)}
  sites = rules.make_sites([Rule("w", 0.5)], params)
  found = battery.jit(
    lambda params, value: suspects.verified(
      sites,
      {"w": jnp.ones(16, bool)},
      {"w": jnp.arange(16, dtype=jnp.float32)},
      params,
      params,
      value,
      lambda p: offset + jnp.sum(_HARM * (p["w"] - 1) ** 2),
      tolerance,
    )
  )(params, value)
  return np.flatnonzero(found["w"]).tolist()


@pytest.mark.parametrize(
  ("tolerance", "kept"),
  [(0.0, 4), (0.39, 4), (0.41, 8), (1.2, 16)],
  ids=str,
)
@pytest.mark.parametrize("value", [None, 10.0], ids=["evaluated", "given"])
def test_as_many_candidates_as_hold_the_loss(tolerance, kept, value):
  # Of 10: zeroing 16, 8, 4 elements adds 12, 4, 0.
  value = None if value is None else jnp.float32(value)
  assert _verified(tolerance, 10.0, value) == list(range(kept))


@pytest.mark.parametrize(
  ("tolerance", "kept"), [(0.0, 4), (0.4, 8), (1.2, 16)], ids=str
)
def test_the_tolerance_of_a_negative_loss_allows_a_rise(tolerance, kept):
  assert _verified(tolerance, -10.0, None) == list(range(kept))


def test_where_every_share_hurts_nothing_is_zeroed():
  params = {"w": jnp.ones(16)}
  sites = rules.make_sites([Rule("w", 0.5)], params)
  found = suspects.verified(
    sites,
    {"w": jnp.ones(16, bool)},
    {"w": jnp.arange(16, dtype=jnp.float32)},
    params,
    params,
    None,
    lambda p: jnp.sum((p["w"] - 1) ** 2),
    0.0,
  )
  assert not np.any(found["w"])


def test_candidates_need_not_be_the_lowest_of_all():
  params = {"w": jnp.ones(16)}
  sites = rules.make_sites([Rule("w", 0.5)], params)
  found = suspects.verified(
    sites,
    {"w": jnp.arange(16) >= 8},
    {"w": jnp.arange(16, dtype=jnp.float32)},
    params,
    params,
    None,
    # Elements from 12 on must stay: four of the eight candidates can go.
    lambda p: jnp.sum((p["w"][12:] - 1) ** 2),
    0.0,
  )
  assert np.flatnonzero(found["w"]).tolist() == [8, 9, 10, 11]


def test_a_loss_that_is_not_a_number_holds_nothing():
  params = {"w": jnp.ones(4)}
  sites = rules.make_sites([Rule("w", 0.5)], params)
  found = suspects.verified(
    sites,
    {"w": jnp.ones(4, bool)},
    {"w": jnp.arange(4, dtype=jnp.float32)},
    params,
    params,
    jnp.float32(1),
    lambda p: 1 / jnp.min(p["w"]) * 0 + jnp.nan,
    10.0,
  )
  assert not np.any(found["w"])
