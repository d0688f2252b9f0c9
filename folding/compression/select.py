"""The k lowest of many scores, exactly, without sorting them.

A threshold is found by bisection on the bits of the scores: 32 counting
passes, each linear in the number of scores. Only counts leave an array, so
sharded scores stay where they are. Ties are broken by position, so the choice
does not depend on how arrays are sharded.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def lowest(scores: Sequence[jax.Array], k: ArrayLike) -> list[jax.Array]:
  """Returns bool arrays that are True at exactly the k lowest scores.

  Args:
    scores: Float arrays, ranked together; no NaN. -0.0 ranks below 0.0.
    k: int32[], 0 <= k <= number of scores in all (below 2^31).

  Example:
    >>> [chosen.tolist() for chosen in lowest(
    ...   [jnp.array([3.0, 1.0]), jnp.array([2.0, 1.0])], 2)]
    [[False, True], [False, True]]
  """
  keys = [_ordered(score) for score in scores]
  k = jnp.asarray(k, jnp.int32)
  # The least key t with count(key <= t) >= k: the k-th lowest.
  t = _bisect(lambda t: _count([key <= t for key in keys]) >= k)
  below = [key < t for key in keys]
  tied = [key == t for key in keys]
  wanted = k - _count(below)  # of the tied ones, in order of position

  def first_of_tied(position):
    return [
      is_tied & (index < position)
      for is_tied, index in zip(tied, _positions(keys), strict=True)
    ]

  cut = _bisect(lambda p: _count(first_of_tied(p)) >= wanted)
  return [
    is_below | is_first
    for is_below, is_first in zip(below, first_of_tied(cut), strict=True)
  ]


def _ordered(score: jax.Array) -> jax.Array:
  """Maps floats to uint32 so that the order is the same."""
  bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _positions(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the position of every element in the row-major whole, uint32."""
  positions, start = [], 0
  for array in arrays:
    index = jnp.full(array.shape, start, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
      step = jnp.uint32(stride)
      index += step * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
      stride *= array.shape[axis]
    positions.append(index)
    start += array.size
  return positions


def _count(chosen: Sequence[jax.Array]) -> jax.Array:
  return sum((jnp.sum(c, dtype=jnp.int32) for c in chosen), jnp.int32(0))


def _bisect(reached: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Returns the least uint32 for which a monotone predicate holds."""

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    return jax.lax.cond(
      reached(middle), lambda: (low, middle), lambda: (middle + 1, high)
    )

  bounds = (jnp.uint32(0), jnp.uint32(2**32 - 1))
  return jax.lax.fori_loop(0, 32, halve, bounds)[1]
