"""Where text comes from: a local path, TFDS by name, or Python's own library.

Every source ends as `Texts`: plain strings in memory, by split.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Registers the text builders; without it TFDS finds "glue" only by luck.
import tensorflow_datasets.text
from absl import logging

from folding import config, schema
from folding.data import local_files, python_stdlib

SPLITS = ("train", "valid", "test")
_TFDS_SPLITS = {
  "train": ("train",),
  "valid": ("validation", "valid", "dev"),
  "test": ("test",),
}


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
    splits, names = _read_tfds(data, task)
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


def _read_tfds(
  data: config.DataConfig, task: config.Task
) -> tuple[dict[str, local_files.Rows], list[str] | None]:
  """Reads a TFDS data set; the names are those of a `ClassLabel`."""
  builder = _prepared(data, task)
  table: Any = builder.info.features
  features: dict[str, Any] = dict(table.items())
  label_field = None if task == "lm" else _label_feature(data, features)
  text_field = local_files.choose_text(
    f"the TFDS data set {data.name}",
    [
      name
      for name, kind in features.items()
      if isinstance(kind, tfds.features.Text) and name != label_field
    ],
    data.text_field,
  )
  names = getattr(features.get(label_field or ""), "names", None)
  splits = {}
  for split, prefixes in _TFDS_SPLITS.items():
    # By prefix: "validation_matched" is what GLUE's MNLI has.
    found = [s for s in builder.info.splits if s.startswith(prefixes)]
    if found:
      source = f"{data.name}[{found[0]}]"
      rows = local_files.Rows(source, [], None if task == "lm" else [], [])
      limit = data.max_bytes
      if limit is not None and split == "train":
        # Room for what may be set aside from it.
        limit /= 1 - data.valid_fraction - data.test_fraction
      _fill(rows, builder, found[0], text_field, label_field, names, limit)
      if rows.texts:
        splits[split] = rows
  schema.require(
    "train" in splits,
    f"the TFDS data set {data.name} has no labelled train split; its splits "
    f"are {', '.join(builder.info.splits)}",
  )
  if label_field and not names:
    # Such as the neutral tweets of sentiment140, which its train has none of.
    known = set(splits["train"].labels or ())
    for split, rows in splits.items():
      keep = [i for i, x in enumerate(rows.labels or ()) if x in known]
      if len(keep) < len(rows.texts):
        num_left = len(rows.texts) - len(keep)
        logging.warning(
          "%s: left out %d rows of classes that train lacks", split, num_left
        )
        splits[split] = rows.take(keep)
  return splits, names


def _fill(rows, builder, split, text_field, label_field, names, limit) -> None:
  """Reads a split into `rows` until `limit` bytes; label -1 is unlabelled."""
  num_bytes = 0
  for example in builder.as_data_source(split):
    text = example[text_field]
    if label_field is not None:
      label = int(example[label_field])
      if label < 0:
        continue
      rows.labels.append(names[label] if names else str(label))
    rows.texts.append(text.decode("utf-8", errors="replace"))
    rows.lines.append(0)
    num_bytes += len(text)
    if limit is not None and num_bytes >= limit:
      return


def _prepared(
  data: config.DataConfig, task: config.Task
) -> tfds.core.DatasetBuilder:
  """Returns a builder whose data is on this machine."""
  schema.require(
    bool(data.name),
    "say what to train on: data.path, a file or folder, or data.name, of TFDS",
  )
  if data.name == "python_stdlib":
    kind = "source" if task == "lm" else "topic"
    return python_stdlib.prepare(kind, data.dir)
  instead = "put text in a local file and set data.path"

  def builder_of() -> tfds.core.DatasetBuilder:
    return tfds.builder(
      data.name, data_dir=data.dir, file_format="array_record"
    )

  try:
    builder = builder_of()
    try:
      builder.download_and_prepare()
    except Exception:
      # Another process may have; if not, what was raised is told below.
      builder = builder_of()
      if not builder.is_prepared():
        raise
  except tfds.core.DatasetNotFoundError as error:
    raise schema.ConfigError(
      f"TFDS has no data set {data.name!r} (data.name); see the names in its "
      f"catalog, or {instead}"
    ) from error
  # A builder may fail in any way: no network, a missing library, a moved page.
  except Exception as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise schema.ConfigError(
      f"cannot fetch or prepare the TFDS data set {data.name!r}: {reason}; "
      f"check the name, the network and data.dir, or {instead}"
    ) from error
  return builder


def _label_feature(data: config.DataConfig, features: dict) -> str:
  """Returns the label's name: configured, "label", or the coarsest class."""
  wanted = data.label_field or ("label" if "label" in features else None)
  classes = {
    name: feature.num_classes
    for name, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  if wanted is None and classes:
    wanted = min(classes, key=lambda name: classes[name] or 0)
  whole = [
    name
    for name, feature in features.items()
    if feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)
  ]
  if wanted is None and len(whole) == 1:
    wanted = whole[0]
  schema.require(
    wanted in whole,
    f"the TFDS data set {data.name} has no class column "
    f"{wanted or 'that can be guessed'} (data.label_field); its columns are: "
    f"{', '.join(features)}",
  )
  assert wanted is not None
  return wanted


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
