"""Keys and values of the tokens so far, for decoding.

Each attention layer has, in the collection "cache", slots/{k [B J, G, M],
v [B I, M, K]}. A slot holds one place: place p of a row is in slot p modulo M.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SLOT_AXIS = {"k": 2, "v": 1}


class Step(NamedTuple):
  """Where the one new token of each row stands, in decoding.

  Rows are filled up at their beginning, so that all stand at the same place
  and the distance of two places is that of two tokens.

  Attributes:
    place: int32[], places before, those filled up included.
    start_B: int32[B], places at the beginning that hold no token.
  """

  place: Int[Array, ""]
  start_B: Int[Array, " B"]


def by_head(
  k_BMJG: Float[Array, "B M J G"], v_BMIK: Float[Array, "B M I K"]
) -> dict[str, Array]:
  """Returns keys and values as a cache of M slots.

  They lie as matrices, one a head, as decoding multiplies them. Batch and
  heads are one axis: XLA for CPU copies the whole cache in each step where it
  has to drop or join axes of an array that is written to.
  """
  B, M, J, G = k_BMJG.shape
  I, K = v_BMIK.shape[2:]  # noqa: E741
  return {
    "k": k_BMJG.transpose(0, 2, 3, 1).reshape(B * J, G, M),
    "v": v_BMIK.transpose(0, 2, 1, 3).reshape(B * I, M, K),
  }


def write(
  cache: dict[str, Array], new: dict[str, Array], place: Int[Array, ""]
) -> dict[str, Array]:
  """Returns the cache of a layer with one more place.

  Args:
    cache: Of M slots.
    new: Of one slot, from `by_head`.
    place: Of the new token.
  """
  return {
    name: jax.lax.dynamic_update_slice_in_dim(
      old, new[name], place % old.shape[axis], axis
    )
    for name, axis in _SLOT_AXIS.items()
    for old in [cache[name]]
  }


def places(num_slots: int, newest: Int[Array, ""]) -> Int[Array, " M"]:
  """Returns the place that each slot holds; below 0 where it holds none."""
  return newest - (newest - jnp.arange(num_slots)) % num_slots


def resize(cache: Any, num_slots: int) -> Any:
  """Returns the caches of all layers with other than the places of a prefill.

  Args:
    cache: The collection as `Transformer.prefill` fills it.
    num_slots: M; with fewer than there are places, the newest are kept.
  """

  def resized(path, x):
    if getattr(path[-1], "key", None) not in _SLOT_AXIS:
      return x  # of a `past`, which has no slots
    axis = _SLOT_AXIS[path[-1].key]
    length = x.shape[axis]
    if num_slots < length:
      newest = jax.lax.slice_in_dim(x, length - num_slots, length, axis=axis)
      return jnp.roll(newest, length % num_slots, axis)
    empty = [(0, 0)] * x.ndim
    empty[axis] = (0, num_slots - length)
    return jnp.pad(x, empty)

  return jax.tree.map_with_path(resized, cache)
