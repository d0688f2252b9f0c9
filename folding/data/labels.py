"""Labels of rows -> arrays, by task: classes, sets of classes and scores."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from folding.config import Task
from folding.errors import ConfigError

# A class, a score, or a set of classes.
Label: TypeAlias = str | float | tuple[str, ...]

SCORE = "score"  # name of the only output of a regression
_LARGEST = float(np.finfo(np.float32).max)


def read_label(label: Any, task: Task, place: str) -> Label:
  """Returns the label of a row.

  Args:
    label: As the file has it; None: it has none.
    task: "classify": a text or a whole number. "regress": a number.
      "multilabel": a list of classes, or a text with commas between them, which
      may be empty.
    place: Where the row is, for messages.

  Raises:
    ConfigError: there is no label, or it is of another kind.
  """
  if task == "multilabel" and isinstance(label, str | list):
    # pandas writes lists to .csv like this.
    if isinstance(label, str) and re.fullmatch(
      r"\[(['\"\d].*)?\]", label.strip()
    ):
      raise ConfigError(
        f"{place}: the labels {label!r} are a list as text; write the classes "
        "with commas between them, or lists in a .jsonl"
      )
    names = label if isinstance(label, list) else label.split(",")
    classes = [_class(x, place) for x in names if x != "" or len(names) > 1]
    if len(classes) > len({*classes}) and {*classes} <= {"0", "1"}:
      raise ConfigError(
        f"{place}: the labels {label!r} look like a 0 or 1 for each class; list "
        "the classes that apply instead, such as [2, 5]"
      )
    return tuple(dict.fromkeys(classes))
  if label is None or not str(label).strip():
    raise ConfigError(
      f"{place}: the row has no label (in a .tsv without a header it is before a "
      "tab, otherwise in the column 'label' or that of data.label_field)"
    )
  if task == "multilabel":
    return (_class(label, place),)
  return _score(label, place) if task == "regress" else _class(label, place)


def _score(label: Any, place: str) -> float:
  if _is_plain_number(label) and not isinstance(label, bool):
    score = float(label)
    if abs(score) <= _LARGEST:
      return score
  raise ConfigError(
    f"{place}: the label {label!r} is not a number that fits float32, which task "
    "'regress' needs"
  )


def _class(label: Any, place: str) -> str:
  """Returns the name of a class: a text or a whole number."""
  name = str(label).strip()
  is_whole = name.lstrip("+-").isdecimal()
  if (
    type(label) not in (int, str)
    or not name
    or (_is_plain_number(name) and not is_whole)
  ):
    raise ConfigError(
      f"{place}: the label {label!r} is neither a text nor a whole number; a "
      "score needs task 'regress'"
    )
  return require_utf8(name, place)


def _is_plain_number(label: Any) -> bool:
  """Returns whether a label is a number; not 1_0, which is 10 for Python."""
  return is_number(label) and "_" not in str(label)


def is_number(value: Any) -> bool:
  """Returns whether a value is a number that fits a float, or its text."""
  try:
    float(value)
  except (OverflowError, TypeError, ValueError):
    return False
  return True


def require_utf8(text: str, place: str) -> str:
  """Returns a text that can be encoded.

  Raises:
    ConfigError: it cannot: JSON allows half of a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"{place}: half a character, which UTF-8 cannot encode ({error.reason})"
    ) from error
  return text


def output_names(
  labels: Sequence[Label],
  task: Task,
  source: str,
  given: Sequence[str] | None = None,
) -> tuple[str, ...]:
  """Returns the names of a head's outputs: the classes in id order, or SCORE.

  Args:
    labels: Labels of the training split.
    task: Not "lm".
    source: Where the labels are from, for messages.
    given: Class names of a labels.txt or of TFDS; None: those of the labels,
      numbers by value, words in order.

  Raises:
    ConfigError: there is one class, or ids do not start at 0.
  """
  if task == "regress":
    return (SCORE,)
  found = set(itertools.chain(*map(_classes, labels)))
  known = tuple(given or _in_order(found))
  if len(known) < 2:
    raise ConfigError(
      f"{source} has one class, {', '.join(known)}; a classifier needs two"
    )
  if all(map(str.isdecimal, found)) and found.isdisjoint({*known, "0"}):
    raise ConfigError(
      f"{source}: ids of labels.txt start at 0, and no label is 0 ({known[0]})"
    )
  return known


def _classes(label: Label) -> tuple[str, ...]:
  return label if isinstance(label, tuple) else (str(label),)


def _in_order(found: Iterable[str]) -> list[str]:
  names = sorted(found)
  if all(name.isdecimal() and len(name) < 20 for name in names):
    return sorted(names, key=int)  # stable: "01" before "1"
  return names


def to_array(
  labels: Sequence[Label],
  task: Task,
  names: Sequence[str],
  *,
  places: Sequence[str],
  allow_ids: bool,
) -> np.ndarray:
  """Returns the labels of a split, by row.

  Args:
    labels: Label of each row.
    task: Not "lm".
    names: From `output_names`.
    places: Where each row is, for messages.
    allow_ids: Whether a label may be the id of a class.

  Returns:
    int32 class ids ("classify"), float32 scores ("regress"), or float32[rows, C],
    1 at the classes of a row ("multilabel").

  Raises:
    ConfigError: a label is not one of the names.
  """
  if task == "regress":
    return np.array(labels, np.float32)
  ids = {name: i for i, name in enumerate(names)}
  numbers = {str(i): i for i in range(len(names))}
  if allow_ids and not numbers.keys() & ids.keys():  # else "1" would be two
    ids |= numbers
  for row, label in enumerate(labels):
    for name in _classes(label):
      if name not in ids:
        raise ConfigError(
          f"{places[row]}: label {name!r} is not one of the {len(names)} of "
          f"{'labels.txt' if allow_ids else 'train'}: {', '.join(names[:20])}"
        )
  if task == "classify":
    return np.array([ids[str(label)] for label in labels], np.int32)
  found = np.zeros((len(labels), len(names)), np.float32)
  for row, label in enumerate(labels):
    found[row, [ids[name] for name in _classes(label)]] = 1
  return found


def unused(labels: np.ndarray, task: Task, names: Sequence[str]) -> list[str]:
  """Returns the classes that no row of a split has."""
  if task == "regress":
    return []
  found = labels if task == "classify" else np.nonzero(labels)[1]
  return [name for i, name in enumerate(names) if not (found == i).any()]
