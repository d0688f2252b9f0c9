import re
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from folding import paths

_NAMES = st.text("abqkv_019", min_size=1, max_size=4)
_TREES = st.dictionaries(
  _NAMES,
  st.recursive(
    st.integers(),
    lambda inner: (
      st.dictionaries(_NAMES, inner, max_size=3) | st.lists(inner, max_size=3)
    ),
    max_leaves=6,
  ),
  max_size=4,
)


class Pair(NamedTuple):
  left: object
  right: object


def _walk(tree, prefix=""):
  """Returns {path: leaf} by plain recursion, the oracle of `flatten`."""
  if isinstance(tree, dict):
    items = sorted(tree.items())
  elif isinstance(tree, list):
    items = list(enumerate(tree))
  else:
    return {prefix: tree}
  found = {}
  for key, value in items:
    found |= _walk(value, f"{prefix}/{key}" if prefix else str(key))
  return found


@hypothesis.given(_TREES)
@hypothesis.settings(max_examples=50, derandomize=True, deadline=None)
def test_flatten_equals_a_recursive_walk(tree):
  assert list(paths.flatten(tree).items()) == list(_walk(tree).items())


def test_flatten_refuses_two_leaves_of_one_path():
  with pytest.raises(ValueError, match="two leaves .* have the same path: a/b"):
    paths.flatten({"a/b": 1, "a": {"b": 2}})


def test_flatten_names_attributes_and_indices():
  tree = {"a": Pair(1, [2, {"b": 3}]), "none": None}
  assert paths.flatten(tree) == {"a/left": 1, "a/right/0": 2, "a/right/1/b": 3}


@hypothesis.given(_TREES)
@hypothesis.settings(max_examples=50, derandomize=True, deadline=None)
def test_map_named_gives_each_leaf_its_own_path(tree):
  named = paths.map_named(lambda name, leaf: (name, leaf), tree)
  leaves = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
  assert leaves == list(_walk(tree).items())


def test_map_named_passes_leaves_of_further_trees():
  tree, rest = {"a": 2, "b": {"c": 3}}, {"a": 5, "b": {"c": 7}}
  product = paths.map_named(lambda name, x, y: (name, x * y), tree, rest)
  assert product == {"a": ("a", 10), "b": {"c": ("b/c", 21)}}


@hypothesis.given(_TREES.filter(lambda tree: bool(_walk(tree))), st.data())
@hypothesis.settings(max_examples=50, derandomize=True, deadline=None)
def test_the_escaped_path_of_a_leaf_matches_that_leaf_alone(tree, data):
  names = list(paths.flatten(tree))
  name = data.draw(st.sampled_from(names))
  assert paths.matching(re.escape(name), names) == [name]


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    (r"blocks_\d+/up", ["blocks_0/up", "blocks_10/up"]),
    (r"up|head", ["head", "up"]),
    (r".*", ["blocks_0/up", "blocks_0/up2", "blocks_10/up", "head", "up"]),
  ],
  ids=["digits", "alternatives", "all"],
)
def test_a_pattern_matches_whole_names_in_their_order(pattern, expected):
  names = ["blocks_0/up", "blocks_0/up2", "blocks_10/up", "head", "up"]
  assert paths.matching(pattern, names) == expected


def test_matching_reads_an_iterator_once():
  assert paths.matching("b", iter("abc")) == ["b"]


def test_a_pattern_that_matches_nothing_lists_the_names():
  names = [f"n{i}" for i in range(9)]
  with pytest.raises(
    ValueError, match=r"'up' matches no .* n0, n1.*n7, \.\.\."
  ):
    paths.matching("up", names)


def test_a_pattern_among_no_names_says_so():
  with pytest.raises(ValueError, match="matches no parameter; there are none"):
    paths.matching("up", [])


def test_a_pattern_that_does_not_parse_is_named():
  with pytest.raises(ValueError, match=r"'\(' does not parse"):
    paths.matching("(", ["a"])


def test_flatten_names_arrays_in_a_list():
  assert list(paths.flatten([{"w": np.ones(1)}])) == ["0/w"]


class Attention(NamedTuple):
  query: object
  value: object


class Variable(NamedTuple):
  value: object


def test_flatten_leaves_out_value_only_of_an_only_child():
  tree = {
    "array": Attention(1, 2),
    "module": Attention({"kernel": 3}, 4),
    "nnx": Variable(5),
  }
  expected = {
    "array/query": 1,
    "array/value": 2,
    "module/query/kernel": 3,
    "module/value": 4,
    "nnx": 5,
  }
  assert paths.flatten(tree) == expected
  named = paths.map_named(lambda name, _: name, tree)
  assert jax.tree.leaves(named) == list(expected)
