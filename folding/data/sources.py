"""Text sources: local files, TFDS data sets and Python's standard library.

`load_texts` returns strings in memory, by split. `corpus` reads the text of
language models.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from folding.config import DataConfig
from folding.data import labels as labels_lib
from folding.data import local_files, python_stdlib
from folding.data.rows import Rows
from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.tasks import TASKS, Task

_log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


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
  machine and for every seed. Texts are distributed by a hash of the text, within
  each class; equal texts stay in one split.

  `data.max_bytes` limits the training text; valid and test get an eighth of it
  each. Texts are kept or dropped whole, chosen by the same hash.

  Args:
    data: The source and its fields.
    task: Decides what labels are; "embed" ignores them, and a line of a .txt is
      a text of it. Text of "lm" is read by `corpus`.

  Raises:
    ConfigError: the source is missing, malformed or cannot be fetched.
  """
  form = TASKS[task].labels
  splits, names = read(data, TASKS[task])
  train = splits["train"]
  known: tuple[str, ...] = ()
  if form is not None and train.labels is not None:
    # Before `max_bytes`, which may drop all rows of a class.
    known = labels_lib.output_names(train.labels, form, train.source, names)
  fractions = fractions_of_train(data, splits)
  if fractions:
    digests = np.array([digest(text) for text in train.texts], np.uint64)
    by_class = form is not None and form.kind == "class"
    classes = [str(x) for x in train.labels or ()] if by_class else None
    found = set_aside(digests, fractions, classes)
    splits |= {
      x: train.take(np.flatnonzero(i).tolist()) for x, i in found.items()
    }
  if data.max_bytes is not None:
    for split in SPLITS:
      limit = limit_of(split, data.max_bytes)
      splits[split] = _limited(splits[split], limit, split)
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


def read(
  data: DataConfig, task: Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Returns the rows of the splits that a source has, and names of classes."""
  require_room(data)
  if data.path is not None:
    splits, names = local_files.read_path(pathlib.Path(data.path), data, task)
  elif is_tfds(data):
    from folding.data import tfds_sets  # imports TFDS, which takes seconds

    splits, names = tfds_sets.read(data, task)
  else:
    splits, names = python_stdlib.read(data, task)
  train = splits["train"]
  for rows in splits.values():
    if len(rows.columns) + len(train.columns) == 3:
      raise ConfigError(
        f"{rows.source} has the texts {' and '.join(rows.columns)}, and "
        f"{train.source} {' and '.join(train.columns)}; set data.text_field"
      )
  return splits, names


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
  columns = DataConfig(
    text_field=("sentence1", "sentence2"), label_field="score"
  )
  rows = local_files.read_file([pathlib.Path(path)], columns, TASKS["regress"])
  firsts = [first for first, _ in rows.texts]
  seconds = [second for _, second in rows.texts]
  scores = np.array(rows.labels, np.float32)
  if np.ptp(scores) == 0:
    raise ConfigError(f"{path}: the scores are all {scores[0]}")
  return ScoredPairs(firsts, seconds, scores)


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


def set_aside(
  digests: np.ndarray,
  fractions: dict[str, float],
  classes: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
  """Returns {split: bool[rows]} of train and of the splits set aside from it.

  Args:
    digests: uint64 hash of each row. Equal rows stay in one split.
    fractions: Fraction of each split other than train.
    classes: Class of each row, to set aside equally much of each; None: one.
  """
  # As numbers, hashes have the order of their bytes.
  _, group, counts = np.unique(digests, return_inverse=True, return_counts=True)
  class_of: dict[int, str] = {}  # of equal rows, the first class
  names = classes or [""] * len(digests)
  for run, name in zip(group.tolist(), names, strict=True):
    class_of[run] = min(name, class_of.get(run, name))
  runs_of: dict[str, list[int]] = {}
  for run in range(len(counts)):
    runs_of.setdefault(class_of[run], []).append(run)
  part = np.zeros(len(counts), int)
  for runs in runs_of.values():
    size = int(counts[runs].sum())
    for number, fraction in enumerate(fractions.values(), 1):
      left = round(fraction * size)
      for run in runs:
        # Nearer to the fraction with it than without.
        if part[run] == 0 and counts[run] <= 2 * left:
          part[run] = number
          left -= counts[run]
  return {
    split: part[group] == number
    for number, split in enumerate(("train", *fractions))
  }


def _joined(text: Text) -> str:
  return text if isinstance(text, str) else "\t".join(text)


def digest(text: Text) -> int:
  """Returns a hash of 64 bits, the same on every machine."""
  return int.from_bytes(python_stdlib.digest(_joined(text)), "big")


def _limited(rows: Rows, limit: int, split: str) -> Rows:
  """Returns whole rows of at most `limit` bytes."""
  sizes = [len(_joined(text).encode("utf-8")) for text in rows.texts]
  order = sorted(range(len(sizes)), key=lambda i: (digest(rows.texts[i]), i))
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
