"""Shrinking of a configured model: smaller parameters and their config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from folding.compression.shrink import Cut, shrink_layers
from folding.config import Config, joined, unshrunk
from folding.models.shape import shape_of
from folding.tasks import task_of


class Shrunk(NamedTuple):
  """Result of `shrink`.

  Attributes:
    config: Config of the smaller model: `model.mlp_width` and `model.heads` per
      layer, `fold.values`. The width of the dense baseline is in
      `model.dense_mlp_width`.
    params: The smaller parameters. The vocabulary has the rows of the
      embedding.
    cut: Selection of indices, and the map of tokens.
  """

  config: Config
  params: dict[str, Any]
  cut: Cut


def shrink(
  config: Config,
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
    config: Resolved.
    params: Its parameters, concrete; their shapes are not checked.
    multiple: Widths of feed-forward layers are rounded up to a multiple of this
      (never above what they were) by keeping some zero neurons.
    absorb: Whether W_O absorbs a diagonal W_V. The moments of an optimizer do
      not follow that, so use False if training continues.
    is_zero: Bools shaped like params, True at elements that are and stay 0. None:
      True at zeros. While training, only those that FPP holds at 0 qualify.

  Raises:
    ValueError: the config is not resolved, or an option is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from folding import config, make_model, shape_of
    >>> c = config.resolve(config.Config(model=config.ModelConfig(num_layers=1)))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> variables = make_model(shape_of(c), 100).init(jax.random.key(0), tokens)
    >>> down = variables["params"]["blocks_0"]["mlp"]["down"]
    >>> down["kernel"] = down["kernel"].at[100:].set(0)
    >>> small = shrink(c, variables["params"], multiple=64)
    >>> small.config.model.mlp_width, small.config.fold.values
    (128, 'identity')
    >>> model = make_model(shape_of(small.config), 100)
    >>> model.apply({"params": small.params}, tokens).shape
    (1, 8, 100)
  """
  small, cut = shrink_layers(
    params,
    multiple=multiple,
    absorb=absorb,
    tokens=not task_of(config).predicts_tokens,
    is_zero=is_zero,
  )
  return Shrunk(shrunk_config(config, cut), small, cut)


def shrunk_config(config: Config, cut: Cut) -> Config:
  """Returns the config of smaller parameters; equal values stay as they are.

  Args:
    config: Resolved, of the parameters before.
    cut: The cut that makes them smaller.
  """
  m, fold = config.model, config.fold
  layers = shape_of(config).layers
  widths, heads, values = [], [], []

  def kept(kernel, count):
    return cut.kept.get(kernel, {}).get(0, range(count))

  for n, layer in enumerate(layers):
    mlp, attn = f"blocks_{n}/mlp", f"blocks_{n}/attn"
    widths.append(len(kept(f"{mlp}/down/kernel", layer.mlp_width)))
    of_layer = kept(f"{attn}/o/kernel", len(layer.heads))
    heads.append(tuple(layer.heads[h] for h in of_layer))
    is_absorbed = f"{attn}/v" in cut.dropped
    values.append("identity" if is_absorbed else layer.values)
  if widths != [layer.mlp_width for layer in layers]:
    m = dataclasses.replace(
      m,
      mlp_width=joined(tuple(widths)),
      dense_mlp_width=unshrunk(config).model.mlp_width,
    )
  if heads != [layer.heads for layer in layers]:
    m = dataclasses.replace(m, heads=tuple(heads))
  if values != [layer.values for layer in layers]:
    fold = dataclasses.replace(fold, values=joined(tuple(values)))
  return dataclasses.replace(config, model=m, fold=fold)
