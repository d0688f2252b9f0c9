"""Accounting: dense and stored parameters and bytes, by group.

Stored parameters are the nonzero values. The masks that say where these belong
are counted separately, in bytes. All numbers are measured on arrays, never taken
from a configuration.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from folding import paths
from folding.compression import checks

# What folding a layer may add or remove; all else has the same path.
_FOLDED = (
  r"(.*/)?attn/(v/(kernel|bias|diagonal)|frequency)|embed_expand/(kernel|bias)"
)


def storage(w: np.ndarray) -> tuple[str, int, int]:
  """Returns (layout, bytes of values, bytes of the mask) of one array.

  It is the smallest of four layouts, which exports use:
  - "whole": the array as it is.
  - "values": the nonzero values, and one bit per element.
  - "first", "last": the nonzero slices of that axis with the zeros in them, and
    one bit per slice.
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
  """Returns which slices of an axis have a True element."""
  return is_kept.any(axis=tuple(a for a in range(is_kept.ndim) if a != axis))


def account(
  params: Any,
  dense: Any,
  groups: Mapping[str, str] | None = None,
  *,
  read: Callable[[Any], np.ndarray] = np.asarray,
) -> dict[str, Any]:
  """Compares a model with its dense baseline.

  Args:
    params: The tree to measure.
    dense: Tree of the dense baseline; shapes and dtypes are enough
      (`jax.eval_shape`). Apart from what folding changes, both trees have the
      same paths.
    groups: {group: pattern of whole parameter paths}; the rest is "other". No
      group may be named "overall". For our models: `folding.models.params.GROUPS`. None: all is "other".
    read: Returns an array of `params` as a whole NumPy array. They are read one
      after another.

  Returns:
    {"parameters": {group: {"dense", "stored"}}, "bytes": {group: {"dense",
    "stored", "masks"}}, "layers": [{"path", "group", "shape", "dense",
    "stored", "zeros"}]}. The groups include "overall". In "layers", "dense" is
    the size of the baseline's array of the same role, 0 without one, and
    "zeros" a fraction.

  Raises:
    ValueError: the paths of the trees differ, a leaf is not an array, `groups`
      is not as above, or a pattern is not a regular expression.

  Example:
    >>> w = {"up": {"kernel": np.array([[0.0, 1.0], [0.0, 2.0]])}}
    >>> account(w, w)["parameters"]["overall"]
    {'dense': 4, 'stored': 2}
  """
  groups = {} if groups is None else groups
  is_groups = isinstance(groups, Mapping) and "overall" not in groups
  what = "a dict of {group: pattern} without 'overall', the sum of all"
  checks.check("account", [("groups", groups, is_groups, what)])
  leaves, dense_leaves = paths.flatten(params), paths.flatten(dense)
  _check_paths(leaves, dense_leaves)
  for side, tree in (("params", leaves), ("dense", dense_leaves)):
    _check_arrays(side, tree)
  patterns = {g: paths.compiled(x) for g, x in groups.items()}
  names = [*patterns, "other", "overall"]
  parameters = {g: {"dense": 0, "stored": 0} for g in names}
  sizes = {g: {"dense": 0, "stored": 0, "masks": 0} for g in names}
  layers = []
  roles = {_role(name): leaf for name, leaf in dense_leaves.items()}
  for name, leaf in dense_leaves.items():
    for group in (_group_of(name, patterns), "overall"):
      parameters[group]["dense"] += int(leaf.size)
      sizes[group]["dense"] += int(leaf.size) * leaf.dtype.itemsize
  for name, leaf in leaves.items():
    w = read(leaf)
    values = int(np.count_nonzero(w))
    _, value_bytes, mask_bytes = storage(w)
    group = _group_of(name, patterns)
    for g in (group, "overall"):
      parameters[g]["stored"] += values
      sizes[g]["stored"] += value_bytes
      sizes[g]["masks"] += mask_bytes
    baseline = roles.get(_role(name))
    layers.append(
      {
        "path": name,
        "group": group,
        "shape": list(w.shape),
        "dense": 0 if baseline is None else int(baseline.size),
        "stored": values,
        "zeros": 1 - values / w.size if w.size else 0.0,
      }
    )
  return {"parameters": parameters, "bytes": sizes, "layers": layers}


def _check_paths(params: Collection[str], dense: Collection[str]) -> None:
  for name in sorted(set(params) ^ set(dense)):
    if not re.fullmatch(_FOLDED, name):
      here, there = (
        ("params", "dense") if name in params else ("dense", "params")
      )
      raise ValueError(
        f"account: {name!r} is in `{here}` and not in `{there}`; give two trees "
        "of the same model"
      )


def _check_arrays(side: str, leaves: Mapping[str, Any]) -> None:
  for name, leaf in leaves.items():
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "size")
    has_values = side == "dense" or hasattr(leaf, "__array__")
    if not (is_array and has_values):
      raise ValueError(
        f"account: {name!r} of `{side}` is a {type(leaf).__name__}, which has "
        "no values to count; give arrays"
      )


def _role(name: str) -> str:
  """Returns the path of the dense array that a folded one replaces."""
  return re.sub(r"/v/diagonal$", "/v/kernel", name)


def _group_of(name: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
  found = (g for g, pattern in patterns.items() if pattern.fullmatch(name))
  return next(found, "other")
