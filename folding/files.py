"""Files and folders: written whole, empty, of a kind, or called."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from folding.schema import ConfigError, reason, require


def write_file(path: str, content: str | bytes) -> None:
  """Writes a file whole or not at all."""
  if isinstance(content, str):
    content = content.encode("utf-8")
  # Of containers that share a disk, several have a process 1.
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
  """Yields a new folder beside one, which it becomes when all has gone well."""
  part = f"{os.path.normpath(folder)}.{secrets.token_hex(4)}.part"
  os.makedirs(part)
  try:
    yield part
    os.replace(part, folder)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def require_local(path: str) -> None:
  """Raises `ConfigError` for what is no place to write to.

  That is an address such as gs://bucket/folder, and a ~ that no shell has
  replaced (none does after "=").
  """
  require(
    "://" not in path,
    f"{path} is an address, and files are written to folders; mount what is there, "
    "or copy it afterwards",
  )
  require(
    not path.startswith("~"),
    f"{path} would be a folder called ~; write $HOME in its place",
  )


def require_workdir(path: str) -> None:
  """Raises `ConfigError` for what is no place to write a run to.

  Beside what `require_local` refuses that is, anywhere in the absolute path, a
  character of patterns: Orbax looks for its files by one, and would not find
  them again.
  """
  require_local(path)
  whole = os.path.abspath(path)
  found = next((character for character in "[*?" if character in whole), None)
  require(
    found is None,
    f"checkpoints cannot be read from {whole}, because of the {found}; choose "
    "another folder",
  )


def require_empty(path: str) -> None:
  """Raises `ConfigError` where a folder has something in it already."""
  require_workdir(path)
  require(
    not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)),
    f"{path} is there already and not an empty folder; choose another",
  )


def read_json(path: str, kind: type[Any]) -> Any:
  """Returns what a JSON file says, of a kind: dict or list.

  Raises:
    ConfigError: it is damaged.
    OSError: it cannot be read.
  """
  with open(path, encoding="utf-8") as file:
    try:
      found = json.load(file)
    except ValueError as error:
      raise ConfigError(f"{path} is damaged: {error}") from error
  require(
    isinstance(found, kind), f"{path} is damaged: it is no {kind.__name__}"
  )
  return found


def call_in_file(where: str, function: str) -> Any:
  """Returns what a function of a Python file returns.

  Args:
    where: "FILE.py", or "FILE.py:ARGUMENT" to call it with that text.
    function: Its name.

  Raises:
    ConfigError: there is no such file, or it gives nothing.
  """
  path, colon, argument = where.partition(":")
  require(os.path.isfile(path), f"there is no file {path!r}")
  spec = importlib.util.spec_from_file_location("given_file", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path!r} is no Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where dataclasses look for their types
  sys.path.insert(0, os.getcwd())  # as of a script, for `from configs import`
  try:
    spec.loader.exec_module(module)
    return getattr(module, function)(*([argument] if colon else []))
  except ConfigError:
    raise
  except Exception as error:  # it is the user's program
    raise ConfigError(
      f"{function}() of {path!r} fails: {reason(error)}"
    ) from error
  finally:
    sys.path.remove(os.getcwd())
