"""Attention over dense and folded heads, and its positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from folding.config import Layer, ModelConfig
from folding.models import cache as cache_lib
from folding.models import linear_attention
from folding.models import past as past_lib
from folding.models.cache import Step
from folding.models.projections import BlockDiagonal, HeadProjection

_MASKED = -1e30  # finite, so that a row with no key at all stays finite
_TOLERANCE = 1e-4  # of attention in linear time, over the range of the values


def attend(
  q_BLHG: Float[Array, "B L H G"],
  k_BMJG: Float[Array, "B M J G"],
  v_BMIK: Float[Array, "B M I K"],
  bias_HLM: Float[Array, "#H L M"],
  keep_BM: Bool[Array, "B M"] | None,
  *,
  head_dim: int,
) -> Float[Array, "B L H K"]:
  """Returns softmax(q k^T (K/G) / sqrt(K) + bias) v without unfolding.

  G numbers a head stand for K, each K/G times, so multiplying the logits by
  K/G gives those of the unfolded projection. Queries of R = H/J neighbouring
  heads share a key head; values have J or H heads (I). Softmax in float32.

  Args:
    q_BLHG: Queries, G = K where dense.
    k_BMJG: Keys.
    v_BMIK: Values; I divides H.
    bias_HLM: Added to the logits; carries positions and causality.
    keep_BM: False at padding; None: no padding.
    head_dim: K, of the unfolded queries.
  """
  return attend_by_head(
    q_BLHG,
    k_BMJG.transpose(0, 2, 3, 1),
    v_BMIK.transpose(0, 2, 1, 3),
    bias_HLM,
    keep_BM,
    head_dim=head_dim,
  )


def attend_by_head(
  q_BLHG: Float[Array, "B L H G"],
  k_JGM: Float[Array, "*J G M"],
  v_IMK: Float[Array, "*I M K"],
  bias_HLM: Float[Array, "#H L M"],
  keep_BM: Bool[Array, "B M"] | None,
  *,
  head_dim: int,
) -> Float[Array, "B L H K"]:
  """Returns `attend` of keys and values that lie as matrices, one a head.

  Args:
    q_BLHG: Queries.
    k_JGM: Keys; the axes before the last two are B and J, or B J as one.
    v_IMK: Values; the same with I.
    bias_HLM: As in `attend`.
    keep_BM: As in `attend`.
    head_dim: As in `attend`.
  """
  B, L, H, _ = q_BLHG.shape
  logits_BHLM = attention_logits(
    q_BLHG, k_JGM, bias_HLM, keep_BM, head_dim=head_dim
  )
  att = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_IMK.dtype)
  out = att.reshape(*v_IMK.shape[:-2], -1, k_JGM.shape[-1]) @ v_IMK
  return out.reshape(B, H, L, -1).transpose(0, 2, 1, 3)


def attention_logits(
  q_BLHG: Float[Array, "B L H G"],
  k_JGM: Float[Array, "*J G M"],
  bias_HLM: Float[Array, "#H L M"],
  keep_BM: Bool[Array, "B M"] | None,
  *,
  head_dim: int,
) -> Float[Array, "B H L M"]:
  """Returns what `attend_by_head`, with the same arguments, has a softmax of."""
  B, L, H, G = q_BLHG.shape
  # The R queries of a key head and the L of a head are rows of one matrix.
  q_JNG = q_BLHG.transpose(0, 2, 1, 3).reshape(*k_JGM.shape[:-2], -1, G)
  # Summed and scaled in float32: bfloat16 logits would lose what is small.
  logits = jnp.matmul(q_JNG, k_JGM, preferred_element_type=jnp.float32)
  scale = head_dim**0.5 / G  # = (K / G) / sqrt(K)
  logits_BHLM = (
    scale * logits.reshape(B, H, L, k_JGM.shape[-1]) + bias_HLM[None]
  )
  if keep_BM is not None:
    logits_BHLM = jnp.where(keep_BM[:, None, None], logits_BHLM, _MASKED)
  return logits_BHLM


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
  """Returns the geometric slopes 2^(-8 h / H), h = 1..H (Press et al. 2022)."""
  return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def rope_frequencies(
  size: int, base: float, scaling: tuple[float, ...] | None = None
) -> Float[np.ndarray, " half"]:
  """Returns the angle a token of each pair of channels, in radians.

  Args:
    size: Channels of a head.
    base: The slowest pair turns about 1 / base a token.
    scaling: As in `folding.config.ModelConfig.rope_scaling`.
  """
  half = size // 2
  frequency = base ** (-np.arange(half) / half)
  if scaling:
    factor, *limits = scaling
    kept = 0.0  # the share of a frequency that is not divided by the factor
    if limits:
      low, high, length = limits
      turns = length * frequency / (2 * np.pi)
      kept = np.clip((turns - low) / (high - low), 0, 1)
    frequency = frequency * (kept + (1 - kept) / factor)
  return frequency.astype(np.float32)


def rotate(
  x_BLHK: Float[Array, "B L H K"],
  frequency: Float[Array | np.ndarray, "#H k"],
  place_L: Int[Array, " L"] | None = None,
) -> Float[Array, "B L H K"]:
  """Applies rotary positions, channel i paired with i + K/2 (Su et al. 2021).

  Args:
    x_BLHK: Queries or keys.
    frequency: Radians a token of the K/2 pairs, for all heads or each.
    place_L: Where the tokens stand; None: from 0 on.
  """
  if place_L is None:
    place_L = jnp.arange(x_BLHK.shape[1])
  angle = jnp.einsum("L,Hk->LHk", place_L.astype(jnp.float32), frequency)[None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BLHK.dtype)


class Attention(nn.Module):
  """Multi-head attention whose q, k and v may be folded, each by itself.

  Parameters: q, k, v (see `projections`), o/kernel [H, K, D], with ALiBi
  log_slopes [H], and with RoPE by pairs frequency [J, G/2], which is fixed.

  Where the collection "cache" is mutable, keys and values are written to its
  "slots" (see `cache`), or go into its "past" (see `past`) where there are
  nodes and logits have rank 1. With a step, attention is to what is there.
  Where the collection "logits" is mutable, those of whole texts are written to
  its "attention", [B, H, L, L].
  """

  config: ModelConfig
  layer: Layer
  out_init: nn.initializers.Initializer
  dtype: Any = jnp.float32
  num_nodes: int = 0  # of a past in place of slots; 0: none

  @nn.compact
  def __call__(
    self,
    x_BLD: Float[Array, "B L D"],
    keep_BL: Bool[Array, "B L"] | None = None,
    step: Step | None = None,
  ) -> Float[Array, "B L D"]:
    c, f = self.config, self.layer
    K, heads = f.head_dim, f.heads
    if keep_BL is not None:
      keep_BL = keep_BL.astype(bool)  # tokenizers write 0 and 1

    def head_projection(name: str, num_heads: int, groups: int):
      return HeadProjection(
        num_heads, K, groups, f.axis, f.qkv_bias, self.dtype, name=name
      )

    q = head_projection("q", len(heads), f.groups)(x_BLD)
    k = head_projection("k", f.num_kv_heads, f.groups)(x_BLD)
    if f.v_block:
      v = BlockDiagonal(
        heads, K, f.v_block, f.v_identity, self.dtype, name="v"
      )(x_BLD)
    else:
      v = head_projection("v", f.num_kv_heads, 0)(x_BLD)
    place_L = jnp.arange(x_BLD.shape[1]) if step is None else step.place[None]
    if c.positions == "rope":
      q, k = self._rotate(q, k, K, place_L)
    slopes_H = self._slopes(heads)
    if self._writes("logits"):
      bias_HLM = self._bias(place_L, place_L, slopes_H)
      k_BJGM = k.transpose(0, 2, 3, 1)
      logits = attention_logits(q, k_BJGM, bias_HLM, keep_BL, head_dim=K)
      self.put_variable("logits", "attention", logits)
    is_rank_1 = c.causal and has_rank_1(c, f)
    if is_rank_1 and self._writes("spans"):
      span = past_lib.span_of_all(q[..., 0], k[..., 0], K)
      self.put_variable("spans", "span", span)
    if is_rank_1 and self.num_nodes and self._writes("cache"):
      arrays = q[..., 0], k[..., 0], v, slopes_H, keep_BL
      if step is None:
        span = self.get_variable("spans", "span")
        past, out_BLHK = past_lib.begin(
          span, *arrays, head_dim=K, num_nodes=self.num_nodes
        )
      else:
        past = self.get_variable("cache", "past")
        past, out_BLHK = past_lib.go_on(past, *arrays, head_dim=K)
      self.put_variable("cache", "past", past)
    elif step is None:
      if takes_linear(c, f, x_BLD.shape):
        out_BLHK = linear_attention.attend_checked(
          *(q[..., 0], k[..., 0], v, slopes_H, keep_BL),
          head_dim=K,
          causal=c.causal,
          tolerance=_TOLERANCE,
        )
      else:
        bias_HLM = self._bias(place_L, place_L, slopes_H)
        out_BLHK = attend(q, k, v, bias_HLM, keep_BL, head_dim=K)
      if self._writes("cache"):
        self.put_variable("cache", "slots", cache_lib.by_head(k, v))
    else:
      cache = self.get_variable("cache", "slots")
      cache = cache_lib.write(cache, cache_lib.by_head(k, v), step.place)
      self.put_variable("cache", "slots", cache)
      place_M = cache_lib.places(cache["k"].shape[-1], step.place)
      bias_HLM = self._bias(place_L, place_M, slopes_H)
      keep_BM = place_M[None] >= step.start_B[:, None]
      out_BLHK = attend_by_head(
        q, cache["k"], cache["v"], bias_HLM, keep_BM, head_dim=K
      )
    return nn.DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=c.use_bias,
      kernel_init=self.out_init,
      dtype=self.dtype,
      name="o",
    )(out_BLHK)

  def _writes(self, collection: str) -> bool:
    # In `init` all are mutable, but parameters are all that is asked for.
    return self.is_mutable_collection(collection) and not self.is_initializing()

  def _rotate(self, q, k, head_dim: int, place_L):
    """Turns queries and keys by their places."""
    c, f = self.config, self.layer
    size = q.shape[-1]
    if size < head_dim and f.rope == "pairs":
      frequency = self.param(
        "frequency",
        lambda _: jnp.tile(
          rope_frequencies(size, c.rope_base, c.rope_scaling), (k.shape[2], 1)
        ),
      )
      frequency = jax.lax.stop_gradient(frequency)
      of_q = jnp.repeat(frequency, q.shape[2] // k.shape[2], axis=0)
      return rotate(q, of_q, place_L), rotate(k, frequency, place_L)
    # A rotation acts on all K channels, so the G numbers (not the kernels)
    # are copied first.
    frequency = rope_frequencies(head_dim, c.rope_base, c.rope_scaling)[None]
    q = jnp.repeat(q, head_dim // size, axis=-1)
    k = jnp.repeat(k, head_dim // size, axis=-1)
    return rotate(q, frequency, place_L), rotate(k, frequency, place_L)

  def _slopes(self, heads: tuple[int, ...]) -> Float[Array, " H"] | None:
    """Returns the slope of each head; None without ALiBi."""
    c = self.config
    if c.positions != "alibi":
      return None
    slopes_H = jnp.array(alibi_slopes(c.num_heads), jnp.float32)
    log_slopes_H = self.param(
      "log_slopes", lambda _: jnp.log(slopes_H)[jnp.array(heads)]
    )
    return jnp.exp(log_slopes_H.astype(jnp.float32))

  def _bias(self, place_L, place_M, slopes_H) -> Float[Array, "H L M"]:
    """Returns -slope |i - j| a head, the causal mask and the window's."""
    c = self.config
    distance_LM = place_L[:, None] - place_M[None, :]
    bias_HLM = jnp.zeros((1, *distance_LM.shape), jnp.float32)
    if slopes_H is not None:
      bias_HLM = -slopes_H[:, None, None] * jnp.abs(distance_LM)[None]
    is_seen_LM = jnp.ones(distance_LM.shape, bool)
    if c.causal:
      is_seen_LM &= distance_LM >= 0
    if c.window is not None:
      is_seen_LM &= jnp.abs(distance_LM) < c.window
    return jnp.where(is_seen_LM[None], bias_HLM, _MASKED)


def has_rank_1(c: ModelConfig, f: Layer) -> bool:
  """Returns whether logits are products of two numbers, but for ALiBi."""
  return (
    f.groups == 1
    and f.axis == "output"
    and c.positions != "rope"
    and c.window is None
  )


def takes_linear(c: ModelConfig, f: Layer, shape: tuple[Any, ...]) -> bool:
  """Returns whether a layer attends to whole texts in linear time.

  Args:
    c: The model.
    f: The layer.
    shape: B, L and D; a program of any B or L has to be dense.
  """
  is_static = all(isinstance(size, int) for size in shape)
  return c.attention == "linear" and has_rank_1(c, f) and is_static
