"""Where text comes from: a local path, TFDS by name, or Python's own library.

Every source ends as `Texts`: plain strings in memory, by split.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from folding import config, schema
from folding.data import local_files, python_stdlib, tfds_rows

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Texts:
  """Raw examples by split ("train", "valid", "test").

  Attributes:
    texts: Strings of each split; empty where a source has no such split and
      the configured fraction to set aside is 0.
    labels: int32 class ids beside the texts; None for language modelling.
    label_names: Class names in id order; () for language modelling.
  """

  texts: dict[str, Sequence[str]]
  labels: dict[str, np.ndarray] | None
  label_names: tuple[str, ...]


def load_texts(data: config.DataConfig, task: config.Task) -> Texts:
  """Reads the text of a run.

  `data.path` (see `local_files`) wins over `data.name`. A split that the source
  lacks is set aside from train by `valid_fraction` and `test_fraction`, the
  same way on every machine and for every seed: a single text is cut at line
  ends, in the order train, valid, test; several are dealt out in the order of
  a hash of the text (for each class by itself), equal texts together.

  `data.max_bytes` caps the training text, and valid and test at an eighth of
  that each, so that evaluation stays in proportion. A language model's text
  is cut at the last line end that fits; labelled texts are kept or left out
  whole, chosen by the same hash.

  Args:
    data: The source and its fields.
    task: "lm" (labels are ignored) or "classify".

  Raises:
    schema.ConfigError: the source is missing, malformed or cannot be fetched.
  """
  schema.require(
    data.max_bytes is None or data.max_bytes >= 16,
    f"data.max_bytes {data.max_bytes} is too small to hold text",
  )
  if data.path is not None:
    splits, names = local_files.read_path(data, task)
  else:
    splits, names = tfds_rows.read_tfds(data, task)
  known = ()
  if task == "classify":
    # Before rows are taken away, which may be all of a class.
    known = tuple(names or _label_names(splits["train"]))
    schema.require(
      len(known) > 1,
      f"{splits['train'].source} has one class, {', '.join(known)}; a classifier "
      "needs two",
    )
  fractions = {"valid": data.valid_fraction, "test": data.test_fraction}
  fractions = {n: part for n, part in fractions.items() if n not in splits}
  if fractions:
    splits = splits | _set_aside(splits["train"], fractions)
  if data.max_bytes is not None:
    for name in SPLITS:
      limit = data.max_bytes if name == "train" else data.max_bytes // 8
      splits[name] = _cap(splits[name], name, limit)
  schema.require(
    bool(splits["train"].texts),
    f"no text is left to train on in {splits['train'].source}; give more text "
    "or lower data.valid_fraction and data.test_fraction",
  )
  texts: dict[str, Sequence[str]] = {s: splits[s].texts for s in SPLITS}
  if task == "lm":
    return Texts(texts, None, ())
  labels = {
    split: _label_ids(splits[split], known, allow_ids=names is not None)
    for split in SPLITS
  }
  return Texts(texts, labels, known)


def _set_aside(
  rows: local_files.Rows, fractions: dict[str, float]
) -> dict[str, local_files.Rows]:
  """Returns train, less the fractions set aside, and those splits."""
  if rows.labels is None and len(rows.texts) == 1:
    return _cut(rows, fractions)
  same: dict[str, list[int]] = {}  # stay together, of two classes too
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
        if len(run) <= 2 * left:  # it ends nearer to the share than without
          parts[name] += run
          left -= len(run)
        else:
          rest.append(run)
      runs = rest
    parts["train"] += itertools.chain(*runs)
  # In the order of the source, so that no split is sorted by class or hash.
  return {name: rows.take(sorted(part)) for name, part in parts.items()}


def _cut(
  rows: local_files.Rows, fractions: dict[str, float]
) -> dict[str, local_files.Rows]:
  """Cuts the one text into train and the fractions, in order, at line ends."""
  [text] = rows.texts
  shares = {"train": 1 - sum(fractions.values()), **fractions}
  # A line end further on than this would take too much of the next part.
  reach = round(min(s for s in shares.values() if s > 0) * len(text)) // 2
  bounds = np.cumsum(list(shares.values()))
  parts, start = {}, 0
  for (name, share), bound in zip(shares.items(), bounds, strict=True):
    stop = start
    if share > 0:
      stop = round(bound * len(text))
      # 0 where no line ends within reach: then at the character.
      stop = text.find("\n", max(stop - 1, 0), stop + reach) + 1 or stop
    texts = [text[start:stop]] if stop > start else []
    parts[name] = local_files.Rows(rows.source, texts, None, [0] * len(texts))
    start = stop
  return parts


def _cap(rows: local_files.Rows, split: str, limit: int) -> local_files.Rows:
  """Returns at most `limit` bytes of the rows."""
  if rows.labels is None:
    texts, left = [], limit
    for text in rows.texts:
      piece = text.encode("utf-8")
      if len(piece) > left:
        # At a line end; without one, at a character.
        piece = piece[: piece.rfind(b"\n", 0, left) + 1] or piece[:left]
        text, left = piece.decode("utf-8", errors="ignore"), 0
      texts.append(text)
      left -= len(piece)
      if left <= 0:
        break
    texts = [text for text in texts if text]
    return local_files.Rows(rows.source, texts, None, [0] * len(texts))
  sizes = [len(text.encode("utf-8")) for text in rows.texts]
  order = sorted(
    range(len(sizes)), key=lambda i: (python_stdlib.digest(rows.texts[i]), i)
  )
  kept, left = [], limit
  for i in order:
    if sizes[i] <= left:
      kept.append(i)
      left -= sizes[i]
  schema.require(
    bool(kept) or not order,
    f"data.max_bytes leaves no text of {split}, which gets {limit:,} bytes of it; "
    "raise it",
  )
  return rows.take(sorted(kept))


def _label_names(train: local_files.Rows) -> list[str]:
  """Returns the labels of train in order: numbers by value, words by letter."""
  names = sorted(set(train.labels or ()))
  if all(name.isdecimal() and len(name) < 20 for name in names):
    return sorted(names, key=int)  # stable: "01" before "1"
  return names


def _label_ids(
  rows: local_files.Rows, names: Sequence[str], allow_ids: bool
) -> np.ndarray:
  """Returns class ids of labels, which are names or, if allowed, ids."""
  ids = {name: i for i, name in enumerate(names)}
  numbers = {str(i): i for i in range(len(names))}
  if allow_ids and not numbers.keys() & ids.keys():  # or "1" would be two
    ids |= numbers
  for index, label in enumerate(rows.labels or ()):
    schema.require(
      label in ids,
      f"{rows.place(index)}: label {label!r} is not one of the {len(names)} "
      f"of {'labels.txt' if allow_ids else 'train'}: {', '.join(names[:20])}",
    )
  return np.array([ids[label] for label in rows.labels or ()], np.int32)
