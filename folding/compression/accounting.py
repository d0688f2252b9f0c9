"""What a model stores: parameters and bytes, by group, dense -> stored.

`stored` counts what has to be kept: values that are not zero. The bytes of
the masks that say where they belong are counted too, by themselves. All
figures are measured on arrays, never taken from a configuration.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from folding import paths


def storage(w: np.ndarray) -> tuple[str, int, int]:
  """Returns (way, bytes of values, bytes of the mask) of one array.

  The cheapest of four ways to keep it: "whole", as it is; "values", those that
  are not zero and a bit an element; or "first" or "last", whole slices of that
  axis, with the zeros in them, and a bit a slice. Exports store arrays so.
  """
  is_kept = w != 0
  values = int(np.count_nonzero(is_kept))
  options = [
    ("whole", w.nbytes, 0),
    ("values", values * w.itemsize, -(-w.size // 8)),
  ]
  if w.ndim > 1 and w.size:
    for way, axis in (("first", 0), ("last", w.ndim - 1)):
      slices = int(np.count_nonzero(slices_of(is_kept, axis)))
      size = slices * (w.size // w.shape[axis]) * w.itemsize
      options.append((way, size, -(-w.shape[axis] // 8)))
  return min(options, key=lambda option: option[1] + option[2])


def slices_of(is_kept: Any, axis: int) -> np.ndarray:
  """Returns which slices of an axis have anything that is kept."""
  return is_kept.any(axis=tuple(a for a in range(is_kept.ndim) if a != axis))


def account(
  params: Any, dense: Any, groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Measures a model against its dense twin.

  Args:
    params: The tree to measure.
    dense: Tree of the dense twin; shapes and dtypes are enough
      (`jax.eval_shape`).
    groups: {group: pattern of whole parameter paths}; the rest is "other". For
      our models: `folding.models.params.GROUPS`. None: all is "other".

  Returns:
    {"parameters": {group: {"dense", "stored"}}, "bytes": {group: {"dense",
    "stored", "masks"}}, "layers": [{"path", "group", "shape", "dense",
    "stored", "zeros"}]}, with "overall" among the groups. A layer's dense is
    the size of the array of that role in the dense twin (0 if it has none).

  Example:
    >>> w = {"up": {"kernel": np.array([[0.0, 1.0], [0.0, 2.0]])}}
    >>> account(w, w)["parameters"]["overall"]
    {'dense': 4, 'stored': 2}
  """
  dense_leaves = paths.flatten(dense)
  groups = groups or {}
  names = [*groups, "other", "overall"]
  parameters = {g: {"dense": 0, "stored": 0} for g in names}
  sizes = {g: {"dense": 0, "stored": 0, "masks": 0} for g in names}
  layers = []
  roles = {_role(name): leaf for name, leaf in dense_leaves.items()}
  for name, leaf in dense_leaves.items():
    for group in (_group_of(name, groups), "overall"):
      parameters[group]["dense"] += int(leaf.size)
      sizes[group]["dense"] += int(leaf.size) * leaf.dtype.itemsize
  for name, leaf in paths.flatten(params).items():
    w = np.asarray(leaf)
    values = int(np.count_nonzero(w))
    _, value_bytes, mask_bytes = storage(w)
    group = _group_of(name, groups)
    for g in (group, "overall"):
      parameters[g]["stored"] += values
      sizes[g]["stored"] += value_bytes
      sizes[g]["masks"] += mask_bytes
    twin = roles.get(_role(name))
    layers.append(
      {
        "path": name,
        "group": group,
        "shape": list(w.shape),
        "dense": 0 if twin is None else int(twin.size),
        "stored": values,
        "zeros": 1 - values / w.size if w.size else 0.0,
      }
    )
  return {"parameters": parameters, "bytes": sizes, "layers": layers}


def _role(name: str) -> str:
  """The path under which a folded array and its dense twin are the same."""
  return re.sub(r"/v/diagonal$", "/v/kernel", name)


def _group_of(name: str, groups: Mapping[str, str]) -> str:
  found = (g for g, pattern in groups.items() if re.fullmatch(pattern, name))
  return next(found, "other")
