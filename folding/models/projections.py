"""Projections into attention heads, dense or folded.

A folded projection is just another projection: it stores fewer numbers and
says nothing about pruning. Its kind can be read off its arrays, given that the
output projection of the same attention layer is [H, K, D]:

  q, k   kernel   [D, H, K]      dense
                  [D, H, G]      output axis: K rows of a head in G groups
                  [G, H, K]      input axis: D input rows in G groups
  v      kernel   [D, H, K]      dense
         diagonal [HK/b, b, b]   blocks of size b; b = 1 is DWC
         (none)                  the identity: W_O has absorbed a diagonal
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

_kernel_init = nn.initializers.lecun_normal()


def folded_init(groups: int, head_dim: int) -> nn.initializers.Initializer:
  """Returns an initializer under which folded logits start at unit variance.

  Logits are (K/G) K^(-1/2) sum_g q_g k_g, of standard deviation (K/G)^(1/2)
  for unit q_g and k_g; each side is made smaller by (G/K)^(1/4).

  Args:
    groups: G.
    head_dim: K.
  """
  return nn.initializers.variance_scaling(
    (groups / head_dim) ** 0.5, "fan_in", "truncated_normal"
  )


class HeadProjection(nn.Module):
  """Query or key projection with `groups` row groups; 0 groups is dense.

  On the output axis the result has G numbers a head and token, of which the
  unfolded projection would have K/G copies each; attention multiplies by K/G
  instead of copying. On the input axis, channel i belongs to group
  i // (D/G), the channels of a group are summed and then projected.
  """

  num_heads: int  # H, or J for keys
  head_dim: int  # K
  groups: int = 0  # G
  axis: str = "output"
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L H g"]:
    size, init = self.head_dim, _kernel_init
    if self.groups and self.axis == "output":
      size, init = self.groups, folded_init(self.groups, self.head_dim)
    elif self.groups:
      *lead, width = x_BLD.shape
      x_BLD = x_BLD.reshape(*lead, self.groups, width // self.groups).sum(-1)
      # The sum of D/G channels has variance D/G, so the fan-in is D, not G.
      init = nn.initializers.variance_scaling(
        self.groups / width, "fan_in", "truncated_normal"
      )
    project = nn.DenseGeneral(
      (self.num_heads, size),
      use_bias=self.use_bias,
      kernel_init=init,
      dtype=self.dtype,
    )
    # The parameters belong to this module's path: q/kernel, not q/dense/kernel.
    nn.share_scope(self, project)
    return project(x_BLD)


class BlockDiagonal(nn.Module):
  """Value projection by blocks on the diagonal: head h sees its own channels.

  A bias would be a constant of the attention output, which the bias of the
  output projection already expresses, so there is none.
  """

  heads: tuple[int, ...]  # which of the D / K heads there are
  head_dim: int  # K
  block: int = 1  # b; 1 is DWC
  is_identity: bool = False  # blocks of 1 are 1, and no parameters
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
    B, L, D = x_BLD.shape
    K, H = self.head_dim, len(self.heads)
    x_BLD = x_BLD.astype(self.dtype)
    x_BLHK = x_BLD.reshape(B, L, D // K, K)
    if H < D // K:
      x_BLHK = x_BLHK[:, :, jnp.array(self.heads)]
    if self.is_identity and self.block == 1:
      return x_BLHK
    if K % self.block and H < D // K:
      raise ValueError(
        f"blocks of {self.block} join heads of {K}, so none can be left out"
      )
    shape = (H * K // self.block, self.block, self.block)
    w = self.param("diagonal", _identity_init, shape).astype(self.dtype)
    if self.block == 1:
      return x_BLHK * w.reshape(H, K)[None, None]
    blocks = x_BLHK.reshape(B, L, *shape[:2])
    v = jnp.einsum("BLnb,nbc->BLnc", blocks, w)
    return v.reshape(B, L, H, K)


def _identity_init(key, shape, dtype=jnp.float32):
  """Identity for DWC; random blocks of the same scale for larger ones."""
  if shape[-1] == 1:
    return jnp.ones(shape, dtype)
  return nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)(
    key, shape, dtype
  )
