"""Rows of text and label from files of the user: txt, tsv, csv and jsonl.

Reads and complains; which rows become which split is decided in `sources`.
Every complaint names the file and, where there is one, the line.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator

from folding import config, schema

EXTENSIONS = config.TEXT_ENDINGS
_STEMS = {
  "train": ("train",),
  "valid": ("valid", "validation", "dev"),
  "test": ("test",),
}
TEXT_NAMES = ("text", "sentence")  # what a text column is usually called


@dataclasses.dataclass(frozen=True)
class Rows:
  """Texts with labels as they are written, and where each came from.

  Attributes:
    source: File or split, for messages.
    texts: One a row.
    labels: One a row; None where the task has none.
    lines: Line of each row in the file; 0: not from a file.
  """

  source: str
  texts: list[str]
  labels: list[str] | None
  lines: list[int]

  def place(self, index: int) -> str:
    """Returns "file:line" of a row."""
    line = self.lines[index]
    return f"{self.source}:{line}" if line else self.source

  def take(self, indices: list[int]) -> "Rows":
    """Returns the rows at these indices, in this order."""
    labels = self.labels
    return Rows(
      self.source,
      [self.texts[i] for i in indices],
      None if labels is None else [labels[i] for i in indices],
      [self.lines[i] for i in indices],
    )


def read_path(
  data: config.DataConfig, task: config.Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads the file or folder `data.path`.

  Returns:
    Rows by split ("train" always, "valid" and "test" where there is a file),
    and the label names of a `labels.txt` beside them, None without one.

  Raises:
    schema.ConfigError: a file is missing, empty, malformed or not UTF-8.
  """
  assert data.path is not None
  path = pathlib.Path(data.path)
  schema.require(path.exists(), f"data.path {path} does not exist")
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
  twice = [name for i, name in enumerate(names) if name in names[:i]]
  schema.require(
    not twice,
    f"{path} names {twice[0] if twice else ''!r} twice; name each class once",
  )
  return splits, names


def _split_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the one file of each split that the folder has."""
  files = {}
  for split, stems in _STEMS.items():
    found = [
      folder / (stem + extension)
      for stem in stems
      for extension in EXTENSIONS
      if (folder / (stem + extension)).is_file()
    ]
    names = ", ".join(file.name for file in found)
    schema.require(
      len(found) <= 1, f"{folder} has several {split} files ({names}); keep one"
    )
    if found:
      files[split] = found[0]
  schema.require(
    "train" in files,
    f"{folder} has no training text; name it train, with one of "
    f"{', '.join(EXTENSIONS)}",
  )
  return files


def _read_file(
  file: pathlib.Path, data: config.DataConfig, task: config.Task
) -> Rows:
  readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
  schema.require(
    file.suffix in EXTENSIONS,
    f"{file} has an unknown extension; use one of {', '.join(EXTENSIONS)}",
  )
  text = _decode(file)
  schema.require(bool(text.strip()), f"{file} is empty")
  if file.suffix == ".txt":
    schema.require(
      task == "lm",
      f"{file} has no labels, which task 'classify' needs; use .tsv, .csv or "
      ".jsonl",
    )
    return Rows(str(file), [text], None, [0])
  rows = Rows(str(file), [], None if task == "lm" else [], [])
  for line, row_text, label in readers[file.suffix](file, text, data):
    place = f"{file}:{line}"
    schema.require(bool(row_text.strip()), f"{place}: the text is empty")
    try:
      f"{row_text}{label}".encode()
    except UnicodeEncodeError as error:  # what JSON may say with \ud83d
      raise schema.ConfigError(
        f"{place}: half a character, which UTF-8 cannot say ({error.reason})"
      ) from error
    rows.texts.append(row_text)
    rows.lines.append(line)
    if rows.labels is not None:
      schema.require(
        label is not None,
        f"{place}: the row has no label (in .tsv it stands before a tab; else "
        "in a column 'label', or the one that data.label_field names)",
      )
      rows.labels.append(str(label))
  schema.require(bool(rows.texts), f"{file} has a header and no rows")
  if file.suffix == ".tsv" and rows.labels:
    first, second = rows.labels[0], rows.texts[0].strip()
    place = f"{file}:{rows.lines[0]}: this looks like a header, which a .tsv"
    schema.require(
      first.lower() != "label" or first in rows.labels[1:],
      f"{place} does not have; take it out",
    )
    schema.require(
      second.lower() != "label",
      f"{place} does not have, and labels come after texts; put them before, or "
      "save it as .csv",
    )
  return rows


def _decode(file: pathlib.Path) -> str:
  try:
    return file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise schema.ConfigError(
      f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8"
    ) from error
  except OSError as error:
    raise schema.ConfigError(f"cannot read {file}: {error}") from error


def _read_tsv(
  file: pathlib.Path, text: str, data: config.DataConfig
) -> Iterator[tuple[int, str, str | None]]:
  """Yields the rows of `label<TAB>text` lines; quotes are plain characters."""
  del data
  # Not splitlines: a text may hold other characters that it would split at.
  for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
    line = line.removesuffix("\r")
    if not line:
      continue
    label, tab, rest = line.partition("\t")
    schema.require(bool(tab), f"{file}:{number}: no tab; want label<TAB>text")
    yield number, rest, label.strip() or None


def _read_csv(
  file: pathlib.Path, text: str, data: config.DataConfig
) -> Iterator[tuple[int, str, str | None]]:
  # Or a text of 128 KiB is an error; of the process, so never less than before.
  csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
  reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
  try:
    columns = list(reader.fieldnames or ())
    twice = next((n for n in columns if columns.count(n) > 1), None)
    schema.require(
      twice is None, f"{file}: two columns are called {twice!r}; rename one"
    )
    other = next((s for s in (";", "\t") if s in "".join(columns[:1])), None)
    schema.require(
      len(columns) > 1 or other is None,
      f"{file}: columns are separated by {other!r}; save it with commas",
    )
    label_field = choose_field(str(file), columns, "label", data.label_field)
    rows = []
    for row in reader:
      schema.require(
        None not in row and None not in row.values(),
        f"{file}:{reader.line_num}: the row does not have {len(columns)} "
        "columns, as the header has",
      )
      rows.append((reader.line_num, row))
  except csv.Error as error:
    raise schema.ConfigError(
      f"{file}: not valid CSV after line {reader.line_num} ({error})"
    ) from error
  texts = [name for name in columns if name != label_field]
  text_field = data.text_field or choose_field(str(file), texts, "text", None)
  if text_field is None:  # a guess is not of numbers
    words = [n for n in texts if not all(_is_number(row[n]) for _, row in rows)]
    texts = words or texts
  text_field = choose_text(str(file), texts, text_field)
  for number, row in rows:
    label = row[label_field].strip() if label_field else ""
    yield number, row[text_field], label or None


def _read_jsonl(
  file: pathlib.Path, text: str, data: config.DataConfig
) -> Iterator[tuple[int, str, str | None]]:
  text_field, label_field = data.text_field, data.label_field
  for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
    if not line.strip():
      continue
    place = f"{file}:{number}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise schema.ConfigError(f"{place}: not JSON ({error})") from error
    schema.require(isinstance(row, dict), f"{place}: not a JSON object")
    # A guess made from a row holds for all after it, which may have no label.
    if label_field is None or data.label_field is not None:
      label_field = choose_field(place, list(row), "label", data.label_field)
    texts = [
      name
      for name, value in row.items()
      if isinstance(value, str) and name != label_field
    ]
    # One that is called so is meant, also where this row has none.
    text_field = text_field or choose_field(place, list(row), "text", None)
    text_field = choose_text(place, texts, text_field)
    label = row.get(label_field) if label_field else None
    label = None if label is None else str(label).strip() or None
    yield number, row[text_field], label


def choose_text(place: str, columns: list[str], wanted: str | None) -> str:
  """Returns the column of text, which a source must not leave in doubt.

  Args:
    place: What messages call the table.
    columns: Candidates, in order.
    wanted: The configured name; None: guess.

  Raises:
    schema.ConfigError: no such column, or several that may be meant.
  """
  chosen = choose_field(place, columns, "text", wanted)
  if chosen is not None:
    return chosen
  schema.require(
    bool(columns), f"{place} has no text column; set data.text_field"
  )
  schema.require(
    len(columns) == 1,
    f"{place} has several columns of text ({', '.join(columns)}); say which in "
    "data.text_field",
  )
  return columns[0]


def _is_number(cell: str) -> bool:
  """Returns whether a cell is a number, or empty, as one that is missing is."""
  try:
    float(cell.strip() or "nan")
  except ValueError:
    return False
  return True


def choose_field(
  place: str, columns: list[str], role: str, wanted: str | None
) -> str | None:
  """Returns the column of a role: as configured, or guessed in any case.

  Args:
    place: What messages call the table.
    columns: Candidates, in order.
    role: "text" or "label".
    wanted: The configured name; None: guess.

  Returns:
    The column; None: none is called as one of this role usually is.

  Raises:
    schema.ConfigError: there is no column of the configured name.
  """
  listing = ", ".join(columns) or "none"
  if wanted is not None:
    schema.require(
      wanted in columns,
      f"{place} has no {role} column {wanted!r} (data.{role}_field); its "
      f"columns are: {listing}",
    )
    return wanted
  names = ("label",) if role == "label" else TEXT_NAMES
  # In lower case, as they are written, before any other.
  lowered = sorted(columns, key=lambda column: column.lower() != column)
  usual = (c for name in names for c in lowered if c.lower() == name)
  return next(usual, None)
