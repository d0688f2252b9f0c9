"""Where arrays lie: the mesh, and the placement of every kind of array.

One device is a mesh of one, so nothing else in the library asks how many there
are. Axes: "data" splits batches; "fsdp" splits batches, and also parameters
and all that is shaped like them; "tensor" splits heads, neurons and the
vocabulary, and with them what is computed of a batch.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from folding import paths
from folding.config import MeshConfig
from folding.schema import ConfigError, require

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")
_SMALLEST = 2**12  # elements; smaller arrays are not worth splitting

# {pattern of paths: the axis that "tensor" splits}, where nothing else is said.
_TENSOR = {
  r"(.*/)?(embed/embedding|attn/o/kernel|mlp/down/kernel)": 0,
  r"(.*/)?attn/[qkv]/kernel": 1,
  r"(.*/)?(mlp/(up|gate)|head)/kernel": -1,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of a config over the devices (None: all).

  Raises:
    ConfigError: the axes do not multiply to the number of devices, or several
      processes would need the same rows of a batch.
  """
  devices = jax.devices() if devices is None else devices
  found = require_sizes(config, len(devices))
  groups = found[0] * found[1]  # of devices, each of other rows of a batch
  count = len({getattr(d, "process_index", 0) for d in devices})
  require(
    groups % count == 0,
    f"mesh {_shown(config)} shares out rows of a batch among {groups} groups of "
    f"devices, and there are {count} processes; use fewer for mesh.tensor",
  )
  return Mesh(np.array(devices).reshape(found), AXES)


def fitting(config: MeshConfig, count: int) -> MeshConfig:
  """Returns the config, or one that splits parameters over `count` devices.

  For a run that was begun on another number of devices.
  """
  if sizes(config, count):
    return config
  return dataclasses.replace(config, data=1, fsdp=-1, tensor=1)


def sizes(config: MeshConfig, count: int) -> list[int] | None:
  """Returns the size of each axis over so many devices, None if none fit."""
  found = [getattr(config, axis) for axis in AXES]
  known = math.prod(size for size in found if size != -1)
  if found.count(-1) == 1 and known > 0 and count % known == 0:
    found[found.index(-1)] = count // known
  return found if math.prod(found) == count and min(found) >= 1 else None


def require_sizes(config: MeshConfig, count: int) -> list[int]:
  """Returns `sizes`.

  Raises:
    ConfigError: the axes do not multiply to so many devices.
  """
  found = sizes(config, count)
  if found is None:
    raise ConfigError(
      f"mesh {_shown(config)} does not multiply to the {count} device(s); set "
      "one axis to -1 to take what is left over"
    )
  return found


def _shown(config: MeshConfig) -> str:
  return ", ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)


def tree_shardings(
  mesh: Mesh | AbstractMesh, tree: Any, params: Any = None, rules: str = ""
) -> Any:
  """Returns a sharding for each leaf of parameters or of a training state.

  A leaf whose path ends like that of a parameter is placed as it is: moments,
  averages and the bits of FPP. Of a parameter that no rule names, "tensor"
  splits the axis of heads, neurons or tokens, and "fsdp" the longest other axis
  that it divides; small arrays are kept whole, like all that belongs to none.

  Args:
    mesh: The mesh, of the axes "data", "fsdp" and "tensor"; others are left be.
    tree: Arrays, or their shapes.
    params: The parameters; None: `tree.params`, or else the tree itself.
    rules: As in `MeshConfig`.

  Raises:
    ConfigError: a rule is malformed, or places nothing; an axis is missing.
  """
  require(
    set(AXES) <= set(mesh.axis_names),
    f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}; name its "
    f"axes {', '.join(AXES)} (those that nothing is split over of size 1)",
  )
  params = getattr(tree, "params", tree) if params is None else params
  placed = _placements(mesh, params, rules)

  def place(name, leaf):
    spec = None
    parts = name.split("/")
    for start in range(len(parts)):
      owner = "/".join(parts[start:])
      if owner in placed:
        spec = _spec_like(tuple(leaf.shape), placed[owner], mesh)
        break
    return NamedSharding(
      mesh, PartitionSpec(*(spec or [None] * len(leaf.shape)))
    )

  return paths.map_named(place, tree)


def unsplit(
  mesh: Mesh | AbstractMesh, params: Any, rules: str = ""
) -> list[str]:
  """Returns a line for each parameter that is kept whole for want of a divisor.

  Args:
    mesh: The mesh.
    params: Arrays, or their shapes.
    rules: As in `MeshConfig`.
  """
  return [
    f"{name} {p.shape} is not split over {' and '.join(p.missed)}, which "
    "does not divide it"
    for name, p in _placements(mesh, params, rules).items()
    if p.missed
  ]


@dataclasses.dataclass(frozen=True)
class _Placement:
  """Of a parameter; `missed` names mesh axes that do not divide the array."""

  shape: tuple[int, ...]
  spec: tuple[str | None, ...]
  missed: tuple[str, ...]


def _placements(
  mesh: Mesh | AbstractMesh, params: Any, rules: str
) -> dict[str, _Placement]:
  shapes = {n: tuple(x.shape) for n, x in paths.flatten(params).items()}
  placed: dict[str, _Placement] = {}
  for pattern, axes in _parse(rules):
    try:
      names = paths.matching(pattern, shapes)
    except ValueError as error:
      raise ConfigError(f"mesh.rules: {error}") from None
    for name in names:
      shape = shapes[name]
      require(
        len(axes) <= len(shape),
        f"mesh.rules: {pattern!r} places {len(axes)} axes, and {name!r} has "
        f"shape {shape}",
      )
      wanted = axes + (None,) * (len(shape) - len(axes))
      placed.setdefault(name, _divided(mesh, shape, wanted))
  return {
    name: placed.get(name) or _default(mesh, name, shape)
    for name, shape in shapes.items()
  }


def _parse(rules: str) -> list[tuple[str, tuple[str | None, ...]]]:
  """Returns (pattern, axes) of each rule; axes are names or None."""
  found = []
  for rule in rules.split():
    pattern, equals, text = rule.rpartition("=")
    axes = text.split(",")
    named = [axis for axis in axes if axis != "-"]
    require(
      bool(equals and pattern)
      and set(named) <= set(AXES)
      and len(named) == len(set(named)),
      f"mesh.rules: {rule!r} is not PATTERN=AXES, such as "
      f"'.*/up/kernel=fsdp,tensor' with axes {', '.join(AXES)} (once each) or -",
    )
    found.append((pattern, tuple(None if a == "-" else a for a in axes)))
  return found


def _divided(
  mesh: Mesh | AbstractMesh,
  shape: tuple[int, ...],
  wanted: tuple[str | None, ...],
) -> _Placement:
  """Returns a placement without the mesh axes that do not divide the array."""
  fits = [
    axis is None or size % mesh.shape[axis] == 0
    for axis, size in zip(wanted, shape, strict=True)
  ]
  pairs = list(zip(wanted, fits, strict=True))
  return _Placement(
    shape,
    tuple(a if ok and a and mesh.shape[a] > 1 else None for a, ok in pairs),
    tuple(a for a, ok in pairs if a and not ok),
  )


def _default(
  mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...]
) -> _Placement:
  wanted: list[str | None] = [None] * len(shape)
  if math.prod(shape) < _SMALLEST:
    return _Placement(shape, tuple(wanted), ())
  for pattern, axis in _TENSOR.items():
    if re.fullmatch(pattern, name) and mesh.shape["tensor"] > 1:
      wanted[axis] = "tensor"
  placed = _divided(mesh, shape, tuple(wanted))
  parts = mesh.shape["fsdp"]
  if parts == 1:
    return placed
  spec = list(placed.spec)
  axes = [a for a, n in enumerate(shape) if n % parts == 0 and spec[a] is None]
  if not axes:
    return dataclasses.replace(placed, missed=(*placed.missed, "fsdp"))
  spec[max(axes, key=lambda a: shape[a])] = "fsdp"
  return dataclasses.replace(placed, spec=tuple(spec))


def _spec_like(
  shape: tuple[int, ...], owner: _Placement, mesh: Mesh | AbstractMesh
) -> list[str | None] | None:
  """Returns the placement of an array that belongs to a parameter.

  None: it is small, such as the bits of rows and neurons.
  """
  spec = list(owner.spec)
  if shape == owner.shape:
    return spec
  if shape == owner.shape[:-1]:  # averages, one for each input
    return spec[:-1]
  size = owner.shape[-1] if owner.shape else 0
  if shape[1:] == (*owner.shape[:-1], -(-size // 8)):  # bits, eight to a byte
    last = spec[-1]
    if last and size % (8 * mesh.shape[last]):
      spec[-1] = None
    return [None, *spec]
  return None


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the placement of what each device has all of."""
  return NamedSharding(mesh, PartitionSpec())


def row_parts(mesh: Mesh | AbstractMesh) -> int:
  """Returns how many parts the rows of a batch are split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Returns the placement of a batch; whole, where it does not divide."""
  is_split = rows % row_parts(mesh) == 0
  return NamedSharding(mesh, PartitionSpec(_BATCH)) if is_split else whole(mesh)


def undivided(mesh: Mesh | AbstractMesh, rows: int) -> list[str]:
  """Returns a line where a batch is too odd to be split, else nothing."""
  parts = row_parts(mesh)
  if rows % parts == 0:
    return []
  return [
    f"{rows} rows of a batch do not divide among data x fsdp = {parts}, so each "
    "device computes all of them"
  ]


def pin_rows(mesh: Mesh | None, x: Any) -> Any:
  """Returns a tree of arrays whose first axis lies as the rows of a batch do.

  Without this, XLA may split what layers write by channels, as it does their
  parameters, and move it to and fro.

  Args:
    mesh: None: nothing is said.
    x: Arrays of a compiled function; their other axes are left to XLA.
  """
  if mesh is None or mesh.size == 1:
    return x

  def pin(x):
    rows = batch_sharding(mesh, x.shape[0]).spec
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    spec = PartitionSpec(rows[0] if len(rows) else None, *free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(pin, x)


def require_divides(mesh: Mesh, rows: int) -> None:
  """Raises `ConfigError` where several processes cannot split a batch."""
  parts = row_parts(mesh)
  require(
    rows % parts == 0 or jax.process_count() == 1,
    f"a batch of {rows} rows does not divide among mesh data x fsdp = {parts}; "
    "use a multiple for data.batch_size and data.eval_batch_size",
  )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Places this process's rows of a batch, split over "data" and "fsdp".

  A batch that these do not divide (a small last one) goes whole to each device,
  which several processes cannot do.

  Raises:
    ConfigError: there are several, and they cannot split it.
  """
  rows = len(next(iter(batch.values()))) * jax.process_count()
  require_divides(mesh, rows)
  sharding = batch_sharding(mesh, rows)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
    for name, array in batch.items()
  }
