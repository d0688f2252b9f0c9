"""Atomic writes, checksums, output folders, JSON files, and Python files."""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from folding.errors import ConfigError, reason

CHECKSUMS = "checksums.json"  # {file of the folder: CRC-32; null: no such file}

# Where configs/ is if the current folder has none: in an installed package (see
# pyproject.toml), or in the clone that holds it.
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_SHIPPED = (os.path.join(_PACKAGE, "shipped"), os.path.dirname(_PACKAGE))


def write_file(path: str, content: str | bytes) -> None:
  """Writes a file atomically: all of it or nothing, even if the power fails."""
  if isinstance(content, str):
    content = content.encode("utf-8")
  with replacing(path) as temporary, open(temporary, "wb") as file:
    file.write(content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Yields the name of a temporary file that becomes `path` on success."""
  # A random name: on a disk that containers share, process ids repeat.
  temporary = f"{path}.{secrets.token_hex(4)}.tmp"
  try:
    yield temporary
    _sync(temporary)
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))
  except BaseException as error:
    if os.path.exists(temporary):
      os.remove(temporary)
    if isinstance(error, OSError) and error.errno and not error.filename:
      error.filename = path  # a full disk or quota names no file
    raise


def sync_folder(folder: str) -> None:
  """Flushes the names in a folder to disk, if the file system can."""
  with contextlib.suppress(OSError):
    _sync(folder or ".")


def sync_tree(folder: str, skip: Callable[[str], bool] | None = None) -> None:
  """Flushes the files and folders of a folder to disk.

  `skip` returns whether a file is flushed already.

  Raises:
    OSError: a file cannot be flushed.
  """
  for parent, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(parent, name)
      if skip is None or not skip(path):
        _sync(path)
    sync_folder(parent)


def _sync(path: str) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def checksum(content: bytes) -> str:
  """Returns a CRC-32 in hexadecimal. It finds damage, not forgery."""
  return f"{zlib.crc32(content):08x}"


def file_checksum(path: str) -> str | None:
  """Returns the `checksum` of a file; None if there is none."""
  crc = 0
  try:
    with open(path, "rb") as file:
      while block := file.read(1 << 18):  # fits the processor's cache
        crc = zlib.crc32(block, crc)
  except FileNotFoundError:
    return None
  return f"{crc:08x}"


def write_checksums(
  folder: str, names: Iterable[str], texts: dict[str, str] | None = None
) -> None:
  """Writes the checksums of files of a folder.

  Args:
    folder: The folder.
    names: The files. One that does not exist must not exist later either.
    texts: {name: text} of files that will be written later.
  """
  found = {name: file_checksum(os.path.join(folder, name)) for name in names}
  for name, text in (texts or {}).items():
    found[name] = checksum(text.encode("utf-8"))
  text = json.dumps(found, indent=1)
  write_file(os.path.join(folder, CHECKSUMS), text)


def leads_out(name: str) -> bool:
  """Returns whether the name of a file in a folder leads out of the folder."""
  return os.path.isabs(name) or ".." in re.split(r"[/\\]", name)


def read_checksums(folder: str) -> dict[str, str | None] | None:
  """Returns the checksums of `write_checksums`; None if there are none.

  Raises:
    ConfigError: it is damaged, empty, or names files outside of the folder.
  """
  path = os.path.join(folder, CHECKSUMS)
  if not os.path.exists(path):
    return None
  found = read_json(path, dict)
  if not found:
    raise ConfigError(f"{path} is damaged: it is empty")
  for name in found:
    if leads_out(name):
      raise ConfigError(f"{path} is damaged: it names {name!r}")
  return found


def require_intact(folder: str, skip: Collection[str] = ()) -> bool:
  """Checks the files of a folder, except for `skip`, against its checksums.

  Returns:
    Whether the folder has checksums.

  Raises:
    ConfigError: a file is missing, was added, was edited or is damaged.
  """
  expected = read_checksums(folder)
  if expected is None:
    return False
  for name, value in expected.items():
    path = os.path.join(folder, name)
    if name not in skip and (found := file_checksum(path)) != value:
      raise ConfigError(
        f"{path} is missing"
        if found is None
        else f"{path} differs from its checksum in {CHECKSUMS}: one of them was "
        "edited or is damaged"
      )
  return True


def require_as_exported(folder: str, skip: Collection[str] = ()) -> None:
  """Checks an exported folder against its checksums, if it has any.

  Folders of other programs have none, or a file of that name in another format.
  Files in `skip` are not checked.

  Raises:
    ConfigError: a file was edited, is missing or is damaged.
  """
  path = os.path.join(folder, CHECKSUMS)
  if not os.path.exists(path):
    return
  with open(path, "rb") as file:
    if not re.search(rb': ("[0-9a-f]{8}"|null)', file.read()):
      return
  try:
    require_intact(folder, skip)
  except ConfigError as error:
    raise ConfigError(
      f"{error}; put back what was exported, or, if you edited it on purpose, "
      f"remove {path}"
    ) from None


def lock(folder: str) -> int | None:
  """Locks a folder for this process.

  The folder itself is locked, so no lock file stays.

  Returns:
    A handle; closing it, or the end of the process, releases the lock. None:
    the operating system or the file system has no locks.

  Raises:
    BlockingIOError: another process holds the lock.
  """
  try:
    import fcntl
  except ImportError:  # Windows
    return None
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(handle)
    if isinstance(error, BlockingIOError):
      raise
    return None
  return handle


@contextlib.contextmanager
def becoming(folder: str) -> Iterator[str]:
  """Yields a temporary folder that is renamed to `folder` on success.

  Removes those of processes that were killed here before.
  """
  folder = os.path.normpath(folder)
  _remove_stale(f"{glob.escape(folder)}.{'[0-9a-f]' * 8}.part")
  part = f"{folder}.{secrets.token_hex(4)}.part"
  os.makedirs(part)
  handle = lock(part)
  try:
    yield part
    sync_tree(part)
    os.replace(part, folder)
    sync_folder(os.path.dirname(folder))
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  finally:
    if handle is not None:
      os.close(handle)


def _remove_stale(pattern: str) -> None:
  """Removes folders that no process holds, if that can be known."""
  for folder in glob.glob(pattern):
    with contextlib.suppress(OSError):
      # A new one may not be locked yet.
      is_new = time.time() - os.path.getmtime(folder) < 60
      handle = None if is_new else lock(folder)
      if handle is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def all_files(folder: str) -> list[str]:
  """Returns the files of a folder and those below it, such as "a/b", sorted."""
  return sorted(
    os.path.relpath(os.path.join(at, name), folder).replace(os.sep, "/")
    for at, _, names in os.walk(folder)
    for name in names
  )


def require_inside(folder: str) -> None:
  """Checks that no symbolic link in a folder leads out of it.

  The folder itself may be a link.

  Raises:
    ConfigError: a link does; names it.
  """
  root = os.path.join(os.path.realpath(folder), "")
  for parent, folders, names in os.walk(folder):
    for path in (os.path.join(parent, name) for name in (*folders, *names)):
      if os.path.islink(path) and not os.path.realpath(path).startswith(root):
        raise ConfigError(
          f"{path} is a link out of {folder}, and files of a run are read and "
          "written in its own folder only; put the file itself there"
        )


def folder_bytes(path: str) -> int:
  """Returns the bytes of the files in a folder and those below it."""
  return sum(os.path.getsize(os.path.join(path, x)) for x in all_files(path))


def require_local(path: str) -> None:
  """Raises `ConfigError` for a path that is not local, such as gs://bucket/folder.

  A path that begins with ~ is refused too: shells do not expand ~ after "=".
  """
  if "://" in path:
    raise ConfigError(
      f"{path} is an address, and output is written to folders; mount it, or "
      "copy the folder afterwards"
    )
  if path.startswith("~"):
    raise ConfigError(f"{path} would be a folder called ~; write $HOME instead")


def require_folder(path: str) -> None:
  """Raises `ConfigError` unless a path is local, and free or a folder."""
  require_local(path)
  if not path:
    raise ConfigError("the name of a folder is empty")
  whole = os.path.abspath(path)
  if os.path.lexists(whole) and not os.path.isdir(whole):
    raise ConfigError(f"{path} is there already and not a folder")
  try:
    whole.encode()
  except UnicodeEncodeError:
    raise ConfigError(f"the name {whole!r} is not UTF-8; rename it") from None


def require_workdir(path: str) -> None:
  """Raises `ConfigError` for a path that cannot hold a run.

  Beyond `require_folder`, its absolute form must be free of wildcards, because
  Orbax finds its files by a glob pattern.
  """
  require_folder(path)
  whole = os.path.abspath(path)
  for character in "[*?":
    if character in whole:
      raise ConfigError(
        f"checkpoints in {whole} could not be read back because of the "
        f"{character}; choose another folder"
      )


def require_empty(path: str) -> None:
  """Raises `ConfigError` unless a path is free or a replaceable empty folder."""
  require_folder(path)
  whole = os.path.abspath(path)
  if whole == os.getcwd() or os.path.ismount(whole):
    raise ConfigError(f"{path!r} cannot be replaced; name a new folder")
  is_empty = os.path.isdir(whole) and not os.listdir(whole)
  if os.path.lexists(whole) and (os.path.islink(whole) or not is_empty):
    raise ConfigError(
      f"{path} is there already and not an empty folder; choose another"
    )


def require_new_file(path: str, ending: str) -> None:
  """Raises `ConfigError` unless a file can be written without loss.

  Its name must have this ending, such as ".npy", and its folder must exist.
  """
  require_local(path)
  folder = os.path.dirname(path) or "."
  if not path.endswith(ending):
    raise ConfigError(f"{path!r} is not the name of a {ending} file")
  if not os.path.isdir(folder):
    raise ConfigError(f"there is no folder {folder} for {path}")
  if os.path.lexists(path):
    raise ConfigError(f"{path} is there already; choose another name")
  start = f"{os.path.basename(path)}."  # as long a name as `write_file` needs
  try:
    tempfile.NamedTemporaryFile(prefix=start, suffix=".tmp", dir=folder).close()
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: str, kind: type[Any]) -> Any:
  """Returns the dict or the list that a JSON file holds.

  Raises:
    ConfigError: it is damaged, or not of this kind.
    OSError: it cannot be read.
  """
  with open(path, encoding="utf-8") as file:
    try:
      found = json.load(file)
    except (ValueError, RecursionError) as error:
      raise ConfigError(f"{path} is damaged: {error}") from error
  if not isinstance(found, kind):
    raise ConfigError(f"{path} is damaged: it is not a {kind.__name__}")
  return found


def write_json(path: str, content: Any) -> None:
  """Writes indented JSON and a line end, as `write_file` does."""
  write_file(path, json.dumps(content, indent=2) + "\n")


def _find(path: str) -> tuple[str, str]:
  """Returns the folder to import from, and the path of a Python file."""
  if os.path.isfile(path):
    return os.getcwd(), path
  if path.startswith("configs/"):
    for root in _SHIPPED:
      found = os.path.join(root, path)
      if os.path.isfile(found):
        print(f"{path} is {found}", file=sys.stderr)
        return root, found
  names = [*shipped("configs"), *shipped("configs/studies")]
  raise ConfigError(
    f"there is no file {path!r}; files of the library: {', '.join(names)}"
  )


def shipped(folder: str) -> list[str]:
  """Returns the config files of the library, such as "configs/lm.py"."""
  return sorted(
    f"{folder}/{name}"
    for root in _SHIPPED
    for name in glob.glob("[!_]*.py", root_dir=os.path.join(root, folder))
  )


def call_in_file(where: str, function: str) -> Any:
  """Calls a function of a Python file and returns its result.

  If a path under configs/ is not in the current folder, the file of that name that
  comes with the library is used, and a line on stderr names it.

  Args:
    where: "FILE.py", or "FILE.py:ARGUMENT" to call it with that text.
    function: Its name.

  Raises:
    ConfigError: there is no such file or function, or it fails.
  """
  path, colon, argument = where.partition(":")
  root, path = _find(path)
  spec = importlib.util.spec_from_file_location("given_file", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path!r} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look up their types there
  sys.path.insert(0, root)  # like a script, for `from configs import`
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, function):
      raise ConfigError(f"{path!r} has no {function}()")
    return getattr(module, function)(*([argument] if colon else []))
  except ConfigError:
    raise
  except dataclasses.FrozenInstanceError as error:
    raise ConfigError(
      f"{function}() of {path} changes a config, which is frozen: {error}; return "
      'folding.config.edited(config, {"section.field": value})'
    ) from error
  except (Exception, SystemExit) as error:  # any error of the user's code
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f":{x.lineno}" for x in frames if x.filename == path]
    raise ConfigError(
      f"{function}() of {path}{lines[-1] if lines else ''} fails: {reason(error)}"
    ) from error
  finally:
    sys.path.remove(root)
