"""Attention in linear time for logits of rank 1, as with G = 1.

With one number per query and key, the logits are s_i t_j, and the output of a
head is a function of one number,

  f(s) = sum_j e^(s t_j) v_j / sum_j e^(s t_j).

Both sums are smooth in s: their values at N nodes give them everywhere (see
`chebyshev`). A sequence is cut into chunks. Attention inside a chunk is exact;
the keys of all earlier chunks are represented by their sums at the nodes,
whose size does not depend on the sequence length. ALiBi decays these sums by
e^(-slope) per position, without loss.

Shapes: s_BHCL scaled queries, t_BHCM centered keys and v_BHCMK values of C
chunks of L = M positions, in float32; P panels of X nodes, N = P X.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from folding.models import chebyshev
from folding.models.exact_attention import MASKED, Biases, attend_whole

_FLOOR = -1e29  # smallest running maximum: e^(MASKED - _FLOOR) is 0


class _Layout(NamedTuple):
  """How a sequence is cut.

  Attributes:
    chunk: L, positions per chunk.
    block: Positions times heads per step of the scan.
    is_turned: Whether the values of whole sequences have their positions as the
      last axis. TPUs pad that axis to 128, and K may be small.
  """

  chunk: int
  block: int
  is_turned: bool

  def store(self, values: Array) -> Array:
    """Returns values [B, H, ..., K], as [B, H, K, ...] if they are turned."""
    return jnp.moveaxis(values, -1, 2) if self.is_turned else values

  def load(self, stored: Array) -> Array:
    """Returns stored values as [B, H, ..., K]."""
    return jnp.moveaxis(stored, 2, -1) if self.is_turned else stored


# By platform. The sizes for CPUs fit their cache.
_LAYOUTS = {
  "cpu": _Layout(64, 4096, is_turned=False),
  "default": _Layout(256, 16384, is_turned=True),
}

_stop = jax.lax.stop_gradient


class Span(NamedTuple):
  """Ranges of s = sqrt(K) q and of t = k that the nodes cover."""

  s_low: Float[Array, "#B #H"]
  s_high: Float[Array, "#B #H"]
  t_low: Float[Array, "#B #H"]
  t_high: Float[Array, "#B #H"]

  @property
  def t_half(self) -> Float[Array, "#B #H"]:
    """Half the range of t."""
    return (self.t_high - self.t_low) / 2


class Inputs(NamedTuple):
  """Queries, keys and values of linear attention, with slopes and a mask.

  Attributes:
    q_BLH: Queries, one number each; the unfolded query has K copies of it.
    k_BLJ: Keys, one number each; J divides H, neighboring heads share a key.
    v_BLIK: Values; I divides H.
    slopes_H: ALiBi slopes, differentiable; None: no positions.
    mask_BL: False at pad tokens; None: no padding.
  """

  q_BLH: Float[Array, "B L H"]
  k_BLJ: Float[Array, "B L J"]
  v_BLIK: Float[Array, "B L I K"]
  slopes_H: Float[Array, " H"] | None = None
  mask_BL: Bool[Array, "B L"] | None = None


class Sums(NamedTuple):
  """Softmax sums over some of the keys, divided by e^top.

  Attributes:
    values: Weighted values, [..., K].
    norm: Sum of the weights.
    top: Running maximum of the logits, without gradient. At nodes: that of the
      logits at the center of each panel, [B, H, P].
  """

  values: Array
  norm: Array
  top: Array


class PastState(NamedTuple):
  """The earlier positions of a sequence, in constant size, for decoding.

  P + N (K + 1) numbers per head.

  Attributes:
    span: The ranges that the nodes cover.
    sums: Sums over the earlier keys at each node, [B, H, N].
    is_outside_B: Whether any query or key was outside the span. If so, outputs
      from that position on are wrong.
  """

  span: Span
  sums: Sums
  is_outside_B: Bool[Array, " B"]


class _Scaled(NamedTuple):
  """The inputs per head, in float32, with keys centered, inside the span."""

  s_BHL: Array
  t_BHL: Array
  v_BHLK: Array
  slopes_BH: Array
  mask_BL: Array


class _Grid(NamedTuple):
  """Node positions in s. Panel p extends by half_BH to both sides of center_p."""

  low_BH: Array  # lower end of the first panel
  half_BH: Array
  center_BHP: Array
  step_BHX: Array  # of the nodes from the center of their panel


def measure_span(x: Inputs) -> Span:
  """Returns the ranges of queries and keys per sequence and head.

  Queries at pad tokens count, keys do not.
  """
  s_BLH, t_BLH = _logit_factors(x)
  mask_BL = _mask(x)
  low_BH = jnp.where(mask_BL[..., None], t_BLH, jnp.inf).min(1)
  high_BH = jnp.where(mask_BL[..., None], t_BLH, -jnp.inf).max(1)
  is_empty = ~mask_BL.any(1)[:, None]  # padding only
  low_BH = jnp.where(is_empty, 0.0, low_BH)
  high_BH = jnp.where(is_empty, 0.0, high_BH)
  return _stop(Span(s_BLH.min(1), s_BLH.max(1), low_BH, high_BH))


def span_bound(span: Span, num_nodes: int) -> Float[Array, "#B #H"]:
  """Returns the `chebyshev.error_bound` per sequence and head.

  Args:
    span: Ranges of queries and keys.
    num_nodes: N, a multiple of 16.
  """
  P = chebyshev.panels(num_nodes)
  return chebyshev.error_bound(P * _panel_half(span, P), span.t_half, num_nodes)


def attend_linear(
  x: Inputs,
  *,
  causal: bool,
  num_nodes: int,
  chunk: int | None = None,
  span: Span | None = None,
) -> Float[Array, "B L H K"]:
  """Returns softmax(sqrt(K) q k - slope |i - j|) v in O(L) time and memory.

  The result and its gradients differ from those of dense attention by rounding
  and interpolation. `span_bound` bounds both errors of the result. A position
  without any visible key outputs 0.

  The nodes follow the data unless `span` is given. An output then depends on
  later keys, by no more than the error bound. With a given span, attention is
  strictly causal, bit for bit.

  Args:
    x: Queries, keys and values.
    causal: Whether later keys are hidden.
    num_nodes: N, a multiple of 16.
    chunk: Positions per chunk, in which attention is exact; None: by platform.
    span: Queries and keys outside are clipped to it; None: measured.
  """
  if span is None:
    span = measure_span(x)
  scaled, grid = _scale(x, span), _make_grid(span, num_nodes)
  if not causal and x.slopes_H is None:
    return _output(_attend_all(scaled, grid), x)
  (B, _, H), K = x.q_BLH.shape, x.v_BLIK.shape[3]
  past = init_state(span, B, H, K, num_nodes).sums
  _, sums = _scan(past, scaled, grid, chunk=chunk)
  if not causal:
    # Later positions are the earlier ones of the reversed sequence.
    s_BHL, t_BHL, v_BHLK = (jnp.flip(a, 2) for a in scaled[:3])
    mask_BL = jnp.flip(scaled.mask_BL, 1)
    turned = _Scaled(s_BHL, t_BHL, v_BHLK, scaled.slopes_BH, mask_BL)
    _, later = _scan(past, turned, grid, chunk=chunk, is_strict=True)
    sums = _join(sums, Sums(*(jnp.flip(a, 2) for a in later)))
  return _output(_divide(sums), x)


def attend_checked(
  x: Inputs,
  *,
  causal: bool,
  tolerance: float,
  num_nodes: tuple[int, ...] = (64, 256),
) -> Float[Array, "B L H K"]:
  """Returns `attend_linear` if its error bound is small enough, else exact.

  The decision is made at run time from the ranges of queries and keys. The
  first of `num_nodes` whose `span_bound` is within the tolerance, in all
  sequences and heads, is used. If there is none, all logits are computed: O(L^2)
  time, O(L) memory. Under `jax.vmap` all alternatives are computed.

  Args:
    x: Queries, keys and values.
    causal: Whether later keys are hidden.
    tolerance: Largest error, relative to the range of the values.
    num_nodes: Numbers of nodes to try, in this order.
  """
  span = measure_span(x)
  is_enough = jnp.stack(
    [(span_bound(span, n) <= tolerance).all() for n in num_nodes]
  )

  def linear(x, num_nodes):
    return attend_linear(x, causal=causal, num_nodes=num_nodes, span=span)

  exact = functools.partial(_attend_exact, causal=causal)
  branches = [
    *(functools.partial(linear, num_nodes=n) for n in num_nodes),
    # A conditional stores the residuals of all branches.
    jax.checkpoint(exact),
  ]
  first = jnp.where(is_enough.any(), is_enough.argmax(), len(num_nodes))
  return jax.lax.switch(first, branches, x)


def init_state(
  span: Span, batch_size: int, num_heads: int, head_dim: int, num_nodes: int
) -> PastState:
  """Returns the state of empty sequences.

  Args:
    span: Ranges that later queries and keys must stay in.
    batch_size: B.
    num_heads: H.
    head_dim: K of the values.
    num_nodes: N, a multiple of 16.
  """
  B, H, P = batch_size, num_heads, chebyshev.panels(num_nodes)
  sums = Sums(
    values=jnp.zeros((B, H, num_nodes, head_dim), jnp.float32),
    norm=jnp.zeros((B, H, num_nodes), jnp.float32),
    top=jnp.full((B, H, P), _FLOOR, jnp.float32),
  )
  return PastState(span, sums, jnp.zeros(B, bool))


def extend(
  state: PastState, x: Inputs, *, chunk: int | None = None
) -> tuple[PastState, Float[Array, "B L H K"]]:
  """Returns the state after L more positions, and their causal attention.

  A prompt is one call. Decoding is one call per token (L = 1), whose cost does
  not depend on the number of earlier tokens.

  Args:
    state: From `init_state`, or from here.
    x: Queries, keys and values of the new positions.
    chunk: Positions per chunk; None: by platform.
  """
  span = state.span
  grid = _make_grid(span, state.sums.norm.shape[2])
  past, sums = _scan(state.sums, _scale(x, span), grid, chunk=chunk)
  s_BLH, t_BLH = _logit_factors(x)
  s_low, s_high, t_low, t_high = (end[:, None] for end in span)
  is_outside_BLH = (s_BLH < s_low) | (s_BLH > s_high)
  is_outside_BLH |= (t_BLH < t_low) | (t_BLH > t_high)
  is_outside_BL = is_outside_BLH.any(2) & _mask(x)
  state = PastState(span, past, state.is_outside_B | is_outside_BL.any(1))
  return state, _output(_divide(sums), x)


def _logit_factors(x: Inputs) -> tuple[Array, Array]:
  """Returns s = sqrt(K) q and t = k per head, float32[B, L, H]."""
  s_BLH = x.v_BLIK.shape[3] ** 0.5 * x.q_BLH.astype(jnp.float32)
  return s_BLH, _repeat(x.k_BLJ.astype(jnp.float32), x.q_BLH.shape[2])


def _mask(x: Inputs) -> Array:
  """Returns the padding mask, [B, L], True everywhere if there is none."""
  if x.mask_BL is None:
    return jnp.ones(x.q_BLH.shape[:2], bool)
  return jnp.asarray(x.mask_BL)


def _repeat(x: Array, num_heads: int) -> Array:
  """Returns x with the heads of axis 2 repeated to H."""
  return jnp.repeat(x, num_heads // x.shape[2], axis=2)


def _scale(x: Inputs, span: Span) -> _Scaled:
  num_heads = x.q_BLH.shape[2]
  s_BHL, t_BHL = (a.swapaxes(1, 2) for a in _logit_factors(x))
  s_BHL = _clip(s_BHL, span.s_low, span.s_high)
  t_BHL = _clip(t_BHL, span.t_low, span.t_high)
  # Shifting all keys shifts all logits of a row, which softmax ignores.
  t_BHL -= ((span.t_low + span.t_high) / 2)[..., None]
  v_BHLK = _repeat(x.v_BLIK.astype(jnp.float32), num_heads).swapaxes(1, 2)
  # Slopes per row leave the sum of their gradient over rows to the end. With rows
  # on several devices, each step of the scan would otherwise move [H, L, M]
  # numbers.
  slopes_BH = jnp.broadcast_to(_slopes(x), t_BHL.shape[:2])
  return _Scaled(s_BHL, t_BHL, v_BHLK, slopes_BH, _mask(x))


def _clip(x_BHL: Array, low_BH: Array, high_BH: Array) -> Array:
  # jnp.clip would halve the gradient of values that equal an end.
  x_BHL = jnp.where(x_BHL < low_BH[..., None], low_BH[..., None], x_BHL)
  return jnp.where(x_BHL > high_BH[..., None], high_BH[..., None], x_BHL)


def _divide(sums: Sums) -> Array:
  """Returns the averages of the values, [..., K]; 0 without any key."""
  return sums.values / jnp.where(sums.norm > 0, sums.norm, 1)[..., None]


def _output(out_BHLK: Array, x: Inputs) -> Array:
  """Returns [B, L, H, K] in the dtype of the values."""
  return out_BHLK.swapaxes(1, 2).astype(x.v_BLIK.dtype)


# The nodes: placing them, writing keys to them, reading queries from them.


def _panel_half(span: Span, P: int) -> Array:
  """Returns half the width of each of P equal panels of the range of s."""
  # The least width keeps rounding from moving an s out of its panel, and the
  # slope of e^(s t), which interpolation enlarges by X^2 / half, accurate.
  least_BH = 1e-3 * jnp.maximum(jnp.abs(span.s_low), jnp.abs(span.s_high))
  least_BH = jnp.maximum(least_BH, 0.5 / jnp.maximum(span.t_half, 0.5))
  return jnp.maximum((span.s_high - span.s_low) / (2 * P), least_BH)


def _make_grid(span: Span, num_nodes: int) -> _Grid:
  P = chebyshev.panels(num_nodes)
  half_BH = _panel_half(span, P)
  odd_P = jnp.asarray(2 * np.arange(P) + 1, jnp.float32)[None, None]
  center_BHP = span.s_low[..., None] + half_BH[..., None] * odd_P
  step_BHX = half_BH[..., None] * chebyshev.nodes()[None, None]
  return _stop(_Grid(span.s_low, half_BH, center_BHP, step_BHX))


def _write(t_BHCM, v_BHCMK, bias_BHCM, grid: _Grid) -> Sums:
  """Returns the sums of each chunk's keys at the nodes; top is [B, H, C, P]."""
  center_BHCMP = t_BHCM[..., None] * grid.center_BHP[:, :, None, None]
  top_BHCP = (center_BHCMP + bias_BHCM[..., None]).max(3)
  top_BHCP = _stop(jnp.maximum(top_BHCP, _FLOOR))
  power_BHCNM = _powers(t_BHCM, bias_BHCM, top_BHCP, grid)
  sum_BHCNK = jnp.einsum("BHCNM,BHCMK->BHCNK", power_BHCNM, v_BHCMK)
  return Sums(sum_BHCNK, power_BHCNM.sum(-1), top_BHCP)


@jax.custom_jvp
def _powers(t_BHCM, bias_BHCM, top_BHCP, grid: _Grid):
  """Returns exp(s_n t + bias - top) as [B, H, C, N, M].

  The exponent at the center is rounded once for all nodes of a panel, like a
  logit: interpolation does not enlarge this error.
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


def _panel_of(s_BHCL, grid: _Grid) -> tuple[Array, Array]:
  """Returns the panel of each s, one-hot [..., P], and its x in [-1, 1]."""
  P = grid.center_BHP.shape[-1]
  low, half = grid.low_BH[..., None, None], grid.half_BH[..., None, None]
  panel = jnp.clip(jnp.floor(_stop(s_BHCL - low) / (2 * half)), 0, P - 1)
  hot_BHCLP = jax.nn.one_hot(panel.astype(int), P, dtype=jnp.float32)
  return hot_BHCLP, (s_BHCL - low) / half - (2 * panel + 1)


@jax.custom_jvp
def _weights(x_BHCL, hot_BHCLP):
  """Returns the interpolation weights of all nodes, 0 in other panels."""
  basis_BHCLX = chebyshev.lagrange(x_BHCL)
  weight = hot_BHCLP[..., :, None] * basis_BHCLX[..., None, :]
  return weight.reshape(*x_BHCL.shape, -1)


@_weights.defjvp
def _weights_jvp(primals, tangents):
  # The derivatives of polynomials of degree below X are such polynomials, too.
  # Differentiating the barycentric formula would cancel digits near a node.
  _, hot_BHCLP = primals
  weight_BHCLN = _weights(*primals)
  weight_BHCLPX = weight_BHCLN.reshape(*hot_BHCLP.shape, -1)
  d_BHCLPX = jnp.einsum(
    "BHCLPX,XY->BHCLPY", weight_BHCLPX, chebyshev.derivatives()
  )
  d_BHCLN = d_BHCLPX.reshape(weight_BHCLN.shape)
  return weight_BHCLN, jnp.einsum("BHCLN,BHCL->BHCLN", d_BHCLN, tangents[0])


def _read(weight_BHCLN, sums: Sums, top: Array) -> Sums:
  """Returns the sums of queries with these weights of the nodes."""
  return Sums(
    jnp.einsum("BHCLN,BHCNK->BHCLK", weight_BHCLN, sums.values),
    jnp.einsum("BHCLN,BHCN->BHCL", weight_BHCLN, sums.norm),
    top,
  )


# Sums over keys.


def _join(a: Sums, b: Sums) -> Sums:
  """Returns the sums over the keys of both."""
  top = _stop(jnp.maximum(a.top, b.top))
  scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
  values = jnp.einsum("...,...K->...K", scale_a, a.values)
  values += jnp.einsum("...,...K->...K", scale_b, b.values)
  return Sums(values, scale_a * a.norm + scale_b * b.norm, top)


def _accumulate(sums: Sums, slopes_BH, chunk: int) -> Sums:
  """Returns, per chunk, the decayed sums over it and all chunks before it.

  Args:
    sums: [B, H, C, N, ...]: of the past first, then of each chunk.
    slopes_BH: Decay per position.
    chunk: Positions per chunk.
  """
  B, H, C, P = sums.top.shape
  lag_IJ = np.arange(C)[:, None] - np.arange(C)  # chunk I sums over chunks J
  ages_IJ = jnp.asarray(chunk * np.maximum(lag_IJ, 0), jnp.float32)
  decay_BHIJ = jnp.einsum("BH,IJ->BHIJ", slopes_BH, ages_IJ)
  top_BHPJ = sums.top.swapaxes(2, 3)
  log_BHPIJ = top_BHPJ[..., None, :] - decay_BHIJ[:, :, None]
  log_BHPIJ = jnp.where((lag_IJ >= 0)[None, None, None], log_BHPIJ, MASKED)
  top_BHPI = _stop(log_BHPIJ.max(-1))
  share_BHPIJ = jnp.exp(log_BHPIJ - top_BHPI[..., None])
  sum_BHJPY = sums.values.reshape(B, H, C, P, -1)
  sum_BHIPY = jnp.einsum("BHPIJ,BHJPY->BHIPY", share_BHPIJ, sum_BHJPY)
  norm_BHJPX = sums.norm.reshape(B, H, C, P, -1)
  norm_BHIPX = jnp.einsum("BHPIJ,BHJPX->BHIPX", share_BHPIJ, norm_BHJPX)
  return Sums(
    sum_BHIPY.reshape(sums.values.shape),
    norm_BHIPX.reshape(sums.norm.shape),
    top_BHPI.swapaxes(2, 3),
  )


def _attend_near(s_BHCL, t_BHCM, v_BHCMK, bias_BHLM, is_seen: Array) -> Sums:
  """Returns exact attention inside each chunk."""
  logits_BHCLM = jnp.einsum("BHCL,BHCM->BHCLM", s_BHCL, t_BHCM)
  logits_BHCLM += bias_BHLM[:, :, None]
  logits_BHCLM = jnp.where(is_seen, logits_BHCLM, MASKED)
  top_BHCL = _stop(jnp.maximum(logits_BHCLM.max(-1), _FLOOR))
  att_BHCLM = jnp.exp(logits_BHCLM - top_BHCL[..., None])
  sum_BHCLK = jnp.einsum("BHCLM,BHCMK->BHCLK", att_BHCLM, v_BHCMK)
  return Sums(sum_BHCLK, att_BHCLM.sum(-1), top_BHCL)


# Whole sequences.


@jax.checkpoint
def _attend_all(x: _Scaled, grid: _Grid) -> Array:
  """Returns attention to all keys without positions: one chunk, only nodes."""
  t_BHCM, v_BHCMK = x.t_BHL[:, :, None], x.v_BHLK[:, :, None]
  mask_BHCM = x.mask_BL[:, None, None]
  bias_BHCM = jnp.where(mask_BHCM, jnp.zeros_like(t_BHCM), MASKED)
  sums = _write(t_BHCM, v_BHCMK, bias_BHCM, grid)
  hot_BHCLP, x_BHCL = _panel_of(x.s_BHL[:, :, None], grid)
  # Tops differ between panels, but cancel between a query's sum and norm.
  found = _read(_weights(x_BHCL, hot_BHCLP), sums, sums.top)
  return _divide(found)[:, :, 0]


def _attend_exact(x: Inputs, *, causal: bool) -> Array:
  """Returns exact attention: O(L^2) time, O(L) memory."""
  s_BLH1, t_BLH1 = (a[..., None] for a in _logit_factors(x))
  biases = Biases(_slopes(x))
  return attend_whole(
    s_BLH1, t_BLH1, x.v_BLIK, biases, x.mask_BL, causal=causal, head_dim=1
  )


def _slopes(x: Inputs) -> Array:
  """Returns the slopes in float32, 0 without positions."""
  if x.slopes_H is None:
    return jnp.zeros(x.q_BLH.shape[2], jnp.float32)
  return x.slopes_H.astype(jnp.float32)


def _scan(
  past: Sums,
  x: _Scaled,
  grid: _Grid,
  *,
  chunk: int | None,
  is_strict: bool = False,
) -> tuple[Sums, Sums]:
  """Returns `_scan_chunks` with chunks of a size for the platform."""
  layouts = _LAYOUTS
  if chunk is not None:
    layouts = {"default": _Layout(chunk, _LAYOUTS["cpu"].block, is_turned=True)}
  scans = {
    name: functools.partial(_scan_chunks, layout=layout, is_strict=is_strict)
    for name, layout in layouts.items()
  }
  return jax.lax.platform_dependent(past, x, grid, **scans)


def _scan_chunks(
  past: Sums,
  x: _Scaled,
  grid: _Grid,
  *,
  layout: _Layout,
  is_strict: bool,
) -> tuple[Sums, Sums]:
  """Returns the past after all positions, and their causal sums.

  If the chunk does not divide the length, padding is appended, with a mask of
  False.

  Args:
    past: Sums at the nodes, [B, H, N]; its top is [B, H, P].
    x: The sequences.
    grid: The nodes.
    layout: How the sequences are cut.
    is_strict: Whether a position is hidden from itself.
  """
  B, H, length = x.s_BHL.shape
  chunk = min(layout.chunk, length)
  num_chunks = -(-length // chunk)
  num_blocks = -(-num_chunks // max(1, layout.block // (B * H * chunk)))
  C = -(-num_chunks // num_blocks)
  v_axis = 2 + layout.is_turned  # of positions
  sizes = num_blocks, C, chunk
  steps = (
    # Padded queries repeat the last one: 0 may be outside the nodes' range,
    # where gradients overflow.
    _cut(x.s_BHL, 2, sizes, mode="edge"),
    _cut(x.t_BHL, 2, sizes),
    _cut(layout.store(x.v_BHLK), v_axis, sizes),
    _cut(x.mask_BL, 1, sizes),
  )
  step = functools.partial(_block, x.slopes_BH, grid, layout, is_strict)
  past, sums = jax.lax.scan(step, past, steps)
  # The padding has decayed the past too far.
  added = math.prod(sizes) - length
  past = past._replace(top=past.top + (added * x.slopes_BH)[..., None])
  values = layout.load(_whole(sums.values, v_axis, length))
  norm, top = (_whole(a, 2, length) for a in (sums.norm, sums.top))
  return past, Sums(values, norm, top)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _block(
  slopes_BH, grid, layout: _Layout, is_strict: bool, past: Sums, block
):
  """Returns the past after a block of chunks, and the sums of its queries."""
  s_BHCL, t_BHCM, stored, mask_BCM = block
  v_BHCMK = layout.load(stored)
  L = s_BHCL.shape[3]
  at_L = jnp.arange(L, dtype=jnp.float32)
  distance_LM = at_L[:, None] - at_L[None]
  is_seen_LM = distance_LM > 0 if is_strict else distance_LM >= 0
  mask_BHCM = mask_BCM[:, None]
  is_seen = is_seen_LM[None, None, None] & mask_BHCM[..., None, :]
  bias_BHLM = -jnp.einsum("BH,LM->BHLM", slopes_BH, jnp.abs(distance_LM))
  near = _attend_near(s_BHCL, t_BHCM, v_BHCMK, bias_BHLM, is_seen)

  to_end_BHM = jnp.einsum("BH,M->BHM", slopes_BH, at_L - L)
  to_end_BHCM = jnp.broadcast_to(to_end_BHM[:, :, None], t_BHCM.shape)
  to_end_BHCM = jnp.where(mask_BHCM, to_end_BHCM, MASKED)
  sums = _write(t_BHCM, v_BHCMK, to_end_BHCM, grid)
  sums = jax.tree.map(
    lambda x, y: jnp.concatenate([x[:, :, None], y], 2), past, sums
  )
  pasts = _accumulate(sums, slopes_BH, L)
  past = jax.tree.map(lambda x: x[:, :, -1], pasts)
  pasts = jax.tree.map(lambda x: x[:, :, :-1], pasts)

  hot_BHCLP, x_BHCL = _panel_of(s_BHCL, grid)
  top_BHCL = jnp.einsum("BHCLP,BHCP->BHCL", hot_BHCLP, pasts.top)
  from_start_BHL = jnp.einsum("BH,L->BHL", slopes_BH, at_L)
  top_BHCL -= from_start_BHL[:, :, None]
  far = _read(_weights(x_BHCL, hot_BHCLP), pasts, top_BHCL)
  sums = _join(near, far)
  return past, sums._replace(values=layout.store(sums.values))


def _cut(
  x: Array, axis: int, sizes: tuple[int, int, int], mode: str = "constant"
) -> Array:
  """Returns [..., length, ...], padded at its end, as [blocks, ..., C, L, ...].

  `sizes` are those of the three axes, and `mode` is that of `jnp.pad`: "constant"
  (0) or "edge".
  """
  width = [(0, 0)] * x.ndim
  width[axis] = (0, math.prod(sizes) - x.shape[axis])
  shape = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
  return jnp.moveaxis(jnp.pad(x, width, mode=mode).reshape(shape), axis, 0)


def _whole(x: Array, axis: int, length: int) -> Array:
  """Returns [blocks, ..., C, L, ...] as [..., length, ...]."""
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])
  return jax.lax.slice_in_dim(x, 0, length, axis=axis)
