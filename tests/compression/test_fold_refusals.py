"""What `fold` and `unfold` refuse: other functions, shapes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from folding import paths
from folding.compression.fold import fold, unfold


def _layer(seed=0):
  """Returns a dense layer that is folded in value: G 2, blocks of 2."""
  rng = np.random.default_rng(seed)
  folded = {
    "q": {
      "kernel": rng.normal(size=(8, 2, 2)),
      "bias": rng.normal(size=(2, 2)),
    },
    "k": {
      "kernel": rng.normal(size=(8, 2, 2)),
      "bias": rng.normal(size=(2, 2)),
    },
    "v": {"diagonal": rng.normal(size=(4, 2, 2))},
    "o": {"kernel": rng.normal(size=(2, 4, 8))},
  }
  return unfold({"enc": {"attn": jax.tree.map(jnp.asarray, folded)}})


def _changed(path, index, by):
  leaves = paths.flatten(_layer())
  leaves[path] = leaves[path].at[index].add(by)
  return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize(
  ("tree", "options", "message"),
  [
    (
      _changed("enc/attn/q/kernel", (3, 1, 1), 1e-4),
      {"groups": 2, "v_block": 0},
      "enc/attn/q: rows of a group differ, so folding to 2 groups would",
    ),
    (
      _changed("enc/attn/k/bias", (0, 3), 1e-4),
      {"groups": 2, "v_block": 0},
      "enc/attn/k: rows of a group differ",
    ),
    (
      _changed("enc/attn/v/kernel", (7, 0, 0), 1e-4),
      {"groups": 0, "v_block": 2},
      "enc/attn/v: there are values off the blocks of 2",
    ),
    (
      _changed("enc/attn/v/bias", (0, 0), 1e-4),
      {"groups": 0, "v_block": 2},
      "enc/attn/v: a folded value projection has no bias",
    ),
    (_layer(), {"groups": 1, "v_block": 0}, "enc/attn/q: rows of a group"),
    (
      jax.tree.map(lambda w: w[None], _layer()),
      {"groups": 2, "v_block": 0},
      r"enc/attn/o/kernel has the shape \(1, 2, 4, 8\) and not \[H, K, D\]",
    ),
    (_layer(), {"groups": 2, "v_block": 1}, "values off the blocks of 1"),
    (_layer(), {"groups": 3}, r"q: 3 groups do not divide an axis of 4 .*8, 2"),
    (_layer(), {"groups": 0, "v_block": 3}, r"v: .* \(8, 2, 4\) has no blocks"),
    (_layer(), {"groups": 2, "axis": "input"}, "enc/attn/q: rows of a group"),
    (_layer(), {"axis": "rows"}, "axis must be 'output' or 'input'; it is"),
    (
      _layer(),
      {"groups": -1},
      "groups is one number for all layers, .*; it is",
    ),
    ({"a": {"kernel": 0}}, {}, "there is no attention layer, .* among a$"),
    (
      fold(_layer(), groups=2, v_block=2),
      {"groups": 2, "v_block": 1},
      "enc/attn/v: it is folded already, to blocks of 2, not 1",
    ),
  ],
  ids=[
    "q-kernel",
    "k-bias",
    "v-kernel",
    "v-bias",
    "too-few-groups",
    "stacked",
    "too-small-block",
    "groups-do-not-divide",
    "block-does-not-divide",
    "other-axis",
    "axis-name",
    "negative",
    "no-attention",
    "folded-otherwise",
  ],
)
def test_fold_refuses_what_would_change_the_function(tree, options, message):
  with pytest.raises(ValueError, match=message):
    fold(tree, **options)


@pytest.mark.parametrize(
  ("role", "leaf", "shape", "message"),
  [
    ("q", "kernel", (8, 2, 3), r"a/q/kernel \(8, 2, 3\) is no folding"),
    ("k", "kernel", (3, 2, 4), r"a/k/kernel \(3, 2, 4\) is no folding"),
    ("v", "diagonal", (3, 2, 2), r"a/v/diagonal \(3, 2, 2\) does not fit"),
  ],
  ids=["columns", "rows", "diagonal"],
)
def test_unfold_refuses_shapes_that_do_not_fit(role, leaf, shape, message):
  layer = _layer()["enc"]["attn"] | {role: {leaf: jnp.ones(shape)}}
  with pytest.raises(ValueError, match=message):
    unfold({"a": layer})
