"""The dense form of a smaller model, which computes the same function."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from folding import paths
from folding.compression.fold import unfold
from folding.errors import ConfigError
from folding.models.attention import layer_frequencies
from folding.models.params import axis_of
from folding.models.shape import Layer, Shape


def unfolded(shape: Shape, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the unfolded parameters of the heads and neurons that are left.

  Raises:
    ConfigError: the parameters have no dense form.
  """
  frequencies = None
  if shape.positions == "rope":
    frequencies = {
      f"blocks_{n}/attn": layer_frequencies(shape, layer)
      for n, layer in enumerate(shape.layers)
    }
  try:
    return unfold(params, frequencies, shape.head_dim)
  except ValueError as error:
    raise ConfigError(f"this model has no dense form: {error}") from None


def filled(
  shape: Shape,
  params: Mapping[str, Any],
  num_heads: int,
  mlp_widths: Sequence[int],
) -> dict[str, Any]:
  """Returns the unfolded parameters, with zeros as removed heads and neurons.

  They are NumPy arrays.

  Args:
    shape: Shape of the model.
    params: Its parameters.
    num_heads: Heads of each layer of the dense form; layers with as many heads
      left keep theirs.
    mlp_widths: Neurons of each layer of the dense form.

  Raises:
    ConfigError: the parameters have no dense form.
  """
  dense = jax.tree.map(np.asarray, unfolded(shape, params))
  for n, (layer, width) in enumerate(
    zip(shape.layers, mlp_widths, strict=True)
  ):
    fill = functools.partial(_filled, layer, num_heads, width)
    dense[f"blocks_{n}"] = paths.map_named(fill, dense[f"blocks_{n}"])
  return dense


def _filled(
  layer: Layer, num_heads: int, mlp_width: int, name: str, w: np.ndarray
) -> np.ndarray:
  """Returns an array with zeros as removed heads and neurons of its layer."""
  if (axis := axis_of(name, "F")) is not None:
    size, stay = mlp_width, range(w.shape[axis])
  elif len(layer.heads) == num_heads:
    return w
  elif (axis := axis_of(name, "HJ")) is not None:
    size = w.shape[axis] * num_heads // len(layer.heads)
    stay = sorted({h * size // num_heads for h in layer.heads})
  else:
    return w
  full = np.zeros((*w.shape[:axis], size, *w.shape[axis + 1 :]), w.dtype)
  full[(slice(None),) * axis + (np.array(stay),)] = w
  return full
