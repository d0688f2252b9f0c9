import json
import struct

import ml_dtypes
import numpy as np
import pytest

from folding import paths
from folding.compression import accounting
from folding.schema import ConfigError
from folding.serving import packed


def _random(shape, zeros=(), dtype=np.float32, seed=0):
  w = np.random.default_rng(seed).normal(size=shape).astype(dtype)
  for index in zeros:
    w[index] = 0
  return w


def _tree():
  """Returns arrays for which each way is the cheapest."""
  odd = np.random.default_rng(1).uniform(size=(7, 5, 3)) < 0.8
  scattered = _random((7, 5, 3))
  scattered[odd] = 0
  return {
    "embed": {"embedding": _random((11, 8), [0, 3, 4, 10, (1, 2)])},
    "blocks_0": {
      "up": {"kernel": _random((6, 9), [(slice(None), slice(2, 7))])},
      "o": {"kernel": scattered, "bias": np.zeros(9, np.float32)},
      "q": {"kernel": _random((8, 2, 1))},
      "half": _random((5, 6), [1, 2], ml_dtypes.bfloat16),
    },
    "nan": np.array([0, np.nan, 0, np.inf] * 8, np.float32),
    "scale": np.float32(3),
    "map": np.arange(300, dtype=np.uint16),
  }


def _header(path):
  raw = path.read_bytes()
  (size,) = struct.unpack("<Q", raw[:8])
  return json.loads(raw[8 : 8 + size])


def test_arrays_come_back_bit_for_bit(tmp_path):
  path = tmp_path / "w.safetensors"
  tree = _tree()
  packed.save_packed(tree, str(path))
  found = packed.load_packed(str(path))
  expected = paths.flatten(tree)
  assert paths.flatten(found).keys() == expected.keys()
  for name, w in paths.flatten(found).items():
    assert (w.dtype, w.shape) == (expected[name].dtype, expected[name].shape)
    assert w.tobytes() == expected[name].tobytes(), name
  ways = json.loads(_header(path)["__metadata__"]["folding"])["packed"]
  assert {name: entry["way"] for name, entry in ways.items()} == {
    "embed/embedding": "first",
    "blocks_0/half": "first",
    "blocks_0/up/kernel": "last",
    "blocks_0/o/kernel": "values",
    "blocks_0/o/bias": "values",
    "nan": "values",
  }


def test_the_file_has_the_bytes_that_are_accounted(tmp_path):
  path = tmp_path / "w.safetensors"
  tree = _tree()
  packed.save_packed(tree, str(path))
  header = _header(path)
  size = {"values": 0, "masks": 0}
  for name, entry in header.items():
    if name != "__metadata__":
      begin, end = entry["data_offsets"]
      size["masks" if name.endswith(":bits") else "values"] += end - begin
  overall = accounting.account(tree, tree)["bytes"]["overall"]
  assert size == {"values": overall["stored"], "masks": overall["masks"]}


def test_a_negative_zero_may_lose_its_sign(tmp_path):
  path = str(tmp_path / "w.safetensors")
  packed.save_packed({"w": np.array([-0.0, 1.0] * 40, np.float32)}, path)
  found = packed.load_packed(path)["w"]
  np.testing.assert_array_equal(found, [0.0, 1.0] * 40)


def test_the_same_arrays_make_the_same_file(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  packed.save_packed(_tree(), str(a))
  packed.save_packed(_tree(), str(b))
  assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
  path = tmp_path / "w.safetensors"
  packed.save_packed(_tree(), str(path))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ConfigError, match="is truncated or no safetensors"):
    packed.load_packed(str(path))


def test_a_file_of_others_is_refused(tmp_path):
  import safetensors.numpy

  path = str(tmp_path / "w.safetensors")
  safetensors.numpy.save_file({"w": np.ones(3)}, path, {"format": "pt"})
  with pytest.raises(ConfigError, match="is not packed as `folding` does"):
    packed.load_packed(path)


def test_a_file_may_be_read_by_whom_others_may(tmp_path):
  plain, path = tmp_path / "plain", tmp_path / "model.safetensors"
  plain.touch()
  packed.save_packed({"w": np.ones((2, 3), np.float32)}, str(path))
  assert path.stat().st_mode == plain.stat().st_mode


def test_a_missing_file_is_one_line(tmp_path):
  with pytest.raises(ConfigError, match="there is no .*gone"):
    packed.load_packed(str(tmp_path / "gone"))


def test_bits_that_do_not_fit_the_values_are_refused(tmp_path):
  path = tmp_path / "w.safetensors"
  packed.save_packed({"w": _random(64, [slice(0, 40)])}, str(path))
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1  # the bits are the last tensor
  path.write_bytes(raw)
  with pytest.raises(ConfigError, match="is not packed as `folding` does"):
    packed.load_packed(str(path))
