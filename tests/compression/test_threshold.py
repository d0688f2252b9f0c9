import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folding.compression import threshold


def _program(bits):
  """Returns `lowest` with passes that find so many bits."""

  def lowest(scores, k):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(threshold, "BITS", {"default": bits})
      return threshold.lowest(scores, k)

  return jax.jit(lowest)


_PROGRAMS = {name: _program(bits) for name, bits in threshold.BITS.items()}
_on_each_platform = pytest.mark.parametrize(
  "lowest", _PROGRAMS.values(), ids=_PROGRAMS
)
_jit_lowest = jax.jit(threshold.lowest)


def _oracle(scores, k):
  """Stable sort by value, then -0.0 before 0.0, then position."""
  flat = np.asarray(scores, np.float64).ravel()
  order = np.lexsort((np.arange(flat.size), ~np.signbit(flat), flat))
  chosen = np.zeros(flat.size, bool)
  chosen[order[:k]] = True
  return chosen.reshape(scores.shape)


# Few values, so that most examples have ties.
_VALUES = st.sampled_from(
  [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3.4e38, -3.4e38, np.inf, -np.inf, 0.5]
)
_FLOATS = _VALUES | st.floats(
  width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True
)


@_on_each_platform
@hypothesis.given(
  values=st.lists(_FLOATS, min_size=18, max_size=18), k=st.integers(0, 18)
)
@hypothesis.settings(max_examples=200, derandomize=True, deadline=None)
def test_lowest_equals_a_stable_sort(lowest, values, k):
  scores = np.array(values, np.float32).reshape(3, 6)
  np.testing.assert_array_equal(lowest(scores, k), _oracle(scores, k))


@pytest.mark.parametrize("value", [0.0, -np.inf, np.inf])
def test_lowest_of_equal_scores_takes_the_first(value):
  scores = np.full((2, 4, 5), value, np.float32)
  for k in (0, 1, 13, 39, 40):
    np.testing.assert_array_equal(_jit_lowest(scores, k), _oracle(scores, k))


def test_lowest_of_bfloat16_equals_a_stable_sort():
  scores = jnp.asarray(
    np.random.default_rng(1).normal(size=(32, 65)), jnp.bfloat16
  )
  assert len(np.unique(np.float32(scores))) < 0.7 * scores.size
  found = _jit_lowest(scores, 1234)
  np.testing.assert_array_equal(found, _oracle(scores, 1234))


@pytest.mark.parametrize("decimals", [1, 9], ids=["tied", "distinct"])
def test_lowest_on_one_device_equals_a_stable_sort(monkeypatch, decimals):
  """One device guesses by a sample; eight simulated devices do not."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  scores = np.random.default_rng(6).normal(size=(2, 130, 40)).round(decimals)
  scores = scores.astype(np.float32)
  lowest = jax.jit(lambda x, k: threshold.lowest(x, k))  # traced here
  for k in (0, 1, 77, 5200, 10400):
    np.testing.assert_array_equal(lowest(scores, k), _oracle(scores, k))


def test_lowest_with_a_traced_count_compiles_once():
  scores = np.random.default_rng(3).normal(size=30).astype(np.float32)
  lowest = jax.jit(lambda x, k: threshold.lowest(x, k))
  counts = [int(lowest(scores, jnp.int32(k)).sum()) for k in (0, 7, 30)]
  assert counts == [0, 7, 30]
  assert lowest._cache_size() == 1


@_on_each_platform
@pytest.mark.parametrize(
  "spec", [PartitionSpec("x"), PartitionSpec(None, "x")], ids=str
)
def test_lowest_on_eight_devices_equals_one(lowest, spec):
  mesh = Mesh(np.array(jax.devices()), ("x",))
  # Rounded, so that the threshold falls among ties on all devices.
  x = np.round(np.random.default_rng(4).normal(size=(64, 40)), 1)
  x, k = x.astype(np.float32), 1111
  assert np.sum(x == np.sort(x.ravel())[k]) > 20
  placed = jax.device_put(x, NamedSharding(mesh, spec))
  np.testing.assert_array_equal(lowest(placed, k), _oracle(x, k))


# The rows of the second size on a device are not a multiple of eight.
@pytest.mark.parametrize("size", [(8192, 1024), (8200, 1000)], ids=str)
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_lowest_of_sharded_scores_moves_only_counts(axis, size):
  mesh = Mesh(np.array(jax.devices()), ("x",))
  placement = NamedSharding(mesh, PartitionSpec(*[None] * axis, "x"))
  shape = jax.ShapeDtypeStruct(size, jnp.float32, sharding=placement)
  count = size[0] * size[1] // 3
  compiled = _PROGRAMS["default"].lower(shape, count).compile()
  assert compiled.output_shardings.is_equivalent_to(placement, 2)
  text = compiled.as_text()
  assert "all-reduce" in text  # the counts
  for moving in ("all-gather", "all-to-all", "collective-permute"):
    assert moving not in text
