"""Text of language models, from its source to documents and ids.

A split that the source lacks is set aside from train. A single text is cut at
line ends, in the order train, valid, test. Several are distributed by a hash;
equal texts stay in one split. `data.max_bytes` cuts at the last line end that
fits.

Files of `LARGE` bytes and more are not held in memory. Their ids are in a folder
beside the text (or in `data.dir`), named by the text and the tokenizer, and later
runs map them into memory. Text files are identified by name, size and
modification time, so a later run need not read them. The ids have checksums, and
damaged ones are made again.
"""

import atexit
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import rich.console
import rich.progress

from folding import files
from folding.config import DataConfig
from folding.data import (
  local_files,
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
_FIRST_ROWS = 1000  # rows by which the column of text is chosen
_FIELDS = (
  "text_field",
  "label_field",
  "valid_fraction",
  "test_fraction",
  "max_bytes",
)

# Size in UTF-8 bytes, and the text, perhaps in slices.
Document: TypeAlias = tuple[int, str | Iterable[str]]
_Splits: TypeAlias = "dict[str, _Region | _Rows]"


class Tokens(NamedTuple):
  """The ids of a text.

  Attributes:
    streams: Ids of each split, from `Tokenizer.stream`.
    num_bytes: UTF-8 bytes of text of each split.
    digest: SHA-256 of all text, in hexadecimal.
  """

  streams: dict[str, np.ndarray]
  num_bytes: dict[str, int]
  digest: str


def load_documents(data: DataConfig) -> dict[str, list[str]]:
  """Returns the documents of each split, in memory.

  Raises:
    ConfigError: the source is missing, malformed or cannot be fetched.
  """
  splits = _splits(data, {})
  return {
    split: [str(text) for _, text in splits[split].documents()]
    for split in sources.SPLITS
  }


def tokenised(
  data: DataConfig, tokenizer: Tokenizer | None, keep: bool = True
) -> tuple[Tokenizer, Tokens]:
  """Returns the tokenizer and the ids of the text.

  Args:
    data: The source.
    tokenizer: None: that of the config, trained if need be.
    keep: Whether to keep the ids of large text for later runs. False: those that
      are not there are written to a temporary folder.

  Raises:
    ConfigError: the text or the tokenizer is not valid, or the ids cannot be
      written.
  """
  found = _large_files(data)
  splits = functools.cache(lambda: _splits(data, found))
  if not found:
    if tokenizer is None:
      train = (text for _, text in splits()["train"].documents())
      tokenizer = tokenizers.train_tokenizer(data, train)
    return tokenizer, _held_tokens(splits(), tokenizer)
  every = [file for part in found.values() for file in part]
  known = [
    (split, file.name, file.stat().st_size, file.stat().st_mtime_ns)
    for split, part in found.items()
    for file in part
  ]
  fields = {name: getattr(data, name) for name in _FIELDS}
  place = pathlib.Path(data.dir) if data.dir else every[0].parent
  folder = place / FOLDER / _hash(json.dumps([_FORMAT, known, fields]))
  local_files.warn_of_ignored(pathlib.Path(data.path or ""), found, data)
  sources.require_room(data)
  if tokenizer is None:
    tokenizer = _tokenizer(data, folder, splits, keep)
  target = _made(
    folder / _hash(identity(tokenizer)),
    lambda part: _write(part, splits(), tokenizer),
    keep,
  )
  return tokenizer, _read(target, tokenizer.dtype)


def _large_files(data: DataConfig) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split; {} if the text is held in memory."""
  if data.path is None or not os.path.exists(data.path):
    return {}
  found = local_files.find_files(pathlib.Path(data.path), data)
  every = [file for part in found.values() for file in part]
  size = sum(file.stat().st_size for file in every)
  is_large = size >= LARGE and all(x.suffix in _ENDINGS for x in every)
  return found if is_large else {}


def _made(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None], keep: bool
) -> pathlib.Path:
  """Returns a folder whose files are intact, written if they are not.

  `write` writes the files into the folder given. `keep` is that of `tokenised`.
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


def identity(tokenizer: Tokenizer) -> str:
  """Returns a text that tells tokenizers with other ids apart.

  Tokens that share a row leave the JSON of a tokenizer as it was.
  """
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
    texts = (text for _, text in splits()["train"].documents())
    made = tokenizers.train_tokenizer(data, texts)
    made.save(os.path.join(part, "tokenizer.json"))

  target = folder / f"{data.tokenizer}-{data.vocab_size}"
  return tokenizers.load_tokenizer(
    _made(target, write, keep) / "tokenizer.json"
  )


def _held_tokens(splits: _Splits, tokenizer: Tokenizer) -> Tokens:
  """Returns the ids of all splits, in memory."""
  held = {split: io.BytesIO() for split in sources.SPLITS}
  num_bytes, digest = _encode(splits, tokenizer, held)
  streams = {
    split: np.frombuffer(file.getbuffer(), tokenizer.dtype)
    for split, file in held.items()
  }
  return Tokens(streams, num_bytes, digest)


def _write(folder: pathlib.Path, splits: _Splits, tokenizer: Tokenizer) -> None:
  """Writes the ids of all splits."""
  console = rich.console.Console()
  with contextlib.ExitStack() as stack:
    opened = {
      split: stack.enter_context(open(folder / f"{split}.bin", "wb"))
      for split in sources.SPLITS
    }
    bar = rich.progress.Progress(
      console=console, transient=True, disable=not console.is_terminal
    )
    total = sum(part.num_bytes for part in splits.values())
    advance = functools.partial(
      stack.enter_context(bar).advance, bar.add_task("tokenising", total=total)
    )
    num_bytes, digest = _encode(splits, tokenizer, opened, advance)
  meta = {"digest": digest, "num_bytes": num_bytes}
  (folder / "meta.json").write_text(json.dumps(meta))


def _encode(
  splits: _Splits,
  tokenizer: Tokenizer,
  to: Mapping[str, io.BufferedIOBase],
  advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, int], str]:
  """Writes the ids of each split to its file, and reports the bytes of text.

  Returns:
    The UTF-8 bytes of each split, and the digest of the text.
  """
  sha = hashlib.sha256()
  num_bytes: dict[str, int] = dict.fromkeys(sources.SPLITS, 0)

  def hashed(text: str) -> str:
    encoded = text.encode("utf-8")
    sha.update(encoded)
    advance(len(encoded))
    return text

  def documents(split: str) -> Iterator[str | Iterable[str]]:
    for size, text in splits[split].documents():
      num_bytes[split] += size
      sha.update(size.to_bytes(8, "little"))
      yield hashed(text) if isinstance(text, str) else map(hashed, text)

  for split in sources.SPLITS:
    texts = documents(split)
    for first in texts:  # without a document, a stream would still begin
      for ids in tokenizer.stream(itertools.chain([first], texts)):
        to[split].write(ids.astype(tokenizer.dtype).tobytes())
    sha.update(b"end")
  return num_bytes, sha.hexdigest()


def _read(folder: pathlib.Path, dtype: Any) -> Tokens:
  meta = files.read_json(str(folder / "meta.json"), dict)
  streams = {}
  for split in sources.SPLITS:
    path = folder / f"{split}.bin"
    streams[split] = np.zeros(0, dtype)
    if path.stat().st_size:  # an empty file cannot be mapped
      streams[split] = np.memmap(path, dtype, "r")
  return Tokens(streams, meta["num_bytes"], meta["digest"])


# Splits.


def _splits(data: DataConfig, large: dict[str, list[pathlib.Path]]) -> _Splits:
  """Returns all splits, from large files or from text in memory."""
  splits: dict[str, _Region | _Rows]
  if large:
    place = large["train"][0]
    splits = {
      split: _region(part[0]) if part[0].suffix == ".txt" else _rows(part, data)
      for split, part in large.items()
    }
  else:
    read, _ = sources.read(data, TASKS["lm"])
    place = read["train"].source
    splits = {split: _held(found.texts) for split, found in read.items()}
  fractions = sources.fractions_of_train(data, splits)
  if fractions:
    splits |= splits["train"].set_aside(fractions)
  if data.max_bytes is not None:
    splits = {
      split: part.limited(sources.limit_of(split, data.max_bytes))
      for split, part in splits.items()
    }
  if not splits["train"].num_bytes:
    raise sources.no_text_left(place)
  tables = {x: part for x, part in splits.items() if isinstance(part, _Rows)}
  if train := tables.pop("train", None):
    for split, part in tables.items():
      seen = np.isin(
        part.digests[part.chosen], train.digests[train.chosen], kind="sort"
      )
      sources.warn_of_repeats(split, int(seen.sum()), seen.size)
  return splits


def _cuts(
  length: int,
  fractions: dict[str, int | float],
  find: Callable[[int, int], int],
) -> dict[str, tuple[int, int]]:
  """Returns where train and the fractions of a text begin and end.

  Args:
    length: Characters of the text.
    fractions: Fraction of each split other than train.
    find: Returns the first line end between two characters, the second excluded;
      -1 if there is none.
  """
  shares = {"train": 1 - sum(fractions.values()), **fractions}
  # A line end beyond this would take too much of the next split.
  reach = round(min(s for s in shares.values() if s > 0) * length) // 2
  bounds = np.cumsum(list(shares.values()))
  parts, start = {}, 0
  for (name, share), bound in zip(shares.items(), bounds, strict=True):
    stop = start
    if share > 0:
      stop = round(bound * length)
      # Without a line end within reach, cut at the character.
      stop = find(max(stop - 1, 0), stop + reach) + 1 or stop
    parts[name] = start, stop
    start = stop
  return parts


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
      parts = _cuts(index.length, fractions, index.find)
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
  """Rows, each a document.

  Attributes:
    read: Returns the texts of the rows whose flags are true.
    is_held: Whether they are in memory.
    digests: uint64 hash of each row.
    sizes: UTF-8 bytes of each row.
    chosen: Whether each row belongs to the split.
    limit: Most bytes of them; None: all.
  """

  read: Callable[[Iterable[Any]], Iterator[str]]
  is_held: bool
  digests: np.ndarray
  sizes: np.ndarray
  chosen: np.ndarray
  limit: int | None = None

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the chosen rows, before the last is cut to the limit."""
    return int(self.sizes[self.chosen].sum())

  def documents(self) -> Iterator[Document]:
    """Yields the chosen rows, up to the limit."""
    texts = self.read(self.chosen)
    if self.limit is not None:
      texts = _first_bytes(texts, self.limit)
    for text in texts:
      yield len(text.encode("utf-8")), text if self.is_held else [text]

  def set_aside(self, fractions: dict[str, Any]) -> dict[str, "_Rows"]:
    """Returns the splits set aside, and the rest as "train"."""
    if len(self.digests) == 1:
      [text] = self.read([True])
      found = _cuts(len(text), fractions, functools.partial(text.find, "\n"))
      return {
        split: _held([text[start:stop]] if stop > start else [])
        for split, (start, stop) in found.items()
      }
    parts = sources.set_aside(self.digests, fractions)
    return {
      split: dataclasses.replace(self, chosen=chosen)
      for split, chosen in parts.items()
    }

  def limited(self, limit: int) -> "_Rows":
    """Returns the first bytes of the rows."""
    before = np.cumsum(self.sizes * self.chosen) - self.sizes
    chosen = self.chosen & (before < limit)
    return dataclasses.replace(self, chosen=chosen, limit=limit)


def _held(texts: Sequence[Any]) -> _Rows:
  """Returns all rows of texts in memory."""
  return _all_rows(functools.partial(itertools.compress, texts), is_held=True)


def _rows(part: Sequence[pathlib.Path], data: DataConfig) -> _Rows:
  """Returns all rows of files."""
  first = list(itertools.islice(local_files.rows_of(part), _FIRST_ROWS))
  if not first:
    raise ConfigError(f"{part[0]} is empty")
  (column, *_), _ = rows.choose_columns(part[0], first, data, TASKS["lm"])
  return _all_rows(functools.partial(_texts, part, column), is_held=False)


def _all_rows(
  read: Callable[[Iterable[Any]], Iterator[str]], *, is_held: bool
) -> _Rows:
  texts = read(itertools.repeat(True))
  found = np.fromiter(
    ((sources.digest(text), len(text.encode("utf-8"))) for text in texts),
    [("digest", np.uint64), ("size", np.int64)],
  )
  chosen = np.ones(len(found), bool)
  return _Rows(read, is_held, found["digest"], found["size"], chosen)


def _texts(
  part: Sequence[pathlib.Path], column: str, chosen: Iterable[Any]
) -> Iterator[str]:
  """Yields the texts of the chosen rows."""
  found = itertools.compress(local_files.rows_of(part, column), chosen)
  for place, row in found:
    yield rows.checked(row.get(column), column, place)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
  """Yields the first `limit` UTF-8 bytes of texts, or less.

  The last text is cut at a line end; without one that fits, at a character.
  """
  for text in texts:
    encoded = text.encode("utf-8")
    left = limit - len(encoded)
    if left < 0:
      encoded = encoded[: encoded.rfind(b"\n", 0, limit) + 1] or encoded[:limit]
      text = encoded.decode("utf-8", errors="ignore")
    if text:
      yield text
    if left <= 0:
      return
    limit = left
