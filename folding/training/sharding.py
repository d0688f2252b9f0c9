"""Where arrays lie: the mesh, and the placement of every kind of array.

One device is a mesh of one, so nothing else in the library asks how many there
are. Axes: "data" splits batches; "fsdp" splits batches, and also parameters
and all that is shaped like them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folding.config import MeshConfig
from folding.schema import ConfigError

_SMALLEST = 2**12  # elements; smaller arrays are not worth splitting


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh of a config over the devices (None: all).

  Raises:
    ConfigError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = {"data": config.data, "fsdp": config.fsdp}
  free = [name for name, size in shape.items() if size == -1]
  known = int(np.prod([size for size in shape.values() if size != -1]))
  if len(free) == 1 and known > 0 and len(devices) % known == 0:
    shape[free[0]] = len(devices) // known
  sizes = list(shape.values())
  if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
    raise ConfigError(
      f"mesh data={config.data}, fsdp={config.fsdp} does not multiply to the "
      f"{len(devices)} device(s); set one axis to -1 to take what is left"
    )
  array = np.array(devices).reshape(sizes)
  return Mesh(array, tuple(shape))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
  """Returns a sharding for each leaf of parameters or optimizer state.

  The longest axis that the fsdp axis divides is split; small arrays, and those
  without such an axis, are kept whole on every device.
  """
  parts = mesh.shape["fsdp"]

  def place(leaf):
    spec: list[str | None] = [None] * len(leaf.shape)
    axes = [a for a, n in enumerate(leaf.shape) if n % parts == 0]
    if parts > 1 and axes and np.prod(leaf.shape) >= _SMALLEST:
      spec[max(axes, key=lambda a: leaf.shape[a])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(place, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Places this process's rows of a batch, split over all mesh axes.

  A batch that the devices do not divide (a small last one) goes whole to each.
  """
  rows = len(next(iter(batch.values()))) * jax.process_count()
  spec = PartitionSpec(("data", "fsdp")) if rows % mesh.size == 0 else None
  sharding = NamedSharding(mesh, spec or PartitionSpec())
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
    for name, array in batch.items()
  }
