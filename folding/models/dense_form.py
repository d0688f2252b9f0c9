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
  params = dict(params)
  for n, layer in enumerate(shape.layers):
    block = params[f"blocks_{n}"]
    attn = _with_values(shape, layer, block["attn"])
    params[f"blocks_{n}"] = {**block, "attn": attn}
  try:
    return unfold(params, frequencies, shape.head_dim)
  except ValueError as error:
    raise ConfigError(f"this model has no dense form: {error}") from None


def _with_values(
  shape: Shape, layer: Layer, attn: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Returns attention with a matrix W_V, if it was diagonal and heads left.

  A head reads its own channels, which only the shape knows.
  """
  v, o_HKD = attn.get("v", {}), attn["o"]["kernel"]
  H, K = len(layer.heads), shape.head_dim
  if H == shape.num_heads or "kernel" in v:
    return attn
  scale = np.asarray(v.get("diagonal", np.ones(H * K))).ravel()
  own = (K * np.array(layer.heads)[:, None] + np.arange(K)).ravel()
  kernel = np.zeros((shape.width, H * K), o_HKD.dtype)
  kernel[own, np.arange(H * K)] = scale
  values: dict[str, np.ndarray] = {"kernel": kernel.reshape(-1, H, K)}
  if "bias" in attn["q"]:
    values["bias"] = np.zeros((H, K), o_HKD.dtype)
  return {**attn, "v": values}


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
  if shape.relative_buckets:  # the layers share one table, of all heads
    table_RH = np.zeros((shape.relative_buckets, num_heads), np.float32)
    for n, layer in enumerate(shape.layers):
      attn = dense[f"blocks_{n}"]["attn"]
      table_RH[:, layer.heads] = attn["relative_bias"][:, layer.heads]
      attn["relative_bias"] = table_RH
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
