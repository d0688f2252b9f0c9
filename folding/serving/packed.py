"""Nested dicts of arrays in a safetensors file, in which zeros take no room."""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import safetensors
from flax import traverse_util

from folding import paths
from folding.compression.accounting import slices_of, storage
from folding.errors import ConfigError
from folding.models import hf_weights

_BITS = ":bits"
_AXES = {"first": 0, "last": -1}


def save_packed(tree: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Writes the arrays of nested dicts so that zeros take no room.

  Each array is stored in the way that `folding.account` counts as cheapest. One
  that is stored whole is a tensor under its path. Otherwise the tensor under
  that path holds the nonzero values, in C order, or the slices that have any; a
  second tensor, "<path>:bits", has a bit per element or slice, packed as
  `numpy.packbits` does. The file's metadata has one entry, "folding": JSON
  {"packed": {path: {"way", "shape"}}}.

  `load_packed` returns the same bits, except that -0.0 may become 0.0.

  Raises:
    OSError: the file cannot be written.
  """
  tensors: dict[str, np.ndarray] = {}
  packed = {}
  for name, leaf in paths.flatten(tree).items():
    w = np.asarray(leaf)
    way, _, _ = storage(w)
    if way == "whole":
      tensors[name] = np.asarray(w, order="C")
      continue
    is_kept = w != 0
    if way in _AXES:
      axis = _AXES[way] % w.ndim
      is_kept = slices_of(is_kept, axis)
      values = np.compress(is_kept, w, axis)
    else:
      values = w[is_kept]
    tensors[name] = np.asarray(values, order="C")
    tensors[name + _BITS] = np.packbits(is_kept)
    packed[name] = {"way": way, "shape": w.shape}
  metadata = {"folding": json.dumps({"packed": packed})}
  hf_weights.save_tensors(path, tensors, metadata)


def load_packed(
  path: str | os.PathLike,
  check: Callable[[dict[str, tuple[int, ...]]], None] | None = None,
) -> dict[str, Any]:
  """Returns the nested dicts of NumPy arrays that `save_packed` wrote.

  `check` is called with {path: shape} before any array is allocated.

  Raises:
    ConfigError: the file is missing, truncated, or has another format.
  """
  flat = {}
  try:
    with safetensors.safe_open(path, "numpy") as file:
      packed = json.loads((file.metadata() or {})["folding"])["packed"]
      names = [name for name in file.keys() if not name.endswith(_BITS)]
      if check is not None:
        check(
          {
            name: tuple(
              packed[name]["shape"]
              if name in packed
              else file.get_slice(name).get_shape()
            )
            for name in names
          }
        )
      for name in names:
        flat[name] = file.get_tensor(name)
        if name in packed:
          bits = file.get_tensor(name + _BITS)
          flat[name] = _unpack(flat[name], bits, **packed[name])
  except FileNotFoundError:
    raise ConfigError(f"there is no {path}") from None
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f"{path} is truncated or not a safetensors file ({error})"
    ) from None
  except ConfigError:
    raise
  # Metadata of any kind: not ours, or damaged.
  except (
    LookupError,
    TypeError,
    ValueError,
    MemoryError,
    RecursionError,
  ) as error:
    raise ConfigError(f"{path} is not packed as `folding` does") from error
  return traverse_util.unflatten_dict(flat, sep="/")


def _unpack(
  values: np.ndarray, bits: np.ndarray, way: str, shape: list[int]
) -> np.ndarray:
  axis = _AXES.get(way)
  count = math.prod(shape) if axis is None else shape[axis]
  if bits.size != -(-count // 8):
    raise ValueError("there is not one bit per element or slice")
  is_kept = np.unpackbits(bits, count=count).astype(bool)
  w = np.zeros(shape, values.dtype)
  if axis is None:
    w[is_kept.reshape(shape)] = values
  else:
    np.moveaxis(w, axis, 0)[is_kept] = np.moveaxis(values, axis, 0)
  return w
