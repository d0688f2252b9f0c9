"""Empty states for decoding in constant size.

A `linear_attention.PastState` covers a range of queries and keys, which is
measured on random tokens. If a query or key leaves it, the state is made again
with a wider one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from folding.errors import ConfigError
from folding.models.attention import (
  TOLERANCE,
  Attention,
  has_rank_1,
  rank_1_inputs,
)
from folding.models.linear_attention import (
  PastState,
  Span,
  init_state,
  measure_span,
  span_bound,
)
from folding.models.shape import Layer
from folding.models.transformer import Transformer

_CALIBRATION = 1024  # random tokens that the first ranges are measured on
_NODES_STEP, _MOST_NODES = 64, 4096


def layers(model: Transformer) -> dict[int, Layer]:
  """Returns the layers that can decode in constant size."""
  every = enumerate(model.shape.layers)
  return {n: x for n, x in every if has_rank_1(model.shape, x)}


def measure_spans(model: Transformer, params: Any) -> dict[int, Span]:
  """Returns the ranges of queries and keys over random tokens, [1, H] each.

  Returns:
    {n: ranges of layer n}, for layers that can decode in constant size.
  """
  length = model.shape.max_length
  if model.shape.positions != "learned":
    length = min(length, 128)
  size = max(1, _CALIBRATION // length), length
  tokens_BL = np.random.default_rng(0).integers(0, model.vocab_size, size)

  def is_projection(module, method):
    return isinstance(module, Attention) and method == "project"

  found: Any = model.apply(
    {"params": params},
    jnp.asarray(tokens_BL, jnp.int32),
    capture_intermediates=is_projection,
  )
  intermediates = found[1]["intermediates"]
  spans = {}
  for n, layer in layers(model).items():
    heads = intermediates[f"blocks_{n}"]["attn"]["project"][0]
    # All texts are one row, so that they share a range.
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in heads)
    x = rank_1_inputs(layer, (q, k, v))
    spans[n] = measure_span(x)
  return spans


def empty_states(
  model: Transformer,
  spans: Mapping[int, Span],
  batch_size: int,
  margin: float,
) -> list[PastState | None]:
  """Returns the state of each layer before any token; None: it has none.

  The ranges are made wider by the factor `margin`.

  Raises:
    ConfigError: the ranges need too many nodes.
  """
  spans = {n: widen(span, margin) for n, span in spans.items()}
  num_nodes = nodes_for(list(spans.values()), TOLERANCE)
  if num_nodes is None:
    raise ConfigError(
      "the queries and keys of this model range too far for a constant state; "
      "use a KV cache (--cache=keys)"
    )
  states: list[PastState | None] = [None] * model.shape.num_layers
  for n, layer in layers(model).items():
    states[n] = init_state(
      spans[n], batch_size, len(layer.heads), layer.value_dim, num_nodes
    )
  return states


def widen(span: Span, margin: float) -> Span:
  """Returns ranges that are `margin` times as wide, with the same centers."""

  def widened(low, high):
    center, half = (low + high) / 2, margin * (high - low) / 2
    return center - half, center + half

  return Span(
    *widened(span.s_low, span.s_high), *widened(span.t_low, span.t_high)
  )


def nodes_for(spans: Sequence[Span], tolerance: float) -> int | None:
  """Returns the fewest nodes that keep all layers within a tolerance.

  Args:
    spans: Ranges of queries and keys, one per layer.
    tolerance: Largest error of attention, relative to the range of its values.

  Returns:
    A multiple of 64, so that similar ranges share a compiled program. None: no
    number up to 4,096 is enough.
  """
  for num_nodes in range(_NODES_STEP, _MOST_NODES + 1, _NODES_STEP):
    if all(bool((span_bound(x, num_nodes) <= tolerance).all()) for x in spans):
      return num_nodes
  return None
