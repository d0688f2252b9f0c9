"""Text sources: local files, TFDS data sets and Python's standard library.

Every source ends as `Texts`: strings in memory, by split.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow_datasets as tfds

# Registers the text builders; without it TFDS finds "glue" only by luck.
import tensorflow_datasets.text

from folding import config as config_lib
from folding import errors
from folding.config import DataConfig
from folding.data import labels as labels_lib
from folding.data import python_stdlib
from folding.data.labels import Label
from folding.data.tokenizers import Text
from folding.errors import ConfigError

_log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
COLUMNAR = (".parquet", ".arrow")  # files that pyarrow reads
Row: TypeAlias = tuple[int, dict[str, Any]]  # line of a file, and its row
Table: TypeAlias = list[Row]

_STEMS = {  # file names, and beginnings of the names of TFDS splits
  "train": ("train",),
  "valid": ("valid", "validation", "dev"),
  "test": ("test",),
}
_BATCH = 1024  # rows of columnar files that are read together
_TEXT_NAMES = (  # the first whose columns are all there is chosen
  ("text",),
  ("sentence1", "sentence2"),
  ("premise", "hypothesis"),
  ("question1", "question2"),
  ("question", "sentence"),
  ("sentence",),
)
_LABEL_NAMES = {
  "lm": ("label",),
  "embed": ("label",),
  "classify": ("label",),
  "regress": ("score", "label"),
  "multilabel": ("labels", "label"),
}


@dataclasses.dataclass(frozen=True)
class Texts:
  """Raw examples by split ("train", "valid", "test").

  Attributes:
    texts: Strings of each split, or pairs of them. A split is empty if the
      source has none and the configured fraction is 0.
    labels: Label of each text, see `labels.to_array`; None for a task without.
    label_names: Names of a head's outputs, see `labels.output_names`; () for a
      task without labels.
    pair: Columns of pairs; None for single texts.
  """

  texts: dict[str, Sequence[Text]]
  labels: dict[str, np.ndarray] | None
  label_names: tuple[str, ...]
  pair: tuple[str, str] | None = None


class ScoredPairs(NamedTuple):
  """Pairs of texts with scores of their similarity.

  Attributes:
    firsts: The first text of each pair.
    seconds: The second.
    scores: float32[pairs].
  """

  firsts: list[str]
  seconds: list[str]
  scores: np.ndarray


def load_scored_pairs(path: str) -> ScoredPairs:
  """Reads a file with the columns "score", "sentence1" and "sentence2".

  Raises:
    ConfigError: it is missing or malformed, or its scores are all the same.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise ConfigError(f"data.sts: there is no file {path}")
  columns = DataConfig(
    text_field=("sentence1", "sentence2"), label_field="score"
  )
  rows = _read_file([file], columns, "regress")
  firsts, seconds = zip(*rows.texts, strict=True)
  scores = np.array(rows.labels, np.float32)
  if np.ptp(scores) == 0:
    raise ConfigError(f"{path}: the scores are all {scores[0]}")
  return ScoredPairs([*firsts], [*seconds], scores)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Texts and labels of a split, as a source has them.

  Attributes:
    source: File or TFDS split, for messages.
    texts: One for each row.
    labels: One for each row; None for a task without labels.
    lines: Line of each row in the file; 0 for other sources.
    columns: Column of the texts, or two of pairs; () for plain text.
  """

  source: str
  texts: list[Text]
  labels: list[Label] | None
  lines: list[int]
  columns: tuple[str, ...] = ()

  def place(self, index: int) -> str:
    """Returns "file:line" of a row."""
    line = self.lines[index]
    return f"{self.source}:{line}" if line else self.source

  def take(self, indices: Sequence[int]) -> "Rows":
    """Returns the rows at these indices, in this order."""
    labels = self.labels
    return dataclasses.replace(
      self,
      texts=[self.texts[i] for i in indices],
      labels=None if labels is None else [labels[i] for i in indices],
      lines=[self.lines[i] for i in indices],
    )


def load_texts(data: DataConfig, task: config_lib.Task) -> Texts:
  """Reads the text of a run.

  `data.path` wins over `data.name`. A split that the source lacks is set aside
  from train by `valid_fraction` and `test_fraction`, the same way on every
  machine and for every seed. A single text is cut at line ends, in the order
  train, valid, test. Several are distributed by a hash of the text, within each
  class; equal texts stay in one split.

  `data.max_bytes` limits the training text; valid and test get an eighth of it
  each. A language model's text is cut at the last line end that fits. Other
  texts are kept or dropped whole, chosen by the same hash.

  Args:
    data: The source and its fields.
    task: Decides what labels are; "lm" and "embed" ignore them. A line of a
      .txt is a text of "embed"; for "lm" the file is one text.

  Raises:
    ConfigError: the source is missing, malformed or cannot be fetched.
  """
  require_room(data)
  if data.path is not None:
    splits, names = _read_path(pathlib.Path(data.path), data, task)
  else:
    splits, names = _read_tfds(data, task)
  train = splits["train"]
  for rows in splits.values():
    if len(rows.columns) + len(train.columns) == 3:
      raise ConfigError(
        f"{rows.source} has the texts {' and '.join(rows.columns)}, and "
        f"{train.source} {' and '.join(train.columns)}; set data.text_field"
      )
  known: tuple[str, ...] = ()
  if train.labels is not None:
    # Before `max_bytes`, which may drop all rows of a class.
    known = labels_lib.output_names(train.labels, task, train.source, names)
  fractions = {"valid": data.valid_fraction, "test": data.test_fraction}
  fractions = {n: share for n, share in fractions.items() if n not in splits}
  if fractions:
    splits |= _set_aside(train, fractions, by_class=task == "classify")
  if data.max_bytes is not None:
    for name in SPLITS:
      limit = data.max_bytes if name == "train" else data.max_bytes // 8
      limited = _cut_to if task == "lm" else _limited
      splits[name] = limited(splits[name], name, limit)
  if not splits["train"].texts:
    raise ConfigError(
      f"no text is left to train on in {train.source}; give more text "
      "or lower data.valid_fraction and data.test_fraction"
    )
  _warn_of_repeats(splits)
  texts: dict[str, Sequence[Text]] = {s: splits[s].texts for s in SPLITS}
  if task in config_lib.UNLABELLED:
    return Texts(texts, None, ())
  labels = {
    split: labels_lib.to_array(
      splits[split].labels or (),
      task,
      known,
      place=splits[split].place,
      allow_ids=names is not None,
    )
    for split in SPLITS
  }
  empty = labels_lib.unused(labels["train"], task, known)
  if empty:
    _log.warning(
      "%d of %d classes have no text to train on: %s",
      *(len(empty), len(known), ", ".join(empty)),
    )
  pair = None
  if len(train.columns) == 2:
    pair = train.columns[0], train.columns[1]
  return Texts(texts, labels, known, pair)


def require_room(data: DataConfig) -> None:
  """Raises `ConfigError` if `data.max_bytes` leaves no text of some split."""
  if data.max_bytes is not None and data.max_bytes < 16:
    raise ConfigError(
      f"data.max_bytes {data.max_bytes} is too small to hold text"
    )


# Splits and classes.


def _set_aside(
  rows: Rows, fractions: dict[str, int | float], *, by_class: bool
) -> dict[str, Rows]:
  """Returns the splits set aside from train, and the rest of train."""
  if rows.labels is None and len(rows.texts) == 1:
    return _cut(rows, fractions)
  same: dict[Text, list[int]] = {}  # equal texts, of different classes too
  for index, text in enumerate(rows.texts):
    same.setdefault(text, []).append(index)
  classes: dict[str, list[list[int]]] = {}
  for text in sorted(same, key=_digest):
    label = ""
    if rows.labels and by_class:
      label = min(str(rows.labels[i]) for i in same[text])
    classes.setdefault(label, []).append(same[text])
  parts: dict[str, list[int]] = {name: [] for name in (*fractions, "train")}
  for runs in classes.values():
    size = sum(map(len, runs))
    for name, fraction in fractions.items():
      left, rest = round(fraction * size), []
      for run in runs:
        if len(run) <= 2 * left:  # nearer to the fraction with it than without
          parts[name] += run
          left -= len(run)
        else:
          rest.append(run)
      runs = rest
    parts["train"] += itertools.chain(*runs)
  # In the order of the source, so no split is sorted by class or hash.
  return {name: rows.take(sorted(part)) for name, part in parts.items()}


def _joined(text: Text) -> str:
  return text if isinstance(text, str) else "\t".join(text)


def _digest(text: Text) -> Any:
  return python_stdlib.digest(_joined(text))


def _cut(rows: Rows, fractions: dict[str, int | float]) -> dict[str, Rows]:
  """Cuts the only text into train and the fractions, at line ends."""
  [text] = map(_joined, rows.texts)
  parts = {}
  found = cuts(len(text), fractions, functools.partial(text.find, "\n"))
  for name, (start, stop) in found.items():
    texts: list[Text] = [text[start:stop]] if stop > start else []
    parts[name] = Rows(rows.source, texts, None, [0] * len(texts))
  return parts


def cuts(
  length: int,
  fractions: dict[str, int | float],
  find: Callable[[int, int], int],
) -> dict[str, tuple[int, int]]:
  """Returns where train and the fractions of a text begin and end.

  Args:
    length: Of the text, in characters.
    fractions: Of the text, by split.
    find: Returns the first line end from a character on and before another; -1
      if there is none.
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


def _cut_to(rows: Rows, split: str, limit: int) -> Rows:
  """Returns the first `limit` bytes of the rows, or less."""
  del split  # for the messages of `_limited`
  texts, left = [], limit
  for text in map(_joined, rows.texts):
    encoded = text.encode("utf-8")
    if len(encoded) > left:
      # At a line end; without one, at a character.
      encoded = encoded[: encoded.rfind(b"\n", 0, left) + 1] or encoded[:left]
      text, left = encoded.decode("utf-8", errors="ignore"), 0
    texts.append(text)
    left -= len(encoded)
    if left <= 0:
      break
  texts = [text for text in texts if text]
  return Rows(rows.source, texts, None, [0] * len(texts))


def _limited(rows: Rows, split: str, limit: int) -> Rows:
  """Returns whole rows of at most `limit` bytes."""
  sizes = [len(_joined(text).encode("utf-8")) for text in rows.texts]
  order = sorted(range(len(sizes)), key=lambda i: (_digest(rows.texts[i]), i))
  kept, left = [], limit
  for i in order:
    if sizes[i] <= left:
      kept.append(i)
      left -= sizes[i]
  if order and not kept:
    raise ConfigError(
      f"data.max_bytes leaves no text of {split}, which gets {limit:,} bytes; "
      "raise it"
    )
  return rows.take(sorted(kept))


def _warn_of_repeats(splits: dict[str, Rows]) -> None:
  """Warns of the texts of valid and test that train has too."""
  known = set(splits["train"].texts)
  for split in ("valid", "test"):
    texts = splits[split].texts
    warn_of_repeats(split, sum(text in known for text in texts), len(texts))


def warn_of_repeats(split: str, seen: int, count: int) -> None:
  """Warns if some of the texts of a split are in train too."""
  if seen:
    share = f"{seen:,} of {count:,} texts ({seen / count:.1%})"
    _log.warning("%s of the %s split are in train too", share, split)


# Local files.


def _read_path(
  path: pathlib.Path, data: DataConfig, task: config_lib.Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads a file or a folder.

  Returns:
    Rows by split: "train", and "valid" and "test" if there is a file; and the
    class names of a `labels.txt` beside them, None without one.
  """
  splits = {
    split: _read_file(part, data, task)
    for split, part in find_files(path).items()
  }
  folder = path if path.is_dir() else path.parent
  path = folder / "labels.txt"
  if task in config_lib.UNLABELLED or not path.is_file():
    return splits, None
  names = [line.strip() for line in _decode(path).split("\n") if line.strip()]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise ConfigError(f"{path} names {name!r} twice; name each class once")
  return splits, names


def find_files(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split: of a file, or in a folder.

  A folder has train.tsv, validation.jsonl and so on. Or it is a data set of
  Hugging Face: `save_to_disk` writes train/data-00000-of-00002.arrow, and the hub
  has train-00000-of-00002.parquet, perhaps in a folder "data".

  Raises:
    ConfigError: there are none, or several for a split.
  """
  if path.is_file():
    return {"train": [path]}
  if not path.is_dir():  # a pipe would wait for ever
    raise ConfigError(f"data.path {path} is neither a file nor a folder")
  found = {}
  for split, stems in _STEMS.items():
    parts = [
      part
      for stem in stems
      for part in (
        *([path / f"{stem}{end}"] for end in config_lib.TEXT_ENDINGS),
        *(sorted(x.glob(f"{stem}-*.parquet")) for x in (path, path / "data")),
        sorted((path / stem).glob("*.arrow")),
      )
      if part and all(file.is_file() for file in part)
    ]
    if len(parts) > 1:
      names = ", ".join(part[0].name for part in parts)
      raise ConfigError(f"{path} has several {split} files ({names}); keep one")
    if parts:
      found[split] = parts[0]
  if not found and (single := sorted(path.glob("data-*.arrow"))):
    found["train"] = single
  if "train" not in found:
    raise ConfigError(
      f"{path} has no training text; name it train, with one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  return found


def _read_file(
  part: Sequence[pathlib.Path], data: DataConfig, task: config_lib.Task
) -> Rows:
  """Reads the files of one split; every error names a file and the line."""
  file = part[0]
  if file.suffix not in config_lib.TEXT_ENDINGS:
    raise ConfigError(
      f"{file} has an unknown extension; use one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  text = "" if file.suffix in COLUMNAR else _decode(file)
  if file.suffix not in COLUMNAR and not text.strip():
    raise ConfigError(f"{file} is empty")
  if file.suffix == ".txt" and task == "embed":
    lines = [(n, line) for n, line in _lines(text) if line.strip()]
    numbers, found = zip(*lines, strict=True)
    return Rows(str(file), [*found], None, [*numbers], ("text",))
  if file.suffix == ".txt":
    if task != "lm":
      raise ConfigError(
        f"{file} has no labels, which task {task!r} needs; use .tsv, .csv or "
        ".jsonl"
      )
    return Rows(str(file), [text], None, [0])
  if file.suffix in _READERS:
    table, has_header = _READERS[file.suffix](file, text, data)
  else:
    table = list(rows_of(part, labelled=task not in config_lib.UNLABELLED))
    has_header = True
    if not table:
      raise ConfigError(f"{file} is empty")
  columns, label_field = ("text",), "label"
  if has_header:
    columns, label_field = choose_columns(file, table, data, task)
  elif isinstance(data.text_field, tuple):
    raise ConfigError(
      f"{file} has no header with the columns {' and '.join(data.text_field)} "
      "(data.text_field)"
    )
  labels = None if task in config_lib.UNLABELLED else []
  rows = Rows(str(file), [], labels, [], columns)
  for line, row in table:
    rows.lines.append(line)
    place = rows.place(-1)
    texts = [checked(row.get(name), name, place) for name in columns]
    rows.texts.append(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
    if rows.labels is not None:
      label = None if label_field is None else row.get(label_field)
      rows.labels.append(labels_lib.read_label(label, task, place))
      first = table[0][1].get(label_field or "")
      if task == "classify" and type(label) is not type(first):
        raise ConfigError(
          f"{place}: the label {label!r} is a {type(label).__name__}, unlike that "
          "of the first row; use one kind"
        )
  if not has_header and rows.labels:
    first, second = str(rows.labels[0]), _joined(rows.texts[0]).strip()
    is_header = first.lower() == "label" and first not in rows.labels[1:]
    if is_header or second.lower() == "label":
      raise ConfigError(
        f"{rows.place(0)}: this looks like a header without a column of text; "
        "name the columns label and text, or leave the header out"
      )
  return rows


def _decode(file: pathlib.Path) -> str:
  try:
    return file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ConfigError(
      f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8"
    ) from error
  except OSError as error:
    raise ConfigError(f"cannot read {file}: {error}") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
  """Yields the number and the text of each line that is not empty."""
  if "\n" not in text:  # the line ends of old Macs
    text = text.replace("\r", "\n")
  # Not splitlines: a text may hold other characters that it would split at.
  for number, line in enumerate(text.split("\n"), 1):
    if line.removesuffix("\r"):
      yield number, line.removesuffix("\r")


def _tsv_rows(
  file: pathlib.Path, text: str, data: DataConfig
) -> tuple[Table, bool]:
  """Returns the rows, and whether the first line is a header.

  Without one, a line is `label<TAB>text`. Quotes are plain characters.
  """
  lines = list(_lines(text))
  columns = lines[0][1].split("\t")
  is_repeated = any(line == lines[0][1] for _, line in lines[1:])
  if _is_header(columns, data) and not (len(columns) == 2 and is_repeated):
    cells = [(number, line.split("\t")) for number, line in lines[1:]]
    return _with_columns(file, columns, cells), True
  table = []
  for number, line in lines:
    label, tab, rest = line.partition("\t")
    if not tab:
      raise ConfigError(f"{file}:{number}: no tab; want label<TAB>text")
    table.append((number, {"label": label, "text": rest}))
  return table, False


def _is_header(cells: Sequence[str], data: DataConfig) -> bool:
  """Returns whether cells name a label and a text, by usual or given names."""
  given = data.text_field or ()
  texts = {*itertools.chain(*_TEXT_NAMES)}
  texts |= {given} if isinstance(given, str) else {*given}
  labels = {*itertools.chain(*_LABEL_NAMES.values()), data.label_field}
  found = {*cells, *map(str.lower, cells)}
  return bool(found & texts and found & labels)


def _csv_rows(
  file: pathlib.Path, text: str, data: DataConfig
) -> tuple[Table, bool]:
  """Returns the rows, and that there is a header."""
  # The default limit is 128 KiB. It is global, so it is only raised.
  csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    columns = next(reader, [])
    rows = [(reader.line_num, row) for row in reader if row]
  except csv.Error as error:
    raise ConfigError(
      f"{file}:{reader.line_num}: not valid CSV ({error})"
    ) from error
  if len(columns) == 1 and any(c in columns[0] for c in ";\t"):
    raise ConfigError(f"{file}: columns are not separated by commas")
  return _with_columns(file, columns, rows), True


def _with_columns(
  file: pathlib.Path, columns: list[str], rows: list[tuple[int, list[str]]]
) -> Table:
  """Returns rows of cells by the names of their columns."""
  if len(set(columns)) < len(columns):
    twice = next(name for name in columns if columns.count(name) > 1)
    raise ConfigError(f"{file}: two columns are called {twice!r}; rename one")
  if not rows:
    raise ConfigError(f"{file} has a header and no rows")
  for number, row in rows:
    if len(row) != len(columns):
      raise ConfigError(
        f"{file}:{number}: the row does not have {len(columns)} columns, as the "
        "header has"
      )
    if row == columns:
      raise ConfigError(f"{file}:{number}: the header is repeated; remove it")
  return [(n, dict(zip(columns, row, strict=True))) for n, row in rows]


def _jsonl_rows(
  file: pathlib.Path, text: str, data: DataConfig
) -> tuple[Table, bool]:
  """Returns the rows, and that they name their columns."""
  table = []
  for number, line in _lines(text):
    if line.strip():
      table.append((number, _json_row(file, number, line)))
  return table, True


def _json_row(file: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  try:
    row = json.loads(line, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{file}:{number}: not JSON ({error})") from error
  if not isinstance(row, dict):
    raise ConfigError(f"{file}:{number}: not a JSON object")
  return row


def rows_of(
  part: Sequence[pathlib.Path],
  column: str | None = None,
  *,
  labelled: bool = False,
) -> Iterator[Row]:
  """Yields the rows of .jsonl, .parquet or .arrow files, read in slices.

  Classes that a file of Hugging Face names are given by name.

  Args:
    part: The files of a split.
    column: Of columnar files, the only one to read; None: all.
    labelled: Whether to leave out rows of class -1, as some test splits have.

  Raises:
    ConfigError: a file is damaged.
  """
  for file in part:
    if file.suffix in COLUMNAR:
      yield from _columnar_rows(file, column, labelled)
      continue
    with open(file, "rb") as lines:
      for number, line in enumerate(lines, 1):
        try:
          text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
          raise ConfigError(
            f"{file}:{number} is not UTF-8; save it as UTF-8"
          ) from error
        if text.strip():
          yield number, _json_row(file, number, text)


def _columnar_rows(
  file: pathlib.Path, column: str | None, labelled: bool
) -> Iterator[Row]:
  import pyarrow as pa  # only needed here
  from pyarrow import parquet

  try:
    with contextlib.ExitStack() as stack:
      if file.suffix == ".parquet":
        source: Any = stack.enter_context(parquet.ParquetFile(file))
        schema, only = source.schema_arrow, [column] if column else None
        batches = source.iter_batches(batch_size=_BATCH, columns=only)
      else:
        opened = stack.enter_context(pa.memory_map(str(file)))
        batches = stack.enter_context(pa.ipc.open_stream(opened))
        schema = batches.schema
      classes, number = _class_names(schema), 0
      for batch in batches:
        wanted = [column] if column else batch.schema.names
        for row in batch.select(wanted).to_pylist():
          number += 1
          for name in classes.keys() & row.keys():
            row[name] = _named(row[name], classes[name])
            if row[name] is None and labelled:
              break
          else:
            yield number, row
  except (pa.ArrowException, OSError) as error:
    raise ConfigError(
      f"cannot read {file}: {errors.first_line(error)}"
    ) from error


def _class_names(schema: Any) -> dict[str, list[str]]:
  """Returns {column: names of its classes} that Hugging Face has stored."""
  metadata = (schema.metadata or {}).get(b"huggingface")
  if metadata is None:
    return {}
  features = json.loads(metadata).get("info", {}).get("features") or {}
  found = {}
  for name, feature in features.items():
    # A list of classes has them one level further inside.
    inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
    if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
      found[name] = inner["names"]
  return found


def _named(value: Any, names: list[str]) -> Any:
  """Returns the name of a class, or those of several; None: it has none."""
  if isinstance(value, list):
    return [names[i] for i in value]
  return names[value] if value is not None and value >= 0 else None


_READERS = {".tsv": _tsv_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object, or raises `ValueError` for a repeated key."""
  row = dict(pairs)
  if len(row) < len(pairs):
    raise ValueError("a key occurs twice")
  return row


def choose_columns(
  file: pathlib.Path, table: Table, data: DataConfig, task: config_lib.Task
) -> tuple[tuple[str, ...], str | None]:
  """Returns the columns of texts and label, and warns of other texts.

  The first row names the columns.
  """
  place, columns = str(file), list(table[0][1])
  label_field = _configured(place, columns, "label", data.label_field)
  if label_field is None:
    usual = [(name,) for name in _LABEL_NAMES[task]]
    label_field = next(iter(_usual(columns, usual)), None)
  if label_field is None and task not in config_lib.UNLABELLED:
    raise ConfigError(
      f"{place} has no column {_LABEL_NAMES[task][-1]!r}; name the column of "
      "labels with data.label_field (and that of texts with data.text_field); "
      f"the columns are {', '.join(columns)}"
    )
  others = [name for name in columns if name != label_field]
  labels = {*itertools.chain(*_LABEL_NAMES.values())}  # of other tasks
  texts = [
    name
    for name in others
    if isinstance(table[0][1][name], str)
    and name.lower() not in labels
    and not all(labels_lib.is_number(row.get(name) or "0") for _, row in table)
  ]
  chosen = _choose_texts(place, others, texts, data, task)
  ignored = ", ".join(name for name in texts if name not in chosen)
  if ignored:
    _log.warning(
      "%s: the text is %s; ignored: %s",
      *(file, " and ".join(chosen), ignored),
    )
  return chosen, label_field


def checked(text: Any, column: str, place: str) -> str:
  """Returns a text that is not empty and can be encoded."""
  if not isinstance(text, str):
    raise ConfigError(f"{place} has no text in the column {column!r}")
  if not text.strip():
    raise ConfigError(f"{place}: the {column} is empty")
  return labels_lib.require_utf8(text, place)


def _choose_texts(
  place: str,
  columns: Sequence[str],
  texts: Sequence[str],
  data: DataConfig,
  task: config_lib.Task,
) -> tuple[str, ...]:
  """Returns the column of texts, or the two of pairs.

  Args:
    place: Name of the table in messages.
    columns: Columns that may be configured or have a usual name.
    texts: The columns that look like text.
    data: May configure them.
    task: "lm" and "embed" have no pairs.
  """
  wanted = data.text_field
  is_single = task in config_lib.UNLABELLED
  if isinstance(wanted, tuple) and is_single:
    raise ConfigError(
      f"task {task!r} reads single texts; data.text_field is a pair"
    )
  wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
  for name in wanted:
    _configured(place, columns, "text", name)
  usual = [x for x in _TEXT_NAMES if len(x) == 1 or not is_single]
  chosen = wanted or _usual(columns, usual)
  if chosen:
    return chosen
  if not texts:
    raise ConfigError(f"{place} has no text column; set data.text_field")
  if len(texts) > 1:
    raise ConfigError(
      f"{place} has several columns of text ({', '.join(texts)}); choose one, "
      "or two of pairs, with data.text_field"
    )
  return (texts[0],)


def _configured(
  place: str, columns: Sequence[str], role: str, wanted: str | None
) -> str | None:
  """Returns a configured column; raises if it is not there."""
  if wanted is not None and wanted not in columns:
    raise ConfigError(
      f"{place} has no {role} column {wanted!r} (data.{role}_field); its "
      f"columns are: {', '.join(columns) or 'none'}"
    )
  return wanted


def _usual(
  columns: Sequence[str], usual: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
  """Returns the first columns that have usual names, in any case; (): none."""
  # "text" wins over "Text".
  by_name = {c.lower(): c for c in reversed(columns)} | {c: c for c in columns}
  for names in usual:
    if all(name in by_name for name in names):
      return tuple(by_name[name] for name in names)
  return ()


# TensorFlow Datasets. Prepared data is read without TensorFlow; to prepare it,
# some builders and all archives need TensorFlow.


def _read_tfds(
  data: DataConfig, task: config_lib.Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads a TFDS data set; the names are those of a `ClassLabel`."""
  builder: Any = _prepared(data, task)
  table: Any = builder.info.features
  features: dict[str, Any] = dict(table.items())
  label_field = None
  if task not in config_lib.UNLABELLED:
    label_field = _label_feature(data, features, task)
  texts = [
    name
    for name, kind in features.items()
    if isinstance(kind, tfds.features.Text) and name != label_field
  ]
  place = f"the TFDS data set {data.name}"
  columns = _choose_texts(place, texts, texts, data, task)
  feature: Any = features.get(label_field or "")
  names = getattr(getattr(feature, "feature", feature), "names", None)
  splits = {}
  for split, prefixes in _STEMS.items():
    # By prefix: MNLI of GLUE has "validation_matched".
    found = [s for s in builder.info.splits if s.startswith(prefixes)]
    if not found:
      continue
    labels = None if label_field is None else []
    rows = Rows(f"{data.name}[{found[0]}]", [], labels, [], columns)
    limit = data.max_bytes
    if limit is not None and split == "train":
      # Room for the splits that may be set aside from it.
      limit /= 1 - data.valid_fraction - data.test_fraction
    num_bytes = 0
    for example in builder.as_data_source(found[0]):
      if rows.labels is not None:
        label = _tfds_label(example[label_field], names, task)
        if label is None:
          continue
        rows.labels.append(label)
      text = [example[c].decode("utf-8", errors="replace") for c in columns]
      rows.texts.append(text[0] if len(text) == 1 else (text[0], text[1]))
      rows.lines.append(0)
      num_bytes += sum(len(example[c]) for c in columns)
      if limit is not None and num_bytes >= limit:
        break
    # The test split of STS-B has no scores.
    if rows.texts and set(rows.labels or ()) != {-1.0}:
      splits[split] = rows
  if "train" not in splits:
    raise ConfigError(
      f"{place} has no labelled train split; its splits are "
      f"{', '.join(builder.info.splits)}"
    )
  if task == "classify" and not names:
    # The train split of sentiment140 has no neutral tweets, the test split has.
    known = set(splits["train"].labels or ())
    for split, rows in splits.items():
      kept = [i for i, x in enumerate(rows.labels or ()) if x in known]
      if len(kept) < len(rows.texts):
        _log.warning(
          "%s: %d rows of classes that train lacks are ignored",
          split,
          len(rows.texts) - len(kept),
        )
        splits[split] = rows.take(kept)
  return splits, names


def require_prepared(
  data: DataConfig, task: config_lib.Task, workdir: str
) -> None:
  """Checks that reading the data of a run will neither fetch nor write any.

  Args:
    data: Of the run's config.
    task: Of the run.
    workdir: The run directory, for the message.

  Raises:
    ConfigError: the TFDS data set is not prepared.
  """
  if data.path:
    return
  builder = None
  with contextlib.suppress(Exception):  # it may fail in any way
    if data.name == "python_stdlib":
      kind = "source" if task == "lm" else "topic"
      builder = python_stdlib.builder(kind, data.dir)
    elif ":" not in data.name:  # a name that TFDS would look up in the network
      builder = tfds.builder(
        data.name, data_dir=data.dir, file_format="array_record"
      )
  if builder is None or not builder.is_prepared():
    raise ConfigError(
      f"the data set {data.name!r} of {workdir} is not prepared in "
      f"{data.dir or 'the TFDS folder'}, and a run that is read back prepares "
      "none; if you trust its config, prepare it with folding train "
      f"--config={workdir}/config.json --workdir=NEW"
    )


def _prepared(
  data: DataConfig, task: config_lib.Task
) -> tfds.core.DatasetBuilder:
  """Returns a builder whose data is on this machine."""
  if not data.name:
    raise ConfigError(
      "set data.path, a file or folder, or data.name, a TFDS data set"
    )
  if data.name == "python_stdlib":
    kind = "source" if task == "lm" else "topic"
    return python_stdlib.prepare(kind, data.dir)
  instead = "put text in a local file and set data.path"

  def new_builder() -> tfds.core.DatasetBuilder:
    return tfds.builder(
      data.name, data_dir=data.dir, file_format="array_record"
    )

  try:
    builder = new_builder()
    try:
      builder.download_and_prepare()
    except Exception:  # TFDS and its builders raise many kinds
      builder = new_builder()
      if not builder.is_prepared():  # nor by another process
        raise
  except tfds.core.DatasetNotFoundError as error:
    raise ConfigError(
      f"TFDS has no data set {data.name!r} (data.name); see the names in its "
      f"catalog, or {instead}"
    ) from error
  # A builder may fail in any way: no network, a missing library, a moved page.
  except Exception as error:
    check = "check the name, the network and data.dir"
    if "No module named 'tensorflow'" in str(error):
      check = "pip install tensorflow, which only this needs"
    raise ConfigError(
      f"cannot fetch or prepare the TFDS data set {data.name!r}: "
      f"{errors.first_line(error)}; {check}, or {instead}"
    ) from error
  return builder


def _tfds_label(
  value: Any, names: Sequence[str] | None, task: config_lib.Task
) -> Label | None:
  """Returns a label of TFDS; None: the row is unlabelled."""
  if task == "regress":
    return float(value)
  ids = [int(x) for x in np.atleast_1d(value)]
  if any(i < 0 for i in ids):
    return None
  classes = tuple(names[i] if names else str(i) for i in ids)
  return classes if task == "multilabel" else classes[0]


def _label_feature(
  data: DataConfig, features: dict[str, Any], task: config_lib.Task
) -> str:
  """Returns the label's name: configured, usual, or the coarsest class."""
  kinds = {
    "classify": (0, np.integer),
    "regress": (0, np.number),
    "multilabel": (1, np.integer),
  }
  rank, number = kinds[task]
  fitting = {
    name: feature
    for name, feature in features.items()
    if feature.shape is not None
    and len(feature.shape) == rank
    and np.issubdtype(feature.np_dtype, number)
  }
  classes = {
    name: feature.num_classes or 0
    for name, feature in fitting.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  usual = [name for name in _LABEL_NAMES[task] if name in features]
  if data.label_field:
    wanted = data.label_field
  elif usual:
    wanted = usual[0]
  elif classes and task == "classify":
    wanted = min(classes, key=lambda name: classes[name])
  else:
    wanted = next(iter(fitting)) if len(fitting) == 1 else None
  if wanted is None or wanted not in fitting:
    kind = {"regress": "score", "classify": "class"}.get(
      task, "list of classes"
    )
    raise ConfigError(
      f"the TFDS data set {data.name} has no {kind} column "
      f"{wanted or 'that can be guessed'} (data.label_field); its columns are: "
      f"{', '.join(features)}"
    )
  return wanted
