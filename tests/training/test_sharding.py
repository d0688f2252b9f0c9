import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from folding import errors, paths
from folding.compression.fpp import fpp
from folding.compression.sites import Rule
from folding.config import MeshConfig, resolve
from folding.data.batches import make_data
from folding.models.shape import shape_of
from folding.training import distributed, sharding
from folding.training.loop import Run
from tests.training import tiny
from tests.training.conftest import tiny_config


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    (MeshConfig(), (8, 1, 1)),
    (MeshConfig(1, -1), (1, 8, 1)),
    (MeshConfig(4, 2), (4, 2, 1)),
    (MeshConfig(-1, 2, 2), (2, 2, 2)),
  ],
  ids=str,
)
def test_mesh_has_the_shape_of_its_config(config, expected):
  mesh = sharding.make_mesh(config)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == expected
  assert mesh.devices.ravel().tolist() == jax.devices()
  assert sharding.fitting(config, 8) == config


def test_mesh_of_one_device_has_size_1():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("data", "fsdp", "tensor"),
  [(16, 1, 1), (-1, 3, 1), (-1, -1, 1), (-1, 0, 1), (-2, -4, 1)],
)
def test_mesh_that_does_not_fit_is_refused(data, fsdp, tensor):
  config = MeshConfig(data, fsdp, tensor)
  with pytest.raises(
    errors.ConfigError,
    match=rf"fsdp={fsdp}, tensor={tensor} does not multiply to the 8 device",
  ):
    sharding.make_mesh(config)
  fitted = sharding.fitting(config, 8)
  assert dict(sharding.make_mesh(fitted).shape)["fsdp"] == 8


def test_mesh_without_an_axis_is_refused():
  mesh = jax.make_mesh((8,), ("data",))
  message = "has the axes data; it needs data, fsdp, tensor"
  with pytest.raises(errors.ConfigError, match=message):
    sharding.tree_shardings(mesh, {"w": shape(64, 128)})


@pytest.mark.parametrize(
  ("sizes", "spec"),
  [
    ((64, 128), P(None, "fsdp")),  # the longest
    ((64, 4, 33), P("fsdp", None, None)),
    ((4, 1023), P(None, None)),  # fewer than 4096
    ((4, 2049), P("fsdp", None)),
    ((64, 132), P("fsdp", None)),  # not 4.125 bytes of mask bits per device
    ((5, 1028), P(None, "fsdp")),
    ((6, 5, 999), P(None, None, None)),  # no axis divides
    ((4096,), P("fsdp")),
    ((), P()),
  ],
  ids=str,
)
def test_longest_divisible_axis_is_split(sizes, spec):
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  placed = sharding.tree_shardings(mesh, {"w": shape(*sizes)})["w"]
  assert placed == jax.sharding.NamedSharding(mesh, spec)


@pytest.mark.parametrize(
  ("name", "sizes", "spec"),
  [
    ("embed/embedding", (512, 64), P("tensor", "fsdp")),
    ("head/kernel", (64, 512), P("fsdp", "tensor")),
    ("blocks_0/attn/q/kernel", (64, 4, 16), P("fsdp", "tensor", None)),
    ("blocks_0/attn/o/kernel", (4, 16, 64), P("tensor", None, "fsdp")),
    ("blocks_9/mlp/up/kernel", (64, 256), P("fsdp", "tensor")),
    ("blocks_0/mlp/down/kernel", (256, 63), P("tensor", None)),
    ("mine/w", (256, 64), P("fsdp", None)),
    ("blocks_0/mlp/up/bias", (256,), P(None)),  # small
    ("blocks_0/attn/q/kernel", (64, 3, 32), P("fsdp", None, None)),
  ],
)
def test_tensor_splits_heads_neurons_and_tokens(name, sizes, spec):
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  placed = sharding.tree_shardings(mesh, {name: shape(*sizes)})[name]
  assert placed.spec == spec


def test_put_params_splits_arrays_of_any_type_and_layout():
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  w = np.arange(64 * 128, dtype=np.float16).reshape(128, 64).T
  [placed] = jax.tree.leaves(sharding.put_params(mesh, {"w": w}))
  np.testing.assert_array_equal(placed, w.astype(np.float32))
  assert placed.dtype == jnp.float32
  assert placed.sharding.spec == P(None, "fsdp")
  # Once split, they get the split of others, or become whole.
  [half] = jax.tree.leaves(
    sharding.put_params(mesh, {"w": placed}, jnp.bfloat16)
  )
  assert (half.dtype, half.sharding) == (jnp.bfloat16, placed.sharding)
  whole = sharding.put_whole(placed, half)
  assert whole.sharding.is_fully_replicated
  np.testing.assert_array_equal(whole, placed)


def test_host_copy_keeps_nothing_in_the_array():
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  params = {"w": np.ones((64, 128), np.float32), "n": np.arange(3)}
  split = params | sharding.put_params(mesh, {"w": params["w"]})
  found = distributed.host_copy(split)
  np.testing.assert_array_equal(found["n"], params["n"])
  np.testing.assert_array_equal(found["w"], params["w"])
  assert split["w"]._npy_value is None  # where JAX keeps it


def test_data_parallel_mesh_splits_no_parameter():
  mesh = sharding.make_mesh(MeshConfig())
  tree = {"w": shape(512, 512)}
  assert sharding.tree_shardings(mesh, tree)["w"].is_fully_replicated
  assert sharding.unsplit(mesh, tree) == []


@pytest.mark.parametrize(("rows", "rows_here"), [(16, 2), (12, 12)])
def test_pinned_rows_have_the_sharding_of_a_batch(rows, rows_here):
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  by_channel = jax.NamedSharding(mesh, P(None, None, "fsdp"))
  x = jax.device_put(jnp.ones((rows, 3, 8)), by_channel)
  pinned = jax.jit(lambda x: sharding.pin_rows(mesh, x))(x)
  assert {s.data.shape[0] for s in pinned.addressable_shards} == {rows_here}
  assert sharding.pin_rows(None, x) is x


def test_first_matching_rule_overrides_the_default():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  tree = {n: shape(64, 128) for n in ("a/w", "b/w", "c/w", "d")}
  rules = (
    ("a/w", ("tensor", "fsdp")),
    ("b/w", ()),
    (".*/w", (None, "tensor")),
    ("d", ("data",)),
  )
  placed = sharding.tree_shardings(mesh, tree, rules=rules)
  assert {n: s.spec for n, s in placed.items()} == {
    "a/w": P("tensor", "fsdp"),
    "b/w": P(None, None),
    "c/w": P(None, "tensor"),
    "d": P("data", None),
  }


@pytest.mark.parametrize(
  ("pattern", "axes", "message"),
  [
    ("w", ("fsdp", "fsdp"), "at most once"),
    ("w", ("model",), "use each of data, fsdp, tensor"),
    ("v", ("fsdp",), "mesh.rules: pattern 'v' matches no parameter"),
    ("(", ("fsdp",), "does not parse"),
    ("w", (None, None, "fsdp"), "3 axes"),
  ],
)
def test_rule_that_is_not_valid_is_refused(pattern, axes, message):
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  tree = {"w": shape(64, 128)}
  with pytest.raises(errors.ConfigError, match=message):
    sharding.tree_shardings(mesh, tree, rules=[(pattern, axes)])


def test_undivided_arrays_are_whole_and_reported():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  tree = {
    "head/kernel": shape(64, 333),
    "odd": shape(63, 99),
    "small": shape(3, 5),
    "ruled": shape(99, 64),
    "fine": shape(64, 64),
  }
  rules = [("ruled", ("fsdp", "tensor"))]
  placed = sharding.tree_shardings(mesh, tree, rules=rules)
  assert placed["head/kernel"].spec == P("fsdp", None)
  assert placed["odd"].spec == P(None, None)
  assert placed["ruled"].spec == P(None, "tensor")
  told = sharding.unsplit(mesh, tree, rules)
  assert [line.split(", which")[0] for line in told] == [
    "head/kernel (64, 333) is not split over tensor",
    "odd (63, 99) is not split over fsdp",
    "ruled (99, 64) is not split over fsdp",
  ]


@pytest.mark.parametrize("score", ["relative", "saliency"])
def test_state_has_the_shardings_of_its_parameters(score):
  fpp = {"score": score, "begin": 0.0, "end": 0.75, "checks": 3}
  run = tiny.make(tiny.config(fpp=tiny.c.FPPConfig(**fpp)))
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  state = jax.eval_shape(run.init)
  placed = paths.flatten(sharding.tree_shardings(mesh, state))
  name = "blocks_0/mlp/up/kernel"  # [32, 128]
  spec = P("fsdp", "tensor")
  assert placed[f"params/{name}"].spec == spec
  for moment in ("mu", "nu"):
    assert placed[f"opt_state/inner/1/0/{moment}/{name}"].spec == spec
  assert placed[f"opt_state/suspected/{name}"].spec == P(None, *spec)
  averages = placed[f"opt_state/averages/{name}"].spec
  assert averages == (P("fsdp") if score == "relative" else spec)
  assert placed["step"].spec == P()


def test_muon_has_the_shardings_of_its_parameters():
  train = tiny.c.TrainConfig(steps=8, optimizer="muon")
  run = tiny.make(tiny.config(train=train))
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  state = jax.eval_shape(run.init)
  placed = paths.flatten(sharding.tree_shardings(mesh, state))
  moments = {
    name.partition("inner_state/")[2]: where.spec
    for name, where in placed.items()
    if "inner_state" in name
  }
  assert moments["0/mu/blocks_0/mlp/up/kernel"] == P("fsdp", "tensor")
  assert moments["mu/embed/embedding"] == P("tensor", "fsdp")
  assert "nu/blocks_0/mlp/up/kernel" not in moments  # Muon has one moment


def test_bits_are_whole_if_two_devices_would_share_a_byte():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  params = {"up/kernel": shape(16, 264)}  # 132 a device, or 16.5 bytes
  bits = {"suspected": {"up/kernel": shape(1, 16, 33)}}
  rules = [("up/kernel", ("fsdp", "tensor"))]
  placed = sharding.tree_shardings(mesh, bits, params, rules)
  assert placed["suspected"]["up/kernel"].spec == P(None, "fsdp", None)


def test_state_lies_like_parameters_on_a_mesh_of_any_axes():
  mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), (AxisType.Auto,) * 3)
  where = NamedSharding(mesh, P("x", None, ("y", "z")))
  params = {
    "wi": jax.ShapeDtypeStruct((4, 3, 32), jnp.float32, sharding=where),
    "wo": jax.ShapeDtypeStruct((4, 3, 8), jnp.float32, sharding=where),
  }
  rules = [Rule("w.", 0.5, layers=1)]
  tx = fpp(optax.adam(0.1), rules, begin=0, end=1, every=1)
  state = jax.eval_shape(tx.init, params)
  found = paths.flatten(sharding.shardings_like(state, params))
  specs = {name: where.spec for name, where in found.items()}
  assert specs["inner/0/mu/wi"] == where.spec
  assert specs["averages/wi"] == P("x", None)
  assert specs["suspected/wi"] == P(None, "x", None, ("y", "z"))
  assert specs["suspected/wo"] == P(None, "x", None, None)  # a byte for eight
  assert specs["step"] == P()


@pytest.mark.parametrize(
  ("config", "rows", "rows_a_device"),
  [
    (MeshConfig(2, 4), 16, 2),
    (MeshConfig(2, 4), 12, 12),
    (MeshConfig(2, 2, 2), 12, 3),
  ],
  ids=str,
)
def test_batch_is_split_over_data_and_fsdp(config, rows, rows_a_device):
  mesh = sharding.make_mesh(config)
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
  assert bool(sharding.undivided(mesh, rows)) == (rows_a_device == rows)


def test_teacher_is_placed_by_its_own_shapes(text_file):
  config = tiny_config(text_file)
  config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4))
  config = resolve(config)
  this = Run(shape_of(config), make_data(config), config)
  kernel = np.ones((64, 8, 16), np.float32)  # of W_Q; the student's is folded
  attn = {"q": {"kernel": kernel}}
  params = {"blocks_0": {"attn": attn}}
  teacher = dataclasses.replace(this.described(), params=params)
  found = this.placed(teacher).params["blocks_0"]["attn"]["q"]["kernel"]
  assert this.like.params["blocks_0"]["attn"]["q"]["kernel"].shape[-1] == 1
  assert {s.data.size for s in found.addressable_shards} == {kernel.size // 4}
