"""Sizes that the layers of Flax NNX keep beside their parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

Shape = tuple[int, ...]


def _general(layer: nnx.LinearGeneral, shape: Shape) -> dict[str, Any]:
  batch = len(layer.batch_axis)
  inputs = batch + len(layer.in_features)
  return {"in_features": shape[batch:inputs], "out_features": shape[inputs:]}


def _conv(layer: nnx.Conv, shape: Shape) -> dict[str, Any]:
  return {
    "kernel_shape": shape,
    "in_features": shape[-2] * layer.feature_group_count,
    "out_features": shape[-1],
  }


def _conv_transpose(layer: nnx.ConvTranspose, shape: Shape) -> dict[str, Any]:
  inputs, outputs = shape[-2:]
  if layer.transpose_kernel:
    inputs, outputs = outputs, inputs
  return {
    "kernel_shape": shape,
    "in_features": inputs,
    "out_features": outputs,
  }


# (class, its parameter, function from (layer, shape) to {attribute: value})
_SIZES: tuple[tuple[type, str, Callable[[Any, Shape], dict[str, Any]]], ...] = (
  (
    nnx.Linear,
    "kernel",
    lambda _, s: dict(in_features=s[0], out_features=s[1]),
  ),
  (nnx.LinearGeneral, "kernel", _general),
  (nnx.Conv, "kernel", _conv),
  (nnx.ConvTranspose, "kernel", _conv_transpose),
  (nnx.Einsum, "kernel", lambda _, s: {"kernel_shape": s}),
  (nnx.Einsum, "bias", lambda _, s: {"bias_shape": s}),
  (
    nnx.Embed,
    "embedding",
    lambda _, s: dict(num_embeddings=s[0], features=s[1]),
  ),
) + tuple(
  (kind, parameter, lambda _, s: {"num_features": s[0]})
  for kind in (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm)
  for parameter in ("scale", "bias")
)


def set_sizes(module: nnx.Module, shapes: Mapping[str, Shape]) -> None:
  """Sets the attributes that repeat the shape of a parameter, such as widths.

  Args:
    module: Its parameters have their new shapes already.
    shapes: {path: new shape of a parameter; of stacked layers, that of one}.
  """
  for path, layer in nnx.iter_modules(module):  # children first
    for kind, parameter, sizes in _SIZES:
      shape = shapes.get("/".join(map(str, (*path, parameter))))
      if isinstance(layer, kind) and shape is not None:
        for name, value in sizes(layer, shape).items():
          setattr(layer, name, value)
    if isinstance(layer, nnx.MultiHeadAttention):
      layer.num_heads, layer.head_dim = layer.query.out_features
      layer.num_kv_heads = layer.key.out_features[0]
      layer.qkv_features = layer.num_heads * layer.head_dim
