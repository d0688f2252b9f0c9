"""Text sources: local files, TFDS data sets and Python's standard library.

Every source ends as `Texts`: strings in memory, by split.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow_datasets as tfds

# Registers the text builders; without it TFDS finds "glue" only by luck.
import tensorflow_datasets.text

from folding import config as config_lib
from folding import errors
from folding.config import DataConfig
from folding.data import python_stdlib
from folding.errors import ConfigError

_log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
Table: TypeAlias = list[tuple[int, dict[str, Any]]]  # (line, row) of a file

_STEMS = {  # file names, and beginnings of the names of TFDS splits
  "train": ("train",),
  "valid": ("valid", "validation", "dev"),
  "test": ("test",),
}
_ROLE_NAMES = {"text": ("text", "sentence"), "label": ("label",)}


@dataclasses.dataclass(frozen=True)
class Texts:
  """Raw examples by split ("train", "valid", "test").

  Attributes:
    texts: Strings of each split. A split is empty if the source has none and
      the configured fraction is 0.
    labels: int32 class ids of the texts; None for a language model.
    label_names: Class names in id order; () for a language model.
  """

  texts: dict[str, Sequence[str]]
  labels: dict[str, np.ndarray] | None
  label_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Texts and labels of a split, as a source has them.

  Attributes:
    source: File or TFDS split, for messages.
    texts: One for each row.
    labels: One for each row; None for a language model.
    lines: Line of each row in the file; 0 for other sources.
  """

  source: str
  texts: list[str]
  labels: list[str] | None
  lines: list[int]

  def place(self, index: int) -> str:
    """Returns "file:line" of a row."""
    line = self.lines[index]
    return f"{self.source}:{line}" if line else self.source

  def take(self, indices: Sequence[int]) -> "Rows":
    """Returns the rows at these indices, in this order."""
    labels = self.labels
    return Rows(
      self.source,
      [self.texts[i] for i in indices],
      None if labels is None else [labels[i] for i in indices],
      [self.lines[i] for i in indices],
    )


def load_texts(data: DataConfig, task: config_lib.Task) -> Texts:
  """Reads the text of a run.

  `data.path` wins over `data.name`. A split that the source lacks is set aside
  from train by `valid_fraction` and `test_fraction`, the same way on every
  machine and for every seed. A single text is cut at line ends, in the order
  train, valid, test. Several are distributed by a hash of the text, within each
  class; equal texts stay in one split.

  `data.max_bytes` limits the training text; valid and test get an eighth of it
  each. A language model's text is cut at the last line end that fits. Labelled
  texts are kept or dropped whole, chosen by the same hash.

  Args:
    data: The source and its fields.
    task: "lm" (labels are ignored) or "classify".

  Raises:
    ConfigError: the source is missing, malformed or cannot be fetched.
  """
  if data.max_bytes is not None and data.max_bytes < 16:
    raise ConfigError(
      f"data.max_bytes {data.max_bytes} is too small to hold text"
    )
  if data.path is not None:
    splits, names = _read_path(pathlib.Path(data.path), data, task)
  else:
    splits, names = _read_tfds(data, task)
  known = ()
  if task == "classify":
    # Before `max_bytes`, which may drop all rows of a class.
    known = tuple(names or _label_names(splits["train"]))
    if len(known) < 2:
      raise ConfigError(
        f"{splits['train'].source} has one class, {', '.join(known)}; a "
        "classifier needs two"
      )
    found = set(splits["train"].labels or ())
    if all(map(str.isdecimal, found)) and found.isdisjoint({*known, "0"}):
      raise ConfigError(
        f"{splits['train'].source}: ids of labels.txt start at 0, and no label is "
        f"0 ({known[0]})"
      )
  fractions = {"valid": data.valid_fraction, "test": data.test_fraction}
  fractions = {n: share for n, share in fractions.items() if n not in splits}
  if fractions:
    splits |= _set_aside(splits["train"], fractions)
  if data.max_bytes is not None:
    for name in SPLITS:
      limit = data.max_bytes if name == "train" else data.max_bytes // 8
      splits[name] = _limited(splits[name], name, limit)
  if not splits["train"].texts:
    raise ConfigError(
      f"no text is left to train on in {splits['train'].source}; give more text "
      "or lower data.valid_fraction and data.test_fraction"
    )
  _warn_of_repeats(splits)
  texts: dict[str, Sequence[str]] = {s: splits[s].texts for s in SPLITS}
  if task == "lm":
    return Texts(texts, None, ())
  labels = {
    split: _label_ids(splits[split], known, allow_ids=names is not None)
    for split in SPLITS
  }
  empty = set(range(len(known))).difference(labels["train"].tolist())
  if empty:
    _log.warning(
      "%d of %d classes have no text to train on: %s",
      *(len(empty), len(known), ", ".join(known[i] for i in sorted(empty))),
    )
  return Texts(texts, labels, known)


# Splits and classes.


def _set_aside(
  rows: Rows, fractions: dict[str, int | float]
) -> dict[str, Rows]:
  """Returns the splits set aside from train, and the rest of train."""
  if rows.labels is None and len(rows.texts) == 1:
    return _cut(rows, fractions)
  same: dict[str, list[int]] = {}  # equal texts, of different classes too
  for index, text in enumerate(rows.texts):
    same.setdefault(text, []).append(index)
  classes: dict[str, list[list[int]]] = {}
  for text in sorted(same, key=python_stdlib.digest):
    label = min(rows.labels[i] for i in same[text]) if rows.labels else ""
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


def _cut(rows: Rows, fractions: dict[str, int | float]) -> dict[str, Rows]:
  """Cuts the only text into train and the fractions, at line ends."""
  [text] = rows.texts
  shares = {"train": 1 - sum(fractions.values()), **fractions}
  # A line end beyond this would take too much of the next split.
  reach = round(min(s for s in shares.values() if s > 0) * len(text)) // 2
  bounds = np.cumsum(list(shares.values()))
  parts, start = {}, 0
  for (name, share), bound in zip(shares.items(), bounds, strict=True):
    stop = start
    if share > 0:
      stop = round(bound * len(text))
      # Without a line end within reach, cut at the character.
      stop = text.find("\n", max(stop - 1, 0), stop + reach) + 1 or stop
    texts = [text[start:stop]] if stop > start else []
    parts[name] = Rows(rows.source, texts, None, [0] * len(texts))
    start = stop
  return parts


def _limited(rows: Rows, split: str, limit: int) -> Rows:
  """Returns at most `limit` bytes of the rows."""
  if rows.labels is None:
    texts, left = [], limit
    for text in rows.texts:
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
  sizes = [len(text.encode("utf-8")) for text in rows.texts]
  order = sorted(
    range(len(sizes)), key=lambda i: (python_stdlib.digest(rows.texts[i]), i)
  )
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


def _label_names(train: Rows) -> list[str]:
  """Returns the labels of train: numbers by value, words in order."""
  names = sorted(set(train.labels or ()))
  if all(name.isdecimal() and len(name) < 20 for name in names):
    return sorted(names, key=int)  # stable: "01" before "1"
  return names


def _label_ids(
  rows: Rows, names: Sequence[str], *, allow_ids: bool
) -> np.ndarray:
  """Returns the class ids of labels, which are names or, if allowed, ids."""
  ids = {name: i for i, name in enumerate(names)}
  numbers = {str(i): i for i in range(len(names))}
  if allow_ids and not numbers.keys() & ids.keys():  # else "1" would be two
    ids |= numbers
  for index, label in enumerate(rows.labels or ()):
    if label not in ids:
      raise ConfigError(
        f"{rows.place(index)}: label {label!r} is not one of the {len(names)} "
        f"of {'labels.txt' if allow_ids else 'train'}: {', '.join(names[:20])}"
      )
  return np.array([ids[label] for label in rows.labels or ()], np.int32)


def _warn_of_repeats(splits: dict[str, Rows]) -> None:
  """Warns of the texts of valid and test that train has too."""
  known = set(splits["train"].texts)
  for split in ("valid", "test"):
    texts = splits[split].texts
    seen = sum(text in known for text in texts)
    if seen:
      share = f"{seen:,} of {len(texts):,} texts ({seen / len(texts):.1%})"
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
  if not (path.is_file() or path.is_dir()):  # a pipe would wait for ever
    raise ConfigError(f"data.path {path} is neither a file nor a folder")
  if path.is_dir():
    folder, files = path, _split_files(path)
  else:
    folder, files = path.parent, {"train": path}
  splits = {
    split: _read_file(file, data, task) for split, file in files.items()
  }
  path = folder / "labels.txt"
  if task == "lm" or not path.is_file():
    return splits, None
  names = [line.strip() for line in _decode(path).split("\n") if line.strip()]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise ConfigError(f"{path} names {name!r} twice; name each class once")
  return splits, names


def _split_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the file of each split in a folder."""
  files = {}
  for split, stems in _STEMS.items():
    found = [
      folder / (stem + extension)
      for stem in stems
      for extension in config_lib.TEXT_ENDINGS
      if (folder / (stem + extension)).is_file()
    ]
    if len(found) > 1:
      names = ", ".join(file.name for file in found)
      raise ConfigError(
        f"{folder} has several {split} files ({names}); keep one"
      )
    if found:
      files[split] = found[0]
  if "train" not in files:
    raise ConfigError(
      f"{folder} has no training text; name it train, with one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  return files


def _read_file(
  file: pathlib.Path, data: DataConfig, task: config_lib.Task
) -> Rows:
  """Reads a file of one split; every error names the file and the line."""
  if file.suffix not in config_lib.TEXT_ENDINGS:
    raise ConfigError(
      f"{file} has an unknown extension; use one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  text = _decode(file)
  if not text.strip():
    raise ConfigError(f"{file} is empty")
  if file.suffix == ".txt":
    if task != "lm":
      raise ConfigError(
        f"{file} has no labels, which task 'classify' needs; use .tsv, .csv or "
        ".jsonl"
      )
    return Rows(str(file), [text], None, [0])
  if file.suffix == ".tsv":
    table, text_field, label_field = _tsv_rows(file, text), "text", "label"
  else:
    read = _csv_rows if file.suffix == ".csv" else _jsonl_rows
    table = read(file, text)
    text_field, label_field = _choose_columns(file, table, data)
  rows = Rows(str(file), [], None if task == "lm" else [], [])
  for line, row in table:
    rows.lines.append(line)
    rows.texts.append(_checked(row.get(text_field), text_field, rows.place(-1)))
    if rows.labels is not None:
      label = None if label_field is None else row.get(label_field)
      rows.labels.append(_checked_label(label, rows.place(-1)))
      if type(label) is not type(table[0][1].get(label_field or "")):
        raise ConfigError(
          f"{rows.place(-1)}: the label {label!r} is a {type(label).__name__}, "
          "unlike that of the first row; use one kind"
        )
  if file.suffix == ".tsv" and rows.labels:
    first, second = rows.labels[0], rows.texts[0].strip()
    is_header = first.lower() == "label" and first not in rows.labels[1:]
    if is_header or second.lower() == "label":
      raise ConfigError(
        f"{rows.place(0)}: this looks like a header, which a .tsv does not have; "
        "each line is label<TAB>text"
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


def _tsv_rows(file: pathlib.Path, text: str) -> Table:
  """Returns the rows of `label<TAB>text` lines; quotes are plain characters."""
  table = []
  for number, line in _lines(text):
    label, tab, rest = line.partition("\t")
    if not tab:
      raise ConfigError(f"{file}:{number}: no tab; want label<TAB>text")
    table.append((number, {"label": label, "text": rest}))
  return table


def _csv_rows(file: pathlib.Path, text: str) -> Table:
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
  if len(set(columns)) < len(columns):
    twice = next(name for name in columns if columns.count(name) > 1)
    raise ConfigError(f"{file}: two columns are called {twice!r}; rename one")
  if len(columns) == 1 and any(c in columns[0] for c in ";\t"):
    raise ConfigError(f"{file}: columns are not separated by commas")
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


def _jsonl_rows(file: pathlib.Path, text: str) -> Table:
  table = []
  for number, line in _lines(text):
    if not line.strip():
      continue
    try:
      row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
      raise ConfigError(f"{file}:{number}: not JSON ({error})") from error
    if not isinstance(row, dict):
      raise ConfigError(f"{file}:{number}: not a JSON object")
    table.append((number, row))
  return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object, or raises `ValueError` for a repeated key."""
  row = dict(pairs)
  if len(row) < len(pairs):
    raise ValueError("a key occurs twice")
  return row


def _choose_columns(
  file: pathlib.Path, table: Table, data: DataConfig
) -> tuple[str, str | None]:
  """Returns the columns of text and label, and warns of other texts.

  The first row names the columns.
  """
  columns = list(table[0][1])
  label_field = _choose_column(str(file), columns, "label", data.label_field)
  others = [name for name in columns if name != label_field]
  texts = [
    name
    for name in others
    if isinstance(table[0][1][name], str)
    and not all(_is_number(row.get(name) or "0") for _, row in table)
  ]
  text_field = _choose_text(str(file), others, texts, data.text_field)
  ignored = ", ".join(name for name in texts if name != text_field)
  if ignored:
    _log.warning(
      "%s: the text is the column %s; ignored: %s", file, text_field, ignored
    )
  return text_field, label_field


def _is_number(value: Any) -> bool:
  try:
    float(value)
  except (TypeError, ValueError):
    return False
  return True


def _checked(text: Any, column: str, place: str) -> str:
  """Returns a text that is not empty and can be encoded."""
  if not isinstance(text, str):
    raise ConfigError(f"{place} has no text in the column {column!r}")
  if not text.strip():
    raise ConfigError(f"{place}: the {column} is empty")
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON allows "\ud83d"
    raise ConfigError(
      f"{place}: half a character, which UTF-8 cannot encode ({error.reason})"
    ) from error
  return text


def _checked_label(label: Any, place: str) -> str:
  """Returns the name of a class: a text or a whole number."""
  if label is None or not str(label).strip():
    raise ConfigError(
      f"{place}: the row has no label (in .tsv it is before a tab, otherwise in "
      "the column 'label' or that of data.label_field)"
    )
  name = str(label).strip()
  is_whole = name.lstrip("+-").isdecimal()
  if type(label) not in (int, str) or (_is_number(name) and not is_whole):
    raise ConfigError(
      f"{place}: the label {label!r} is neither a text nor a whole number"
    )
  return _checked(name, "label", place)


def _choose_text(
  place: str, columns: Sequence[str], texts: Sequence[str], wanted: str | None
) -> str:
  """Returns the column of text.

  Args:
    place: Name of the table in messages.
    columns: Columns that may be configured or have a usual name.
    texts: The columns that look like text.
    wanted: The configured name; None: guess.
  """
  chosen = _choose_column(place, columns, "text", wanted)
  if chosen is None:
    if not texts:
      raise ConfigError(f"{place} has no text column; set data.text_field")
    if len(texts) > 1:
      raise ConfigError(
        f"{place} has several columns of text ({', '.join(texts)}); choose one "
        "with data.text_field"
      )
    [chosen] = texts
  return chosen


def _choose_column(
  place: str, columns: Sequence[str], role: str, wanted: str | None
) -> str | None:
  """Returns the column of a role, "text" or "label": configured or guessed.

  None if no column has a usual name, in any case of letters.
  """
  if wanted is not None:
    if wanted not in columns:
      raise ConfigError(
        f"{place} has no {role} column {wanted!r} (data.{role}_field); its "
        f"columns are: {', '.join(columns) or 'none'}"
      )
    return wanted
  # "text" before "Text".
  lowered = sorted(columns, key=lambda column: column.lower() != column)
  usual = (
    c for name in _ROLE_NAMES[role] for c in lowered if c.lower() == name
  )
  return next(usual, None)


# TensorFlow Datasets. Prepared data is read without TensorFlow; to prepare it,
# some builders and all archives need TensorFlow.


def _read_tfds(
  data: DataConfig, task: config_lib.Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads a TFDS data set; the names are those of a `ClassLabel`."""
  builder: Any = _prepared(data, task)
  table: Any = builder.info.features
  features: dict[str, Any] = dict(table.items())
  label_field = None if task == "lm" else _label_feature(data, features)
  texts = [
    name
    for name, kind in features.items()
    if isinstance(kind, tfds.features.Text) and name != label_field
  ]
  place = f"the TFDS data set {data.name}"
  text_field = _choose_text(place, texts, texts, data.text_field)
  names = getattr(features.get(label_field or ""), "names", None)
  splits = {}
  for split, prefixes in _STEMS.items():
    # By prefix: MNLI of GLUE has "validation_matched".
    found = [s for s in builder.info.splits if s.startswith(prefixes)]
    if not found:
      continue
    rows = Rows(
      f"{data.name}[{found[0]}]", [], None if task == "lm" else [], []
    )
    limit = data.max_bytes
    if limit is not None and split == "train":
      # Room for the splits that may be set aside from it.
      limit /= 1 - data.valid_fraction - data.test_fraction
    num_bytes = 0
    for example in builder.as_data_source(found[0]):
      if rows.labels is not None:
        label = int(example[label_field])
        if label < 0:  # unlabelled
          continue
        rows.labels.append(names[label] if names else str(label))
      text = example[text_field]
      rows.texts.append(text.decode("utf-8", errors="replace"))
      rows.lines.append(0)
      num_bytes += len(text)
      if limit is not None and num_bytes >= limit:
        break
    if rows.texts:
      splits[split] = rows
  if "train" not in splits:
    raise ConfigError(
      f"{place} has no labelled train split; its splits are "
      f"{', '.join(builder.info.splits)}"
    )
  if label_field and not names:
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


def _label_feature(data: DataConfig, features: dict[str, Any]) -> str:
  """Returns the label's name: configured, "label", or the coarsest class."""
  classes = {
    name: feature.num_classes or 0
    for name, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  whole = [
    name
    for name, feature in features.items()
    if feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)
  ]
  if data.label_field:
    wanted = data.label_field
  elif "label" in features:
    wanted = "label"
  elif classes:
    wanted = min(classes, key=lambda name: classes[name])
  else:
    wanted = whole[0] if len(whole) == 1 else None
  if wanted is None or wanted not in whole:
    raise ConfigError(
      f"the TFDS data set {data.name} has no class column "
      f"{wanted or 'that can be guessed'} (data.label_field); its columns are: "
      f"{', '.join(features)}"
    )
  return wanted
