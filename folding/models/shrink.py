"""Shrinks a model: smaller parameters and their shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from folding.compression.shrink import Cut, shrink_layers
from folding.models.shape import Shape


class Shrunk(NamedTuple):
  """Result of `shrink`.

  Attributes:
    shape: Shape of the smaller model; it knows its widths before.
    params: The smaller parameters. The vocabulary has the rows of the
      embedding.
    cut: Selection of indices, and the map of tokens.
  """

  shape: Shape
  params: dict[str, Any]
  cut: Cut


def shrink(
  shape: Shape,
  params: Mapping[str, Any],
  *,
  multiple: int = 1,
  absorb: bool = True,
  is_zero: Any = None,
) -> Shrunk:
  """Removes the units that are zero, so that the arrays become smaller.

  See `folding.compression.shrink.shrink_layers` for what is removed. The
  function stays the same up to float rounding. A next-token model keeps all
  tokens: a token with a zero row has the logit 0, so it still has a probability.
  Shrinking twice changes nothing more.

  Args:
    shape: Shape of the model.
    params: Its parameters, concrete; their shapes are not checked.
    multiple: Widths of feed-forward layers are rounded up to a multiple of this
      (never above what they were) by keeping some zero neurons.
    absorb: Whether W_O absorbs a diagonal W_V. The moments of an optimizer do
      not follow that, so use False if training continues.
    is_zero: Bools shaped like params, True at elements that are and stay 0. None:
      True at zeros. While training, only those that FPP holds at 0 qualify.

  Raises:
    ValueError: an option is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from folding import config, make_model, shape_of
    >>> shape = shape_of(config.Config(model=config.ModelConfig(num_layers=1)))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> init = jax.jit(make_model(shape, 100).init)
    >>> variables = init(jax.random.key(0), tokens)
    >>> down = variables["params"]["blocks_0"]["mlp"]["down"]
    >>> down["kernel"] = down["kernel"].at[100:].set(0)
    >>> small = shrink(shape, variables["params"], multiple=64)
    >>> small.shape.layers[0].mlp_width, small.shape.layers[0].values
    (128, 'identity')
    >>> apply = jax.jit(make_model(small.shape, 100).apply)
    >>> apply({"params": small.params}, tokens).shape
    (1, 8, 100)
  """
  small, cut = shrink_layers(
    params,
    multiple=multiple,
    absorb=absorb,
    tokens=shape.output != "tokens",
    is_zero=is_zero,
  )
  return Shrunk(shrunk_shape(shape, cut), small, cut)


def shrunk_shape(shape: Shape, cut: Cut) -> Shape:
  """Returns the shape of smaller parameters, from that of the larger ones."""

  def kept(kernel, count):
    return cut.kept.get(kernel, {}).get(0, range(count))

  layers = []
  for n, layer in enumerate(shape.layers):
    mlp, attn = f"blocks_{n}/mlp", f"blocks_{n}/attn"
    of_layer = kept(f"{attn}/o/kernel", len(layer.heads))
    heads = tuple(layer.heads[h] for h in of_layer)
    is_absorbed = f"{attn}/v" in cut.dropped
    layers.append(
      dataclasses.replace(
        layer,
        heads=heads,
        num_kv_heads=len(heads) * shape.num_kv_heads // shape.num_heads,
        mlp_width=len(kept(f"{mlp}/down/kernel", layer.mlp_width)),
        values="identity" if is_absorbed else layer.values,
      )
    )
  return dataclasses.replace(shape, layers=tuple(layers))
