"""A loop made for jaxpruner's hooks trains what a loop with `fpp` trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from folding import Rule, fpp
from folding.compression.hooks import Hooks

OPTIONS = {"begin": 2, "end": 8, "every": 2}
RULES = [Rule("w", 0.5)]


def _start():
  x = jax.random.normal(jax.random.key(0), (32, 8))
  return {"w": jax.random.normal(jax.random.key(1), (8, 4))}, x, x[:, :4] ** 2


def _loss(params, x, y):
  return jnp.mean((x @ params["w"] - y) ** 2)


def _with_hooks(pruner, inner, calls):
  """The example loop of jaxpruner's README, with its three calls."""
  params, x, y = _start()
  tx = pruner.wrap_optax(inner)
  state = tx.init(params)
  for _ in range(12):
    forward = params
    if calls:
      forward = pruner.pre_forward_update(params, state)
    grads = jax.grad(_loss)(forward, x, y)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if calls:
      params = pruner.post_gradient_update(params, state)
  return np.asarray(params["w"])


def test_hooks_train_as_fpp_does_bit_for_bit():
  params, x, y = _start()
  tx = fpp(optax.adamw(0.1), RULES, **OPTIONS)
  state = tx.init(params)
  for _ in range(12):
    updates, state = tx.update(jax.grad(_loss)(params, x, y), state, params)
    params = optax.apply_updates(params, updates)
  for calls in (True, False):
    found = _with_hooks(Hooks(RULES, OPTIONS), optax.adamw(0.1), calls)
    np.testing.assert_array_equal(found, np.asarray(params["w"]))
  assert np.count_nonzero(found == 0) == 16  # half of 32, to the last


def test_options_reach_fpp():
  options = OPTIONS | {"score": "random", "seed": 3}
  plain = _with_hooks(Hooks(RULES, OPTIONS), optax.adamw(0.1), True)
  drawn = _with_hooks(Hooks(RULES, options), optax.adamw(0.1), True)
  assert ((plain == 0) != (drawn == 0)).any()
