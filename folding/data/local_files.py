"""Text in local files: .txt, .tsv, .csv, .jsonl, .parquet and .arrow."""

import collections
import contextlib
import csv
import itertools
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from folding import config as config_lib
from folding import errors
from folding.config import DataConfig
from folding.data import rows as rows_lib
from folding.data.rows import Row, Rows, Table
from folding.errors import ConfigError
from folding.tasks import Task

_log = logging.getLogger(__name__)

COLUMNAR = (".parquet", ".arrow")  # files that pyarrow reads
_LABELS = "labels.txt"  # names of the classes, beside the files
_BATCH = 1024  # rows of columnar files that are read together


def read_path(
  path: pathlib.Path, data: DataConfig, task: Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads a file or a folder.

  Returns:
    Rows by split: "train", and "valid" and "test" if there is a file; and the
    class names of a `labels.txt` beside them, None without one.
  """
  found = find_files(path, data)
  warn_of_ignored(path, found, data)
  splits = {split: read_file(part, data, task) for split, part in found.items()}
  listed = (path if path.is_dir() else path.parent) / _LABELS
  if task.labels is None or not listed.is_file():
    return splits, None
  names = [x.strip() for x in _decode(listed).split("\n") if x.strip()]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise ConfigError(f"{listed} names {name!r} twice; name each class once")
  return splits, names


def find_files(
  path: pathlib.Path, data: DataConfig
) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split: of a file, or in a folder.

  A folder has train.tsv, validation.jsonl and so on. Or it is a data set of
  Hugging Face: `save_to_disk` writes train/data-00000-of-00002.arrow, and the hub
  has train-00000-of-00002.parquet, perhaps in a folder "data".

  Raises:
    ConfigError: there are none, or several for a split; or all are .txt, and the
      config names columns.
  """
  if path.is_file():
    found = {"train": [path]}
  elif path.is_dir():
    found = _files_in(path)
  else:  # opening a pipe would block
    raise ConfigError(
      f"{path.absolute()} is neither a file nor a folder of texts"
    )
  endings = {file.suffix for part in found.values() for file in part}
  if endings == {".txt"} and _named_columns(data):
    raise ConfigError(
      f"{path} is plain text without columns; leave out data.text_field and "
      "data.label_field, or give .tsv, .csv or .jsonl"
    )
  return found


def _files_in(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split in a folder; see `find_files`."""
  found = {}
  for split, stems in rows_lib.STEMS.items():
    parts = [
      part
      for stem in stems
      for part in (
        *([path / f"{stem}{end}"] for end in config_lib.TEXT_ENDINGS),
        *(sorted(x.glob(f"{stem}-*.parquet")) for x in (path, path / "data")),
        sorted((path / stem).glob("data*.arrow")),  # not cache-*.arrow
      )
      if part and all(file.is_file() for file in part)
    ]
    if len(parts) > 1:
      names = ", ".join(part[0].name for part in parts)
      raise ConfigError(f"{path} has several {split} files ({names}); keep one")
    if parts:
      found[split] = parts[0]
  if not found and (single := sorted(path.glob("data*.arrow"))):
    found["train"] = single
  for part in found.values():
    count = re.search(r"-of-(\d+)", part[0].name)
    if count and int(count[1]) != len(part):
      raise ConfigError(
        f"{part[0]} is one of {int(count[1])} files, and its folder has "
        f"{len(part)}; get all files of one download"
      )
  if "train" not in found:
    raise ConfigError(
      f"{path} has no training text; name it train, with one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  return found


def warn_of_ignored(
  path: pathlib.Path, found: dict[str, list[pathlib.Path]], data: DataConfig
) -> None:
  """Warns of files in a folder that look like text and belong to no split.

  No warning is given for:
    - `labels.txt` and the file of `data.sts`, which are read;
    - cache-*.arrow, which Hugging Face writes beside a data set;
    - .txt beside splits of other kinds, such as README.txt.
  """
  every = [file for part in found.values() for file in part]
  used = {file.name for file in every}
  used |= {_LABELS, pathlib.Path(data.sts or "").name}
  has_txt = any(file.suffix == ".txt" for file in every)
  endings = [x for x in config_lib.TEXT_ENDINGS if x != ".txt" or has_txt]
  ignored = sorted(
    file.name
    for file in path.glob("*")
    if file.name not in used
    and file.name.lower().endswith(tuple(endings))
    and not file.match("cache-*.arrow")
    and file.is_file()
  )
  if ignored:
    more = ", ..." if len(ignored) > 5 else ""
    _log.warning(
      "%s: ignored: %s; the splits are called train, valid (or validation, val, "
      "dev) and test",
      path,
      ", ".join(ignored[:5]) + more,
    )


def read_file(
  part: Sequence[pathlib.Path], data: DataConfig, task: Task
) -> Rows:
  """Reads the files of one split; every error names a file and the line."""
  file = part[0]
  if not file.is_file():
    raise ConfigError(f"there is no file {file}")
  if file.suffix not in config_lib.TEXT_ENDINGS:
    raise ConfigError(
      f"{file} has an unknown extension; use one of "
      f"{', '.join(config_lib.TEXT_ENDINGS)}"
    )
  if file.suffix == ".txt":
    return _read_txt(file, task)
  if file.suffix == ".tsv":
    table = _tsv_rows(file, data, task)
  else:
    table = list(rows_of(part, labelled=task.labels is not None))
  if not table:
    raise ConfigError(f"{file} is empty")
  columns, label_field = rows_lib.choose_columns(file, table, data, task)
  texts, labels = [], []
  for place, row in table:
    found = [rows_lib.checked(row.get(name), name, place) for name in columns]
    texts.append(found[0] if len(found) == 1 else (found[0], found[1]))
    if task.labels and label_field is not None:
      label, first = row.get(label_field), table[0][1].get(label_field)
      labels.append(task.labels.read(label, place))
      if task.labels.kind == "class" and type(label) is not type(first):
        raise ConfigError(
          f"{place}: the label {label!r} is a {type(label).__name__}, unlike that "
          "of the first row; use one kind"
        )
  return Rows(
    source=str(file),
    texts=texts,
    labels=None if label_field is None else labels,
    places=[place for place, _ in table],
    columns=columns,
  )


def _read_txt(file: pathlib.Path, task: Task) -> Rows:
  """Returns the lines of a file, or all of it if a task predicts tokens."""
  if task.labels is not None:
    raise ConfigError(
      f"{file} has no labels, which task {task.name!r} needs; use .tsv, .csv or "
      ".jsonl, or task 'embed' or 'lm' (configs/embed.py, configs/lm.py)"
    )
  text = _text(file)
  if task.predicts_tokens:
    return Rows(str(file), [text], None, [str(file)])
  lines = [(n, line) for n, line in _lines(text) if line.strip()]
  places = [f"{file}:{number}" for number, _ in lines]
  return Rows(str(file), [line for _, line in lines], None, places, ("text",))


def _text(file: pathlib.Path) -> str:
  text = _decode(file)
  if not text.strip():
    raise ConfigError(f"{file} is empty")
  return text


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
  # str.splitlines would also split at other characters.
  for number, line in enumerate(text.split("\n"), 1):
    if line.removesuffix("\r"):
      yield number, line.removesuffix("\r")


def _tsv_rows(file: pathlib.Path, data: DataConfig, task: Task) -> Table:
  """Returns the rows of a .tsv, in which quotes are plain characters.

  Without a header, a line is `label<TAB>text`.
  """
  lines = list(_lines(_text(file)))
  first = lines[0][1]
  columns = first.split("\t")
  if _is_header(columns, data, task):
    cells = [(number, line.split("\t")) for number, line in lines[1:]]
    return list(_with_columns(file, columns, cells))
  if named := _named_columns(data):
    raise ConfigError(
      f"{file} has no header with the columns {', '.join(map(repr, named))} "
      "(data.text_field, data.label_field); name them in the first line"
    )
  table = []
  for number, line in lines:
    label, tab, rest = line.partition("\t")
    if not tab:
      raise ConfigError(f"{file}:{number}: no tab; expected label<TAB>text")
    if "\t" in rest:
      raise ConfigError(
        f"{file}:{number}: several tabs, and no header says what the columns are; "
        "name them in the first line, text and label among them"
      )
    table.append((f"{file}:{number}", {"label": label, "text": rest}))
  label, text = (table[0][1][name].strip() for name in ("label", "text"))
  counts = collections.Counter(row["label"].strip() for _, row in table[1:])
  are_names = label.isidentifier() and text.isidentifier()
  are_names &= min(counts.values(), default=1) > 1  # the others are classes
  is_header = label not in counts and (label.lower() == "label" or are_names)
  if task.labels and (is_header or text.lower() == "label"):
    raise ConfigError(
      f"{table[0][0]}: {first!r:.60} looks like a header without a column of text; "
      "name the columns label and text, or leave the header out"
    )
  return table


def _is_header(cells: Sequence[str], data: DataConfig, task: Task) -> bool:
  """Returns whether cells have a given name, or usual ones of text and label.

  A task without labels needs no label, but then all cells must be names.
  """
  texts = {*itertools.chain(*rows_lib.TEXT_NAMES)}
  labels = rows_lib.label_names()
  found = {*cells, *map(str.lower, cells)}
  if found & {*_named_columns(data)}:
    return True
  are_names = task.labels is None and all(cell.isidentifier() for cell in cells)
  return bool(found & texts and (found & labels or are_names))


def _named_columns(data: DataConfig) -> list[str]:
  """Returns the columns that a config names."""
  texts, label = data.text_field or (), data.label_field
  texts = [texts] if isinstance(texts, str) else [*texts]
  return texts if label is None else [*texts, label]


def _with_columns(
  file: pathlib.Path, columns: list[str], rows: Iterable[tuple[int, list[str]]]
) -> Iterator[Row]:
  """Yields rows of cells by the names of their columns."""
  if len(set(columns)) < len(columns):
    twice = next(name for name in columns if columns.count(name) > 1)
    raise ConfigError(f"{file}: two columns are called {twice!r}; rename one")
  number = None
  for number, row in rows:
    if len(row) != len(columns):
      raise ConfigError(
        f"{file}:{number}: the row does not have {len(columns)} columns, as the "
        "header has"
      )
    if row == columns:
      raise ConfigError(f"{file}:{number}: the header is repeated; remove it")
    yield f"{file}:{number}", dict(zip(columns, row, strict=True))
  if number is None:
    raise ConfigError(f"{file} has a header and no rows")


def rows_of(
  part: Sequence[pathlib.Path],
  column: str | None = None,
  *,
  labelled: bool = False,
) -> Iterator[Row]:
  """Yields the rows of .csv, .jsonl, .parquet or .arrow files, read in slices.

  Classes that a file of Hugging Face names are given by name.

  Args:
    part: The files of a split.
    column: The only column to read of columnar files; None: all.
    labelled: Whether to leave out rows of class -1, as some test splits have.

  Raises:
    ConfigError: a file is damaged.
  """
  for file in part:
    if file.suffix in COLUMNAR:
      yield from _columnar_rows(file, column, labelled)
      continue
    try:
      # As they are: the csv module needs the line ends in quotes.
      with open(file, encoding="utf-8-sig", newline="") as lines:
        yield from _READERS[file.suffix](file, lines)
    except UnicodeDecodeError as error:
      raise ConfigError(f"{file} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
      raise ConfigError(f"cannot read {file}: {error}") from error


def _csv_rows(file: pathlib.Path, lines: Iterable[str]) -> Iterator[Row]:
  # The default limit is 128 KiB. It is global, so it is only raised.
  csv.field_size_limit(max(csv.field_size_limit(), file.stat().st_size))
  reader = csv.reader(lines, strict=True)
  try:
    columns = next(filter(None, reader), [])
    if len(columns) == 1 and any(c in columns[0] for c in ";\t"):
      raise ConfigError(
        f"{file}: columns are not separated by commas; write commas, or a .tsv "
        "with tabs"
      )
    cells = ((reader.line_num, row) for row in reader if row)
    yield from _with_columns(file, columns, cells)
  except csv.Error as error:
    raise ConfigError(
      f"{file}:{reader.line_num}: not valid CSV ({error})"
    ) from error


def _jsonl_rows(file: pathlib.Path, lines: Iterable[str]) -> Iterator[Row]:
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
      raise ConfigError(
        f"{file}:{number}: not JSON, an object per line ({error})"
      ) from error
    if not isinstance(row, dict):
      raise ConfigError(f"{file}:{number}: not a JSON object")
    yield f"{file}:{number}", row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object, or raises `ValueError` for a repeated key."""
  row = dict(pairs)
  if len(row) < len(pairs):
    raise ValueError("a key occurs twice")
  return row


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
      wanted = [column] if column else schema.names
      names_of = _class_names(file, schema)
      classes = {k: v for k, v in names_of.items() if k in wanted}
      number = 0
      for batch in batches:
        chosen = batch.select(wanted)
        chosen.validate(full=True)  # damaged arrays may crash the interpreter
        for row in chosen.to_pylist():
          number += 1
          place = f"{file}:{number}"
          named = {
            x: _named(row[x], names, place) for x, names in classes.items()
          }
          if not labelled or None not in named.values():
            yield place, row | named
  # Two columns of one name are a KeyError.
  except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"cannot read {file}: {errors.first_line(error)}"
    ) from error


def _class_names(file: pathlib.Path, schema: Any) -> dict[str, list[str]]:
  """Returns {column: names of its classes} that Hugging Face has stored."""
  metadata = (schema.metadata or {}).get(b"huggingface")
  if metadata is None:
    return {}
  found = {}
  try:
    features = json.loads(metadata).get("info", {}).get("features") or {}
    for name, feature in features.items():
      # A list of classes has them one level further inside.
      if isinstance(feature, dict):
        feature = feature.get("feature", feature)
      if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        found[name] = list(feature["names"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"{file}: the description of its columns by Hugging Face is damaged "
      f"({errors.reason(error)})"
    ) from error
  return found


def _named(value: Any, names: list[str], place: str) -> Any:
  """Returns the name of a class, or those of several; None: it has none."""
  if isinstance(value, list):
    return [_named(x, names, place) for x in value]
  if value is None or value == -1:
    return None
  if type(value) is not int or not 0 <= value < len(names):
    raise ConfigError(
      f"{place}: the class {value!r} is not the index of one of the "
      f"{len(names)} names that the file has"
    )
  return names[value]


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
