"""The k lowest of many scores, exactly and without sorting.

The threshold is found one byte after the other, by bisection: eight counting
passes over bytes for each of the four. Only counts leave a device, so sharded
scores stay where they are. Ties are broken by position, so the choice does not
depend on the sharding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def lowest(scores: jax.Array, k: ArrayLike) -> jax.Array:
  """Returns bools that are True at exactly the k lowest scores.

  Args:
    scores: Float array of fewer than 2^31 elements, without NaN. -0.0 ranks
      below 0.0; equal scores rank by position.
    k: int32[], 0 <= k <= number of scores.

  Example:
    >>> lowest(jnp.array([3.0, 1.0, 2.0, 1.0, 1.0]), 2).tolist()
    [False, True, False, True, False]
  """
  keys = _sortable(scores)

  def next_byte(n, found):
    """Returns one more byte of the k-th lowest key, and its rank among equals."""
    prefix, k = found
    shift = jnp.uint32(24 - 8 * n)
    is_open = (n == 0) | (keys >> (shift + 8) == prefix)
    # No count includes 255, so closed keys do not count.
    bytes_ = jnp.where(is_open, (keys >> shift).astype(jnp.uint8), 255)
    byte, below = _bisect(
      lambda t: _count(bytes_ <= t.astype(jnp.uint8)), k, 255, iterations=8
    )
    return (prefix << 8) | byte, k - below

  start = jnp.uint32(0), jnp.asarray(k, jnp.int32)
  t, wanted = jax.lax.fori_loop(0, 4, next_byte, start)
  is_tied = keys == t

  def is_before(p):  # the loop below would store positions outside it
    return is_tied & (_positions(scores) < p)

  # If all tied elements are wanted, there is nothing to search.
  least = jnp.where(_count(is_tied) == wanted, scores.size, 0)
  end, _ = _bisect(lambda p: _count(is_before(p)), wanted, scores.size, least)
  return (keys < t) | is_before(end)


def _sortable(scores: jax.Array) -> jax.Array:
  """Maps floats to uint32 of the same order."""
  sign = jnp.uint32(1 << 31)
  bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _positions(x: jax.Array) -> jax.Array:
  """Returns the row-major position of every element, uint32."""
  index = jnp.zeros(x.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += jnp.uint32(stride) * place
    stride *= x.shape[axis]
  return index


def _count(chosen: jax.Array) -> jax.Array:
  """Returns int32[], how many are True.

  XLA:CPU stores an int32 per element of a plain sum, and takes five times as long
  as if eight neighbours are first summed as int8. On several devices neighbours may
  lie on different ones.
  """

  def plain(chosen):
    return jnp.sum(chosen, dtype=jnp.int32)

  def by_eights(chosen):
    rows = chosen.shape[-2]
    padding = [(0, 0)] * (chosen.ndim - 2) + [(0, -rows % 8), (0, 0)]
    eights = jnp.pad(chosen, padding)
    eights = eights.reshape(*chosen.shape[:-2], -1, 8, chosen.shape[-1])
    return plain(jnp.sum(eights, axis=-2, dtype=jnp.int8))

  if chosen.ndim < 2 or jax.device_count() > 1:
    return plain(chosen)
  return jax.lax.platform_dependent(chosen, cpu=by_eights, default=plain)


def _bisect(
  count: Callable[[jax.Array], jax.Array],
  k: jax.Array,
  high: int,
  low: ArrayLike = 0,
  iterations: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the least t in [low, high] with count(t) >= k, and count(t - 1).

  Args:
    count: Monotone function of uint32[], 0 below `low`. It is at least k at
      `high`, where it is not called.
    k: int32[].
    high: The largest t.
    low: The least t.
    iterations: Number of halvings, if known: compilers then count the work of the
      loop. None: until one t is left.
  """

  def halve(bounds):
    low, high, below = bounds
    middle = low + (high - low) // 2
    found = count(middle)
    is_enough = found >= k
    return (
      jnp.where(is_enough, low, middle + 1),
      jnp.where(is_enough, middle, high),
      jnp.where(is_enough, below, found),
    )

  bounds = jnp.uint32(low), jnp.uint32(high), jnp.int32(0)
  if iterations is None:
    bounds = jax.lax.while_loop(lambda b: b[0] < b[1], halve, bounds)
  else:
    bounds = jax.lax.fori_loop(0, iterations, lambda _, b: halve(b), bounds)
  return bounds[1], bounds[2]
