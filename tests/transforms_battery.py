"""Checks that every optax transform of this library must pass.

A test file parametrizes over `CHECKS` and its own cases, and calls
`check(make, extra, folder)`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

Extra = Callable[[jax.Array], dict[str, Any]]  # step -> keywords of update()
STEPS = 4

# LLVM fuses some products with sums, into one rounding. Which ones depends on
# the rest of its module. Unoptimized code in many modules does not, so two
# programs can be compared bit for bit.
jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 32,
  },
)


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
  """Returns parameters whose paths have a slash, with odd sizes."""
  rng = np.random.default_rng(0)
  return {
    "mlp": {
      "up": {"kernel": jnp.asarray(rng.normal(size=(8, 13)), dtype)},
      "down": {"kernel": jnp.asarray(rng.normal(size=(13, 8)), dtype)},
    },
    "scale": jnp.asarray(rng.normal(size=5), dtype),
  }


def loss(params: Any, step: jax.Array) -> jax.Array:
  """Returns a sum over elements, so that each has its own gradient."""
  targets = jax.tree.map(
    lambda p: jnp.sin(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape),
    params,
  )
  terms = jax.tree.map(
    lambda p, t: jnp.sum(
      jnp.cos(step + t) * p + 0.5 * (p.astype(jnp.float32) - t) ** 2
    ),
    params,
    targets,
  )
  return sum(jax.tree.leaves(terms), jnp.float32(0))


def make_step(tx: Any, extra: Extra, gradient_dtype: Any = None) -> Callable:
  """Returns the update of (params, state, step), not jitted."""

  def step_fn(params, state, step):
    grads = jax.grad(loss)(params, step)
    if gradient_dtype is not None:
      grads = jax.tree.map(lambda g: g.astype(gradient_dtype), grads)
    updates, state = tx.update(grads, state, params, **extra(step))
    return optax.apply_updates(params, updates), state

  return step_fn


def take_steps(step_fn: Any, params: Any, state: Any, steps: range) -> Any:
  """Returns (params, state) after some steps."""
  for step in steps:
    params, state = step_fn(params, state, jnp.float32(step))
  return params, state


def run(
  tx: Any, extra: Extra, params: Any, steps: int = STEPS, wrap: Any = jit
) -> tuple[Any, Any]:
  """Returns (params, state) after the first steps."""
  step_fn, state = wrap(make_step(tx, extra)), tx.init(params)
  return take_steps(step_fn, params, state, range(steps))


@functools.cache
def plain_step(make: Any, extra: Extra) -> tuple[Callable, list[int]]:
  """Returns the jitted step of the plain run, and a list with a 1 per trace."""
  step_fn, traces = make_step(make(), extra), []

  def counted(*args):
    traces.append(1)
    return step_fn(*args)

  return jit(counted), traces


def plain_run(make: Any, extra: Extra, steps: int) -> tuple[Any, Any]:
  """Returns (params, state) after the first steps of the plain run."""
  step_fn, _ = plain_step(make, extra)
  params = make_params()
  return take_steps(step_fn, params, make().init(params), range(steps))


@functools.cache
def baseline(make: Any, extra: Extra) -> tuple[Any, Any]:
  """Returns (params, state) of the plain run that others are compared with."""
  return plain_run(make, extra, STEPS)


def assert_equal(tree: Any, expected: Any) -> None:
  """Asserts the same structure, dtypes and bits."""
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def jit_equals_eager(make, extra, folder):
  del folder
  jitted, _ = plain_run(make, extra, 2)
  eager, _ = run(make(), extra, make_params(), 2, wrap=lambda f: f)
  for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
    # A few roundings of float32: jit may fuse a product with a sum.
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(a == 0, b == 0)


def one_trace(make, extra, folder):
  del folder
  baseline(make, extra)
  _, traces = plain_step(make, extra)
  assert len(traces) == 1


def keeps_tree_and_dtypes(make, extra, folder):
  del folder
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
    with jax.enable_x64(dtype == jnp.float64):
      params, tx = make_params(dtype), make()
      before = jax.eval_shape(tx.init, params)
      after, state = jax.eval_shape(
        make_step(tx, extra), params, before, jnp.float32(0)
      )
      assert after == jax.eval_shape(lambda: params)  # noqa: B023
      assert state == before


def inside_a_chain(make, extra, folder):
  del folder
  chained = optax.chain(optax.identity(), make())
  expected, _ = baseline(make, extra)
  assert_equal(run(chained, extra, make_params())[0], expected)


def under_multi_steps(make, extra, folder):
  """Each gradient twice, averaged over two, is the run with half the steps."""
  del folder
  expected, _ = baseline(make, extra)
  multi = optax.MultiSteps(make(), 2)
  step_fn = jit(make_step(multi, extra))
  params, state = make_params(), multi.init(make_params())
  for step in range(2 * STEPS):
    # The first of two leaves the parameters alone, so the gradient is equal.
    params, state = step_fn(params, state, jnp.float32(step // 2))
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(a == 0, b == 0)


def ignores_unknown_extra_args(make, extra, folder):
  del folder
  expected = baseline(make, extra)
  more = run(make(), lambda s: extra(s) | {"weather": s}, make_params())
  assert_equal(more, expected)


def donated_state(make, extra, folder):
  del folder
  given = make_params()
  expected = baseline(make, extra)
  donating = run(
    make(),
    extra,
    jax.tree.map(jnp.array, given),
    wrap=lambda f: jit(f, donate_argnums=(0, 1)),
  )
  assert_equal(donating, expected)
  assert_equal(given, make_params())  # init kept no array of the caller


def narrow_updates(make, extra, folder):
  """Zeros are exact even if updates are narrower than parameters."""
  del folder
  tx, params = make(), make_params()
  step_fn = jit(make_step(tx, extra, jnp.bfloat16))
  params, _ = take_steps(step_fn, params, tx.init(params), range(STEPS))
  exact, _ = baseline(make, extra)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
    assert np.sum(np.asarray(a) == 0) == np.sum(np.asarray(b) == 0)


def resumes_from_a_checkpoint(make, extra, folder):
  """Half the steps, saved and restored, then the other half: the same bits."""
  expected = baseline(make, extra)
  half = plain_run(make, extra, STEPS // 2)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
  )
  with ocp.CheckpointManager(os.path.abspath(folder)) as manager:
    manager.save(0, args=ocp.args.StandardSave(half))
    manager.wait_until_finished()
    params, state = manager.restore(0, args=ocp.args.StandardRestore(like))
  assert_equal((params, state), half)
  step_fn, _ = plain_step(make, extra)
  rest = take_steps(step_fn, params, state, range(STEPS // 2, STEPS))
  assert_equal(rest, expected)


def mismatched_trees(make, extra, folder):
  del folder
  tx, params = make(), make_params()
  state = tx.init(params)
  with pytest.raises(ValueError, match="different structure"):
    tx.update({"scale": params["scale"]}, state, params, **extra(jnp.int32(0)))


CHECKS = [
  jit_equals_eager,
  one_trace,
  keeps_tree_and_dtypes,
  inside_a_chain,
  under_multi_steps,
  ignores_unknown_extra_args,
  donated_state,
  narrow_updates,
  resumes_from_a_checkpoint,
  mismatched_trees,
]
