"""Atomic writes, output folders, JSON files, and functions of Python files."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from folding.errors import ConfigError, reason


def write_file(path: str, content: str | bytes) -> None:
  """Writes a whole file, or nothing if it fails."""
  if isinstance(content, str):
    content = content.encode("utf-8")
  # A random name: on a disk that containers share, process ids repeat.
  temporary = f"{path}.{secrets.token_hex(4)}.tmp"
  try:
    with open(temporary, "wb") as file:
      file.write(content)
    os.replace(temporary, path)
  except BaseException:
    if os.path.exists(temporary):
      os.remove(temporary)
    raise


@contextlib.contextmanager
def becoming(folder: str) -> Iterator[str]:
  """Yields a temporary folder that is renamed to `folder` on success."""
  part = f"{os.path.normpath(folder)}.{secrets.token_hex(4)}.part"
  os.makedirs(part)
  try:
    yield part
    os.replace(part, folder)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def require_local(path: str) -> None:
  """Raises `ConfigError` for a path that is not a local one.

  Such as gs://bucket/folder, or a ~ that no shell has expanded (none does after
  "=").
  """
  if "://" in path:
    raise ConfigError(
      f"{path} is an address, and output is written to folders; mount it, or "
      "copy the folder afterwards"
    )
  if path.startswith("~"):
    raise ConfigError(f"{path} would be a folder called ~; write $HOME instead")


def require_workdir(path: str) -> None:
  """Raises `ConfigError` for a path that cannot hold a run.

  The path must be local and its absolute form free of wildcards, because Orbax
  finds its files by a glob pattern.
  """
  require_local(path)
  whole = os.path.abspath(path)
  for character in "[*?":
    if character in whole:
      raise ConfigError(
        f"checkpoints in {whole} could not be read back because of the "
        f"{character}; choose another folder"
      )


def require_empty(path: str) -> None:
  """Raises `ConfigError` unless a path is free or an empty folder."""
  require_workdir(path)
  is_empty = os.path.isdir(path) and not os.listdir(path)
  if os.path.exists(path) and not is_empty:
    raise ConfigError(
      f"{path} is there already and not an empty folder; choose another"
    )


def read_json(path: str, kind: type[Any]) -> Any:
  """Returns the content of a JSON file.

  Args:
    path: The file.
    kind: dict or list.

  Raises:
    ConfigError: it is damaged, or not of this kind.
    OSError: it cannot be read.
  """
  with open(path, encoding="utf-8") as file:
    try:
      found = json.load(file)
    except ValueError as error:
      raise ConfigError(f"{path} is damaged: {error}") from error
  if not isinstance(found, kind):
    raise ConfigError(f"{path} is damaged: it is not a {kind.__name__}")
  return found


def call_in_file(where: str, function: str) -> Any:
  """Calls a function of a Python file and returns its result.

  Args:
    where: "FILE.py", or "FILE.py:ARGUMENT" to call it with that text.
    function: Its name.

  Raises:
    ConfigError: there is no such file or function, or it fails.
  """
  path, colon, argument = where.partition(":")
  if not os.path.isfile(path):
    raise ConfigError(f"there is no file {path!r}")
  spec = importlib.util.spec_from_file_location("given_file", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path!r} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look up their types there
  sys.path.insert(0, os.getcwd())  # like a script, for `from configs import`
  try:
    spec.loader.exec_module(module)
    return getattr(module, function)(*([argument] if colon else []))
  except ConfigError:
    raise
  except Exception as error:  # whatever the user's program raises
    raise ConfigError(
      f"{function}() of {path!r} fails: {reason(error)}"
    ) from error
  finally:
    sys.path.remove(os.getcwd())
