"""The k lowest of many scores, exactly and without sorting.

A range of keys that holds the threshold is split into 256 parts, and the part
that holds it is found by counting passes over bytes, until the threshold is known.
Only counts leave a device, so sharded scores stay where they are. Ties are broken
by position, so the choice does not depend on the sharding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# How many bits a pass over bytes finds. Devices wait for each pass, but XLA:CPU
# does not fuse the counts of one.
BITS = {"cpu": 1, "default": 4}
_SAMPLE = 4096  # scores that a first guess of the threshold is based on
_TOP = np.uint32(2**32 - 1)


class _Range(NamedTuple):
  """Keys from `first` to `last`, the k-th lowest among them.

  `until` keys are at most `last`.
  """

  first: jax.Array
  last: jax.Array
  until: jax.Array


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
  keys, k = _sortable(scores), jnp.asarray(k, jnp.int32)
  found = _Range(jnp.uint32(0), jnp.uint32(_TOP), jnp.int32(scores.size))
  if jax.device_count() > 1:  # a constant lets compilers count the work
    found = jax.lax.fori_loop(0, 4, lambda _, r: _narrow(keys, k, r), found)
  else:
    found = _until_known(keys, k, _narrow(keys, k, found, _guess(keys, k)))

  def first_tied():
    places = jnp.where(keys == found.first, 1 + _positions(scores), _TOP)
    places = jnp.where(keys < found.first, 0, places)
    ends = found._replace(first=jnp.uint32(0), last=jnp.uint32(scores.size))
    return places <= _until_known(places, k, ends).last

  return jax.lax.cond(found.until == k, lambda: keys <= found.last, first_tied)


def _until_known(keys: jax.Array, k: jax.Array, found: _Range) -> _Range:
  """Narrows a range to one key, or until exactly k keys are at most `last`."""
  return jax.lax.while_loop(
    lambda r: (r.until != k) & (r.first < r.last),
    lambda r: _narrow(keys, k, r),
    found,
  )


def _narrow(
  keys: jax.Array,
  k: jax.Array,
  found: _Range,
  guess: tuple[jax.Array, jax.Array] | None = None,
) -> _Range:
  """Returns the part of a range that the k-th lowest key is in.

  Args:
    keys: uint32 array.
    k: int32[].
    found: The range.
    guess: Keys that it probably lies between, which are split most finely. None:
      the ends of the range.
  """
  low, high = guess or (found.first, found.last)
  shift = jnp.maximum(24 - jax.lax.clz(high - low).astype(jnp.int32), 0)
  shift = shift.astype(jnp.uint32)
  # No count includes 255, where all higher keys are.
  parts = jnp.minimum((jnp.maximum(keys, low) - low) >> shift, 255)
  parts = parts.astype(jnp.uint8)
  part, until = _search(lambda t: _count(parts <= t.astype(jnp.uint8)), k)
  first = low + (part << shift)
  width = jnp.minimum((jnp.uint32(1) << shift) - 1, found.last - first)
  return _Range(
    first=jnp.where(part == 0, found.first, first),
    last=jnp.where(part == 255, found.last, first + width),
    until=jnp.minimum(found.until, until),
  )


def _guess(keys: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns keys that are likely to be below and above the k-th lowest."""
  sample = jnp.sort(keys.ravel()[:: max(keys.size // _SAMPLE, 1)])
  share = k / keys.size
  deviations = 3 * jnp.sqrt(share * (1 - share) / sample.size)
  ranks = jnp.stack([share - deviations, share + deviations]) * sample.size
  low, high = sample[jnp.clip(ranks.astype(jnp.int32), 0, sample.size - 1)]
  return low, high


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
  count: Callable[[jax.Array], jax.Array], k: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the least byte t with count(t) >= k, and count(t).

  Args:
    count: Monotone function of uint32[]. It is at least k at 255, where it is not
      called: then the returned count is 2^31 - 1.
    k: int32[].
  """

  def by_passes_of(each):
    """Each pass makes 2^each - 1 counts at once, and finds so many bits."""

    def one_pass(n, found):
      t, least = found
      step = jnp.uint32(1) << jnp.uint32(8 - each * (n + 1))
      parts = (step * jnp.uint32(j) for j in range(1, 2**each))
      counts = jnp.stack([count(t + part - 1) for part in parts])
      is_below = counts < k
      t += step * jnp.sum(is_below, dtype=jnp.uint32)
      return t, jnp.minimum(least, jnp.min(jnp.where(is_below, most, counts)))

    most = jnp.int32(2**31 - 1)
    return jax.lax.fori_loop(0, 8 // each, one_pass, (jnp.uint32(0), most))

  return jax.lax.platform_dependent(
    **{name: functools.partial(by_passes_of, n) for name, n in BITS.items()}
  )
