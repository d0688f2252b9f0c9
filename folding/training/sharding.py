"""The device mesh, and the sharding of every array.

One device is a mesh of one, so the rest of the library never asks how many
devices there are. The mesh has three axes. "data" splits batches. "fsdp" splits
batches, parameters and all arrays shaped like parameters. "tensor" splits
heads, neurons and the vocabulary, and the activations that belong to them.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from folding import memory, paths
from folding.compression.sites import axes_like
from folding.config import MeshConfig
from folding.errors import ConfigError
from folding.models import params as params_lib

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")
_SMALLEST = 2**12  # elements; smaller arrays are not worth splitting

# For each array axis a mesh axis, several that split it together, or None.
Axis = str | tuple[str, ...] | None
Axes = tuple[Axis, ...]
Rules = Sequence[tuple[str, Axes]]  # see `MeshConfig.rules`


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of a config over the devices (None: all).

  Raises:
    ConfigError: the axes do not multiply to the number of devices, or several
      processes would need the same rows of a batch.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes(config, len(devices))
  if sizes is None:
    raise ConfigError(
      f"mesh {_shown(config)} does not multiply to the {len(devices)} "
      "device(s); set one axis to -1 to take the remaining devices"
    )
  groups = sizes[0] * sizes[1]  # of devices; each computes rows of its own
  count = len({device.process_index for device in devices})
  if groups % count:
    raise ConfigError(
      f"mesh {_shown(config)} splits a batch over {groups} groups of devices, "
      f"which {count} processes cannot share; decrease mesh.tensor"
    )
  auto = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, auto, devices=devices)


def fitting(config: MeshConfig, count: int) -> MeshConfig:
  """Returns a config that fits `count` devices, for a run begun on others.

  If the given config does not fit, parameters are split over all devices.
  """
  if _sizes(config, count):
    return config
  return dataclasses.replace(config, data=1, fsdp=-1, tensor=1)


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...] | None:
  """Returns the size of each axis, None if they do not fit the devices."""
  sizes = [config.data, config.fsdp, config.tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  return tuple(sizes) if math.prod(sizes) == count and min(sizes) > 0 else None


def _shown(config: MeshConfig) -> str:
  return ", ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)


@dataclasses.dataclass(frozen=True)
class _Placement:
  """Where a parameter lies.

  Attributes:
    shape: The shape of the parameter.
    axes: The mesh axis that splits each array axis, or None.
    missed: Mesh axes that do not divide the array.
  """

  shape: tuple[int, ...]
  axes: Axes
  missed: Axes = ()


def tree_shardings(
  mesh: Mesh, tree: Any, params: Any = None, rules: Rules = ()
) -> Any:
  """Returns a sharding for each leaf of parameters or of a training state.

  A parameter lies as the first rule that matches it says. Without a rule
  "tensor" splits the axis of heads, neurons or tokens, and "fsdp" the longest
  other axis that it divides. It splits the last axis only if its mask bits split
  into whole bytes, or if it divides no other axis. Small arrays are whole on every
  device. A leaf whose path ends with the path of a parameter lies as the parameter
  does: moments, moving averages and mask bits. All other leaves are whole.

  Args:
    mesh: Has the axes "data", "fsdp" and "tensor".
    tree: Arrays, or their shapes.
    params: The parameters; None: `tree.params` if there is one, otherwise the
      tree itself.
    rules: Where parameters are placed, see `MeshConfig.rules`.

  Raises:
    ConfigError: a rule is not valid or matches no parameter, or the mesh lacks
      an axis.
  """
  missing = set(AXES) - set(mesh.axis_names)
  if missing:
    raise ConfigError(
      f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}; it needs "
      f"{', '.join(AXES)} (of size 1 if nothing is split over them)"
    )
  params = getattr(tree, "params", tree) if params is None else params
  return _place(mesh, tree, _placements(mesh, params, rules))


def shardings_like(tree: Any, params: Any) -> Any:
  """Returns a sharding for each leaf of a state, from those of parameters.

  A leaf whose path ends with the path of a parameter lies as the parameter does:
  moments, moving averages and mask bits. All other leaves are whole.

  Args:
    tree: Optimizer state, or shapes of its arrays.
    params: Parameters with a `NamedSharding` each, or their shapes and shardings;
      the axes of the mesh have any names.
  """
  leaves = paths.flatten(params)
  mesh = next(iter(leaves.values())).sharding.mesh
  placed = {
    name: _Placement(x.shape, tuple(x.sharding.spec))
    for name, x in leaves.items()
  }
  return _place(mesh, tree, placed)


def _place(mesh: Mesh, tree: Any, placed: Mapping[str, _Placement]) -> Any:
  """Returns a sharding for each leaf of a tree, given those of parameters."""

  def place(name, leaf):
    parts = name.split("/")
    owners = ("/".join(parts[start:]) for start in range(len(parts)))
    owner = next((placed[name] for name in owners if name in placed), None)
    axes = (None,) * len(leaf.shape)
    if owner:
      axes = axes_like(leaf.shape, owner.shape, owner.axes, mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*axes))

  return paths.map_named(place, tree)


def unsplit(mesh: Mesh, params: Any, rules: Rules = ()) -> list[str]:
  """Returns a line for each parameter that a mesh axis does not divide.

  Args:
    mesh: The mesh.
    params: Arrays, or their shapes.
    rules: Where parameters are placed, see `MeshConfig.rules`.
  """
  return [
    f"{name} {p.shape} is not split over {' and '.join(map(str, p.missed))}, "
    "which does not divide it"
    for name, p in _placements(mesh, params, rules).items()
    if p.missed
  ]


def _placements(mesh: Mesh, params: Any, rules: Rules) -> dict[str, _Placement]:
  shapes = {n: tuple(x.shape) for n, x in paths.flatten(params).items()}
  placed: dict[str, _Placement] = {}
  for pattern, axes in rules:
    named = [axis for axis in axes if axis is not None]
    if not set(named) <= set(AXES) or len(named) > len(set(named)):
      raise ConfigError(
        f"mesh.rules: the axes of {pattern!r} are {axes}; use each of "
        f"{', '.join(AXES)} at most once, and None"
      )
    try:
      names = paths.matching(pattern, shapes)
    except ValueError as error:
      raise ConfigError(f"mesh.rules: {error}") from None
    for name in names:
      shape = shapes[name]
      if len(axes) > len(shape):
        raise ConfigError(
          f"mesh.rules: {pattern!r} has {len(axes)} axes, and {name!r} has "
          f"shape {shape}"
        )
      wanted = (*axes, *(None,) * (len(shape) - len(axes)))
      placed.setdefault(name, _divided(mesh, shape, wanted))
  return {
    name: placed.get(name) or _default(mesh, name, shape)
    for name, shape in shapes.items()
  }


def _divided(mesh: Mesh, shape: tuple[int, ...], wanted: Axes) -> _Placement:
  """Returns a placement without the mesh axes that do not divide the array."""
  axes: list[Axis] = []
  missed: list[Axis] = []
  for axis, size in zip(wanted, shape, strict=True):
    parts = mesh.shape[axis] if axis else 1
    axes.append(axis if parts > 1 and size % parts == 0 else None)
    if size % parts:
      missed.append(axis)
  return _Placement(shape, tuple(axes), tuple(missed))


def _default(mesh: Mesh, name: str, shape: tuple[int, ...]) -> _Placement:
  wanted: list[str | None] = [None] * len(shape)
  if math.prod(shape) < _SMALLEST:
    return _Placement(shape, tuple(wanted))
  axis = params_lib.split_axis(name)
  if axis is not None:
    wanted[axis] = "tensor"
  placed = _divided(mesh, shape, tuple(wanted))
  parts = mesh.shape["fsdp"]
  if parts == 1:
    return placed
  axes = list(placed.axes)
  free = [a for a, n in enumerate(shape) if n % parts == 0 and axes[a] is None]
  if not free:
    return dataclasses.replace(placed, missed=(*placed.missed, "fsdp"))
  # Mask bits have eight elements of the last axis per byte.
  whole_bytes = shape[-1] % (8 * parts) == 0
  rank = {a: (a < len(shape) - 1 or whole_bytes, shape[a]) for a in free}
  axes[max(free, key=rank.__getitem__)] = "fsdp"
  return dataclasses.replace(placed, axes=tuple(axes))


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Returns the sharding of a batch; whole if its rows do not divide."""
  is_split = rows % _row_parts(mesh) == 0
  return NamedSharding(mesh, PartitionSpec(_BATCH)) if is_split else whole(mesh)


def _row_parts(mesh: Mesh) -> int:
  """Returns how many parts the rows of a batch are split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def undivided(mesh: Mesh, rows: int) -> list[str]:
  """Returns a line if the rows of a batch do not divide, otherwise nothing."""
  parts = _row_parts(mesh)
  if rows % parts == 0:
    return []
  return [
    f"{rows} rows of a batch do not divide among data x fsdp = {parts}, so each "
    "device computes all of them"
  ]


def pin_rows(mesh: Mesh | None, x: Any) -> Any:
  """Pins the first axis of arrays to the sharding of the rows of a batch.

  Without it XLA may split the output of a layer by channels, as it does the
  parameters, and move it back and forth.

  Args:
    mesh: None: returns `x` as it is.
    x: Arrays inside a compiled function; XLA places their other axes.
  """
  if mesh is None or mesh.size == 1:
    return x
  if jax.sharding.get_abstract_mesh().manual_axes:  # in `sum_over_rows`
    return x

  def pin(x):
    rows = batch_sharding(mesh, x.shape[0]).spec
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    spec = PartitionSpec(rows[0] if len(rows) else None, *free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(pin, x)


def kernels_on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Lets models use kernels, split over a mesh; None: they use none."""
  if mesh is None or mesh.devices.flat[0].platform == "cpu":
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def sum_over_rows(
  mesh: Mesh | None, function: Callable[[Any, Any], Any], whole: Any, rows: Any
) -> Any:
  """Returns the sum of function(whole, its rows) over devices.

  Each device calls the function on its own rows, so loops inside it move nothing
  along "data" and "fsdp". "tensor" still splits its products.

  Args:
    mesh: None: returns function(whole, rows).
    function: Returns sums over rows.
    whole: Arrays that each device needs whole. Their gradient is summed over
      devices once.
    rows: Arrays [B, ...].
  """
  if mesh is None or mesh.size == 1:
    return function(whole, rows)
  spec = batch_sharding(mesh, len(jax.tree.leaves(rows)[0])).spec
  if spec == PartitionSpec():  # each device has all rows
    return function(whole, rows)

  def own(whole, rows):
    return jax.tree.map(lambda x: x[None], function(whole, rows))

  sums = jax.shard_map(
    own,
    mesh=mesh,
    in_specs=(PartitionSpec(), spec),
    out_specs=spec,
    axis_names=set(_BATCH),
    check_vma=False,
  )(whole, rows)
  return jax.tree.map(lambda x: x.sum(0), sums)


def require_divides(mesh: Mesh, rows: int) -> None:
  """Raises `ConfigError` if several processes cannot split a batch."""
  parts = _row_parts(mesh)
  if rows % parts and jax.process_count() > 1:
    raise ConfigError(
      f"a batch of {rows} rows does not divide among mesh data x fsdp = {parts}; "
      "use a multiple for data.batch_size and data.eval_batch_size"
    )


def put_rows(
  mesh: Mesh, batch: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """Places a batch that each process has whole, split as by `put_batch`."""
  found = batch_sharding(mesh, len(next(iter(batch.values()))))
  return {name: _put(array, found) for name, array in batch.items()}


def put_whole(tree: Any, like: Any) -> Any:
  """Returns arrays, whole on each device that has part of another array.

  Args:
    tree: Arrays that each process has whole, or that are split over the mesh.
    like: An array; unless it is on a mesh, they go to the default device.
  """
  mesh = _mesh_of(like)
  if mesh is None:
    return jax.device_put(tree)
  everywhere = whole(mesh)
  if any(_mesh_of(x) is not None for x in jax.tree.leaves(tree)):
    return jax.jit(_same, out_shardings=everywhere)(tree)  # one program
  return jax.tree.map(lambda x: _put(x, everywhere), tree)


def _same(tree: Any) -> Any:
  return tree


def put_params(mesh: Mesh, params: Any, dtype: Any = np.float32) -> Any:
  """Returns parameters, split over a mesh as `tree_shardings` says.

  They are placed one array at a time, and each process copies its own part only.

  Args:
    mesh: Has all devices that get a part.
    params: Arrays of any float type that each process has whole, perhaps mapped
      from a file, or that are split already.
    dtype: Type of the placed arrays.
  """
  shardings = tree_shardings(mesh, params)
  return jax.tree.map(functools.partial(_put, dtype=dtype), params, shardings)


def put_like(params: Any, like: Any) -> Any:
  """Returns parameters, split over the mesh of an array; without one as they are."""
  mesh = _mesh_of(like)
  return params if mesh is None else put_params(mesh, params)


def _mesh_of(array: Any) -> Mesh | None:
  """Returns the mesh that an array lies on."""
  mesh = getattr(getattr(array, "sharding", None), "mesh", None)
  return mesh if isinstance(mesh, Mesh) else None


def _put(array: Any, where: NamedSharding, dtype: Any = None) -> jax.Array:
  """Places an array that each process has; several do not compare theirs.

  One on a mesh moves there.
  """
  if _mesh_of(array) is not None:
    return jax.device_put(array.astype(dtype or array.dtype), where)
  array = np.asarray(array)

  def part(index):
    found = array[index]
    return found if dtype is None else np.array(found, dtype, order="C")

  placed = jax.make_array_from_callback(array.shape, where, part, dtype)
  memory.forget_mapped(array)
  return placed


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Places this process's rows of a batch, split over "data" and "fsdp".

  A batch that does not divide (a small last one) is whole on each device, which
  several processes cannot do.

  Raises:
    ConfigError: several processes cannot split the batch.
  """
  rows = len(next(iter(batch.values()))) * jax.process_count()
  require_divides(mesh, rows)
  sharding = batch_sharding(mesh, rows)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
    for name, array in batch.items()
  }
