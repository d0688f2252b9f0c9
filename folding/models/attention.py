"""Attention over dense and folded heads, and its positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from folding.config import FoldConfig, ModelConfig
from folding.models.projections import BlockDiagonal, HeadProjection

_MASKED = -1e30  # finite, so that a row with no key at all stays finite


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
  B, L, H, G = q_BLHG.shape
  M, J = k_BMJG.shape[1:3]
  q_BLJRG = q_BLHG.reshape(B, L, J, H // J, G)
  # Summed and scaled in float32: bfloat16 logits would lose what is small.
  logits = jnp.einsum(
    "BLJRG,BMJG->BJRLM", q_BLJRG, k_BMJG, preferred_element_type=jnp.float32
  )
  scale = head_dim**0.5 / G  # = (K / G) / sqrt(K)
  logits_BHLM = scale * logits.reshape(B, H, L, M) + bias_HLM[None]
  if keep_BM is not None:
    logits_BHLM = jnp.where(keep_BM[:, None, None], logits_BHLM, _MASKED)
  att_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMIK.dtype)
  I = v_BMIK.shape[2]  # noqa: E741
  att_BISLM = att_BHLM.reshape(B, I, H // I, L, M)
  out = jnp.einsum("BISLM,BMIK->BLISK", att_BISLM, v_BMIK)
  return out.reshape(B, L, H, -1)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
  """Returns the geometric slopes 2^(-8 h / H), h = 1..H (Press et al. 2022)."""
  return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)


def rope_frequencies(size: int, base: float) -> Float[np.ndarray, " half"]:
  """Returns the angle a token of each pair of channels, in radians."""
  half = size // 2
  return (base ** (-np.arange(half) / half)).astype(np.float32)


def rotate(
  x_BLHK: Float[Array, "B L H K"], frequency: Float[Array | np.ndarray, "#H k"]
) -> Float[Array, "B L H K"]:
  """Applies rotary positions, channel i paired with i + K/2 (Su et al. 2021).

  Args:
    x_BLHK: Queries or keys.
    frequency: Radians a token of the K/2 pairs, for all heads or each.
  """
  position = jnp.arange(x_BLHK.shape[1], dtype=jnp.float32)
  angle = jnp.einsum("L,Hk->LHk", position, frequency)[None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BLHK.dtype)


class Attention(nn.Module):
  """Multi-head attention whose q, k and v may be folded, each by itself.

  Parameters: q, k, v (see `projections`), o/kernel [H, K, D], with ALiBi
  log_slopes [H], and with RoPE by pairs frequency [J, G/2], which is fixed.
  """

  config: ModelConfig  # of this layer: numbers, not one for each layer
  fold: FoldConfig  # v_block 0 keeps W_V dense, groups 0 keeps W_Q and W_K
  out_init: nn.initializers.Initializer
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BLD: Float[Array, "B L D"],
    keep_BL: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    c, f = self.config, self.fold
    assert c.num_kv_heads is not None and c.head_dim is not None
    assert c.qkv_bias is not None, "the config is not resolved"
    assert isinstance(f.groups, int) and isinstance(f.v_block, int)
    K, use_bias = c.head_dim, c.qkv_bias
    heads = c.heads[0] if c.heads else tuple(range(c.num_heads))
    num_kv_heads = len(heads) * c.num_kv_heads // c.num_heads

    def head_projection(name: str, num_heads: int, groups: int):
      return HeadProjection(
        num_heads, K, groups, f.axis, use_bias, self.dtype, name=name
      )

    q = head_projection("q", len(heads), f.groups)(x_BLD)
    k = head_projection("k", num_kv_heads, f.groups)(x_BLD)
    if f.v_block:
      v = BlockDiagonal(
        heads, K, f.v_block, f.v_identity, self.dtype, name="v"
      )(x_BLD)
    else:
      v = head_projection("v", num_kv_heads, 0)(x_BLD)
    if c.positions == "rope":
      q, k = self._rotate(q, k, K)
    bias_HLM = self._bias(x_BLD.shape[1], len(heads))
    out_BLHK = attend(q, k, v, bias_HLM, keep_BL, head_dim=K)
    return nn.DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=c.use_bias,
      kernel_init=self.out_init,
      dtype=self.dtype,
      name="o",
    )(out_BLHK)

  def _rotate(self, q, k, head_dim: int):
    """Turns queries and keys by their positions."""
    c, f = self.config, self.fold
    size = q.shape[-1]
    if size < head_dim and f.rope == "pairs":
      frequency = self.param(
        "frequency",
        lambda _: jnp.tile(
          rope_frequencies(size, c.rope_base), (k.shape[2], 1)
        ),
      )
      frequency = jax.lax.stop_gradient(frequency)
      of_q = jnp.repeat(frequency, q.shape[2] // k.shape[2], axis=0)
      return rotate(q, of_q), rotate(k, frequency)
    # A rotation acts on all K channels, so the G numbers (not the kernels)
    # are copied first.
    frequency = rope_frequencies(head_dim, c.rope_base)[None]
    q = jnp.repeat(q, head_dim // size, axis=-1)
    k = jnp.repeat(k, head_dim // size, axis=-1)
    return rotate(q, frequency), rotate(k, frequency)

  def _bias(self, length: int, num_heads: int) -> Float[Array, "H L M"]:
    """Returns -slope |i - j| a head, the causal mask and the window's."""
    c = self.config
    position = jnp.arange(length)
    distance_LM = position[:, None] - position[None, :]
    bias_HLM = jnp.zeros((1, length, length), jnp.float32)
    if c.positions == "alibi":
      slopes_H = jnp.array(alibi_slopes(c.num_heads), jnp.float32)
      log_slopes_H = self.param(
        "log_slopes", lambda _: jnp.log(slopes_H)[:num_heads]
      )
      slope = jnp.exp(log_slopes_H.astype(jnp.float32))
      bias_HLM = -slope[:, None, None] * jnp.abs(distance_LM)[None]
    is_seen_LM = jnp.ones((length, length), bool)
    if c.causal:
      is_seen_LM &= distance_LM >= 0
    if c.window is not None:
      is_seen_LM &= jnp.abs(distance_LM) < c.window
    return jnp.where(is_seen_LM[None], bias_HLM, _MASKED)
