"""Several processes that train one model.

Each process computes the same program on its own devices and rows of a batch.
They share one run directory, into which only process 0 writes metrics, results
and reports.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from folding.errors import ConfigError, one_line


def join(where: str) -> None:
  """Connects this process to the others, before the first use of a device.

  JAX waits five minutes for all processes.

  Args:
    where: `Config.distributed`: "none", "auto" or "HOST:PORT,PROCESS,COUNT".

  Raises:
    ConfigError: "auto" finds no cluster, or the address cannot be used.
  """
  if where == "none" or jax.distributed.is_initialized():
    return
  address, process, count = None, None, None
  if where != "auto":
    address, *numbers = where.split(",")
    process, count = map(int, numbers)
  try:
    jax.distributed.initialize(address, count, process)
  except (ValueError, RuntimeError) as error:
    raise ConfigError(
      f"distributed={where!r} does not start: {one_line(error)[:200]}"
    ) from error


def is_main() -> bool:
  """Returns whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes have reached the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together(
  message: str = "another process failed, see its message; nothing was trained",
) -> Iterator[None]:
  """Raises an error of one process in all of them, at the end of a block.

  All processes must reach the end, so nothing in the block may wait for another
  process.

  Args:
    message: Message of the error in processes that have none of their own.

  Raises:
    ConfigError: another process failed.
  """
  error = None
  try:
    yield
  except (ConfigError, OSError) as found:
    error = found
  if any_process(error is not None):
    raise error or ConfigError(message)


def require_same(text: str, what: str) -> None:
  """Checks that a text is the same in all processes; all must call it.

  Args:
    text: Text of this process.
    what: Its name in the message.

  Raises:
    ConfigError: in all processes, if any has another text than process 0.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(text.encode()).digest()
  found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  others = np.flatnonzero((found != found[0]).any(axis=1))
  if len(others):
    raise ConfigError(
      f"process {', '.join(map(str, others))} has {what} than process 0"
    )


def any_process(flag: bool) -> bool:
  """Returns whether the flag is True in any process; all must call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def to_host(tree: Any) -> Any:
  """Returns whole NumPy arrays in each process; all must call it.

  NumPy arrays, of which each process has its own, stay as they are.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def gathered(x):
    if not isinstance(x, jax.Array):
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gathered, tree)


def host_copy(tree: Any) -> Any:
  """Returns the same as `to_host`, of arrays that live on.

  An array of several devices, or of another device than the CPU, keeps the NumPy
  array that is made of it. Here a copy does, which is freed.
  """

  def copied(x):
    return x.copy() if isinstance(x, jax.Array) else x

  return to_host(jax.tree.map(copied, tree))
