"""Arrays <-> a safetensors file in which zeros take no room.

Each array is kept in the way that `folding.account` says is cheapest, in as
many bytes. One that is kept whole is a tensor by its path. Otherwise the
tensor of that path holds the values that are not zero, in C order, or the
slices that have any; a second one, "<path>:bits", has a bit for each element
or slice, packed as `numpy.packbits` does. The file's metadata has one entry,
"folding": JSON {"packed": {path: {"way", "shape"}}}.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (tells NumPy of bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

from folding import paths
from folding.compression.accounting import slices_of, storage
from folding.models.hf_save import save_tensors
from folding.schema import ConfigError

_BITS = ":bits"
_AXES = {"first": 0, "last": -1}


def save_packed(tree: Mapping[str, Any], path: str) -> None:
  """Writes the arrays of nested dicts.

  What `load_packed` gives back is equal bit for bit, but that -0.0 may have
  become 0.0.

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
  save_tensors(path, tensors, metadata)


def load_packed(path: str) -> dict[str, Any]:
  """Returns the nested dicts of NumPy arrays that `save_packed` wrote.

  Raises:
    ConfigError: the file is truncated, or is none of ours.
  """
  tree: dict[str, Any] = {}
  try:
    with safetensors.safe_open(path, "numpy") as file:
      packed = json.loads((file.metadata() or {})["folding"])["packed"]
      for name in file.keys():
        if name.endswith(_BITS):
          continue
        w = file.get_tensor(name)
        if name in packed:
          bits = file.get_tensor(name + _BITS)
          w = _unpack(w, bits, **packed[name])
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
          place = place.setdefault(folder, {})
        place[last] = w
  except FileNotFoundError:
    raise ConfigError(f"there is no {path}") from None
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f"{path} is truncated or no safetensors file ({error})"
    ) from None
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"{path} is not packed as `folding` does") from error
  return tree


def _unpack(
  values: np.ndarray, bits: np.ndarray, way: str, shape: list[int]
) -> np.ndarray:
  w = np.zeros(shape, values.dtype)
  if way in _AXES:
    axis = _AXES[way] % w.ndim
    is_kept = np.unpackbits(bits, count=shape[axis]).astype(bool)
    np.moveaxis(w, axis, 0)[is_kept] = np.moveaxis(values, axis, 0)
  else:
    is_kept = np.unpackbits(bits, count=math.prod(shape)).astype(bool)
    w[is_kept.reshape(shape)] = values
  return w
