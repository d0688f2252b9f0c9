"""Sums over keys with weights e^(s t), known at the nodes of s.

Shapes: s_BHCL queries, scaled, t_BHCM keys, around 0, and v_BHCMK values, of C
chunks of L query and M key positions; P panels of X nodes, N = P X. All is
float32. Products with a broadcast number are einsums: their transposes are then
matrix products, which XLA for CPU runs several times as fast as reductions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from folding.models import chebyshev

FLOOR = -1e29  # the least running maximum
MASKED = -1e30  # logit of what is not seen: e^(MASKED - FLOOR) is 0

_stop = jax.lax.stop_gradient


class Grid(NamedTuple):
  """Where the nodes are: panel p is `half` wide to both sides of a centre."""

  low_BH: Array  # where the first panel begins
  half_BH: Array
  center_BHP: Array
  step_BHX: Array  # of the nodes from the centre


class Part(NamedTuple):
  """Attention over some of the keys before it is divided; all over e^top."""

  sum_K: Array  # weighted values, [..., K]
  norm: Array  # sum of the weights
  top: Array  # a running maximum of logits, no function of the inputs


def panel_half(
  low_BH: Float[Array, "#B #H"],
  high_BH: Float[Array, "#B #H"],
  t_half_BH: Float[Array, "#B #H"],
  P: int,
) -> Float[Array, "#B #H"]:
  """Returns half the width of P panels that share out the ranges of s."""
  # Never so narrow that rounding would take an s out of its panel, or be seen
  # in the slope of e^(s t): it is enlarged by X^2 over the half width.
  least_BH = 1e-3 * jnp.maximum(jnp.abs(low_BH), jnp.abs(high_BH))
  least_BH = jnp.maximum(least_BH, 0.5 / jnp.maximum(t_half_BH, 0.5))
  return jnp.maximum((high_BH - low_BH) / (2 * P), least_BH)


def make_grid(
  low_BH: Float[Array, "#B #H"],
  high_BH: Float[Array, "#B #H"],
  t_half_BH: Float[Array, "#B #H"],
  num_nodes: int,
) -> Grid:
  """Returns panels that share out the ranges of s, for keys of this range."""
  P = chebyshev.panels(num_nodes)
  half_BH = panel_half(low_BH, high_BH, t_half_BH, P)
  odd_P = jnp.asarray(2 * np.arange(P) + 1, jnp.float32)[None, None]
  center_BHP = low_BH[..., None] + half_BH[..., None] * odd_P
  step_BHX = half_BH[..., None] * chebyshev.nodes()[None, None]
  return _stop(Grid(low_BH, half_BH, center_BHP, step_BHX))


def join(a: Part, b: Part) -> Part:
  """Returns attention over the keys of both."""
  top = _stop(jnp.maximum(a.top, b.top))
  scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
  sum_K = jnp.einsum("...,...K->...K", scale_a, a.sum_K)
  sum_K += jnp.einsum("...,...K->...K", scale_b, b.sum_K)
  return Part(sum_K, scale_a * a.norm + scale_b * b.norm, top)


def divide(part: Part) -> Array:
  """Returns the averages of the values, [..., K]; 0 where there is no key."""
  return part.sum_K / jnp.where(part.norm > 0, part.norm, 1)[..., None]


def summarise(t_BHCM, v_BHCMK, bias_BHCM, seen_BHCM, grid) -> Part:
  """Returns what each chunk's keys add up to at the nodes; its top is BHCP."""
  if seen_BHCM is not None:
    bias_BHCM = jnp.where(seen_BHCM, bias_BHCM, MASKED)
  center_BHCMP = t_BHCM[..., None] * grid.center_BHP[:, :, None, None]
  top_BHCP = (center_BHCMP + bias_BHCM[..., None]).max(3)
  top_BHCP = _stop(jnp.maximum(top_BHCP, FLOOR))
  power_BHCNM = _powers(t_BHCM, bias_BHCM, top_BHCP, grid)
  sum_BHCNK = jnp.einsum("BHCNM,BHCMK->BHCNK", power_BHCNM, v_BHCMK)
  return Part(sum_BHCNK, power_BHCNM.sum(-1), top_BHCP)


def weigh(weight_BHCLN, part: Part) -> Part:
  """Returns a chunk's queries' sums of what its past has at the nodes."""
  return Part(
    jnp.einsum("BHCLN,BHCNK->BHCLK", weight_BHCLN, part.sum_K),
    jnp.einsum("BHCLN,BHCN->BHCL", weight_BHCLN, part.norm),
    part.top,
  )


def read_weights(s_BHCL, grid) -> tuple[Array, Array]:
  """Returns which panel each s is in, one-hot [..., P], and weights [..., N]."""
  P = grid.center_BHP.shape[-1]
  low, half = grid.low_BH[..., None, None], grid.half_BH[..., None, None]
  panel = jnp.clip(jnp.floor(_stop(s_BHCL - low) / (2 * half)), 0, P - 1)
  hot_BHCLP = jax.nn.one_hot(panel.astype(int), P, dtype=jnp.float32)
  return hot_BHCLP, _weights((s_BHCL - low) / half - (2 * panel + 1), hot_BHCLP)


@jax.custom_jvp
def _powers(t_BHCM, bias_BHCM, top_BHCP, grid):
  """Returns exp(s_n t + bias - top) as [B, H, C, N, M].

  The centre's part of the exponent is rounded once for all nodes of a panel,
  as if the logit itself were: interpolation does not enlarge such an error.
  """
  B, H, C, M = t_BHCM.shape
  center_BHCPM = grid.center_BHP[:, :, None, :, None] * t_BHCM[..., None, :]
  center_BHCPM += bias_BHCM[..., None, :] - top_BHCP[..., None]
  step_BHCXM = grid.step_BHX[:, :, None, :, None] * t_BHCM[..., None, :]
  exponent = center_BHCPM[..., None, :] + step_BHCXM[:, :, :, None]
  return jnp.exp(exponent).reshape(B, H, C, -1, M)


@_powers.defjvp
def _powers_jvp(primals, tangents):
  grid = primals[3]
  power_BHCNM = _powers(*primals)
  node_BHPX = grid.center_BHP[..., None] + grid.step_BHX[:, :, None]
  node_BHN = node_BHPX.reshape(*node_BHPX.shape[:2], -1)
  node_BHN = jnp.broadcast_to(
    node_BHN, (*power_BHCNM.shape[:2], node_BHN.shape[-1])
  )
  one_N = jnp.ones(node_BHN.shape[-1:], jnp.float32)
  d_BHCNM = jnp.einsum("BHN,BHCM->BHCNM", node_BHN, tangents[0])
  d_BHCNM += jnp.einsum("N,BHCM->BHCNM", one_N, tangents[1])
  return power_BHCNM, power_BHCNM * d_BHCNM


@jax.custom_jvp
def _weights(x_BHCL, hot_BHCLP):
  """Returns the Lagrange polynomials of x in its panel, 0 in the others."""
  basis_BHCLX = chebyshev.lagrange(x_BHCL)
  weight = hot_BHCLP[..., :, None] * basis_BHCLX[..., None, :]
  return weight.reshape(*x_BHCL.shape, -1)


@_weights.defjvp
def _weights_jvp(primals, tangents):
  # Derivatives of polynomials of degree below X are such polynomials, too: to
  # differentiate the barycentric formula would cancel digits near a node.
  x_BHCL, hot_BHCLP = primals
  weight_BHCLN = _weights(*primals)
  weight_BHCLPX = weight_BHCLN.reshape(*hot_BHCLP.shape, -1)
  d_BHCLPX = jnp.einsum(
    "BHCLPX,XY->BHCLPY", weight_BHCLPX, chebyshev.derivatives()
  )
  d_BHCLN = d_BHCLPX.reshape(weight_BHCLN.shape)
  return weight_BHCLN, jnp.einsum("BHCLN,BHCL->BHCLN", d_BHCLN, tangents[0])
