"""Exact attention of dense or folded heads, in one step or in blocks."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from folding.models import attention_kernel, block_attention

MASKED = -1e30  # finite, so that a row without any key has no NaN
QUERIES = 32  # per block of a short causal sequence
_FARTHEST = 128  # distances from here on share a bucket


class Biases(NamedTuple):
  """Learned parameters of the `position_bias` of a layer; None: it has none.

  Attributes:
    slopes_H: Slopes of ALiBi.
    relative_RH: Bias per bucket of distances, see `relative_buckets`.
  """

  slopes_H: Float[Array, " H"] | None = None
  relative_RH: Float[Array, "R H"] | None = None


def attend(
  q_BLHG: Float[Array, "B L H G"],
  k_JGM: Float[Array, "*J G M"],
  v_IMr: Float[Array, "*I M r"],
  bias_HLM: Float[Array, "#H L M"],
  mask_BM: Bool[Array, "B M"] | None,
  *,
  head_dim: int,
  cap: float | None = None,
) -> Float[Array, "B L H r"]:
  """Returns softmax(q k^T (K/G) / sqrt(K) + bias) v without unfolding.

  The unfolded queries and keys repeat each of the G numbers K/G times, so their
  logits are K/G times as large. R = H/J neighboring query heads share a key
  head; values have J or H heads (I). The softmax is computed in float32.

  Args:
    q_BLHG: Queries, G = K if dense.
    k_JGM: Keys; the leading axes are B and J, or one axis of size B J.
    v_IMr: Values; the same with I, which divides H. r = K unless W_V has low
      rank.
    bias_HLM: Added to the logits: positions, and -1e30 at hidden keys.
    mask_BM: False at pad tokens; None: no padding.
    head_dim: K.
    cap: Limit of the logits before the bias, see `soft_cap`.
  """
  B, L, H, _ = q_BLHG.shape
  q_BHLG = q_BLHG.swapaxes(1, 2)
  logits_BHLM = attention_logits(
    q_BHLG, k_JGM, bias_HLM, mask_BM, head_dim=head_dim, cap=cap
  )
  # The norm divides the output, which is smaller than the weights. So neither
  # pass has a second array of weights, nor the backward pass sums over them.
  top_BHL1 = jax.lax.stop_gradient(logits_BHLM.max(-1, keepdims=True))
  att_BHLM = jnp.exp(logits_BHLM - top_BHL1)
  out = jnp.matmul(
    att_BHLM.astype(v_IMr.dtype).reshape(
      *v_IMr.shape[:-2], -1, k_JGM.shape[-1]
    ),
    v_IMr,
    preferred_element_type=jnp.float32,
  )
  out_BHLr = out.reshape(B, H, L, -1) / att_BHLM.sum(-1, keepdims=True)
  return out_BHLr.astype(v_IMr.dtype).swapaxes(1, 2)


def attend_whole(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  biases: Biases,
  mask_BL: Bool[Array, "B L"] | None,
  *,
  causal: bool,
  window: int | None = None,
  head_dim: int,
  cap: float | None = None,
) -> Float[Array, "B L H r"]:
  """Returns `attend` within whole sequences, in blocks if causal or long.

  On TPUs and GPUs a kernel attends in long sequences if there is one for them and
  the mesh of the context is known, see `attention_kernel`.

  Keys at the distance `window` and beyond are hidden. The other arguments are
  those of `attend` and `position_bias`.
  """
  length = q_BLHG.shape[1]
  options = {
    "causal": causal,
    "window": window,
    "head_dim": head_dim,
    "cap": cap,
  }
  # Blocks need a known length, which an exported program may leave open.
  if not isinstance(length, int) or length <= min(
    block_attention.SIZES.values()
  ):
    return _attend_short(q_BLHG, k_BLJG, v_BLIr, biases, mask_BL, **options)
  is_long = length > block_attention.SIZES["default"]
  if is_long and biases.relative_RH is None:
    out_BLHr = attention_kernel.attend(
      q_BLHG, k_BLJG, v_BLIr, mask_BL, biases.slopes_H, **options
    )
    if out_BLHr is not None:
      return out_BLHr
  return _attend_by_blocks(q_BLHG, k_BLJG, v_BLIr, biases, mask_BL, **options)


def _attend_short(
  q_BLHG, k_BLJG, v_BLIr, biases, mask_BL, *, causal, window, **options
) -> Float[Array, "B L H r"]:
  """Returns `attend_whole` of a short sequence, in the blocks of `_seen`."""
  length = q_BLHG.shape[1]
  bias = functools.partial(position_bias, causal=causal, window=window)
  k_BJGL, v_BILr = k_BLJG.transpose(0, 2, 3, 1), v_BLIr.swapaxes(1, 2)
  position_L = jnp.arange(length)
  outs = []
  for queries, keys in _seen(length, causal=causal, window=window):
    outs.append(
      attend(
        q_BLHG[:, queries],
        k_BJGL[..., keys],
        v_BILr[:, :, keys],
        bias(position_L[queries], position_L[keys], biases),
        None if mask_BL is None else mask_BL[:, keys],
        **options,
      )
    )
  return jnp.concatenate(outs, axis=1)


def _attend_by_blocks(
  q_BLHG, k_BLJG, v_BLIr, biases, mask_BL, *, causal, window, **options
) -> Float[Array, "B L H r"]:
  """Returns `attend_whole` by `block_attention`."""
  if q_BLHG.shape[-1] == 1:
    # The logits are the same. XLA turns a product with G = 1 into elementwise
    # work, which is slow on TPUs.
    q_BLHG, k_BLJG = (jnp.repeat(x, 2, axis=-1) for x in (q_BLHG, k_BLJG))

  def logits(q_BHLG, query_L, keys: block_attention.Keys, key_M, biases):
    return attention_logits(
      q_BHLG,
      keys.k_BJMG.swapaxes(-1, -2),
      position_bias(query_L, key_M, biases, causal=causal, window=window),
      None if keys.mask_B1M is None else keys.mask_B1M[:, 0],
      **options,
    )

  keys = block_attention.Keys(
    k_BLJG.swapaxes(1, 2),
    v_BLIr.swapaxes(1, 2),
    None if mask_BL is None else mask_BL[:, None],
  )
  out_BHLr = block_attention.attend_by_blocks(
    logits, q_BLHG.swapaxes(1, 2), keys, biases, causal=causal, window=window
  )
  return out_BHLr.swapaxes(1, 2)


def _seen(
  length: Any, *, causal: bool, window: int | None
) -> list[tuple[slice, slice]]:
  """Returns blocks of queries, each with the range of keys that it sees.

  If the length is unknown, one block holds all tokens.
  """
  if not causal or not isinstance(length, int):
    return [(slice(None), slice(None))]
  pairs = []
  for start in range(0, length, QUERIES):
    stop = min(start + QUERIES, length)
    first = 0 if window is None else max(start - window + 1, 0)
    pairs.append((slice(start, stop), slice(first, stop)))
  return pairs


def attention_logits(
  q_BHLG: Float[Array, "B H L G"],
  k_JGM: Float[Array, "*J G M"],
  bias_HLM: Float[Array, "#H L M"],
  mask_BM: Bool[Array, "#B M"] | None,
  *,
  head_dim: int,
  cap: float | None = None,
) -> Float[Array, "B H L M"]:
  """Returns the attention logits of `attend`, before the softmax."""
  B, H, L, G = q_BHLG.shape
  # The L queries of the R heads that share a key head are N rows of one matrix.
  q_JNG = q_BHLG.reshape(*k_JGM.shape[:-2], -1, G)
  # In float32: sums in bfloat16 would lose small terms.
  logits = jnp.matmul(q_JNG, k_JGM, preferred_element_type=jnp.float32)
  scale = head_dim**0.5 / G  # = (K / G) / sqrt(K)
  logits_BJNM = scale * logits.reshape(B, -1, *logits.shape[-2:])
  J, N, M = logits_BJNM.shape[1:]
  if len(bias_HLM) == 1:  # TPUs would repeat [1, L, M] in memory for all H
    bias_JNM = jnp.tile(bias_HLM, (1, H // J, 1))
  else:
    bias_JNM = bias_HLM.reshape(J, N, M)
  logits_BJNM = soft_cap(logits_BJNM, cap) + bias_JNM[None]
  logits_BHLM = logits_BJNM.reshape(B, H, L, M)
  if mask_BM is not None:
    logits_BHLM = jnp.where(mask_BM[:, None, None], logits_BHLM, MASKED)
  return logits_BHLM


def soft_cap(x: Array, cap: float | None) -> Array:
  """Returns cap tanh(x / cap), which is between -cap and cap; None: x."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def position_bias(
  query_L: Int[Array, " L"],
  key_M: Int[Array, " M"],
  biases: Biases,
  *,
  causal: bool,
  window: int | None,
) -> Float[Array, "#H L M"]:
  """Returns ALiBi's -slope |i - j| or a relative bias, and -1e30 at hidden keys.

  Keys at the distance `window` and beyond are hidden.
  """
  distance_LM = query_L[:, None] - key_M[None, :]
  bias_HLM = jnp.zeros((1, *distance_LM.shape), jnp.float32)
  if biases.slopes_H is not None:
    bias_HLM = -biases.slopes_H[:, None, None] * jnp.abs(distance_LM)[None]
  if biases.relative_RH is not None:
    buckets = jnp.asarray(relative_buckets(len(biases.relative_RH)))
    at_LM = jnp.clip(distance_LM, -_FARTHEST, _FARTHEST) + _FARTHEST
    bias_HLM += jnp.moveaxis(biases.relative_RH[buckets[at_LM]], -1, 0)
  is_seen_LM = jnp.ones(distance_LM.shape, bool)
  if causal:
    is_seen_LM &= distance_LM >= 0
  if window is not None:
    is_seen_LM &= jnp.abs(distance_LM) < window
  return jnp.where(is_seen_LM[None], bias_HLM, MASKED)


def relative_buckets(count: int) -> Int[np.ndarray, " distances"]:
  """Returns the bucket of each distance i - j from -128 to 128.

  Half of the buckets are for earlier keys, half for later ones. Half of each
  hold one distance, the others grow in proportion to it (Raffel et al. 2020).
  In float32, as in transformers, which decides at the edges.
  """
  distance = np.arange(-_FARTHEST, _FARTHEST + 1)
  half, single = count // 2, count // 4
  far = np.maximum(np.abs(distance), 1).astype(np.float32) / single
  growth = np.log(far) / math.log(_FARTHEST / single) * (half - single)
  wide = np.minimum(single + growth.astype(np.int32), half - 1)
  bucket = np.where(np.abs(distance) < single, np.abs(distance), wide)
  return np.where(distance < 0, half, 0) + bucket


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
  """Returns the geometric slopes 2^(-8 h / H), h = 1..H (Press et al. 2022)."""
  return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
