"""Rows of a source, and which of its columns are texts and labels."""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from folding.config import DataConfig
from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.tasks import TASKS, Label, Task, is_number, require_utf8

_log = logging.getLogger(__name__)

Row: TypeAlias = tuple[str, dict[str, Any]]  # its "file:line", and its cells
Table: TypeAlias = list[Row]

STEMS = {  # file names, and beginnings of the names of TFDS splits
  "train": ("train",),
  "valid": ("valid", "validation", "val", "dev"),
  "test": ("test",),
}
TEXT_NAMES = (  # the first entry whose columns all exist is chosen
  ("text",),
  ("sentence1", "sentence2"),
  ("premise", "hypothesis"),
  ("question1", "question2"),
  ("question", "sentence"),
  ("sentence",),
)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Texts and labels of a split, as a source has them.

  Attributes:
    source: File or TFDS split, for messages.
    texts: One for each row.
    labels: One for each row; None for a task without labels.
    places: "file:line" of each row, or another name of its source, for messages.
    columns: Column of the texts, or two of pairs; () for plain text.
  """

  source: str
  texts: list[Text]
  labels: list[Label] | None
  places: list[str]
  columns: tuple[str, ...] = ()

  def take(self, indices: Sequence[int]) -> "Rows":
    """Returns the rows at these indices, in this order."""
    labels = self.labels
    return dataclasses.replace(
      self,
      texts=[self.texts[i] for i in indices],
      labels=None if labels is None else [labels[i] for i in indices],
      places=[self.places[i] for i in indices],
    )


def choose_columns(
  file: pathlib.Path, table: Table, data: DataConfig, task: Task
) -> tuple[tuple[str, ...], str | None]:
  """Returns the columns of texts and label, and warns of other texts.

  The first row names the columns. The label is None for a task without labels.
  """
  place, columns = str(file), list(table[0][1])
  label_field = _label_column(place, columns, data, task)
  others = [name for name in columns if name != label_field]
  labels = label_names()  # of other tasks
  texts = [
    name
    for name in others
    if isinstance(table[0][1][name], str)
    and name.lower() not in labels
    and not all(is_number(row.get(name) or "0") for _, row in table)
  ]
  chosen = choose_texts(place, others, texts, data, task)
  if data.text_field is None:
    _require_same_texts(table, chosen, label_field, task)
  ignored = ", ".join(name for name in texts if name not in chosen)
  if ignored:
    _log.warning(
      "%s: the text is %s; ignored: %s",
      file,
      " and ".join(chosen),
      ignored,
    )
  return chosen, None if task.labels is None else label_field


def label_names() -> set[str]:
  """Returns the usual names of columns of labels, of all tasks."""
  labels = (task.labels for task in TASKS.values())
  return {name for found in labels if found for name in found.columns}


def _require_same_texts(
  table: Table,
  chosen: tuple[str, ...],
  label_field: str | None,
  task: Task,
) -> None:
  """Refuses texts of later rows that would change the choice of columns."""
  keys = itertools.chain.from_iterable(row for _, row in table)
  columns = [name for name in dict.fromkeys(keys) if name != label_field]
  wider = _usual(columns, _usual_texts(task))
  for name in wider if wider != chosen else ():
    for place, row in table:
      if name in row and name not in table[0][1]:
        raise ConfigError(
          f"{place}: the text {name!r} has no column in the first row; give it to "
          "all rows, or set data.text_field"
        )


def _label_column(
  place: str, columns: Sequence[str], data: DataConfig, task: Task
) -> str | None:
  """Returns the configured or the usual column of labels; None: none is needed."""
  if data.label_field is not None:
    _require_column(place, columns, "label", data.label_field)
    return data.label_field
  usual = task.labels.columns if task.labels else ("label",)
  if found := _usual(columns, [(name,) for name in usual]):
    return found[0]
  if task.labels is None:
    return None
  others = "; ".join(
    f"task {other.name!r} reads {other.labels.columns[0]!r}"
    for other in TASKS.values()
    if other.labels and _usual(columns, [other.labels.columns[:1]])
  )
  raise ConfigError(
    f"{place} has no column {' or '.join(map(repr, usual))}"
    f"{f' ({others})' if others else ''}; name the column of "
    "labels with data.label_field (and that of texts with data.text_field); "
    f"the columns are {', '.join(map(repr, columns))}"
  )


def choose_texts(
  place: str,
  columns: Sequence[str],
  texts: Sequence[str],
  data: DataConfig,
  task: Task,
) -> tuple[str, ...]:
  """Returns the column of texts, or the two of pairs.

  Args:
    place: Name of the table in messages.
    columns: Columns that may be configured or have a usual name.
    texts: The columns that look like text.
    data: May configure them.
    task: Without labels there are no pairs.
  """
  wanted = data.text_field
  is_single = task.labels is None
  if isinstance(wanted, tuple) and is_single:
    raise ConfigError(
      f"task {task.name!r} reads single texts; data.text_field is a pair"
    )
  if isinstance(wanted, tuple) and wanted[0] == wanted[1]:
    raise ConfigError(
      f"data.text_field names {wanted[0]!r} twice; name the two texts of a pair, or "
      "one text"
    )
  wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
  for name in wanted:
    _require_column(place, columns, "text", name)
  chosen = wanted or _usual(columns, _usual_texts(task))
  if chosen:
    return chosen
  if not texts:
    raise ConfigError(
      f"{place} has no text column; in a config set data.text_field to one of "
      f"{', '.join(map(repr, columns)) or 'its columns'}"
    )
  if len(texts) > 1:
    raise ConfigError(
      f"{place} has several columns of text ({', '.join(texts)}); keep one, or "
      f"in a config choose one{'' if is_single else ' or two of pairs'} with "
      "data.text_field"
    )
  return (texts[0],)


def _usual_texts(task: Task) -> list[tuple[str, ...]]:
  """Returns the usual names of texts, without pairs if the task has none."""
  is_single = task.labels is None
  return [x for x in TEXT_NAMES if len(x) == 1 or not is_single]


def _require_column(
  place: str, columns: Sequence[str], role: str, wanted: str
) -> None:
  """Raises `ConfigError` unless a configured column is there."""
  if wanted not in columns:
    raise ConfigError(
      f"{place} has no {role} column {wanted!r} (data.{role}_field); its "
      f"columns are: {', '.join(map(repr, columns)) or 'none'}"
    )


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


def checked(text: Any, column: str, place: str) -> str:
  """Returns a text that is not empty and can be encoded."""
  if not isinstance(text, str):
    raise ConfigError(f"{place} has no text in the column {column!r}")
  if not text.strip():
    raise ConfigError(f"{place}: the {column} is empty")
  return require_utf8(text, place)
