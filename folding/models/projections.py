"""Projections into attention heads, dense or folded.

A folded projection stores fewer numbers; pruning does not concern it. Its kind
follows from its arrays and the head size K:

  q, k   kernel   [D, H, K]      dense
                  [D, H, G]      output axis: K rows of a head in G groups
                  [G, H, K]      input axis: D input rows in G groups
  v      kernel   [D, H, K]      dense
                  [D, H, r]      low rank, beside o/kernel [H, r, D]
         diagonal [HK, 1, 1]     DWC
         (none)                  the identity: W_O has absorbed a diagonal
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from folding.models import products

_kernel_init = nn.initializers.lecun_normal()


def folded_init(groups: int, head_dim: int) -> nn.initializers.Initializer:
  """Returns an initializer that gives folded logits unit variance.

  Logits are (K/G) K^(-1/2) sum_g q_g k_g, with standard deviation (K/G)^(1/2)
  for unit q_g and k_g. So queries and keys are each scaled by (G/K)^(1/4).
  """
  return nn.initializers.variance_scaling(
    (groups / head_dim) ** 0.5, "fan_in", "truncated_normal"
  )


class HeadProjection(nn.Module):
  """Projection into heads with G row groups, or a dense one.

  On the output axis the result has G numbers per head and token. The unfolded
  projection has K/G copies of each; attention multiplies by K/G instead. On the
  input axis, channel i belongs to group i // (D/G); the channels of a group are
  summed and then projected.
  """

  num_heads: int  # H, or J for keys
  head_dim: int  # K
  groups: int = 0  # G; 0: dense
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
      dot_general=products.project,
    )
    # Without a scope of its own: q/kernel, not q/DenseGeneral_0/kernel.
    nn.share_scope(self, project)
    return project(x_BLD)


class DiagonalProjection(nn.Module):
  """Value projection by a diagonal: head h scales its own K channels.

  It has no bias: a bias would be a constant of the attention output, which the
  bias of the output projection expresses already.
  """

  heads: tuple[int, ...]  # indices of the heads that are kept, out of D / K
  head_dim: int  # K
  is_identity: bool = False  # without parameters: W_O has absorbed the diagonal
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
    B, L, D = x_BLD.shape
    K, H = self.head_dim, len(self.heads)
    x_BLHK = x_BLD.astype(self.dtype).reshape(B, L, D // K, K)
    if H < D // K:
      x_BLHK = x_BLHK[:, :, jnp.array(self.heads)]
    if self.is_identity:
      return x_BLHK
    w = self.param("diagonal", nn.initializers.ones, (H * K, 1, 1))
    return x_BLHK * w.astype(self.dtype).reshape(1, 1, H, K)
