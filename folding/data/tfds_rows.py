"""Rows of a TensorFlow Datasets data set, read without TensorFlow.

Preparing one, once, takes TensorFlow where its builder or its archives do.
"""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Registers the text builders; without it TFDS finds "glue" only by luck.
import tensorflow_datasets.text
from absl import logging

from folding import config, schema
from folding.data import local_files, python_stdlib

_SPLITS = {
  "train": ("train",),
  "valid": ("validation", "valid", "dev"),
  "test": ("test",),
}


def read_tfds(
  data: config.DataConfig, task: config.Task
) -> tuple[dict[str, local_files.Rows], list[str] | None]:
  """Reads a TFDS data set; the names are those of a `ClassLabel`.

  Args:
    data: Its name, folder and columns.
    task: A classifier's rows have labels.

  Raises:
    schema.ConfigError: it cannot be prepared, or has no such columns.
  """
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
  for split, prefixes in _SPLITS.items():
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
    check = "check the name, the network and data.dir"
    if "No module named 'tensorflow'" in str(error):
      check = "pip install tensorflow, which only this needs"
    raise schema.ConfigError(
      f"cannot fetch or prepare the TFDS data set {data.name!r}: "
      f"{schema.first_line(error)}; {check}, or {instead}"
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
