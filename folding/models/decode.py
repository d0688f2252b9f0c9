"""Caches of the earlier tokens, for decoding.

A KV cache grows with the sequence. Layers with logits of rank 1 may have the
`PastState` of `linear_attention` instead, whose size is constant.

Prompts are left-padded, so the newest tokens of all rows share one position.
Positions count from the start of the padded row; their differences are the
distances of tokens.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from folding.models.linear_attention import PastState


class Step(NamedTuple):
  """Position of the tokens of one decoding step.

  Attributes:
    position: int32[], of the new tokens in the padded rows.
    start_B: int32[B], number of pad tokens at the start of each row.
  """

  position: Int[Array, ""]
  start_B: Int[Array, " B"]


class KVCache(NamedTuple):
  """Keys and values of one layer, M slots each. Position p is in slot p mod M.

  Batch and heads are one axis. XLA for CPUs would copy the whole cache at every
  step if the axes of an updated array had to be split or joined.
  """

  k: Float[Array, "BJ G M"]
  v: Float[Array, "BI M K"]


Cache: TypeAlias = KVCache | PastState


def make_cache(
  k_BMJG: Float[Array, "B M J G"], v_BMIK: Float[Array, "B M I K"]
) -> KVCache:
  """Returns a cache with a slot for each of these positions."""
  B, M, J, G = k_BMJG.shape
  I, K = v_BMIK.shape[2:]  # noqa: E741
  return KVCache(
    k_BMJG.transpose(0, 2, 3, 1).reshape(B * J, G, M),
    v_BMIK.transpose(0, 2, 1, 3).reshape(B * I, M, K),
  )


def write(cache: KVCache, new: KVCache, position: Int[Array, ""]) -> KVCache:
  """Returns the cache with one more position, in place of the oldest if full."""
  slot = position % cache.k.shape[2]
  update = jax.lax.dynamic_update_slice_in_dim
  return KVCache(
    update(cache.k, new.k, slot, axis=2), update(cache.v, new.v, slot, axis=1)
  )


def slot_positions(num_slots: int, newest: Int[Array, ""]) -> Int[Array, " M"]:
  """Returns the position that each slot holds; negative if it is empty."""
  return newest - (newest - jnp.arange(num_slots)) % num_slots


def resize(cache: KVCache, num_slots: int) -> KVCache:
  """Returns a full cache with more slots, or with its newest positions.

  Position p is in slot p, as from `make_cache`.
  """

  def resized(x, axis):
    length = x.shape[axis]
    if num_slots < length:
      newest = jax.lax.slice_in_dim(x, length - num_slots, length, axis=axis)
      return jnp.roll(newest, length % num_slots, axis)
    empty = [(0, 0)] * x.ndim
    empty[axis] = (0, num_slots - length)
    return jnp.pad(x, empty)

  return KVCache(resized(cache.k, 2), resized(cache.v, 1))
