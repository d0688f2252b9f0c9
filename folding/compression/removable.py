"""What may go without a trace, and so what stays: the plan of a shrink.

Each function finds the units of one kind that contribute nothing to the
function, adds the indices of the others to `kept`, and says what is left.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from folding.config import Config, Layer

Kept = dict[str, dict[int, np.ndarray]]  # {path: {axis: indices that stay}}
Zeros = Mapping[str, Any]  # {path: bool array, True at zero}


def keep_neurons(mlp: str, zeros: Zeros, multiple: int, kept: Kept) -> int:
  """Plans a feed-forward layer and returns its width.

  Args:
    mlp: Path of the layer.
    zeros: Of all parameters.
    multiple: The width is rounded up to it, at most to what it was.
    kept: Is added to.
  """
  is_dead_F = zeros[f"{mlp}/down/kernel"].all(1)
  for side in ("up", "gate"):
    if f"{mlp}/{side}/kernel" in zeros:
      # Every activation maps 0 to 0.
      is_silent_F = zeros[f"{mlp}/{side}/kernel"].all(0)
      is_dead_F |= is_silent_F & zeros.get(f"{mlp}/{side}/bias", True)
  alive = np.flatnonzero(~is_dead_F)
  size = -(-max(len(alive), 1) // multiple) * multiple
  if size >= len(is_dead_F):
    return len(is_dead_F)
  filling = np.flatnonzero(is_dead_F)[: size - len(alive)]
  indices = np.sort(np.concatenate([alive, filling]))
  kept[f"{mlp}/down/kernel"] = {0: indices}
  for side in ("up", "gate"):
    kept[f"{mlp}/{side}/kernel"] = {1: indices}
    kept[f"{mlp}/{side}/bias"] = {0: indices}
  return size


def keep_heads(
  attn: str, zeros: Zeros, layer: Layer, kept: Kept
) -> tuple[int, ...]:
  """Plans an attention layer and returns its heads, as in `model.heads`.

  Args:
    attn: Path of the layer.
    zeros: Of all parameters.
    layer: Its shape.
    kept: Is added to.
  """
  heads = layer.heads
  is_dead_H = zeros[f"{attn}/o/kernel"].all((1, 2))
  H, K, _ = zeros[f"{attn}/o/kernel"].shape
  shared = len(heads) // layer.num_kv_heads
  if f"{attn}/v/diagonal" in zeros:
    is_dead_H |= zeros[f"{attn}/v/diagonal"].reshape(H, -1).all(1)
  elif f"{attn}/v/kernel" in zeros:
    is_silent_J = zeros[f"{attn}/v/kernel"].all((0, 2))
    if f"{attn}/v/bias" in zeros:
      is_silent_J &= zeros[f"{attn}/v/bias"].all(1)
    is_dead_H |= np.repeat(is_silent_J, shared)
  is_dead_J = is_dead_H.reshape(-1, shared).all(1)
  if is_dead_J.all():
    is_dead_J[0] = False  # a layer needs a head
  if not is_dead_J.any():
    return heads
  of_j = np.flatnonzero(~is_dead_J)
  of_h = _members(of_j, shared)
  kept[f"{attn}/v/diagonal"] = {0: _members(of_h, K)}
  for role, axis, indices in (
    ("q/kernel", 1, of_h),
    ("q/bias", 0, of_h),
    ("k/kernel", 1, of_j),
    ("k/bias", 0, of_j),
    ("v/kernel", 1, of_j),
    ("v/bias", 0, of_j),
    ("o/kernel", 0, of_h),
    ("log_slopes", 0, of_h),
    ("frequency", 0, of_j),
  ):
    kept[f"{attn}/{role}"] = {axis: indices}
  return tuple(heads[h] for h in of_h)


def keep_tokens(config: Config, zeros: Zeros, kept: Kept) -> np.ndarray:
  """Plans the embedding and returns the map of tokens, int32[V]."""
  # The logits of a next-token model need every row.
  is_zero_V = zeros["embed/embedding"].all(1) & (config.task != "lm")
  stand_in = np.argmax(is_zero_V)  # the first one, for all of them
  stays_V = ~is_zero_V
  stays_V[stand_in] = True
  token_map_V = np.cumsum(stays_V, dtype=np.int32) - np.int32(1)
  if not stays_V.all():
    token_map_V[~stays_V] = token_map_V[stand_in]
    kept["embed/embedding"] = {0: np.flatnonzero(stays_V)}
  return token_map_V


def _members(groups: np.ndarray, size: int) -> np.ndarray:
  """Returns the indices of the members of groups of one size."""
  return (groups[:, None] * size + np.arange(size)).reshape(-1)
