"""Labels of rows -> arrays: classes, sets of classes and scores."""

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from folding.errors import ConfigError
from folding.tasks import Label, Labels, is_visible

_log = logging.getLogger(__name__)


def output_names(
  labels: Sequence[Label],
  form: Labels,
  source: str,
  given: Sequence[str] | None = None,
) -> tuple[str, ...]:
  """Returns the names of a head's outputs: the classes in id order, or "score".

  Args:
    labels: Labels of the training split.
    form: What they are.
    source: Where the labels are from, for messages.
    given: Class names of a labels.txt or of TFDS; None: those of the labels,
      numbers by value, words in order.

  Raises:
    ConfigError: there is one class, two spellings of one, all classes in every
      text, or one score; or ids do not start at 0.
  """
  if form.kind == "score":
    if len({*labels}) == 1:
      raise ConfigError(f"{source}: the scores are all {labels[0]}")
    return form.columns[:1]
  found = set(itertools.chain(*map(_classes, labels)))
  known = tuple(given or _in_order(found))
  if len(known) < 2:
    raise ConfigError(
      f"{source} has one class, {', '.join(known)}; a classifier needs two"
    )
  _require_distinct(found, source)
  if form.kind == "classes" and all(
    len(_classes(x)) == len(known) for x in labels
  ):
    raise ConfigError(
      f"{source}: every text has all classes, {', '.join(known)}; if the labels are "
      "a 0 or 1 for each class, list the classes that apply instead, such as 2,5"
    )
  if given is None and {"-1", "0"} <= found:
    _log.warning(
      "%s: -1 is read as a class; leave these rows out if it means no label",
      source,
    )
  if all(map(str.isdecimal, found)) and found.isdisjoint({*known, "0"}):
    raise ConfigError(
      f"{source}: ids of labels.txt start at 0, and no label is 0 ({known[0]})"
    )
  return known


def _require_distinct(names: Iterable[str], source: str) -> None:
  """Refuses classes that differ in nothing that a reader sees."""
  known: dict[str | int, str] = {}
  for name in sorted(names):
    seen = "".join(filter(is_visible, unicodedata.normalize("NFC", name)))
    is_whole = re.fullmatch(r"[+-]?\d{1,20}", seen)
    other = known.setdefault(int(seen) if is_whole else seen, name)
    if other != name:
      raise ConfigError(
        f"{source}: the labels {other!a} and {name!a} look like one class; spell it "
        "in one way"
      )


def _classes(label: Label) -> tuple[str, ...]:
  return label if isinstance(label, tuple) else (str(label),)


def _in_order(found: Iterable[str]) -> list[str]:
  names = sorted(found)
  if all(name.isdecimal() and len(name) < 20 for name in names):
    return sorted(names, key=int)  # stable: "01" before "1"
  return names


def to_array(
  labels: Sequence[Label],
  form: Labels,
  names: Sequence[str],
  *,
  places: Sequence[str],
  allow_ids: bool,
) -> np.ndarray:
  """Returns the labels of a split, by row.

  Args:
    labels: Label of each row.
    form: What they are.
    names: From `output_names`.
    places: Where each row is, for messages.
    allow_ids: Whether a label may be the id of a class.

  Returns:
    int32 class ids ("class"), float32 scores ("score"), or float32[rows, C], 1 at
    the classes of a row ("classes").

  Raises:
    ConfigError: a label is not one of the names.
  """
  found = blank(form, len(labels), len(names))
  if form.kind == "score":
    found[:] = labels
    return found
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
  for row, label in enumerate(labels):
    chosen = [ids[name] for name in _classes(label)]
    if form.kind == "class":
      found[row] = chosen[0]
    else:
      found[row, chosen] = 1
  return found


def blank(form: Labels, num_rows: int, num_outputs: int) -> np.ndarray:
  """Returns zeros of the shape and type of the labels of rows."""
  shape = (num_rows, num_outputs)[: 2 if form.kind == "classes" else 1]
  return np.zeros(shape, np.int32 if form.kind == "class" else np.float32)


def unused(labels: np.ndarray, form: Labels, names: Sequence[str]) -> list[str]:
  """Returns the classes that no row of a split has."""
  if form.kind == "score":
    return []
  found = labels if form.kind == "class" else np.nonzero(labels)[1]
  return [name for i, name in enumerate(names) if not (found == i).any()]
