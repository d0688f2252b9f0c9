"""Text sources: local files, TFDS data sets and Python's standard library.

Every source ends as `Texts`: strings in memory, by split.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from folding.config import DataConfig
from folding.data import labels as labels_lib
from folding.data import local_files, python_stdlib
from folding.data.rows import Rows
from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.tasks import TASKS

_log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_Run = TypeVar("_Run")  # rows of equal text, which stay in one split


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


def load_texts(data: DataConfig, task: str) -> Texts:
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
  row = TASKS[task]
  form = row.labels
  require_room(data)
  if data.path is not None:
    splits, names = local_files.read_path(pathlib.Path(data.path), data, row)
  elif is_tfds(data):
    from folding.data import tfds_sets  # imports TFDS, which takes seconds

    splits, names = tfds_sets.read(data, row)
  else:
    splits, names = python_stdlib.read(data, row)
  train = splits["train"]
  for rows in splits.values():
    if len(rows.columns) + len(train.columns) == 3:
      raise ConfigError(
        f"{rows.source} has the texts {' and '.join(rows.columns)}, and "
        f"{train.source} {' and '.join(train.columns)}; set data.text_field"
      )
  known: tuple[str, ...] = ()
  if form is not None and train.labels is not None:
    # Before `max_bytes`, which may drop all rows of a class.
    known = labels_lib.output_names(train.labels, form, train.source, names)
  fractions = fractions_of_train(data, splits)
  if fractions:
    by_class = form is not None and form.kind == "class"
    splits |= _set_aside(train, fractions, by_class=by_class)
  if data.max_bytes is not None:
    for split in SPLITS:
      rows, limit = splits[split], limit_of(split, data.max_bytes)
      splits[split] = (
        _cut_to(rows, limit)
        if row.predicts_tokens
        else _limited(rows, limit, split)
      )
  if not splits["train"].texts:
    raise no_text_left(train.source)
  _warn_of_repeats(splits)
  texts: dict[str, Sequence[Text]] = {s: splits[s].texts for s in SPLITS}
  if form is None:
    return Texts(texts, None, ())
  labels = {
    split: labels_lib.to_array(
      splits[split].labels or (),
      form,
      known,
      places=splits[split].places,
      allow_ids=names is not None,
    )
    for split in SPLITS
  }
  empty = labels_lib.unused(labels["train"], form, known)
  if empty:
    _log.warning(
      "%d of %d classes have no text to train on: %s",
      len(empty),
      len(known),
      ", ".join(empty),
    )
  pair = None
  if len(train.columns) == 2:
    pair = train.columns[0], train.columns[1]
  return Texts(texts, labels, known, pair)


def is_tfds(data: DataConfig) -> bool:
  """Returns whether the source is a TFDS data set."""
  return data.path is None and data.name != python_stdlib.NAME


def require_room(data: DataConfig) -> None:
  """Raises `ConfigError` if `data.max_bytes` leaves no text of some split."""
  if data.max_bytes is not None and data.max_bytes < 16:
    raise ConfigError(
      f"data.max_bytes {data.max_bytes} is too small to hold text"
    )


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
  rows = local_files.read_file([file], columns, TASKS["regress"])
  firsts, seconds = zip(*rows.texts, strict=True)
  scores = np.array(rows.labels, np.float32)
  if np.ptp(scores) == 0:
    raise ConfigError(f"{path}: the scores are all {scores[0]}")
  return ScoredPairs([*firsts], [*seconds], scores)


# Splits. The public functions here are for `corpus` too.


def fractions_of_train(
  data: DataConfig, splits: Collection[str]
) -> dict[str, float]:
  """Returns the fraction of train that each missing split gets."""
  fractions = {"valid": data.valid_fraction, "test": data.test_fraction}
  return {n: share for n, share in fractions.items() if n not in splits}


def limit_of(split: str, max_bytes: int) -> int:
  """Returns the most bytes of a split; see `load_texts`."""
  return max_bytes if split == "train" else max_bytes // 8


def no_text_left(place: Any) -> ConfigError:
  """Returns the error that the training split of a file or set is empty."""
  return ConfigError(
    f"no text is left to train on in {place}; give more text or lower "
    "data.valid_fraction and data.test_fraction"
  )


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
      taken, runs = take(runs, round(fraction * size), len)
      parts[name] += itertools.chain(*taken)
    parts["train"] += itertools.chain(*runs)
  # In the order of the source, so no split is sorted by class or hash.
  return {name: rows.take(sorted(part)) for name, part in parts.items()}


def take(
  runs: Iterable[_Run], count: int, size: Callable[[_Run], int]
) -> tuple[list[_Run], list[_Run]]:
  """Returns runs of about `count` rows in all, and the other runs."""
  taken, rest = [], []
  for run in runs:
    if size(run) <= 2 * count:  # nearer to the count with it than without
      taken.append(run)
      count -= size(run)
    else:
      rest.append(run)
  return taken, rest


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
    parts[name] = Rows(rows.source, texts, None, [rows.source] * len(texts))
  return parts


def cuts(
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


def _cut_to(rows: Rows, limit: int) -> Rows:
  texts: list[Text] = [*first_bytes(map(_joined, rows.texts), limit)]
  return Rows(rows.source, texts, None, [rows.source] * len(texts))


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
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


def _limited(rows: Rows, limit: int, split: str) -> Rows:
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
