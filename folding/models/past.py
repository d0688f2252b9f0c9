"""A state of constant size in place of all keys, for decoding with G = 1.

An attention layer whose logits have rank 1 may have, in the collection
"cache", `past` (see `linear_attention`) instead of slots (see `cache`). What
its nodes serve is in the collection "spans", which `Transformer` writes where
it is mutable, and reads otherwise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from folding.models import chebyshev, linear_attention
from folding.models.linear_attention import PastState, Span, span_bound


class Past(NamedTuple):
  """The state of a layer, and what it is worth.

  Attributes:
    state: See `linear_attention`.
    is_outside_B: Whether a query or key was outside what the nodes serve, so
      that all that came after it is wrong.
  """

  state: PastState
  is_outside_B: Bool[Array, " B"]


def begin(
  span: Span,
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  v_BLIK: Float[Array, "B L I K"],
  slopes_H: Float[Array, " H"] | None,
  keep_BL: Bool[Array, "B L"] | None,
  *,
  head_dim: int,
  num_nodes: int,
) -> tuple[Past, Float[Array, "B L H K"]]:
  """Returns the past after the prompts, and their causal attention.

  Args:
    span: Of this layer.
    q_BLH: As in `linear_attention.attend_linear`, like all that follow.
    k_BLJ: Keys.
    v_BLIK: Values.
    slopes_H: Of ALiBi.
    keep_BL: False where there is no token.
    head_dim: K.
    num_nodes: N.
  """
  B, _, H = q_BLH.shape
  state = linear_attention.init_state(span, B, H, head_dim, num_nodes)
  past = Past(state, jnp.zeros(B, bool))
  return go_on(past, q_BLH, k_BLJ, v_BLIK, slopes_H, keep_BL, head_dim=head_dim)


def go_on(
  past: Past,
  q_BLH: Float[Array, "B L H"],
  k_BLJ: Float[Array, "B L J"],
  v_BLIK: Float[Array, "B L I K"],
  slopes_H: Float[Array, " H"] | None,
  keep_BL: Bool[Array, "B L"] | None = None,
  *,
  head_dim: int,
) -> tuple[Past, Float[Array, "B L H K"]]:
  """Returns the past after more tokens, and their causal attention."""
  state, out_BLHK = linear_attention.extend(
    past.state, q_BLH, k_BLJ, v_BLIK, slopes_H, keep_BL, head_dim=head_dim
  )
  span = state.span
  if keep_BL is not None:  # what is read where there is no token is no matter
    q_BLH = jnp.where(keep_BL[..., None], q_BLH, q_BLH[:, -1:])
  new = linear_attention.measure_span(q_BLH, k_BLJ, keep_BL, head_dim=head_dim)
  is_outside_BH = (new.s_low < span.s_low) | (new.s_high > span.s_high)
  is_outside_BH |= (new.t_low < span.t_low) | (new.t_high > span.t_high)
  is_outside_B = past.is_outside_B | is_outside_BH.any(axis=1)
  return Past(state, is_outside_B), out_BLHK


def span_of_all(
  q_BLH: Float[Array, "B L H"], k_BLJ: Float[Array, "B L J"], head_dim: int
) -> Span:
  """Returns the ranges of all texts together, [1, H]."""
  span = linear_attention.measure_span(q_BLH, k_BLJ, head_dim=head_dim)
  return Span(
    span.s_low.min(0, keepdims=True),
    span.s_high.max(0, keepdims=True),
    span.t_low.min(0, keepdims=True),
    span.t_high.max(0, keepdims=True),
  )


def widen(spans: Any, margin: float) -> Any:
  """Returns the collection "spans" with ranges `margin` times as wide."""

  def widened(low, high):
    center, half = (low + high) / 2, margin * (high - low) / 2
    return center - half, center + half

  return jax.tree.map(
    lambda span: Span(
      *widened(span.s_low, span.s_high), *widened(span.t_low, span.t_high)
    ),
    spans,
    is_leaf=_is_span,
  )


def nodes_for(spans: Any, tolerance: float) -> int:
  """Returns the nodes with which all layers are within a tolerance.

  They are a multiple of 64, so that models of like ranges share a program.

  Args:
    spans: The collection.
    tolerance: Largest error of a layer's attention, over the range of its
      values.

  Raises:
    ValueError: no number is enough.
  """
  leaves = jax.tree.leaves(spans, is_leaf=_is_span)
  largest = max(
    float(((x.s_high - x.s_low) * (x.t_high - x.t_low)).max()) / 4
    for x in leaves
  )
  num_nodes = chebyshev.nodes_for(largest, 1.0, tolerance)
  num_nodes = -(-num_nodes // 64) * 64
  # Panels have a least width, which more of them do not change.
  if any(float(span_bound(x, num_nodes).max()) > tolerance for x in leaves):
    raise ValueError("the queries are too far from 0 for how little they vary")
  return num_nodes


def is_outside(cache: Any) -> bool:
  """Returns whether a past in the collection "cache" has become wrong."""
  leaves = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Past))
  flags = [x.is_outside_B for x in leaves if isinstance(x, Past)]
  return any(bool(x.any()) for x in jax.device_get(flags))


def _is_span(x: Any) -> bool:
  return isinstance(x, Span)
