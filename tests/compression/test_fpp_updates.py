import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from folding.compression.fpp import fpp, fpp_counts
from folding.compression.sites import Rule
from tests.compression.fpp_cases import WEIGHTS, random_params, separable

# ---------------------------------------------------------------------------
# Frozen, zero, and untouched.


def _history(tx, params, steps=14, outside=None):
  """Returns params before the first and after every step, and the states."""

  @jax.jit
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
  """Returns which elements are not trainable, from the packed bits."""
  bits = np.unpackbits(np.asarray(state.suspected[name][0]), axis=-1)
  return bits[..., : shape[-1]].astype(bool)


_INNER = {
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "momentum": lambda: optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
  ),
}
_SLOW = {"begin": 2, "end": 11, "every": 3, "patience": 2}


@pytest.mark.parametrize(
  ("inner", "dtype"), [("adamw", jnp.bfloat16), ("momentum", jnp.float32)]
)
def test_frozen_elements_keep_their_bits_and_zeros_stay_zero(inner, dtype):
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


def test_masks_come_from_float32_parameters_of_a_bfloat16_model():
  rng = np.random.default_rng(0)
  # All equal in bfloat16, which has 8 bits.
  w = 1 + rng.permutation(64).astype(np.float32).reshape(8, 8) / 2**16
  params = {"w": jnp.asarray(w)}
  assert len(np.unique(params["w"].astype(jnp.bfloat16))) == 1
  tx = fpp(
    optax.sgd(0.0), [Rule("w", 0.5)], begin=0, end=0, every=1, score="magnitude"
  )
  x = jnp.ones((2, 8), jnp.bfloat16)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.sum(x @ p["w"].astype(x.dtype)))(params)
    updates, _ = tx.update(grads, state, params)
    return optax.apply_updates(params, updates)

  new = step(params, tx.init(params))["w"]
  np.testing.assert_array_equal(new == 0, w < np.median(w))


def test_weight_decay_after_fpp_moves_frozen_elements():
  """Negative control of the test above."""
  tx = fpp(_INNER["adamw"](), WEIGHTS, score="magnitude", warn=False, **_SLOW)
  decay = optax.add_decayed_weights(-0.1)
  history, states = _history(tx, random_params(), outside=decay)
  stop = _units(states[7], "up", (8, 6))
  frozen = stop & np.asarray(history[7]["up"] != 0)
  assert frozen.any()
  moved = np.asarray(history[7]["up"] != history[6]["up"])
  assert moved[frozen].all()


def test_elements_never_frozen_train_as_with_the_inner_optimizer():
  inner = "momentum"
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
      # A few roundings: the programs may fuse products with sums differently.
      np.testing.assert_allclose(a[~touched], b[~touched], rtol=1e-5, atol=1e-6)
    assert touched.any() == (n in ("up", "embed"))
    assert not touched.all()


def _clipped_update(clip_inside):
  clip = optax.clip_by_global_norm(1.0)
  options = {"begin": 0, "end": 9, "every": 1, "patience": 9}
  options |= {"score": "magnitude"}
  params = {"w": jnp.arange(1.0, 9.0), "b": jnp.ones(3)}
  grads = {"w": jnp.where(params["w"] < 3, 1e3, 1.0), "b": jnp.ones(3)}
  inner = optax.chain(clip, optax.sgd(1.0)) if clip_inside else optax.sgd(1.0)
  tx = fpp(inner, [Rule("w", 0.5)], **options)
  update, state = jax.jit(tx.update), tx.init(params)
  # Two steps without a gradient. The second mask update freezes
  # floor(0.29 * 4) = 1 unit, the third 2, which have the large gradients.
  for _ in range(2):
    _, state = update(jax.tree.map(jnp.zeros_like, grads), state, params)
  if not clip_inside:
    grads, _ = clip.update(grads, clip.init(params))
  updates, _ = update(grads, state, params)
  return np.asarray(updates["w"]), np.asarray(updates["b"])


def test_clipping_inside_counts_only_trainable_gradients():
  w, b = _clipped_update(clip_inside=True)
  expected = -1 / math.sqrt(6 + 3)  # nine trainable gradients of 1
  np.testing.assert_array_equal(w[:2], 0.0)
  np.testing.assert_allclose(w[2:], expected, rtol=1e-6)
  np.testing.assert_allclose(b, expected, rtol=1e-6)


def test_clipping_outside_counts_frozen_gradients():
  """Negative control of the test above."""
  w, _ = _clipped_update(clip_inside=False)
  assert np.abs(w[2:]).max() < 1e-3


def _zeroed(value_fn, *, tolerance, value=None, size=20):
  """Returns which elements of ascending size one mask update zeroes.

  95% of them are candidates: 19 of 20.
  """
  params, rules = {"w": jnp.arange(1.0, 1.0 + size)}, [Rule("w", 0.95)]
  tx = fpp(
    optax.sgd(0.0),
    rules,
    begin=0,
    end=0,
    every=1,
    score="magnitude",
    tolerance=tolerance,
  )
  update = jax.jit(tx.update, static_argnames="value_fn")
  updates, state = update(
    params, tx.init(params), params, value=value, value_fn=value_fn
  )
  new = optax.apply_updates(params, updates)["w"]
  counts = fpp_counts(rules, state, {"w": new})
  assert (counts["zero"], counts["undone"]) == (np.sum(new == 0), 0)
  # Candidates that are not zeroed train again.
  np.testing.assert_array_equal(_units(state, "w", (size,)), new == 0)
  return np.flatnonzero(new == 0).tolist()


# Zeroing 19, 9 or 4 elements adds 15, 5 or 0 to the loss.
@pytest.mark.parametrize(
  ("offset", "tolerance", "kept"),
  [
    (10.0, 0.0, 4),
    (10.0, 0.49, 4),
    (10.0, 0.51, 9),
    (10.0, 1.5, 19),
    (-10.0, 0.5, 9),  # a negative loss may rise, too
  ],
)
def test_verification_zeroes_as_many_as_keep_the_loss(offset, tolerance, kept):
  harm = jnp.asarray([0.0] * 4 + [1.0] * 16)

  def value_fn(params):
    return offset + jnp.sum(harm * (params["w"] == 0))

  # The loss is given or evaluated.
  value = jnp.float32(offset) if offset > 0 else None
  found = _zeroed(value_fn, tolerance=tolerance, value=value)
  assert found == list(range(kept))


@pytest.mark.parametrize("rise", [1.0, np.nan])
def test_verification_zeroes_nothing_if_every_share_hurts(rise):
  def value_fn(params):
    return jnp.where(jnp.any(params["w"] == 0), 1 + rise, 1.0)

  # There are 61 candidates, so a thirty-second of them would be one.
  assert _zeroed(value_fn, tolerance=0.5, size=65) == []


def test_verification_halves_only_the_candidates():
  """Units that earlier mask updates pruned are not candidates."""
  params = {"w": jnp.arange(1.0, 17.0)}
  tx = fpp(
    optax.sgd(0.0),
    [Rule("w", 0.75)],
    begin=0,
    end=2,
    every=1,
    patience=0,
    score="magnitude",
    tolerance=0.0,
  )

  def value_fn(params):
    # The first zeros do no harm; of the later ones only one half do not.
    return jnp.sum(params["w"][11:] == 0).astype(jnp.float32)

  update = jax.jit(tx.update, static_argnames="value_fn")
  state, zeros = tx.init(params), []
  for _ in range(3):
    updates, state = update(params, state, params, value_fn=value_fn)
    params = optax.apply_updates(params, updates)
    zeros.append(int(np.sum(params["w"] == 0)))
  # The ramp chooses 0, 10 and 12: then 1 of 2 candidates is harmless.
  assert zeros == [0, 10, 11]


def test_fpp_inside_fpp_gets_the_statistics():
  params = {name: random_params()[name] for name in ("up", "embed")}
  inner = fpp(
    optax.sgd(0.0),
    [Rule("up", 0.5)],
    begin=0,
    end=0,
    every=1,
    score="activation",
  )
  outer = fpp(
    inner, [Rule("embed", 0.5)], begin=1, end=1, every=1, score="magnitude"
  )
  state, update = outer.init(params), jax.jit(outer.update)
  size = jnp.array([9.0, 9, 9, 9, 1e-4, 1e-4, 1e-4, 1e-4])
  for step in range(2):
    updates, state = update(
      separable(params, step), state, params, stats={"up": size}
    )
    params = optax.apply_updates(params, updates)
  # Inputs decide: |w| would not choose exactly the last four rows.
  np.testing.assert_array_equal(params["up"][4:], 0)
  assert (params["up"][:4] != 0).all()
  assert (params["embed"] == 0).sum() == 30


_HUGE = np.array([1e30, 1e30, 1.0, 1.0], np.float32)


@pytest.mark.parametrize("where", ["own", "other"])
def test_gradients_of_a_skipped_step_change_no_average(where):
  params = {"w": jnp.ones(4), "b": jnp.zeros(1)}
  tx = fpp(
    optax.apply_if_finite(optax.sgd(0.0), 9),
    [Rule("w", 0.5)],
    begin=10,
    end=10,
    every=1,
    score="saliency",
  )
  grads = {"w": jnp.arange(1.0, 5.0), "b": jnp.ones(1)}
  bad = {"w": jnp.asarray(_HUGE), "b": jnp.full(1, jnp.nan)}
  if where == "own":
    bad = {"w": bad["w"].at[3].set(jnp.inf), "b": jnp.ones(1)}
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(14):
    updates, state = update(bad if step == 3 else grads, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(params["w"], [0, 0, 1, 1])


@contextlib.contextmanager
def _warned(message):
  """Asserts that callbacks give one warning; no message: none."""
  if message is None:  # pytest makes warnings errors
    yield
    jax.effects_barrier()
    return
  with pytest.warns(UserWarning, match=message) as found:
    yield
    jax.effects_barrier()
  assert len(found) == 1


@pytest.mark.parametrize(
  ("score", "evidence"),
  [
    ("activation", np.nan),
    ("relative", -2.0),
    ("saliency", 0.0),
    ("movement", 0.0),
  ],
)
def test_a_site_without_evidence_is_not_pruned(score, evidence):
  """Another site, with evidence, is pruned."""
  params = {"w": jnp.ones((4, 2)), "v": jnp.ones((4, 2))}
  rules = [Rule("w", 0.5, score=score), Rule("v", 0.5, score="magnitude")]
  tx, debug = (
    fpp(
      optax.sgd(0.0),
      rules,
      begin=1,
      end=3,
      every=1,
      warn=not debug,
      debug=debug,
    )
    for debug in (False, True)
  )
  grads = {"w": jnp.full((4, 2), min(evidence, 0.0)), "v": jnp.zeros((4, 2))}
  if score in ("activation", "relative"):
    grads["w"] = jnp.zeros((4, 2))
  stats = {"w": jnp.full(4, evidence)}

  def step(params, state):
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  def check(params, state):
    debug.update(grads, state, params, stats=stats)

  update, checked = jax.jit(step), jax.jit(checkify.checkify(check))
  state = tx.init(params)
  with _warned("nothing is pruned in w,"):
    for _ in range(4):
      error, _ = checked(params, state)
      params, state = update(params, state)
  assert fpp_counts(rules, state, params)["zero"] == 4
  assert not fpp_counts(rules, state, params)["done"]
  assert (params["w"] == 1).all()
  with pytest.raises(ValueError, match="observed for 'w'"):
    error.throw()


def test_a_site_whose_gradients_end_keeps_its_masks():
  params, rules = {"w": jnp.arange(1.0, 9.0)}, [Rule("w", 0.5)]
  tx = fpp(
    optax.sgd(0.0),
    rules,
    begin=0,
    end=4,
    every=1,
    score="saliency",
    decay=0.0,  # the average is the last product
    warn=False,
  )
  state, update, masks = tx.init(params), jax.jit(tx.update), []
  for scale in (1.0, 1.0, 1.0, 0.0, 0.0):
    grads = {"w": jnp.full(8, scale)}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    masks.append(np.asarray(state.suspected["w"]))
    zeros = np.flatnonzero(params["w"] == 0).tolist()
  assert zeros == [0, 1]  # chosen by the second update
  assert masks[2].any()
  np.testing.assert_array_equal(masks[4], masks[2])
  assert state.zeroed == 2
  assert fpp_counts(rules, state, params)["undone"] == 0


@pytest.mark.parametrize(
  ("after", "undone", "patience"),
  [
    (optax.scale(0.5), 6, 0),  # 4 weights and 2 rows
    (optax.scale_by_learning_rate(0.1), 6, 2),
    (optax.add_decayed_weights(0.1), 6, 2),
    (optax.clip_by_global_norm(0.01), 6, 2),
    (optax.identity(), 0, 0),
    (optax.identity(), 0, 2),
  ],
  ids=["scale", "rate", "decay", "clip", "nothing", "nothing-patient"],
)
def test_zeros_that_a_later_transform_undoes_are_counted(
  after, undone, patience
):
  rules = [Rule("w", 0.5), Rule("embed", 0.5, "row")]
  params = {"w": jnp.arange(1.0, 9.0), "embed": jnp.ones((4, 3))}
  tx, debug = (
    optax.chain(
      fpp(
        optax.sgd(0.0),
        rules,
        begin=0,
        end=4,
        every=1,
        patience=patience,
        score="magnitude",
        warn=not debug,
        debug=debug,
      ),
      after,
    )
    for debug in (False, True)
  )

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  def check(params, state):
    debug.update(params, state, params)

  update, checked = jax.jit(step), jax.jit(checkify.checkify(check))
  state, messages = tx.init(params), []
  with _warned("fpp: pruned units are not zero any more" if undone else None):
    for _ in range(5):
      error, _ = checked(params, state)
      messages.append(error.get())
      params, state = update(params, state)
  counts = fpp_counts(rules, state, params)  # of a chain
  assert counts["undone"] == undone
  assert counts["zero"] == (0 if undone else 10)
  found = ["not zero any more" in (message or "") for message in messages]
  assert any(found) == bool(undone)


def test_zeros_of_the_last_mask_update_that_are_undone_give_a_warning():
  tx = optax.chain(
    fpp(
      optax.sgd(0.1), Rule("w", 0.5), begin=2, end=3, every=5, score="magnitude"
    ),
    optax.scale_by_learning_rate(0.1),
  )
  params = {"w": jnp.arange(1.0, 9.0)}
  update, state = jax.jit(tx.update), tx.init(params)

  def step(params, state):
    updates, state = update(params, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(3):
    params, state = step(params, state)
  with _warned("not zero any more"):
    params, state = step(params, state)


def test_warnings_under_vmap_are_those_of_the_single_runs():
  """`vmap` turns a `cond` into a select, which runs both branches."""
  tx = fpp(
    optax.sgd(0.1), Rule("w", 0.5), begin=0, end=2, every=1, score="saliency"
  )

  def run(params, scale):
    state = tx.init(params)
    for _ in range(4):
      grads = jax.tree.map(lambda w: scale * w, params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  params = {"w": jnp.arange(1.0, 17.0).reshape(2, 8)}
  runs = jax.jit(jax.vmap(run))
  with _warned(None):
    pruned = runs(params, jnp.ones(2))
  np.testing.assert_array_equal(np.sum(pruned["w"] == 0, axis=1), [4, 4])
  with _warned("nothing is pruned in w,"):
    pruned = runs(params, jnp.array([1.0, 0.0]))
  np.testing.assert_array_equal(np.sum(pruned["w"] == 0, axis=1), [4, 0])


@pytest.mark.parametrize("bad", ["gradient", "statistic", "negative"])
def test_statistics_of_a_skipped_step_change_no_average(bad):
  params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(1)}
  tx = fpp(
    optax.apply_if_finite(optax.sgd(0.0), 9),
    [Rule("w", 0.5)],
    begin=10,
    end=10,
    every=1,
    score="activation",
  )
  ones = jax.tree.map(jnp.ones_like, params)
  stats = jnp.arange(1.0, 5.0)
  nan = {**ones, "b": jnp.full(1, jnp.nan)}
  bad_grads, bad_stats = {
    "gradient": (nan, jnp.asarray(_HUGE)),
    "statistic": (ones, jnp.asarray(_HUGE).at[3].set(jnp.inf)),
    "negative": (ones, jnp.asarray(_HUGE).at[3].set(-1.0)),
  }[bad]
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(14):
    g, s = (bad_grads, bad_stats) if step in (0, 3) else (ones, stats)
    updates, state = update(g, state, params, stats={"w": s})
    params = optax.apply_updates(params, updates)
  assert state.observed == 12
  np.testing.assert_allclose(state.averages["w"], stats, rtol=1e-6)
  np.testing.assert_array_equal(params["w"][:, 0] == 0, [1, 1, 0, 0])


def test_fpp_passes_a_line_search_its_arguments_without_statistics():
  def loss(p):
    return jnp.sum((p["w"] - jnp.arange(1.0, 5.0)[:, None]) ** 2)

  tx = fpp(optax.lbfgs(), Rule("w", 0.5), begin=4, end=4, every=1)
  stats = {"w": jnp.array([1.0, 1.0, 1e-4, 1e-4])}

  @jax.jit
  def step(params, state):
    value, grad = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
      grad, state, params, value=value, grad=grad, value_fn=loss, stats=stats
    )
    return optax.apply_updates(params, updates), state

  params = {"w": jnp.array([[0.1], [0.2], [0.3], [0.4]])}
  state = tx.init(params)
  for _ in range(8):
    params, state = step(params, state)
  np.testing.assert_allclose(params["w"][:, 0], [1, 2, 0, 0], atol=1e-5)


def test_fpp_takes_a_patience_beyond_its_mask_updates():
  params = {"w": jnp.arange(1.0, 9.0)}
  tx = fpp(
    optax.sgd(0.0),
    Rule("w", 0.5),
    begin=0,
    end=2,
    every=1,
    patience=100,
    score="magnitude",
  )
  state = tx.init(params)
  for step in range(3):  # not jitted, so the state is not traced
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    assert np.sum(params["w"] == 0) == (4 if step == 2 else 0)
