"""The k lowest of many scores, exactly and without sorting.

The threshold is found one byte after the other, by counting passes over bytes.
Only counts leave a device, so sharded scores stay where they are. Ties are broken
by position, so the choice does not depend on the sharding.
"""

import functools
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
    byte, below = _search(
      lambda t: _count(bytes_ <= t.astype(jnp.uint8)), k, bits=8
    )
    return (prefix << 8) | byte, k - below

  start = jnp.uint32(0), jnp.asarray(k, jnp.int32)
  t, wanted = jax.lax.fori_loop(0, 4, next_byte, start)
  is_tied = keys == t

  def is_before(p):  # the loop below would store positions outside it
    return is_tied & (_positions(scores) < p)

  # If all tied elements are wanted, there is nothing to search.
  has_all = _count(is_tied) == wanted
  end, _ = _search(
    lambda p: _count(is_before(p)), wanted, bits=jnp.where(has_all, 0, 32)
  )
  return (keys < t) | is_tied & (has_all | is_before(end))


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


def _search(
  count: Callable[[jax.Array], jax.Array], k: jax.Array, bits: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Returns the least t of `bits` bits with count(t) >= k, and count(t - 1).

  Args:
    count: Monotone function of uint32[]. It is at least k at the largest t, where
      it is not called.
    k: int32[].
    bits: 8, or one of 0 and 32. A constant lets compilers count the work.
  """

  def by_passes_of(each):
    """Each pass makes 2^each - 1 counts at once, and finds so many bits."""

    def one_pass(n, found):
      t, below = found
      step = jnp.uint32(1) << jnp.uint32(bits - each * (n + 1))
      parts = (step * jnp.uint32(j) for j in range(1, 2**each))
      counts = jnp.stack([count(t + part - 1) for part in parts])
      is_below = counts < k
      t += step * jnp.sum(is_below, dtype=jnp.uint32)
      return t, jnp.maximum(below, jnp.max(jnp.where(is_below, counts, 0)))

    start = jnp.uint32(0), jnp.int32(0)
    return jax.lax.fori_loop(0, bits // each, one_pass, start)

  several = functools.partial(by_passes_of, 4)  # devices wait for each pass
  if jax.device_count() > 1:
    return several()
  one = functools.partial(by_passes_of, 1)  # XLA:CPU does not fuse the counts
  return jax.lax.platform_dependent(cpu=one, default=several)
