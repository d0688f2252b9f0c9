"""Several processes that train one model: how they meet, and who writes.

Each process computes the same program on its own devices and rows; process 0
alone writes metrics, results and reports. They share one run directory.
"""

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from folding.schema import ConfigError, one_line, require

TIMEOUT_SECS = 300  # to wait for the others at the start


def join(where: str, timeout_secs: int = TIMEOUT_SECS) -> None:
  """Meets the other processes; before the first use of a device.

  Args:
    where: "none", "auto" or "HOST:PORT,PROCESS,COUNT", as `Config` has it.
    timeout_secs: How long to wait for the others.

  Raises:
    ConfigError: a process does not come, or "auto" finds no cluster.
  """
  if where == "none" or jax.distributed.is_initialized():
    return
  address, process, count = None, None, None
  if where != "auto":
    address, *numbers = where.split(",")
    process, count = map(int, numbers)
    # JAX would end the process with a dump of its stack if one did not come.
    _meet(address, process, count, timeout_secs)
  try:
    jax.distributed.initialize(
      address, count, process, initialization_timeout=timeout_secs
    )
  except (ValueError, RuntimeError) as error:
    raise ConfigError(
      f"distributed={where!r} does not start: {one_line(error)[:200]}"
    ) from error


def _meet(address: str, process: int, count: int, timeout_secs: float) -> None:
  """Waits until all processes have been at the address of process 0.

  Raises:
    ConfigError: one has not, or there is no such address.
  """
  host, _, port = address.rpartition(":")
  host = host.strip("[]")  # of IPv6
  deadline = time.monotonic() + timeout_secs
  try:
    if process == 0:
      missing = _host(int(port), count, deadline)
    else:
      missing = _visit((host, int(port)), process, deadline)
  except (OSError, OverflowError) as error:
    raise ConfigError(
      f"distributed: process {process} cannot use {address}: {error}"
    ) from error
  if missing:
    raise ConfigError(
      f"distributed: process {', '.join(map(str, sorted(missing)))} of {count} "
      f"did not come to {address} within {timeout_secs:g} s"
    )


def _host(port: int, count: int, deadline: float) -> set[int]:
  """Lets the others go on when all have come; returns those that have not."""
  missing = set(range(1, count))
  visitors = []
  # On all interfaces, as JAX does later: by its own name a machine may be found
  # at its loopback, and from outside at an address that it does not have.
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  with socket.create_server(
    ("", port), family=family, dualstack_ipv6=dual
  ) as server:
    while missing and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        visitor, _ = server.accept()
        visitor.settimeout(2.0)  # ours speak at once
        word = visitor.recv(16)
      except OSError:  # nobody came, or somebody left
        continue
      visitors.append(visitor)
      missing -= {int(word)} if word.isdigit() else set()
  for visitor in visitors:
    with visitor, contextlib.suppress(OSError):
      visitor.sendall(b"go" if not missing else b"no")
  return missing


def _visit(place: tuple[str, int], process: int, deadline: float) -> set[int]:
  """Waits to be let go on; returns {0} if process 0 has not come."""
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(place, timeout=left) as visit:
        visit.sendall(str(process).encode())
        visit.settimeout(max(0.1, deadline - time.monotonic()))
        if visit.recv(16) == b"go":
          return set()
    except ConnectionError:  # it is not there yet
      pass
    except TimeoutError:
      break
    time.sleep(0.1)
  return {0}


def is_main() -> bool:
  """Returns whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together(
  told: str = "another process cannot begin, and says why; nothing was trained",
) -> Iterator[None]:
  """Makes a mistake that one process finds in a block one of all of them.

  All must come to the end of the block, so nothing in it may wait for others.

  Args:
    told: What the others say.

  Raises:
    ConfigError: another process has found one, and says which.
  """
  error = None
  try:
    yield
  except (ConfigError, OSError) as found:
    error = found
  if any_process(error is not None):
    raise error or ConfigError(told)


def require_same(text: str, what: str) -> None:
  """Refuses what is not the same in all processes; all of them must ask.

  Args:
    text: Of this process.
    what: What the message calls it.

  Raises:
    ConfigError: in all processes, where one has another text.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(text.encode()).digest()
  found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  others = np.flatnonzero((found != found[0]).any(axis=1))
  require(
    not len(others),
    f"process {', '.join(map(str, others))} has {what} than process 0",
  )


def any_process(flag: bool) -> bool:
  """Returns whether the flag is True in any process; all of them must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def to_host(tree: Any) -> Any:
  """Returns whole NumPy arrays in each process; all of them must ask."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
