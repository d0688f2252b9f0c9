import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folding.compression import select

_jit_lowest = jax.jit(select.lowest)


def _oracle(scores, k):
  """Stable sort by value, then -0.0 before 0.0, then position."""
  flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores])
  order = np.lexsort((np.arange(flat.size), ~np.signbit(flat), flat))
  chosen = np.zeros(flat.size, bool)
  chosen[order[:k]] = True
  ends = np.cumsum([s.size for s in scores])[:-1]
  parts = np.split(chosen, ends)
  return [p.reshape(s.shape) for p, s in zip(parts, scores, strict=True)]


def _assert_equals_oracle(scores, k, lowest=_jit_lowest):
  chosen = lowest([jnp.asarray(s) for s in scores], k)
  for found, expected in zip(chosen, _oracle(scores, k), strict=True):
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)


# Few values, so that most examples have ties.
_VALUES = st.sampled_from(
  [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3.4e38, -3.4e38, np.inf, -np.inf, 0.5]
)
_FLOATS = _VALUES | st.floats(
  width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True
)


@hypothesis.given(
  st.lists(_FLOATS, min_size=17, max_size=17), st.integers(0, 17)
)
@hypothesis.settings(max_examples=200, derandomize=True, deadline=None)
def test_equals_a_stable_sort_over_several_arrays(values, k):
  flat = np.array(values, np.float32)
  scores = [flat[:12].reshape(3, 4), flat[12:].reshape(5)]
  _assert_equals_oracle(scores, k)


@pytest.mark.parametrize(
  "values",
  [np.zeros(40), np.full(40, -np.inf), np.full(40, np.inf), np.arange(40) // 7],
  ids=["zeros", "lowest", "highest", "runs"],
)
@pytest.mark.parametrize("k", [0, 1, 13, 39, 40])
def test_ties_go_to_the_first_positions(values, k):
  scores = [values.astype(np.float32).reshape(2, 4, 5)]
  _assert_equals_oracle(scores, k)


def test_equals_np_partition_on_many_distinct_scores():
  x = np.random.default_rng(0).normal(size=(64, 129)).astype(np.float32)
  k = 3000
  (chosen,) = _jit_lowest([jnp.asarray(x)], k)
  threshold = np.partition(x.ravel(), k - 1)[k - 1]
  np.testing.assert_array_equal(chosen, x <= threshold)


def test_bfloat16_scores_with_their_many_ties():
  x = np.random.default_rng(1).normal(size=(32, 65))
  scores = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (x, -x)]
  assert len(np.unique(scores[0].astype(np.float32))) < 0.7 * scores[0].size
  _assert_equals_oracle(scores, 1234)


def test_one_device_counts_by_eights_and_chooses_the_same(monkeypatch):
  x = np.round(np.random.default_rng(6).normal(size=(13, 20)), 1)
  scores = [x.astype(np.float32), x[:, 0].astype(np.float32)]
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  calls, sum_eights = [], select.sum_eights
  monkeypatch.setattr(
    select, "sum_eights", lambda *a: calls.append(1) or sum_eights(*a)
  )
  for k in (0, 77, 273):
    _assert_equals_oracle(scores, k, select.lowest)
  assert calls


@pytest.mark.parametrize("k", [0, 5, 24])
def test_eager_equals_jit_and_the_oracle(k):
  x = np.round(np.random.default_rng(2).normal(size=(4, 6)), 1)
  _assert_equals_oracle([x.astype(np.float32)], k, select.lowest)


def test_k_may_be_traced_without_compiling_again():
  traces = []

  @jax.jit
  def lowest(x, k):
    traces.append(1)
    return select.lowest([x], k)[0]

  x = jnp.asarray(np.random.default_rng(3).normal(size=30), jnp.float32)
  counts = [int(lowest(x, jnp.int32(k)).sum()) for k in (0, 7, 30)]
  assert (counts, len(traces)) == ([0, 7, 30], 1)


_SPECS = {
  "rows": PartitionSpec("x"),
  "columns": PartitionSpec(None, "x"),
  "whole": PartitionSpec(),
}


@pytest.mark.parametrize("spec", _SPECS.values(), ids=_SPECS)
def test_eight_devices_choose_what_one_chooses(spec):
  mesh = Mesh(np.array(jax.devices()), ("x",))
  # Rounded, so that the cut falls among ties that lie on all devices.
  x = np.round(np.random.default_rng(4).normal(size=(64, 40)), 1)
  x = x.astype(np.float32)
  k = 1111
  assert np.sum(x == np.sort(x.ravel())[k]) > 20
  placed = jax.device_put(x, NamedSharding(mesh, spec))
  (chosen,) = _jit_lowest([placed], k)
  np.testing.assert_array_equal(chosen, _oracle([x], k)[0])


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
# The second has no whole number of eights on a device.
@pytest.mark.parametrize("size", [(8192, 1024), (8200, 1000)])
def test_sharded_scores_stay_where_they_are(axis, size):
  mesh = Mesh(np.array(jax.devices()), ("x",))
  spec = PartitionSpec(*[None] * axis, "x")
  placement = NamedSharding(mesh, spec)
  shape = jax.ShapeDtypeStruct(size, jnp.float32, sharding=placement)
  lowest = jax.jit(lambda x: select.lowest([x], x.size // 3)[0])
  compiled = lowest.lower(shape).compile()
  assert compiled.output_shardings.is_equivalent_to(placement, 2)
  text = compiled.as_text()
  assert "all-reduce" in text  # the counts
  for moving in ("all-gather", "all-to-all", "collective-permute"):
    assert moving not in text


@pytest.mark.parametrize("axis", [0, -2, 2])
def test_sums_of_eight_neighbours_add_up_to_the_sum(axis):
  x = np.random.default_rng(5).integers(0, 2, (9, 17, 8)).astype(np.int8)
  parts = np.asarray(select.sum_eights(jnp.asarray(x), axis, jnp.int8))
  assert parts.shape[axis] == -(-x.shape[axis] // 8)
  first = np.take(parts, 0, axis)
  np.testing.assert_array_equal(first, np.take(x, range(8), axis).sum(axis))
  np.testing.assert_array_equal(parts.sum(axis), x.sum(axis))
