import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.compression import accounting


def _zeroed(shape, zeros, dtype=np.float32):
  w = np.ones(shape, dtype)
  for index in zeros:
    w[index] = 0
  return w


KINDS = {
  "qkv": "attn/[qkv]/(kernel|diagonal)",
  "linear": "attn/o/kernel",
  "embedding": "embed/embedding",
}


def test_account_counts_by_pattern():
  params = {"conv": {"w": np.ones(6)}, "q": {"kernel": np.array([1.0, 0.0])}}
  found = accounting.account(params, params, {"conv": "conv/.*"})
  assert found["parameters"] == {
    "conv": {"dense": 6, "stored": 6},
    "other": {"dense": 2, "stored": 1},
    "overall": {"dense": 8, "stored": 7},
  }


@pytest.mark.parametrize(
  ("w", "expected"),
  [
    # 64 floats of 4 bytes; a mask would cost more.
    (_zeroed((8, 8), []), (64, 256, 0)),
    # One zero saves 4 bytes and the bits would cost 8: not worth it.
    (_zeroed((8, 8), [(0, 0)]), (63, 256, 0)),
    # Four scattered zeros: 240 + 8 bytes against 256.
    (_zeroed((8, 8), [(i, i) for i in range(4)]), (60, 240, 8)),
    # Two rows: 6 * 8 * 4 bytes and one byte for 8 rows.
    (_zeroed((8, 8), [(1,), (5,)]), (48, 192, 1)),
    # Nine columns of which three are zero: 6 * 4 * 4, and 9 bits in 2 bytes.
    (_zeroed((4, 9), [(slice(None), slice(0, 3))]), (24, 96, 2)),
    # A kept row may contain zeros, which are stored too.
    (_zeroed((8, 8), [(1,), (5,), (0, 0)]), (47, 192, 1)),
    # Middle axes are not sliced: values and bits, 2 * 2 * 4 * 4 + 4 bytes.
    (_zeroed((2, 4, 4), [(slice(None), slice(2, 4))]), (16, 64, 4)),
    # Vectors: values and bits.
    (_zeroed(16, [slice(0, 8)]), (8, 32, 2)),
    # Two bytes per value.
    (_zeroed((8, 8), [(1,)], jnp.bfloat16), (56, 112, 1)),
    (
      _zeroed((8, 8), [(i, i) for i in range(8)], jnp.bfloat16),
      (56, 112, 8),
    ),
    (np.zeros((8, 8), np.float32), (0, 0, 1)),
    (np.float32(3), (1, 4, 0)),
    (np.zeros((0, 3), np.float32), (0, 0, 0)),
    (np.array([-0.0, 1.0] * 32, np.float32), (32, 128, 8)),
  ],
  ids=[
    "full",
    "one-zero",
    "scattered",
    "rows",
    "columns",
    "rows-with-holes",
    "middle-axis",
    "vector",
    "bfloat16",
    "bfloat16-scattered",
    "all-zero",
    "scalar",
    "empty",
    "negative-zero",
  ],
)
def test_storage_counted_by_hand(w, expected):
  w = np.asarray(w)
  _, value_bytes, mask_bytes = accounting.storage(w)
  assert (np.count_nonzero(w), value_bytes, mask_bytes) == expected


def _dense():
  attn = {
    "q": {"kernel": np.ones((8, 2, 4), np.float32)},
    "v": {"kernel": np.ones((8, 2, 4), np.float32)},
    "o": {"kernel": np.ones((2, 4, 8), np.float32)},
  }
  return {
    "attn": attn,
    "embed": {"embedding": np.ones((16, 8), np.float32)},
    "norm": {"scale": np.ones(8, np.float32)},
  }


def _small():
  attn = {
    "q": {"kernel": np.ones((8, 2, 1), np.float32)},
    "v": {"diagonal": np.ones((8, 1, 1), np.float32)},
    "o": {"kernel": _zeroed((2, 4, 8), [(0, slice(None), slice(0, 6))])},
  }
  return {
    "attn": attn,
    "embed": {"embedding": _zeroed((16, 8), [(slice(4, 16),)])},
    "norm": {"scale": np.ones(8, np.float32)},
  }


def test_account_counted_by_hand():
  found = accounting.account(_small(), _dense(), KINDS)
  assert found["parameters"] == {
    "qkv": {"dense": 128, "stored": 24},
    "linear": {"dense": 64, "stored": 40},
    "embedding": {"dense": 128, "stored": 32},
    "other": {"dense": 8, "stored": 8},
    "overall": {"dense": 328, "stored": 104},
  }
  assert found["bytes"] == {
    "qkv": {"dense": 512, "stored": 96, "masks": 0},
    "linear": {"dense": 256, "stored": 160, "masks": 8},
    "embedding": {"dense": 512, "stored": 128, "masks": 2},
    "other": {"dense": 32, "stored": 32, "masks": 0},
    "overall": {"dense": 1312, "stored": 416, "masks": 10},
  }


def test_account_compares_layers_with_the_array_of_their_role():
  found = accounting.account(_small(), _dense(), KINDS)["layers"]
  layers = {layer["path"]: layer for layer in found}
  assert layers["attn/v/diagonal"] == {
    "path": "attn/v/diagonal",
    "group": "qkv",
    "shape": [8, 1, 1],
    "dense": 64,
    "stored": 8,
    "zeros": 0.0,
  }
  assert layers["embed/embedding"]["zeros"] == 0.75
  assert len(layers) == 5


def test_account_of_an_array_without_baseline_has_no_dense_size():
  small = _small()
  small["attn"]["frequency"] = np.ones(3)  # of a folded layer
  found = accounting.account(small, _dense(), KINDS)["layers"]
  assert [x["dense"] for x in found if x["path"] == "attn/frequency"] == [0]


@pytest.mark.parametrize(
  ("params", "dense", "message"),
  [
    ({"params": _dense()}, _dense(), "'attn/o/kernel' is in `dense`"),
    (_dense() | {"head": np.ones(3)}, _dense(), "'head' is in `params`"),
    ({"w": np.ones(3)}, {}, "'w' is in `params`"),
  ],
  ids=["wrapped", "more", "empty"],
)
def test_account_refuses_trees_of_other_paths(params, dense, message):
  with pytest.raises(ValueError, match=message):
    accounting.account(params, dense)


@pytest.mark.parametrize("pattern", ["(", 3])
def test_account_names_a_group_pattern_that_does_not_parse(pattern):
  with pytest.raises(ValueError, match=r"pattern .* does not parse"):
    accounting.account(_dense(), _dense(), {"conv": pattern})


def test_account_takes_shapes_of_a_bfloat16_baseline():
  def make():
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), _dense())

  expected = accounting.account(_small(), _dense(), KINDS)
  found = accounting.account(_small(), jax.eval_shape(make), KINDS)
  assert found["parameters"] == expected["parameters"]
  for group, size in found["bytes"].items():
    assert size["dense"] == expected["bytes"][group]["dense"] / 2
    assert size["stored"] == expected["bytes"][group]["stored"]


def test_account_refuses_shapes_without_values():
  shapes = jax.eval_shape(_dense)
  with pytest.raises(ValueError, match="'attn/.*' of `params` is a ShapeDtype"):
    accounting.account(shapes, _dense())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("abc", "abc"), "'' of `params` is a str"),
    (({"w": 1}, {"w": 1}), "'w' of `params` is a int"),
    (({"w": np.ones(3)}, {"w": "x"}), "'w' of `dense` is a str"),
    (
      ({"w": np.ones(3)},) * 2 + ({"overall": ".*"},),
      "kinds .* without 'overall'",
    ),
    (({"w": np.ones(3)},) * 2 + (["w"],), r"kinds .* it is \['w'\]"),
  ],
  ids=["text", "number", "dense", "overall", "list"],
)
def test_account_refuses_other_types(arguments, message):
  with pytest.raises(ValueError, match=f"account: {message}"):
    accounting.account(*arguments)


def test_account_of_an_empty_array_has_no_zeros():
  tree = {"w": np.zeros((0, 3), np.float32)}
  (layer,) = accounting.account(tree, tree)["layers"]
  assert (layer["stored"], layer["zeros"]) == (0, 0.0)
