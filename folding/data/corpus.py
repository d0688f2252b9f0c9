"""Text of any size for language models: read in slices, tokenised once.

Files of `LARGE` bytes and more are not held in memory. Their splits, ids and
digests are those that `sources` and `batches` make of the same text in memory.
The ids are in a folder beside the text (or in `data.dir`), named by the text and
the tokenizer, and later runs map them into memory. Files of text are known by
name, size and time of change, so that a later run need not read them. What it
reads instead has checksums, and is made again if it is damaged.
"""

import atexit
import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import rich.console
import rich.progress

from folding import files
from folding.config import DataConfig
from folding.data import (
  local_files,
  python_stdlib,
  rows,
  sources,
  tokenizers,
)
from folding.data.tokenizers import Tokenizer
from folding.errors import ConfigError, first_line
from folding.tasks import TASKS

_log = logging.getLogger(__name__)

LARGE = 1 << 27  # bytes of all files
FOLDER = ".folding-tokens"
_FORMAT = 1  # raised if the same text would get other splits, tokenizers or ids
_ENDINGS = (".txt", ".csv", ".jsonl", *local_files.COLUMNAR)
_BLOCK = 1 << 20  # bytes
_FIRST_ROWS = 1000  # rows that the column of text is chosen by
_FIELDS = (
  "text_field",
  "label_field",
  "valid_fraction",
  "test_fraction",
  "max_bytes",
)

# Size in UTF-8 bytes, and the text in slices.
Document: TypeAlias = tuple[int, Iterable[str]]


class Tokens(NamedTuple):
  """The ids of a text.

  Attributes:
    streams: Ids of each split, from `Tokenizer.stream`; mapped into memory.
    num_bytes: UTF-8 bytes of text of each split.
    digest: As in `batches.Data`.
  """

  streams: dict[str, np.ndarray]
  num_bytes: dict[str, int]
  digest: str


def tokenised(
  data: DataConfig, tokenizer: Tokenizer | None, keep: bool = True
) -> tuple[Tokenizer, Tokens] | None:
  """Returns the tokenizer and the ids of large text.

  None: it is not large, or the training split is a table of one row.

  Args:
    data: The source. Only local files may be large, and no .tsv.
    tokenizer: None: that of the config, trained if need be.
    keep: Whether to keep the ids for later runs. False: those that are not there
      are written to a temporary folder.

  Raises:
    ConfigError: the text or the tokenizer is not valid, or the ids cannot be
      written.
  """
  if data.path is None or not os.path.exists(data.path):
    return None
  found = local_files.find_files(pathlib.Path(data.path), data)
  every = [file for part in found.values() for file in part]
  size = sum(file.stat().st_size for file in every)
  if size < LARGE or any(file.suffix not in _ENDINGS for file in every):
    return None
  known = [
    (split, file.name, file.stat().st_size, file.stat().st_mtime_ns)
    for split, part in found.items()
    for file in part
  ]
  fields = {name: getattr(data, name) for name in _FIELDS}
  place = pathlib.Path(data.dir) if data.dir else every[0].parent
  folder = place / FOLDER / _hash(json.dumps([_FORMAT, known, fields]))
  # A single text is cut into splits, which `sources` does in memory.
  if not folder.is_dir() and _has_one_row(found["train"]):
    return None
  local_files.warn_of_ignored(pathlib.Path(data.path), found, data)
  sources.require_room(data)
  splits = functools.cache(lambda: _splits(data, found))
  if tokenizer is None:
    tokenizer = _tokenizer(data, folder, splits, keep)
  target = _made(
    folder / _hash(_identity(tokenizer)),
    lambda part: _write(part, splits(), tokenizer),
    keep,
  )
  return tokenizer, _read(target, tokenizer.dtype)


def _has_one_row(train: Sequence[pathlib.Path]) -> bool:
  """Returns whether files are a table of at most one row."""
  rows_after_first = itertools.islice(local_files.rows_of(train), 1, 2)
  return train[0].suffix != ".txt" and not any(rows_after_first)


def _made(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None], keep: bool
) -> pathlib.Path:
  """Returns a folder whose files are intact, written if they are not.

  Args:
    folder: The folder.
    write: Writes the files into the folder given.
    keep: See `tokenised`.
  """
  if folder.exists():
    reason = _damage(folder)
    if not reason:
      return folder
    _log.warning("%s; it is made again from the text", reason)
  if not keep:
    folder = pathlib.Path(tempfile.mkdtemp(), folder.name)
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
  try:
    if folder.exists():
      shutil.rmtree(folder)
    with files.becoming(str(folder)) as part:
      write(pathlib.Path(part))
      files.write_checksums(part, files.all_files(part))
  except OSError as error:
    if _damage(folder):  # otherwise another process was first
      raise ConfigError(
        f"cannot write the tokens of large text to {folder.parent} "
        f"({first_line(error)}); set data.dir to another folder"
      ) from error
  return folder


def _damage(folder: pathlib.Path) -> str:
  """Returns why the files of a folder cannot be used; "": they are intact."""
  try:
    if files.require_intact(str(folder)):
      return ""
  except (ConfigError, OSError) as error:
    return first_line(error)
  return f"{folder} has no {files.CHECKSUMS}"


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(tokenizer: Tokenizer) -> str:
  ids = [tokenizer.begin_ids.tolist(), tokenizer.end_ids.tolist()]
  token_map = getattr(tokenizer, "token_map", np.zeros(0, int)).tolist()
  return tokenizer.to_json() + json.dumps([ids, token_map])


def _tokenizer(
  data: DataConfig,
  folder: pathlib.Path,
  splits: Callable[[], Any],
  keep: bool,
) -> Tokenizer:
  """Returns the tokenizer of the config, trained once."""
  if data.tokenizer not in tokenizers.BUILT_IN:
    return tokenizers.load_tokenizer(data.tokenizer)

  def write(part):
    texts = (slices for _, slices in splits()["train"].documents())
    made = tokenizers.train_tokenizer(data, texts)
    made.save(os.path.join(part, "tokenizer.json"))

  target = folder / f"{data.tokenizer}-{data.vocab_size}"
  return tokenizers.load_tokenizer(
    _made(target, write, keep) / "tokenizer.json"
  )


def _write(
  folder: pathlib.Path,
  splits: dict[str, "_Region | _Rows"],
  tokenizer: Tokenizer,
) -> None:
  """Writes the ids of all splits."""
  sha, num_bytes = hashlib.sha256(), {}
  console = rich.console.Console()
  with rich.progress.Progress(
    console=console, transient=True, disable=not console.is_terminal
  ) as bar:
    for split in sources.SPLITS:
      part = splits[split]
      job = bar.add_task(f"tokenising {split}", total=part.num_bytes)
      advance = functools.partial(bar.advance, job)
      with open(folder / f"{split}.bin", "wb") as file:
        num_bytes[split] = _write_split(file, part, tokenizer, sha, advance)
      sha.update(b"end")
  meta = {"digest": sha.hexdigest(), "num_bytes": num_bytes}
  (folder / "meta.json").write_text(json.dumps(meta))


def _write_split(
  file: BinaryIO,
  part: "_Region | _Rows",
  tokenizer: Tokenizer,
  sha: Any,
  advance: Callable[[int], None],
) -> int:
  """Writes the ids of a split, hashes its text, and returns its UTF-8 bytes."""
  num_bytes = 0

  def hashed(text: str) -> str:
    encoded = text.encode("utf-8")
    sha.update(encoded)
    advance(len(encoded))
    return text

  def documents() -> Iterator[Iterable[str]]:
    nonlocal num_bytes
    for size, slices in part.documents():
      num_bytes += size
      sha.update(size.to_bytes(8, "little"))
      yield map(hashed, slices)

  if part.num_bytes:
    for ids in tokenizer.stream(documents()):
      file.write(ids.astype(tokenizer.dtype).tobytes())
  return num_bytes


def _read(folder: pathlib.Path, dtype: Any) -> Tokens:
  meta = files.read_json(str(folder / "meta.json"), dict)
  streams = {}
  for split in sources.SPLITS:
    path = folder / f"{split}.bin"
    streams[split] = np.zeros(0, dtype)
    if path.stat().st_size:  # an empty file cannot be mapped
      streams[split] = np.memmap(path, dtype, "r")
  return Tokens(streams, meta["num_bytes"], meta["digest"])


# Splits, as `sources` makes them.


def _splits(
  data: DataConfig, found: dict[str, list[pathlib.Path]]
) -> dict[str, "_Region | _Rows"]:
  splits: dict[str, _Region | _Rows] = {
    split: _region(part[0]) if part[0].suffix == ".txt" else _rows(part, data)
    for split, part in found.items()
  }
  train = splits["train"]
  for split, part in splits.items():
    if (
      split != "train" and isinstance(part, _Rows) and isinstance(train, _Rows)
    ):
      seen = np.isin(part.digests, train.digests)
      sources.warn_of_repeats(split, int(seen.sum()), seen.size)
  fractions = sources.fractions_of_train(data, splits)
  if fractions:
    splits |= train.set_aside(fractions)
  if data.max_bytes is not None:
    splits = {
      split: part.limited(sources.limit_of(split, data.max_bytes))
      for split, part in splits.items()
    }
  if not splits["train"].num_bytes:
    raise sources.no_text_left(found["train"][0])
  return splits


@dataclasses.dataclass(frozen=True)
class _Region:
  """A part of a .txt file, which is one document.

  Attributes:
    file: The file.
    start: First byte.
    stop: Byte after the last.
  """

  file: pathlib.Path
  start: int
  stop: int

  @property
  def num_bytes(self) -> int:
    return self.stop - self.start

  def documents(self) -> Iterator[Document]:
    """Yields the document; none if it is empty."""
    if self.num_bytes:
      yield self.num_bytes, self._slices()

  def _slices(self) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
      with open(self.file, "rb") as file:
        for block in _blocks(file, self.start, self.stop):
          yield decoder.decode(block)
      yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
      raise ConfigError(
        f"{self.file} is not UTF-8; save it as UTF-8"
      ) from error

  def set_aside(self, fractions: dict[str, Any]) -> dict[str, "_Region"]:
    """Returns the splits cut off, and the rest as "train"."""
    with open(self.file, "rb") as file:
      index = _Index(file, self.start, self.stop)
      parts = sources.cuts(index.length, fractions, index.find)
      return {
        split: _Region(self.file, index.byte(start), index.byte(stop))
        for split, (start, stop) in parts.items()
      }

  def limited(self, limit: int) -> "_Region":
    """Returns the first bytes, up to a line end if there is one."""
    if self.num_bytes <= limit:
      return self
    with open(self.file, "rb") as file:
      stop = self.start + limit
      while stop > self.start:
        begin = max(self.start, stop - _BLOCK)
        file.seek(begin)
        at = file.read(stop - begin).rfind(b"\n")
        if at >= 0:
          return dataclasses.replace(self, stop=begin + at + 1)
        stop = begin
      # At the beginning of a character, which has four bytes at most.
      stop = self.start + limit
      begin = max(self.start, stop - 3)
      file.seek(begin)
      *_, last = 0, *np.flatnonzero(_begins(file.read(stop + 1 - begin)))
      return dataclasses.replace(self, stop=begin + int(last))


def _region(file: pathlib.Path) -> _Region:
  """Returns a whole file, without a byte order mark."""
  with open(file, "rb") as opened:
    start = 3 if opened.read(3) == b"\xef\xbb\xbf" else 0
    stop = file.stat().st_size
    if not any(block.strip() for block in _blocks(opened, start, stop)):
      raise ConfigError(f"{file} is empty")
  return _Region(file, start, stop)


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
  file.seek(start)
  while start < stop:
    block = file.read(min(_BLOCK, stop - start))
    if not block:
      raise ConfigError("a file of text became shorter while it was read")
    start += len(block)
    yield block


class _Index:
  """Finds the characters of a part of a file by their index.

  Attributes:
    length: Number of characters.
  """

  def __init__(self, file: BinaryIO, start: int, stop: int):
    self._file, self._start, self._stop = file, start, stop
    counts = [np.count_nonzero(_begins(x)) for x in _blocks(file, start, stop)]
    self._before = np.concatenate([[0], np.cumsum(counts)])  # each block
    self.length = int(self._before[-1])

  def byte(self, character: int) -> int:
    """Returns the first byte of a character."""
    if character >= self.length:
      return self._stop
    block = int(np.searchsorted(self._before, character, side="right")) - 1
    start = self._start + block * _BLOCK
    self._file.seek(start)
    begins = _begins(self._file.read(min(_BLOCK, self._stop - start)))
    return start + int(np.flatnonzero(begins)[character - self._before[block]])

  def find(self, low: int, high: int) -> int:
    """Returns the first line end among characters low, ..., high - 1; or -1."""
    start, passed = self.byte(low), low
    for block in _blocks(self._file, start, self.byte(min(high, self.length))):
      at = block.find(b"\n")
      if at >= 0:
        return passed + int(np.count_nonzero(_begins(block[:at])))
      passed += int(np.count_nonzero(_begins(block)))
    return -1


def _begins(block: bytes) -> np.ndarray:
  """Returns bool[bytes], whether each byte begins a character."""
  return np.frombuffer(block, np.uint8) & 0xC0 != 0x80


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Rows of files, each a document.

  Attributes:
    files: Files of the rows, in order.
    column: Column of the text.
    digests: uint64 hash of each row of the files.
    sizes: UTF-8 bytes of each row of the files.
    chosen: Whether each row of the files belongs to the split.
    limit: Most bytes; None: all.
  """

  files: tuple[pathlib.Path, ...]
  column: str
  digests: np.ndarray
  sizes: np.ndarray
  chosen: np.ndarray
  limit: int | None = None

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the chosen rows, before a limit."""
    return int(self.sizes[self.chosen].sum())

  def documents(self) -> Iterator[Document]:
    """Yields the chosen rows, up to the limit."""
    texts = _texts(self.files, self.column, self.chosen)
    if self.limit is not None:
      texts = sources.first_bytes(texts, self.limit)
    for text in texts:
      yield len(text.encode("utf-8")), [text]

  def set_aside(self, fractions: dict[str, Any]) -> dict[str, "_Rows"]:
    """Returns the splits set aside, and the rest as "train"."""
    # As numbers, hashes have the order of their bytes, by which `sources` sorts.
    _, group, counts = np.unique(
      self.digests, return_inverse=True, return_counts=True
    )
    runs, part = list(enumerate(counts.tolist())), np.zeros(len(counts), int)
    for number, fraction in enumerate(fractions.values(), 1):
      count = round(fraction * len(self.digests))
      taken, runs = sources.take(runs, count, lambda run: run[1])
      part[[run for run, _ in taken]] = number
    return {
      split: dataclasses.replace(self, chosen=part[group] == number)
      for number, split in enumerate(("train", *fractions))
    }

  def limited(self, limit: int) -> "_Rows":
    """Returns the first bytes of the rows."""
    return dataclasses.replace(self, limit=limit)


def _rows(part: Sequence[pathlib.Path], data: DataConfig) -> _Rows:
  """Returns all rows of files."""
  first = list(itertools.islice(local_files.rows_of(part), _FIRST_ROWS))
  if not first:
    raise ConfigError(f"{part[0]} is empty")
  (column, *_), _ = rows.choose_columns(part[0], first, data, TASKS["lm"])
  digests, sizes = [], []
  for text in _texts(part, column):
    digests.append(int.from_bytes(python_stdlib.digest(text), "big"))
    sizes.append(len(text.encode("utf-8")))
  return _Rows(
    files=tuple(part),
    column=column,
    digests=np.array(digests, np.uint64),
    sizes=np.array(sizes, np.int64),
    chosen=np.ones(len(sizes), bool),
  )


def _texts(
  part: Sequence[pathlib.Path],
  column: str,
  chosen: Iterable[Any] = itertools.repeat(True),
) -> Iterator[str]:
  """Yields the texts of the chosen rows."""
  found = itertools.compress(local_files.rows_of(part, column), chosen)
  for place, row in found:
    yield rows.checked(row.get(column), column, place)
