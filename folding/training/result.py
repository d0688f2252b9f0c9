"""`result.json`: what came out of a run, with where and by what it was made."""

import json
import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

from folding import files

_PACKAGES = ("folding", "jax", "flax", "optax")


def write_result(workdir: str, result: dict[str, Any]) -> None:
  """Writes figures and their provenance, whole or not at all."""
  device = jax.devices()[0]
  versions = {name: _version(name) for name in _PACKAGES}
  record = {
    "schema": 1,
    "device": f"{device.device_kind} x{len(jax.devices())} "
    f"({platform.machine()}, {os.cpu_count()} cores)",
    "versions": {**versions, "python": platform.python_version()},
    "commit": source_commit(),
    **result,
  }
  path = os.path.join(workdir, "result.json")
  files.write_file(path, json.dumps(record, indent=1))


def is_finished(workdir: str) -> bool:
  """Returns whether a run was trained to its end and tested."""
  path = os.path.join(workdir, "result.json")
  return os.path.exists(path) and bool(read_result(workdir).get("finished"))


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:  # run from a source tree
    return "not installed"


def read_result(workdir: str) -> dict[str, Any]:
  """Returns what `write_result` wrote."""
  return files.read_json(os.path.join(workdir, "result.json"), dict)


def source_commit() -> str | None:
  """Returns the commit of the source tree, if it is one."""
  here = os.path.abspath(__file__)
  # Installed in a project that has a repository, this file is not in it.
  if _git(here, "ls-files", "--error-unmatch", here) is None:
    return None
  return _git(here, "rev-parse", "--short=12", "HEAD")


def _git(file: str, *words: str) -> str | None:
  """Returns what git says in the folder of a file; None if it fails."""
  try:
    found = subprocess.run(
      ["git", "-C", os.path.dirname(file), *words],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return found.stdout.strip()
