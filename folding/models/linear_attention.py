"""Attention in linear time where logits have rank 1, as with G = 1.

Logits s_i t_j make a head's output a function of one number: f(s) = sum_j
e^(s t_j) v_j over its normaliser sum_j e^(s t_j), and both sums are known at
all s once they are known at N nodes (see `chebyshev`). So a text is cut into
chunks: inside a chunk attention is computed exactly, and all before it is a
`PastState` of the same size whatever its length (see `nodal`). ALiBi
multiplies the sums by e^(-slope) a position, without loss.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from folding.models import chebyshev, chunked, nodal


class Span(NamedTuple):
  """Ranges of s = sqrt(K) q and of t = k that the nodes serve."""

  s_low: Float[Array, "#B #H"]
  s_high: Float[Array, "#B #H"]
  t_low: Float[Array, "#B #H"]
  t_high: Float[Array, "#B #H"]

  @property
  def t_half(self) -> Float[Array, "#B #H"]:
    """Half the range of t."""
    return (self.t_high - self.t_low) / 2

  def grid(self, num_nodes: int) -> nodal.Grid:
    """Returns so many nodes for these ranges."""
    return nodal.make_grid(self.s_low, self.s_high, self.t_half, num_nodes)


class PastState(NamedTuple):
  """All that later positions need to know of a text; P + N (K + 1) numbers.

  Attributes:
    span: What the nodes were chosen for.
    top_BHP: Running maximum of the logits at the centre of each panel.
    norm_BHN: Normaliser at each node, over e^top.
    sum_BHNK: Weighted sum of values at each node, over e^top.
  """

  span: Span
  top_BHP: Float[Array, "B H P"]
  norm_BHN: Float[Array, "B H N"]
  sum_BHNK: Float[Array, "B H N K"]


def measure_span(
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  keep_BL: Bool[Array, "B L"] | None = None,
  *,
  head_dim: int,
) -> Span:
  """Returns the ranges of each text's queries and keys, a head."""
  s_BLH = head_dim**0.5 * q_BLH.astype(jnp.float32)
  t_BLH = _repeat(k_BLJ.astype(jnp.float32), q_BLH.shape[2])
  low_BH, high_BH = t_BLH.min(1), t_BLH.max(1)
  if keep_BL is not None:
    keep_BL1 = keep_BL[..., None]
    low_BH = jnp.where(keep_BL1, t_BLH, jnp.inf).min(1)
    high_BH = jnp.where(keep_BL1, t_BLH, -jnp.inf).max(1)
    is_empty = ~keep_BL.any(1)[:, None]  # a text of padding alone
    low_BH = jnp.where(is_empty, 0.0, low_BH)
    high_BH = jnp.where(is_empty, 0.0, high_BH)
  span = Span(s_BLH.min(1), s_BLH.max(1), low_BH, high_BH)
  return jax.lax.stop_gradient(span)


def span_bound(span: Span, num_nodes: int) -> Float[Array, "#B #H"]:
  """Returns the `chebyshev.error_bound` of each text and head."""
  P = chebyshev.panels(num_nodes)
  half_BH = nodal.panel_half(span.s_low, span.s_high, span.t_half, P)
  return chebyshev.error_bound(P * half_BH, span.t_half, num_nodes)


def attend_linear(
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  v_BLIK: Float[Array, "B L I K"],
  slopes_H: Float[Array, " H"] | None = None,
  keep_BL: Bool[Array, "B L"] | None = None,
  *,
  head_dim: int,
  causal: bool,
  num_nodes: int,
  chunk: int = 64,
  span: Span | None = None,
) -> Float[Array, "B L H K"]:
  """Returns softmax(sqrt(K) q k - slope |i - j|) v in O(L) time and memory.

  Result and gradients differ from those of dense attention by rounding and
  interpolation alone; for the result, `span_bound` bounds both.

  The nodes follow the data unless `span` says where they are. Then an output
  depends on later keys, though by no more than that difference; what is to be
  strictly causal, bit for bit, needs a given span.

  Args:
    q_BLH: The one number of a query, of which K copies make the unfolded one.
    k_BLJ: The same of a key; J divides H, neighbouring heads share a key.
    v_BLIK: Values; I divides H.
    slopes_H: ALiBi slopes, differentiable; None: no positions.
    keep_BL: False at padding; None: no padding. A position that sees no key
      gives 0.
    head_dim: K, of the unfolded queries.
    causal: Whether later keys are hidden.
    num_nodes: N, as from `chebyshev.nodes_for`.
    chunk: Positions between which attention is exact.
    span: Queries and keys outside are moved to its ends; None: measured.
  """
  if span is None:
    span = measure_span(q_BLH, k_BLJ, keep_BL, head_dim=head_dim)
  arrays = _prepare(q_BLH, k_BLJ, v_BLIK, span, head_dim)
  grid = span.grid(num_nodes)
  if not causal and slopes_H is None:
    out_BHLK = chunked.attend_all(*arrays, keep_BL, grid)
    return out_BHLK.swapaxes(1, 2).astype(v_BLIK.dtype)
  B, _, H = q_BLH.shape
  slopes_H = _slopes(slopes_H, q_BLH)
  state = init_state(span, B, H, v_BLIK.shape[3], num_nodes)
  past = nodal.Part(state.sum_BHNK, state.norm_BHN, state.top_BHP)
  _, part = chunked.scan(past, arrays, slopes_H, keep_BL, grid, chunk)
  if not causal:
    # What comes later is what came before in the text read backwards.
    s_BHL, t_BHL, v_BHLK = (jnp.flip(x, 2) for x in arrays)
    keep_BL = None if keep_BL is None else jnp.flip(keep_BL, 1)
    _, later = chunked.scan(
      past,
      (s_BHL, t_BHL, v_BHLK),
      slopes_H,
      keep_BL,
      grid,
      chunk,
      is_strict=True,
    )
    later = nodal.Part(*(jnp.flip(x, 2) for x in later))
    part = nodal.join(part, later)
  return nodal.divide(part).swapaxes(1, 2).astype(v_BLIK.dtype)


def attend_checked(
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  v_BLIK: Float[Array, "B L I K"],
  slopes_H: Float[Array, " H"] | None = None,
  keep_BL: Bool[Array, "B L"] | None = None,
  *,
  head_dim: int,
  causal: bool,
  tolerance: float,
  num_nodes: tuple[int, ...] = (64, 256),
  chunk: int = 64,
) -> Float[Array, "B L H K"]:
  """Returns `attend_linear` where it is as exact as asked for, else dense.

  The ranges of queries and keys decide when it is run: the first number of
  nodes whose `span_bound` is within the tolerance in all texts and heads is
  used, and if there is none all logits are computed, in O(L^2) time but O(L)
  memory. Under `jax.vmap` all alternatives are computed.

  Arguments are those of `attend_linear`; `tolerance` is the largest error, over
  the range of the values, and `num_nodes` are tried in this order.
  """
  span = measure_span(q_BLH, k_BLJ, keep_BL, head_dim=head_dim)
  is_enough = jnp.stack(
    [(span_bound(span, n) <= tolerance).all() for n in num_nodes]
  )
  inputs = (q_BLH, k_BLJ, v_BLIK, slopes_H, keep_BL)

  def linear(inputs, num_nodes):
    return attend_linear(
      *inputs,
      head_dim=head_dim,
      causal=causal,
      num_nodes=num_nodes,
      chunk=chunk,
      span=span,
    )

  def dense(inputs):
    q_BLH, k_BLJ, v_BLIK, slopes_H, keep_BL = inputs
    out_BHLK = chunked.attend_exact(
      *_prepare(q_BLH, k_BLJ, v_BLIK, span, head_dim),
      _slopes(slopes_H, q_BLH),
      keep_BL,
      causal=causal,
    )
    return out_BHLK.swapaxes(1, 2).astype(v_BLIK.dtype)

  branches = [functools.partial(linear, num_nodes=n) for n in num_nodes]
  first = jnp.where(is_enough.any(), is_enough.argmax(), len(num_nodes))
  return jax.lax.switch(first, [*branches, dense], inputs)


def init_state(
  span: Span, batch_size: int, num_heads: int, head_dim: int, num_nodes: int
) -> PastState:
  """Returns the state of empty texts.

  Args:
    span: What queries and keys will keep to, which has to be known before the
      text is: measured on other texts, and widened.
    batch_size: B.
    num_heads: H.
    head_dim: K of the values.
    num_nodes: N, as from `chebyshev.nodes_for`.
  """
  BH = batch_size, num_heads
  P, kind = chebyshev.panels(num_nodes), jnp.float32
  return PastState(
    span,
    jnp.full((*BH, P), nodal.FLOOR, kind),
    jnp.zeros((*BH, num_nodes), kind),
    jnp.zeros((*BH, num_nodes, head_dim), kind),
  )


def extend(
  state: PastState,
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  v_BLIK: Float[Array, "B L I K"],
  slopes_H: Float[Array, " H"] | None = None,
  keep_BL: Bool[Array, "B L"] | None = None,
  *,
  head_dim: int,
  chunk: int = 64,
) -> tuple[PastState, Float[Array, "B L H K"]]:
  """Returns the state after L more positions, and their causal attention.

  A prompt goes in at once, decoding a position at a time (L = 1): a step costs
  the same whatever the length so far. Arguments are those of `attend_linear`.
  """
  if keep_BL is None:
    keep_BL = jnp.ones(q_BLH.shape[:2], bool)
  past, part = chunked.scan(
    nodal.Part(state.sum_BHNK, state.norm_BHN, state.top_BHP),
    _prepare(q_BLH, k_BLJ, v_BLIK, state.span, head_dim),
    _slopes(slopes_H, q_BLH),
    keep_BL,
    state.span.grid(state.norm_BHN.shape[2]),
    chunk,
  )
  out_BLHK = nodal.divide(part).swapaxes(1, 2).astype(v_BLIK.dtype)
  return PastState(state.span, past.top, past.norm, past.sum_K), out_BLHK


def _repeat(x: Array, num_heads: int) -> Array:
  """Returns x with the heads of axis 2 repeated to H."""
  return jnp.repeat(x, num_heads // x.shape[2], axis=2)


def _slopes(slopes_H: Array | None, q_BLH: Array) -> Array:
  if slopes_H is None:
    return jnp.zeros(q_BLH.shape[2:], jnp.float32)
  return slopes_H.astype(jnp.float32)


def _prepare(
  q_BLH, k_BLJ, v_BLIK, span, head_dim
) -> tuple[Array, Array, Array]:
  """Returns s_BHL, t_BHL and v_BHLK in float32, inside the span."""
  num_heads = q_BLH.shape[2]
  s_BHL = head_dim**0.5 * q_BLH.astype(jnp.float32).swapaxes(1, 2)
  t_BHL = _repeat(k_BLJ.astype(jnp.float32), num_heads).swapaxes(1, 2)
  s_BHL = _inside(s_BHL, span.s_low, span.s_high)
  t_BHL = _inside(t_BHL, span.t_low, span.t_high)
  # What is added to all t changes the logits of a row alike: no change.
  t_BHL -= ((span.t_low + span.t_high) / 2)[..., None]
  v_BHLK = _repeat(v_BLIK.astype(jnp.float32), num_heads).swapaxes(1, 2)
  return s_BHL, t_BHL, v_BHLK


def _inside(x_BHL: Array, low_BH: Array, high_BH: Array) -> Array:
  # Not jnp.clip, which halves the gradient of what equals an end.
  x_BHL = jnp.where(x_BHL < low_BH[..., None], low_BH[..., None], x_BHL)
  return jnp.where(x_BHL > high_BH[..., None], high_BH[..., None], x_BHL)
