import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding.compression.fpp import fpp
from folding.compression.rules import Rule
from tests import transforms_battery as battery
from tests.compression.fpp_cases import WEIGHTS, random_params, separable

# ---------------------------------------------------------------------------
# Frozen, zero, and untouched.


def _history(tx, params, steps=14, outside=None):
  """Returns params before the first and after every step, and the states."""

  @battery.jit
  def step_fn(params, state, step):
    updates, state = tx.update(separable(params, step), state, params)
    if outside is not None:
      updates, _ = outside.update(updates, outside.init(params), params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  history, states = [params], [state]
  for step in range(steps):
    params, state = step_fn(params, state, jnp.float32(step))
    history.append(params)
    states.append(state)
  return history, states


def _units(state, name, shape):
  """Which elements are not trainable, read from the packed bits."""
  bits = np.unpackbits(np.asarray(state.suspected[name][0]), axis=-1)
  return bits[..., : shape[-1]].astype(bool)


_INNER = {
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "momentum": lambda: optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
  ),
}
_SLOW = {"begin": 2, "end": 11, "every": 3, "patience": 2}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("inner", _INNER)
def test_frozen_keeps_its_bits_and_zero_stays_zero(inner, dtype):
  params = random_params(dtype)
  tx = fpp(_INNER[inner](), WEIGHTS, score="magnitude", **_SLOW)
  history, states = _history(tx, params)
  num_frozen = 0
  for before, after, state in zip(
    history, history[1:], states[1:], strict=False
  ):
    for n in ("up", "embed"):
      old, new = np.asarray(before[n]), np.asarray(after[n])
      assert new.dtype == old.dtype
      stop = _units(state, n, new.shape)
      frozen = stop & (new != 0)
      num_frozen += frozen.sum()
      np.testing.assert_array_equal(new[frozen], old[frozen])
      np.testing.assert_array_equal(new[old == 0], 0.0)
      assert not np.any(np.signbit(new[stop & (new == 0)].astype(np.float32)))
  assert num_frozen > 20
  for n in ("up", "embed"):
    size = params[n].size
    assert np.sum(np.asarray(history[-1][n]) == 0) == math.floor(0.7 * size)


def test_weight_decay_after_fpp_moves_what_is_frozen():
  """Negative control of the test above."""
  tx = fpp(_INNER["adamw"](), WEIGHTS, score="magnitude", **_SLOW)
  decay = optax.add_decayed_weights(-0.1)
  history, states = _history(tx, random_params(), outside=decay)
  stop = _units(states[7], "up", (8, 6))
  frozen = stop & np.asarray(history[7]["up"] != 0)
  assert frozen.any()
  moved = np.asarray(history[7]["up"] != history[6]["up"])
  assert moved[frozen].all()


@pytest.mark.parametrize("inner", _INNER)
def test_what_is_never_suspected_trains_as_with_the_bare_optimizer(inner):
  params = random_params()
  rules = [Rule("up|embed", 0.3)]
  tx = fpp(_INNER[inner](), rules, score="magnitude", **_SLOW)
  history, states = _history(tx, params)
  free, _ = _history(_INNER[inner](), params)
  for n, w in params.items():
    touched = np.zeros(w.shape, bool)
    for found, expected, state in zip(history, free, states, strict=True):
      if n in state.suspected:
        touched |= _units(state, n, w.shape)
      a, b = np.asarray(found[n]), np.asarray(expected[n])
      np.testing.assert_array_equal(a[~touched], b[~touched])
    assert touched.any() == (n in ("up", "embed"))
    assert not touched.all()


def test_without_rules_it_is_the_bare_optimizer():
  tx = fpp(_INNER["adamw"](), [], **_SLOW)
  found, _ = _history(tx, random_params())
  expected, _ = _history(_INNER["adamw"](), random_params())
  battery.assert_equal(found, expected)


def _clipped_update(clip_inside):
  clip = optax.clip_by_global_norm(1.0)
  options = {"begin": 0, "end": 9, "every": 1, "patience": 9}
  options |= {"score": "magnitude"}
  params = {"w": jnp.arange(1.0, 9.0), "b": jnp.ones(3)}
  grads = {"w": jnp.where(params["w"] < 3, 1e3, 1.0), "b": jnp.ones(3)}
  inner = optax.chain(clip, optax.sgd(1.0)) if clip_inside else optax.sgd(1.0)
  tx = fpp(inner, [Rule("w", 0.5)], **options)
  update, state = battery.jit(tx.update), tx.init(params)
  # Two steps of no gradient: at the second check floor(0.29 * 4) = 1 unit is
  # frozen, at the third 2, which are those of the large gradients.
  for _ in range(2):
    _, state = update(jax.tree.map(jnp.zeros_like, grads), state, params)
  if not clip_inside:
    grads, _ = clip.update(grads, clip.init(params))
  updates, _ = update(grads, state, params)
  return np.asarray(updates["w"]), np.asarray(updates["b"])


def test_a_clip_inside_sees_only_trainable_gradients():
  w, b = _clipped_update(clip_inside=True)
  expected = -1 / math.sqrt(6 + 3)  # nine trainable gradients of 1
  np.testing.assert_array_equal(w[:2], 0.0)
  np.testing.assert_allclose(w[2:], expected, rtol=1e-6)
  np.testing.assert_allclose(b, expected, rtol=1e-6)


def test_a_clip_outside_is_swamped_by_frozen_gradients():
  """Negative control of the test above."""
  w, _ = _clipped_update(clip_inside=False)
  assert np.abs(w[2:]).max() < 1e-3


def test_verification_zeroes_only_what_is_harmless():
  # Elements in ascending magnitude; the loss hangs on those from the 8th on.
  params = {"w": jnp.arange(1.0, 33.0) / 100}
  harm = (jnp.arange(32) >= 8).astype(jnp.float32)

  def value_fn(p):
    return 1.0 + jnp.sum(harm * (p["w"] - params["w"]) ** 2)

  tx = fpp(
    optax.sgd(0.01),
    [Rule("w", 0.75)],
    begin=0,
    end=0,
    every=1,
    score="magnitude",
    tolerance=0.01,
  )
  update = battery.jit(tx.update, static_argnames="value_fn")
  grads, options = {"w": jnp.ones(32)}, {"value_fn": value_fn}
  updates, state = update(
    grads, tx.init(params), params, value=value_fn(params), **options
  )
  pruned = optax.apply_updates(params, updates)
  new = np.asarray(pruned["w"])
  # Loop oracle: of the 24 suspects 24, 12, 6, ... are tried.
  w, bound = np.float64(params["w"]), 1.01
  for count in (24, 12, 6, 3, 1, 0):
    rise = sum(w[i] ** 2 for i in range(8, 32) if i < count)
    if 1.0 + rise <= bound:
      break
  assert 0 < count < 24
  np.testing.assert_array_equal(new[:count], 0.0)
  # The rest is trainable again at once.
  np.testing.assert_allclose(new[count:], w[count:] - 0.01, rtol=1e-5)
  stop = _units(state, "w", (32,))
  np.testing.assert_array_equal(stop, np.arange(32) < count)
  # That was the last check: what did not hold is not suspected again.
  _, later = update(grads, state, pruned, **options)
  np.testing.assert_array_equal(later.suspected["w"], state.suspected["w"])


def test_verified_pruning_keeps_the_loss_and_unverified_does_not():
  params = {"w": jnp.linspace(0.5, 1.0, 40)}

  def value_fn(p):
    return 1.0 + jnp.sum((p["w"] - params["w"]) ** 2)

  losses = {}
  for tolerance in (None, 0.05):
    tx = fpp(
      optax.sgd(0.0),
      [Rule("w", 0.5)],
      begin=0,
      end=3,
      every=1,
      score="magnitude",
      tolerance=tolerance,
    )
    update = battery.jit(tx.update, static_argnames="value_fn")
    p, state = params, tx.init(params)
    for _ in range(4):
      zeros = jax.tree.map(jnp.zeros_like, p)
      updates, state = update(zeros, state, p, value_fn=value_fn)
      p = optax.apply_updates(p, updates)
    losses[tolerance] = float(value_fn(p))
  assert losses[0.05] <= 1.05**4
  assert losses[None] > 5


def test_one_inside_another_gets_the_statistics():
  params = {name: random_params()[name] for name in ("up", "embed")}
  inner = fpp(
    *(optax.sgd(0.0), [Rule("up", 0.5)]),
    **{"begin": 0, "end": 0, "every": 1, "score": "activation"},
  )
  outer = fpp(
    *(inner, [Rule("embed", 0.5)]),
    **{"begin": 1, "end": 1, "every": 1, "score": "magnitude"},
  )
  state = outer.init(params)
  size = jnp.array([9.0, 9, 9, 9, 1e-4, 1e-4, 1e-4, 1e-4])
  for step in range(2):
    updates, state = outer.update(
      separable(params, step), state, params, stats={"up": size}
    )
    params = optax.apply_updates(params, updates)
  # By their inputs: |w| alone would not take just the last four rows.
  np.testing.assert_array_equal(params["up"][4:], 0)
  assert (params["up"][:4] != 0).all()
  assert (params["embed"] == 0).sum() == 30


def test_a_step_that_overflows_and_is_skipped_says_nothing():
  w = {"w": jnp.ones(4), "b": jnp.zeros(1)}
  rule = Rule("w", 0.5)
  tx = fpp(
    optax.apply_if_finite(optax.sgd(0.0), 9),
    [rule],
    **{"begin": 10, "end": 10, "every": 1, "score": "saliency"},
  )
  grads = {"w": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": jnp.ones(1)}
  huge = jnp.array([1e30, 1e30, 1.0, 1.0])
  for bad in (
    {"w": huge.at[3].set(jnp.inf), "b": jnp.ones(1)},
    {"w": huge, "b": jnp.full(1, jnp.nan)},
  ):
    params, state = w, tx.init(w)
    for step in range(14):
      g = bad if step == 3 else grads
      updates, state = tx.update(g, state, params)
      params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], [0, 0, 1, 1])


@pytest.mark.parametrize("score", ["activation", "relative"])
def test_statistics_of_a_step_that_overflows_and_is_skipped_say_nothing(score):
  w = {"w": jnp.ones((4, 2)), "b": jnp.zeros(1)}
  tx = fpp(
    optax.apply_if_finite(optax.sgd(0.0), 9),
    [Rule("w", 0.5)],
    **{"begin": 10, "end": 10, "every": 1, "score": score},
  )
  ones = jax.tree.map(jnp.ones_like, w)
  stats = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
  huge = jnp.array([1e30, 1e30, 1.0, 1.0])
  nan = {**ones, "b": jnp.full(1, jnp.nan)}
  for bad, of_it in (
    (nan, huge),
    (ones, huge.at[3].set(jnp.inf)),
  ):
    params, state = w, tx.init(w)
    for step in range(14):
      g, s = (bad, {"w": of_it}) if step in (0, 3) else (ones, stats)
      updates, state = tx.update(g, state, params, stats=s)
      params = optax.apply_updates(params, updates)
    assert state.observed == 12
    np.testing.assert_allclose(state.averages["w"], stats["w"], rtol=1e-6)
    np.testing.assert_array_equal(params["w"][:, 0] == 0, [1, 1, 0, 0])


def test_a_line_search_inside_takes_its_own_arguments():
  def f(p):
    return jnp.sum((p["w"] - jnp.arange(1.0, 5.0)) ** 2)

  tx = fpp(
    optax.lbfgs(), [Rule("w", 0.5)], begin=4, end=4, every=1, score="magnitude"
  )
  params = {"w": jnp.array([0.1, 0.2, 0.3, 0.4])}
  state = tx.init(params)
  for _ in range(8):
    value, grad = jax.value_and_grad(f)(params)
    updates, state = tx.update(
      grad, state, params, value=value, grad=grad, value_fn=lambda p: f(p)
    )
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["w"], [0, 0, 3, 4], atol=1e-5)
