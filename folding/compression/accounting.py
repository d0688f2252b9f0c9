"""Accounting: dense and stored parameters and bytes, by kind.

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
  kinds: Mapping[str, str] | None = None,
  *,
  read: Callable[[Any], np.ndarray] = np.asarray,
) -> dict[str, Any]:
  """Compares a model with its dense baseline.

  Args:
    params: The tree to measure.
    dense: Tree of the dense baseline; shapes and dtypes are enough
      (`jax.eval_shape`). Apart from what folding changes, both trees have the
      same paths.
    kinds: {kind of parameters: pattern of whole paths}; the rest is "other", and
      "overall" is the sum of all. For our models: `folding.models.params.KINDS`.
      None: all is "other".
    read: Returns an array of `params` as a whole NumPy array. They are read one
      after another.

  Returns:
    {"parameters": {kind: {"dense", "stored"}}, "bytes": {kind: {"dense",
    "stored", "masks"}}, "layers": [{"path", "group": its kind, "shape", "dense",
    "stored", "zeros"}]}. The kinds include "overall". In "layers", "dense" is
    the size of the baseline's array of the same role, 0 without one, and
    "zeros" a fraction.

  Raises:
    ValueError: the paths of the trees differ, a leaf is not an array, `kinds`
      is not as above, or a pattern is not a regular expression.

  Example:
    >>> w = {"up": {"kernel": np.array([[0.0, 1.0], [0.0, 2.0]])}}
    >>> account(w, w)["parameters"]["overall"]
    {'dense': 4, 'stored': 2}
  """
  kinds = {} if kinds is None else kinds
  is_table = isinstance(kinds, Mapping) and "overall" not in kinds
  what = "a dict of {kind: pattern} without 'overall', the sum of all"
  checks.check("account", [("kinds", kinds, is_table, what)])
  leaves, dense_leaves = paths.flatten(params), paths.flatten(dense)
  _check_paths(leaves, dense_leaves)
  for side, tree in (("params", leaves), ("dense", dense_leaves)):
    _check_arrays(side, tree)
  patterns = {kind: paths.compiled(x) for kind, x in kinds.items()}
  names = [*patterns, "other", "overall"]
  parameters = {kind: {"dense": 0, "stored": 0} for kind in names}
  sizes = {kind: {"dense": 0, "stored": 0, "masks": 0} for kind in names}
  layers = []
  roles = {_role(name): leaf for name, leaf in dense_leaves.items()}
  for name, leaf in dense_leaves.items():
    for kind in (_kind_of(name, patterns), "overall"):
      parameters[kind]["dense"] += int(leaf.size)
      sizes[kind]["dense"] += int(leaf.size) * leaf.dtype.itemsize
  for name, leaf in leaves.items():
    w = read(leaf)
    values = int(np.count_nonzero(w))
    _, value_bytes, mask_bytes = storage(w)
    own = _kind_of(name, patterns)
    for kind in (own, "overall"):
      parameters[kind]["stored"] += values
      sizes[kind]["stored"] += value_bytes
      sizes[kind]["masks"] += mask_bytes
    baseline = roles.get(_role(name))
    layers.append(
      {
        "path": name,
        "group": own,
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


def _kind_of(name: str, patterns: Mapping[str, re.Pattern[str]]) -> str:
  found = (
    kind for kind, pattern in patterns.items() if pattern.fullmatch(name)
  )
  return next(found, "other")
