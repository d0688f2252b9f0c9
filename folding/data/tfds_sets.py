"""Text in data sets of TensorFlow Datasets.

Prepared data is read without TensorFlow. To prepare it, some builders and all
archives need TensorFlow.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Registers the text builders. TFDS may not find "glue" without it.
import tensorflow_datasets.text
from tensorflow_datasets.core import constants

from folding import errors
from folding.config import DataConfig
from folding.data import rows as rows_lib
from folding.data.rows import Rows
from folding.errors import ConfigError
from folding.tasks import Label, Labels, Task

_log = logging.getLogger(__name__)


def read(
  data: DataConfig, task: Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Reads a TFDS data set; the names are those of a `ClassLabel`."""
  builder: Any = _prepared(data)
  table: Any = builder.info.features
  features: dict[str, Any] = dict(table.items())
  label_field, form = "", task.labels
  if form:
    label_field = _label_feature(data, features, form)
  texts = [
    name
    for name, kind in features.items()
    if isinstance(kind, tfds.features.Text) and name != label_field
  ]
  place = f"the TFDS data set {data.name}"
  columns = rows_lib.choose_texts(place, texts, texts, data, task)
  feature: Any = features.get(label_field)
  names = getattr(getattr(feature, "feature", feature), "names", None)
  splits = {}
  for split, prefixes in rows_lib.STEMS.items():
    # By prefix: MNLI of GLUE has "validation_matched".
    found = [s for s in builder.info.splits if s.startswith(prefixes)]
    if not found:
      continue
    labels = [] if label_field else None
    rows = Rows(f"{data.name}[{found[0]}]", [], labels, [], columns)
    limit = data.max_bytes or math.inf
    if split == "train":  # room for the splits that may be set aside from it
      limit /= 1 - data.valid_fraction - data.test_fraction
    _fill(
      rows,
      builder.as_data_source(found[0]),
      lambda example: form and _tfds_label(example[label_field], names, form),
      limit,
    )
    # The test split of STS-B has no scores.
    if rows.texts and set(rows.labels or ()) != {-1.0}:
      splits[split] = rows
  if "train" not in splits:
    raise ConfigError(
      f"{place} has no labelled train split; its splits are "
      f"{', '.join(builder.info.splits)}"
    )
  if form and form.kind == "class" and not names:
    splits = _without_unknown_classes(splits)
  return splits, names


def _fill(
  rows: Rows,
  examples: Any,
  read_label: Callable[[dict[str, Any]], Label | None],
  limit: int | float,
) -> None:
  """Adds the labelled examples to rows, until their texts have `limit` bytes."""
  num_bytes = 0
  for example in examples:
    if rows.labels is not None:
      label = read_label(example)
      if label is None:
        continue
      rows.labels.append(label)
    encoded = [example[name] for name in rows.columns]
    texts = [text.decode("utf-8", errors="replace") for text in encoded]
    rows.texts.append(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
    rows.places.append(rows.source)
    num_bytes += sum(map(len, encoded))
    if num_bytes >= limit:
      return


def _without_unknown_classes(splits: dict[str, Rows]) -> dict[str, Rows]:
  """Returns the splits without rows of classes that train lacks.

  The train split of sentiment140 has no neutral tweets, the test split has.
  """
  known = set(splits["train"].labels or ())
  found = {}
  for split, rows in splits.items():
    kept = [i for i, x in enumerate(rows.labels or ()) if x in known]
    if len(kept) < len(rows.texts):
      _log.warning(
        "%s: %d rows of classes that train lacks are ignored",
        split,
        len(rows.texts) - len(kept),
      )
    found[split] = rows.take(kept)
  return found


def require_prepared(data: DataConfig, workdir: str) -> None:
  """Checks that reading the data of a run will neither fetch nor write any.

  TFDS is asked only for data in its default folder. Files of a data set can name
  code, and a run may come from someone else.

  Raises:
    ConfigError: the TFDS data set is not prepared, or is in another folder.
  """
  builder, default = None, str(constants.DATA_DIR)
  is_default = not data.dir or _whole(data.dir) == _whole(default)
  if not is_default:
    raise ConfigError(
      f"the config of {workdir} chooses the folder {data.dir} for the TFDS data "
      f"set {data.name!r}, and a run that is read back may not; if you trust that "
      f"folder, set the environment variable TFDS_DATA_DIR={data.dir}"
    )
  with contextlib.suppress(Exception):  # it may fail in any way
    if ":" not in data.name:  # a name that TFDS would look up in the network
      builder = _builder(data)
  if builder is None or not builder.is_prepared():
    raise ConfigError(
      f"the data set {data.name!r} of {workdir} is not prepared in "
      f"{data.dir or 'the TFDS folder'}, and a run that is read back prepares "
      "none; if you trust its config, prepare it with folding train "
      f"--config={workdir}/config.json --workdir=NEW"
    )


def _whole(folder: str) -> str:
  return os.path.realpath(os.path.expanduser(folder))


def _prepared(data: DataConfig) -> tfds.core.DatasetBuilder:
  """Returns a builder whose data is on this machine."""
  if not data.name:
    raise ConfigError(
      "set data.path, a file or folder, or data.name, a TFDS data set"
    )
  instead = "put text in a local file and set data.path"
  try:
    builder = _builder(data)
    try:
      builder.download_and_prepare()
    except Exception:  # TFDS and its builders raise many kinds
      builder = _builder(data)
      if not builder.is_prepared():  # nor by another process
        raise
  except ConfigError:
    raise
  except tfds.core.DatasetNotFoundError as error:
    raise ConfigError(
      f"TFDS has no data set {data.name!r} (data.name), and there is no such file "
      f"or folder; see the names in its catalog, or {instead}"
    ) from error
  # A builder may fail in any way: no network, a missing library, a moved page.
  except Exception as error:
    check = "check the name, the network and data.dir"
    if "No module named 'tensorflow'" in str(error):
      check = "pip install tensorflow, which only this needs"
    raise ConfigError(
      f"cannot fetch or prepare the TFDS data set {data.name!r}: "
      f"{errors.first_line(error)}; {check}, or {instead}"
    ) from error
  return builder


def _builder(data: DataConfig) -> tfds.core.DatasetBuilder:
  with _no_foreign_features():
    return tfds.builder(
      data.name, data_dir=data.dir, file_format="array_record"
    )


@contextlib.contextmanager
def _no_foreign_features() -> Iterator[None]:
  """Keeps TFDS from importing modules that the files of a data set name."""
  connector: Any = tfds.features.FeatureConnector
  original = vars(connector)["cls_from_name"]

  def find(cls, name):
    if not name.startswith("tensorflow_datasets."):
      raise ConfigError(
        f"the files of the data set name the feature class {name!r}, and only "
        "those of tensorflow_datasets are read; prepare it without that feature"
      )
    return original.__func__(cls, name)

  connector.cls_from_name = classmethod(find)
  try:
    yield
  finally:
    connector.cls_from_name = original


def _tfds_label(
  value: Any, names: Sequence[str] | None, form: Labels
) -> Label | None:
  """Returns a label of TFDS; None: the row is unlabelled."""
  if form.kind == "score":
    return float(value)
  ids = [int(x) for x in np.atleast_1d(value)]
  if any(i < 0 for i in ids):
    return None
  classes = tuple(names[i] if names else str(i) for i in ids)
  return classes if form.kind == "classes" else classes[0]


def _label_feature(
  data: DataConfig, features: dict[str, Any], form: Labels
) -> str:
  """Returns the label's name: configured, usual, or the coarsest class."""
  words, rank, number = {
    "class": ("class", 0, np.integer),
    "score": ("score", 0, np.number),
    "classes": ("list of classes", 1, np.integer),
  }[form.kind]
  fitting = {
    name: feature
    for name, feature in features.items()
    if feature.shape is not None
    and len(feature.shape) == rank
    and np.issubdtype(feature.np_dtype, number)
  }
  classes = {
    name: feature.num_classes or 0
    for name, feature in fitting.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  usual = [name for name in form.columns if name in features]
  if data.label_field:
    wanted = data.label_field
  elif usual:
    wanted = usual[0]
  elif classes and form.kind == "class":
    wanted = min(classes, key=lambda name: classes[name])
  else:
    wanted = next(iter(fitting)) if len(fitting) == 1 else None
  if wanted is None or wanted not in fitting:
    raise ConfigError(
      f"the TFDS data set {data.name} has no {words} column "
      f"{wanted or 'that can be guessed'} (data.label_field); its columns are: "
      f"{', '.join(features)}"
    )
  return wanted
