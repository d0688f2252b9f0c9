import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from folding import schema
from folding.config import MeshConfig
from folding.training import sharding


@pytest.mark.parametrize(
  ("data", "fsdp", "expected"),
  [(-1, 1, (8, 1)), (1, -1, (1, 8)), (-1, 4, (2, 4)), (4, 2, (4, 2))],
)
def test_mesh_shape(data, fsdp, expected):
  mesh = sharding.make_mesh(MeshConfig(data, fsdp))
  assert mesh.axis_names == ("data", "fsdp")
  assert mesh.devices.shape == expected
  assert mesh.devices.ravel().tolist() == jax.devices()


def test_mesh_of_one_device():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
  ("data", "fsdp"),
  [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 0), (-2, -4), (16, 1)],
)
def test_mesh_that_does_not_fit_is_refused(data, fsdp):
  with pytest.raises(
    schema.ConfigError,
    match=rf"data={data}, fsdp={fsdp} does not multiply to the 8 device",
  ):
    sharding.make_mesh(MeshConfig(data, fsdp))


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((64, 128), P(None, "fsdp")),  # the longest
    ((128, 64), P("fsdp", None)),
    ((64, 4, 33), P("fsdp", None, None)),
    ((4, 1023), P(None, None)),  # fewer than 4096
    ((4, 2049), P("fsdp", None)),
    ((6, 5, 999), P(None, None, None)),  # no axis divides
    ((4095,), P(None)),
    ((4096,), P("fsdp")),
    ((8, 16), P(None, None)),
    ((), P()),
  ],
  ids=str,
)
def test_longest_divisible_axis_is_split(shape, spec):
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  tree = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  placed = sharding.tree_shardings(mesh, tree)["w"]
  assert placed == jax.sharding.NamedSharding(mesh, spec)


def test_without_fsdp_nothing_is_split():
  mesh = sharding.make_mesh(MeshConfig())
  tree = [jax.ShapeDtypeStruct((512, 512), jnp.float32)]
  assert sharding.tree_shardings(mesh, tree)[0].is_fully_replicated


@pytest.mark.parametrize(("rows", "rows_a_device"), [(16, 2), (8, 1), (12, 12)])
def test_batch_is_split_over_all_devices(rows, rows_a_device):
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  batch = {
    "tokens": np.arange(rows * 3, dtype=np.int32).reshape(rows, 3),
    "labels": np.arange(rows, dtype=np.int32),
  }
  placed = sharding.put_batch(mesh, batch)
  for name, array in batch.items():
    np.testing.assert_array_equal(placed[name], array)
    assert placed[name].dtype == array.dtype
    shards = placed[name].addressable_shards
    assert [s.data.shape[0] for s in shards] == [rows_a_device] * 8
    for shard in shards:
      np.testing.assert_array_equal(shard.data, array[shard.index])
