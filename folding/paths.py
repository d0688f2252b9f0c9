"""Paths of parameters, such as "blocks_0/attn/q/kernel", and patterns of them.

This works on any pytree of dicts, sequences or attributes. Patterns are regular
expressions that must match a whole path.
"""

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax


def _names(tree: Any) -> list[str]:
  """Returns the paths of the leaves, such as "a/b/0".

  The attribute `value` of a Flax NNX variable is left out: some states hold
  variables, others their arrays. It is an only child, unlike the `value` of a
  dataclass with other fields.
  """
  key_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  prefixes = (path[:n] for path in key_paths for n in range(len(path)))
  num_leaves = collections.Counter(prefixes)

  def name(path):
    is_value = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    if is_value and num_leaves[path[:-1]] == 1:
      path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")

  return [name(path) for path in key_paths]


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf} in the tree's own order.

  Raises:
    ValueError: two leaves have the same path, because a name contains "/".

  Example:
    >>> flatten({"mlp": {"up": 1, "down": 2}})
    {'mlp/down': 2, 'mlp/up': 1}
  """
  leaves = jax.tree.leaves(tree)
  found = dict(zip(_names(tree), leaves, strict=True))
  if len(found) < len(leaves):
    raise ValueError(
      f"two leaves of a tree have the same path: {', '.join(found)}"
    )
  return found


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Maps function(path, leaf, *leaves of the other trees) over a tree."""
  leaves, structure = jax.tree.flatten(tree)
  others = [structure.flatten_up_to(other) for other in rest]
  return structure.unflatten(map(function, _names(tree), leaves, *others))


def compiled(pattern: str) -> re.Pattern[str]:
  """Returns a compiled pattern.

  Raises:
    ValueError: it is not a regular expression.
  """
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"pattern {pattern!r} does not parse: {error}") from None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
  """Returns the names that a pattern matches as a whole.

  Raises:
    ValueError: the pattern is not a regular expression, or matches no name.

  Example:
    >>> matching(r"blocks_.*/up", ["blocks_0/up", "blocks_0/down", "up"])
    ['blocks_0/up']
  """
  names, regex = list(names), compiled(pattern)
  found = [name for name in names if regex.fullmatch(name)]
  if not found:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(
      f"pattern {pattern!r} matches no parameter; there are {shown or 'none'}"
    )
  return found
