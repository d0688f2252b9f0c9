"""The k lowest of many scores, exactly, without sorting or storing them.

A threshold is found by bisection on the bits of the scores: 32 counting
passes, each linear in the number of scores. Only counts leave an array, so
sharded scores stay where they are. Ties are broken by position, so the choice
does not depend on how arrays are sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

# A float array, or a function of the arrays that it holds which returns one.
Scores: TypeAlias = Any


def value(scores: Scores) -> jax.Array:
  """Returns the array of scores."""
  return scores() if isinstance(scores, Partial) else scores


def lowest(scores: Sequence[Scores], k: ArrayLike) -> list[jax.Array]:
  """Returns bool arrays that are True at exactly the k lowest scores.

  Args:
    scores: Float arrays, ranked together; no NaN. -0.0 ranks below 0.0. A
      `jax.tree_util.Partial` that takes no further argument is called in each
      pass over its array, so that the array need not be stored.
    k: int32[], 0 <= k <= number of scores in all (below 2^31).

  Example:
    >>> [chosen.tolist() for chosen in lowest(
    ...   [jnp.array([3.0, 1.0]), jnp.array([2.0, 1.0])], 2)]
    [[False, True], [False, True]]
  """
  k = jnp.asarray(k, jnp.int32)
  # The least key t with count(key <= t) >= k: the k-th lowest.
  t = _bisect(
    lambda t, scores: _count([key <= t for key in _keys(scores)]) >= k,
    (jnp.uint32(0), jnp.uint32(2**32 - 1)),
    scores,
  )
  keys = _keys(scores)
  below = [key < t for key in keys]
  tied = [key == t for key in keys]
  wanted = k - _count(below)  # of the tied ones, in order of position

  def first_of_tied(position, scores, one):
    keys = _keys(scores)
    return [
      (key == t) & (index < position)
      for key, index in zip(keys, _positions(keys, one), strict=True)
    ]

  size = jnp.uint32(sum(key.size for key in keys))
  start = jnp.where(_count(tied) == wanted, size, 0)  # all: nothing to search
  inputs = scores, jnp.uint32(1)
  cut = _bisect(
    lambda position, inputs: _count(first_of_tied(position, *inputs)) >= wanted,
    (start, size),
    inputs,
  )
  return [
    is_below | is_first
    for is_below, is_first in zip(
      below, first_of_tied(cut, *inputs), strict=True
    )
  ]


def _keys(scores: Sequence[Scores]) -> list[jax.Array]:
  """Maps floats to uint32 so that the order is the same."""
  sign = jnp.uint32(1 << 31)
  keys = []
  for s in scores:
    x = value(s).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    keys.append(jnp.where(bits >= sign, ~bits, bits | sign))
  return keys


def _positions(arrays: Sequence[jax.Array], one: jax.Array) -> list[jax.Array]:
  """Returns the position of every element in the row-major whole, uint32.

  Args:
    arrays: Their shapes count.
    one: uint32[] 1; as an input, so that positions depend on the pass.
  """
  positions, start = [], 0
  for array in arrays:
    index = jnp.full(array.shape, start, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
      step = jnp.uint32(stride) * one
      index += step * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
      stride *= array.shape[axis]
    positions.append(index)
    start += array.size
  return positions


def sum_eights(x: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
  """Returns the sums of eight neighbours each along an axis.

  As a first step of a sum: XLA for CPUs would otherwise store a number for each
  element before it adds them up, which takes ten times as long as the rest.
  """
  axis %= x.ndim
  missing = -x.shape[axis] % 8
  if missing:
    x = jnp.pad(x, [(0, missing * (a == axis)) for a in range(x.ndim)])
  shape = (*x.shape[:axis], x.shape[axis] // 8, 8, *x.shape[axis + 1 :])
  return jnp.sum(x.reshape(shape), axis=axis + 1, dtype=dtype)


def _count(chosen: Sequence[jax.Array]) -> jax.Array:
  total = jnp.int32(0)
  for c in chosen:
    # Eight neighbours may lie on two devices, and would have to be moved.
    if c.ndim > 1 and jax.device_count() == 1:
      c = sum_eights(c, -2, jnp.int8)
    total += jnp.sum(c, dtype=jnp.int32)
  return total


def _bisect(
  reached: Callable[[jax.Array, Any], jax.Array],
  bounds: tuple[jax.Array, jax.Array],
  inputs: Any,
) -> jax.Array:
  """Returns the least uint32 in bounds at which a monotone predicate holds.

  Args:
    reached: The predicate, of a number and the inputs.
    bounds: (low, high); it holds at high.
    inputs: Arrays; what is computed of them is not kept between passes.
  """

  def halve(bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    # Tied to the pass, lest XLA take what is made of the inputs out of it.
    holds = reached(middle, jax.lax.optimization_barrier((inputs, middle))[0])
    return jnp.where(holds, low, middle + 1), jnp.where(holds, middle, high)

  return jax.lax.while_loop(lambda b: b[0] < b[1], halve, bounds)[1]
