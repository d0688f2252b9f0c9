"""Attention with dense or folded queries and keys, and its positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from folding.models import decode as decode_lib
from folding.models import linear_attention, products
from folding.models.decode import Cache, Step
from folding.models.exact_attention import (
  Biases,
  alibi_slopes,
  attend,
  attend_whole,
  position_bias,
)
from folding.models.linear_attention import PastState
from folding.models.projections import DiagonalProjection, HeadProjection
from folding.models.shape import Layer, Shape

TOLERANCE = 1e-4  # of linear attention, relative to the range of the values


def layer_frequencies(
  shape: Shape, layer: Layer, size: int | None = None
) -> Float[np.ndarray, " half"]:
  """Returns the `rope_frequencies` of a layer; size None: of all K channels."""
  return rope_frequencies(
    size or layer.head_dim,
    layer.rope_base,
    shape.rope_scaling,
    shape.rope_share,
  )


def rope_frequencies(
  size: int,
  base: float,
  scaling: tuple[float, ...] | None = None,
  share: float = 1.0,
) -> Float[np.ndarray, " half"]:
  """Returns the angle per token of each pair of channels, in radians.

  Args:
    size: Number of channels of a head.
    base: The slowest pair turns by about 1 / base per token.
    scaling: How rotations are slowed, see `folding.config.Design.rope_scaling`.
    share: Fraction of the channels that turn; the last pairs have angle 0.
  """
  half, turning = size // 2, int(size * share) // 2
  frequency = np.zeros(half)
  frequency[:turning] = base ** (-np.arange(turning) / turning)
  if scaling:
    factor, *limits = scaling
    kept = 0.0  # share of a frequency that is not divided by the factor
    if limits:
      low, high, length = limits
      turns = length * frequency / (2 * np.pi)
      kept = np.clip((turns - low) / (high - low), 0, 1)
    frequency = frequency * (kept + (1 - kept) / factor)
  return frequency.astype(np.float32)


def rotate(
  x_BLHK: Float[Array, "B L H K"],
  frequency: Float[Array | np.ndarray, "#H k"],
  position_L: Int[Array, " L"],
) -> Float[Array, "B L H K"]:
  """Applies rotary positions, channel i paired with i + K/2 (Su et al. 2021).

  Args:
    x_BLHK: Queries or keys.
    frequency: Radians per token of the K/2 pairs, for all heads or per head.
    position_L: Positions of the tokens.
  """
  position_L = position_L.astype(jnp.float32)
  angle = jnp.einsum("L,Hk->LHk", position_L, frequency)[None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BLHK.dtype)


class Attention(nn.Module):
  """Multi-head attention with dense or folded projections.

  Parameters: q, k and v (see `projections`), o/kernel [H, r, D]; with ALiBi
  log_slopes [H]; with norms of queries and keys q_norm/scale and k_norm/scale
  [K]. These are not trained: with RoPE by pairs frequency [J, G/2]; with a
  relative bias relative_bias [R, H].

  Attributes:
    shape: Shape of the model.
    layer: Shape of this layer.
    out_init: Initializer of W_O.
    dtype: Type of the computation.
  """

  shape: Shape
  layer: Layer
  out_init: nn.initializers.Initializer
  dtype: Any = jnp.float32

  def setup(self):
    c, layer = self.shape, self.layer
    H, J, K = len(layer.heads), layer.num_kv_heads, layer.head_dim

    def heads(count: int, size: int, groups: int = 0):
      return HeadProjection(
        num_heads=count,
        head_dim=size,
        groups=groups,
        axis=layer.axis,
        use_bias=layer.qkv_bias,
        dtype=self.dtype,
      )

    self.q = heads(H, K, layer.groups)
    self.k = heads(J, K, layer.groups)
    if layer.values == "dense":
      self.v = heads(J, layer.value_dim)
    else:
      self.v = DiagonalProjection(
        layer.heads, K, layer.values == "identity", self.dtype
      )
    self.o = nn.DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=c.use_bias,
      kernel_init=self.out_init,
      dtype=self.dtype,
      dot_general=products.project,
    )
    if c.qk_norm:
      self.q_norm = nn.RMSNorm(c.norm_epsilon, dtype=self.dtype)
      self.k_norm = nn.RMSNorm(c.norm_epsilon, dtype=self.dtype)
    if c.positions == "alibi":
      slopes_H = alibi_slopes(c.num_heads)[list(layer.heads)]
      self.log_slopes = self.param(
        "log_slopes", lambda _: jnp.log(jnp.array(slopes_H, jnp.float32))
      )
    if c.relative_buckets:
      shape = (c.relative_buckets, len(layer.heads))
      self.relative_bias = self.param(
        "relative_bias", nn.initializers.zeros, shape
      )
    if self._has_pairs:
      pairs = layer_frequencies(c, layer, layer.groups)
      self.frequency = self.param(
        "frequency", lambda _: jnp.tile(pairs, (J, 1))
      )

  def __call__(
    self,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Attends within whole sequences. The mask is False or 0 at pad tokens."""
    q, k, v = self.project(x_BLD, jnp.arange(x_BLD.shape[1]))
    return self.o(self._attend(q, k, v, mask_BL))

  def prefill(
    self,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"],
    state: PastState | None,
  ) -> tuple[Float[Array, "B L D"], Cache]:
    """Attends within left-padded prompts; returns the cache for decoding.

    Without an empty state to extend, it makes a KV cache of L slots.
    """
    q, k, v = self.project(x_BLD, jnp.arange(x_BLD.shape[1]))
    if state is None:
      out_BLHr = self._attend(q, k, v, mask_BL)
      return self.o(out_BLHr), decode_lib.make_cache(k, v)
    x = self._rank_1(q, k, v, mask_BL)
    state, out_BLHr = linear_attention.extend(state, x)
    return self.o(out_BLHr), state

  def decode(
    self, x_B1D: Float[Array, "B 1 D"], cache: Cache, step: Step
  ) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Attends from one new token per row to all tokens so far."""
    q, k, v = self.project(x_B1D, step.position[None])
    if isinstance(cache, PastState):
      x = self._rank_1(q, k, v, None)
      cache, out_B1Hr = linear_attention.extend(cache, x)
      return self.o(out_B1Hr), cache
    cache = decode_lib.write(cache, decode_lib.make_cache(k, v), step.position)
    position_M = decode_lib.slot_positions(cache.k.shape[2], step.position)
    bias_H1M = self.bias(step.position[None], position_M)
    mask_BM = position_M[None] >= step.start_B[:, None]
    out_B1Hr = attend(
      q, cache.k, cache.v, bias_H1M, mask_BM, **self.logit_options
    )
    return self.o(out_B1Hr), cache

  def project(
    self, x_BLD: Float[Array, "B L D"], position_L: Int[Array, " L"]
  ) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values, normed and rotated as configured.

    Returns:
      q_BLHG, k_BLJG and v_BLIr, with K numbers for G unless logits are folded.
    """
    c, layer = self.shape, self.layer
    q, k, v = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if c.positions != "rope":
      return q, k, v
    if self._has_pairs:
      frequency = jax.lax.stop_gradient(self.frequency)
      per_query = jnp.repeat(frequency, q.shape[2] // k.shape[2], axis=0)
      return (
        rotate(q, per_query, position_L),
        rotate(k, frequency, position_L),
        v,
      )
    # A rotation acts on all K channels, so the G numbers are copied first.
    copies = layer.head_dim // q.shape[-1]
    q, k = jnp.repeat(q, copies, axis=-1), jnp.repeat(k, copies, axis=-1)
    frequency = layer_frequencies(c, layer)[None]
    return rotate(q, frequency, position_L), rotate(k, frequency, position_L), v

  def bias(
    self, query_L: Int[Array, " L"], key_M: Int[Array, " M"]
  ) -> Float[Array, "#H L M"]:
    """Returns the `position_bias` of this layer."""
    c = self.shape
    return position_bias(
      query_L, key_M, self._biases(), causal=c.causal, window=self.layer.window
    )

  @property
  def logit_options(self) -> dict[str, Any]:
    """Options of `attention_logits`."""
    return {"head_dim": self.layer.head_dim, "cap": self.shape.attention_cap}

  def _attend(self, q, k, v, mask_BL) -> Float[Array, "B L H r"]:
    """Attends within whole sequences."""
    c = self.shape
    if mask_BL is not None:
      mask_BL = mask_BL.astype(bool)
    # Linear time needs known sizes, which an exported program may leave open.
    is_known = all(isinstance(size, int) for size in q.shape[:2])
    if c.attention == "linear" and has_rank_1(c, self.layer) and is_known:
      x = self._rank_1(q, k, v, mask_BL)
      return linear_attention.attend_checked(
        x, causal=c.causal, tolerance=TOLERANCE
      )
    return attend_whole(
      q,
      k,
      v,
      self._biases(),
      mask_BL,
      causal=c.causal,
      window=self.layer.window,
      **self.logit_options,
    )

  def _rank_1(self, q, k, v, mask_BL) -> linear_attention.Inputs:
    return rank_1_inputs(self.layer, (q, k, v), self._slopes(), mask_BL)

  @property
  def _has_pairs(self) -> bool:
    """Whether G numbers per head are rotated as G/2 pairs."""
    c, layer = self.shape, self.layer
    is_folded = 0 < layer.groups < layer.head_dim and layer.axis == "output"
    return c.positions == "rope" and layer.rope == "pairs" and is_folded

  def _slopes(self) -> Float[Array, " H"] | None:
    """Returns the ALiBi slope per head; None without ALiBi."""
    if self.shape.positions != "alibi":
      return None
    return jnp.exp(self.log_slopes.astype(jnp.float32))

  def _biases(self) -> Biases:
    relative_RH = None
    if self.shape.relative_buckets:
      relative_RH = jax.lax.stop_gradient(self.relative_bias)
    return Biases(self._slopes(), relative_RH)


def rank_1_inputs(
  layer: Layer,
  heads: tuple[Array, Array, Array],
  slopes_H: Float[Array, " H"] | None = None,
  mask_BL: Bool[Array, "B L"] | None = None,
) -> linear_attention.Inputs:
  """Returns the inputs of linear attention from `Attention.project`, with G = 1.

  Linear attention scales logits by the square root of the size of the values,
  r. Queries are scaled by (K/r)^(1/2), so that the scale is that of K.

  `heads` are q_BLH1, k_BLJ1 and v_BLIr.
  """
  q, k, v = heads
  if layer.value_dim != layer.head_dim:
    q *= (layer.head_dim / layer.value_dim) ** 0.5
  return linear_attention.Inputs(q[..., 0], k[..., 0], v, slopes_H, mask_BL)


def has_rank_1(shape: Shape, layer: Layer) -> bool:
  """Returns whether logits are products of two numbers, apart from ALiBi."""
  return (
    layer.groups == 1
    and layer.axis == "output"
    and shape.positions != "rope"
    and layer.window is None
    and not shape.relative_buckets
    and shape.attention_cap is None
  )
