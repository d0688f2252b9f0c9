"""Who does what: claims in a directory that several machines may share.

A claim is a file that only one process can make. Its holder touches it while it
works. When it is released, or its holder is gone, the next claim has the next
number: `NAME.0`, `NAME.1`, ...; the highest one counts. So nobody deletes or
replaces what another may just have made.
"""

import contextlib
import json
import os
import re
import socket
import time

BEAT_SECONDS = 5.0  # between touches
STALE_SECONDS = 60.0  # without a touch: the holder is gone

_RELEASED = ".released"


class Claim:
  """A claim that this process holds."""

  def __init__(self, folder: str, name: str, number: int):
    self._folder, self._name, self._number = folder, name, number
    self._path = os.path.join(folder, f"{name}.{number}")
    self._beaten, self._is_mine = time.monotonic(), True

  def beat(self) -> bool:
    """Touches the claim if it is time; returns whether it is still held.

    It is not where another process took it for abandoned, as may happen to one
    that was suspended.
    """
    now = time.monotonic()
    if self._is_mine and now - self._beaten >= BEAT_SECONDS:
      self._is_mine = _highest(self._folder, self._name) == self._number
      self._beaten = now
      if self._is_mine:
        os.utime(self._path)
    return self._is_mine

  def release(self) -> None:
    """Lets others claim the same again."""
    with open(self._path + _RELEASED, "w", encoding="utf-8"):
      pass


class Claims:
  """Claims of this process and of others in a directory.

  Args:
    folder: Made if need be.
    stale_seconds: See `STALE_SECONDS`.
  """

  def __init__(self, folder: str, stale_seconds: float = STALE_SECONDS):
    self._folder, self._stale = folder, stale_seconds
    # {claim: (when it was touched, by its clock; when that was seen, by ours)}
    self._seen: dict[str, tuple[float, float]] = {}
    os.makedirs(folder, exist_ok=True)

  def take(self, name: str) -> Claim | None:
    """Returns a claim, or None where somebody else holds it."""
    number = _highest(self._folder, name)
    if number is not None and not self._is_free(f"{name}.{number}"):
      return None
    number = 0 if number is None else number + 1
    path = os.path.join(self._folder, f"{name}.{number}")
    try:
      descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:  # another process was quicker
      return None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
      json.dump({"host": _machine(), "pid": os.getpid()}, file)
    return Claim(self._folder, name, number)

  def held(self) -> set[str]:
    """Returns the names that somebody holds, this process included."""
    highest: dict[str, int] = {}
    for entry in os.listdir(self._folder):
      name, _, number = entry.rpartition(".")
      if number.isdecimal():
        highest[name] = max(int(number), highest.get(name, 0))
    return {n for n, k in highest.items() if not self._is_free(f"{n}.{k}")}

  def _is_free(self, claim: str) -> bool:
    path = os.path.join(self._folder, claim)
    if os.path.exists(path + _RELEASED):
      return True
    host, pid = _read(path)
    if host == _machine() and not _is_alive(pid):
      return True
    # Clocks of machines differ, so a change is waited for and no age computed.
    touched, now = os.stat(path).st_mtime, time.monotonic()
    before, seen = self._seen.setdefault(claim, (touched, now))
    if before != touched:
      self._seen[claim] = (touched, now)
      return False
    return now - seen > self._stale


def _machine() -> str:
  """Returns what tells machines, and containers on one, apart."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # of Linux
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      parts.append(file.read().strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def _highest(folder: str, name: str) -> int | None:
  pattern = re.compile(rf"{re.escape(name)}\.(\d+)")
  matches = [pattern.fullmatch(entry) for entry in os.listdir(folder)]
  return max((int(m[1]) for m in matches if m), default=None)


def _read(path: str) -> tuple[str | None, int]:
  try:
    with open(path, encoding="utf-8") as file:
      values = json.load(file)
    return values["host"], values["pid"]
  except ValueError:  # just made, and not yet written
    return None, 0


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
