"""Models ready for use, and the folders that they are read from.

`load` reads a run, a compact export (see `export`) or a Hugging Face
checkpoint. `shrunk` and `cast` return smaller forms of a model.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import files, paths
from folding.compression.accounting import account
from folding.data.tokenizers import MappedTokenizer, load_tokenizer
from folding.errors import ConfigError, reason
from folding.model import Model
from folding.models import hf_weights
from folding.models.hf_weights import CONFIG, TOKENIZER, WEIGHTS
from folding.models.shape import Shape, shape_of
from folding.models.shrink import shrink
from folding.models.transformer import (
  make_model,
  param_shapes,
  require_params,
)
from folding.serving import card
from folding.serving.packed import load_packed
from folding.tasks import task_of
from folding.training.checkpoint import load_run
from folding.training.run_dir import load_order
from folding.training.trained import read_checkpoint
from folding.typed import edited

FORMAT, SCHEMA = "folding", 1


Loaded = Model  # its earlier name, for one release


def load(path: str | os.PathLike, *, pairs: bool = False) -> Model:
  """Reads a model for use.

  Args:
    path: A folder: what `folding export` or `export` wrote, a run (its best
      checkpoint, or the newest), or a Hugging Face checkpoint. Or a name on
      the Hugging Face hub, such as "org/model".
    pairs: Whether a Hugging Face checkpoint reads pairs; its files do not record it.

  Raises:
    ConfigError: it is none of them, has another schema, is truncated, or
      differs from its checksums; or `pairs` is given for a model of single texts.
  """
  model = _load(path, pairs)
  if pairs and model.pair is None:
    raise ConfigError(
      f"{path} reads single texts; pairs are for a Hugging Face checkpoint with a "
      "head for them"
    )
  return model


def _load(path: str | os.PathLike, pairs: bool) -> Model:
  path = str(hf_weights.find_pretrained(os.fspath(path)))
  config_path = os.path.join(path, CONFIG)
  if not os.path.isfile(config_path):
    raise ConfigError(
      f"{path} is neither a run nor an exported model: it has no {CONFIG}"
    )
  values = files.read_json(config_path, dict)
  if values.get("format") == FORMAT:
    return _load_compact(path, values)
  if "folding" in values:
    raise ConfigError(
      f"{path} is a program for onnxruntime; load what it was exported from"
    )
  if "model_type" in values:
    model = read_checkpoint(path, segments=pairs)
    if pairs and task_of(model).labels:
      model = dataclasses.replace(model, pair=("sentence1", "sentence2"))
    given = {
      name: np.shape(w) for name, w in paths.flatten(model.params).items()
    }
    require_shapes(path, model.shape, len(model.labels), given)
    origin = card.origin_of_folder(path)._replace(dtype=model.origin.dtype)
    return dataclasses.replace(model, origin=origin)
  model = load_run(path)
  labels = model.labels
  if task_of(model).labels:
    count = model.params["head"]["kernel"].shape[1]
    labels = labels or tuple(map(str, range(count)))
    if len(labels) != count:
      raise ConfigError(
        f"{path}/labels.json has {len(labels)} names for {count} classes"
      )
  origin = card.origin_of_run(path, model.origin.base)
  length = load_order(path).data.length
  if length < model.shape.max_length:
    note = f"It was trained on texts of at most {length} tokens."
    origin = origin._replace(notes=(note, *origin.notes))
  return dataclasses.replace(model, labels=labels, origin=origin, targets=None)


def _load_compact(path: str, values: dict[str, Any]) -> Model:
  schema = values.get("schema")
  if type(schema) is not int or schema != SCHEMA:
    raise ConfigError(
      f"{path} is an export of schema {schema!r}, and this version of folding "
      f"reads schema {SCHEMA}"
    )
  try:
    config = config_lib.from_saved(values["config"])
    labels = tuple(values["labels"])
    if task_of(config).labels and not labels:  # an earlier export
      is_normalized = values.get("is_normalized") is True
      config = edited(
        config, {"task": "embed", "model.normalize": is_normalized}
      )
    config = config_lib.resolve(config)
    checksums = {WEIGHTS: "", TOKENIZER: ""} | values["sha256"]
  except (KeyError, TypeError) as error:
    raise ConfigError(f"{path}/{CONFIG} is damaged: {reason(error)}") from None
  require_names(labels, f"{path}/{CONFIG} is damaged: ")
  for name, expected in checksums.items():
    if os.path.basename(name) != name:
      raise ConfigError(f"{path}/{CONFIG} is damaged: sha256 names {name!r}")
    file = os.path.join(path, name)
    if not os.path.isfile(file):
      raise ConfigError(f"{path} has no {name}")
    if file_sha256(file) != expected:
      raise ConfigError(
        f"{file} is not the file that was exported: its checksum differs from "
        f"that in {CONFIG}; copy it again"
      )
  files.require_as_exported(path, skip=checksums)
  params = load_packed(
    os.path.join(path, WEIGHTS),
    functools.partial(require_shapes, path, shape_of(config), len(labels)),
  )
  tokenizer = load_tokenizer(os.path.join(path, TOKENIZER))
  origin = card.origin_of_folder(path)
  return Model.of(config, params, tokenizer, labels, origin)


def require_names(labels: Sequence[str], start: str = "") -> None:
  """Raises `ConfigError` unless labels are different strings, none of them empty.

  Args:
    labels: Names of the outputs of a head.
    start: Start of the message.
  """
  names = {x for x in labels if isinstance(x, str) and x.strip()}
  if len(names) != len(labels):
    raise ConfigError(
      f"{start}labels must be different names; they are {labels!r}"
    )


def require_shapes(
  path: str,
  shape: Shape,
  num_classes: int,
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises `ConfigError` unless arrays have the shapes of a model."""
  rows = shapes.get("embed/embedding", (0,))[0]
  model = make_model(shape, rows, max(1, num_classes))
  require_params(model, shapes, path)


def require_exportable(path: str | os.PathLike, params: Any) -> str:
  """Returns the path of a folder that a model can be exported to.

  Raises:
    ConfigError: the folder is not empty, or see `require_finite_weights`.
  """
  files.require_empty(os.fspath(path))
  require_finite_weights(params)
  return os.fspath(path)


def require_finite_weights(params: Any) -> None:
  """Raises `ConfigError` if a parameter is NaN or infinite.

  Some formats would turn it into an ordinary number.
  """
  for name, w in paths.flatten(params).items():
    is_float = jnp.issubdtype(w.dtype, jnp.floating)
    if is_float and not np.isfinite(np.asarray(w)).all():
      raise ConfigError(
        f"the parameter {name} has values that are NaN or infinite, so the model "
        "is not exported"
      )


def file_sha256(path: str) -> str:
  """Returns the SHA-256 of a file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def shrunk(loaded: Model) -> Model:
  """Returns the model after `folding.shrink`, with its tokenizer mapped.

  The function stays the same, to float rounding: tokens of a classifier with a
  zero embedding share one row of zeros.
  """
  shape, params, cut = shrink(loaded.shape, loaded.params)
  tokenizer = loaded.tokenizer
  if "embed/embedding" in cut.kept:
    tokenizer = MappedTokenizer(tokenizer, cut.token_map)
  return dataclasses.replace(
    loaded,
    shape=shape,
    params=jax.tree.map(np.asarray, params),
    tokenizer=tokenizer,
  )


def cast(loaded: Model, dtype: str) -> Model:
  """Returns the model with its floating-point arrays in another dtype.

  Rotary frequencies and ALiBi slopes keep theirs: their rounding error grows with
  the position.

  Raises:
    ConfigError: the dtype is not a floating-point one.
  """
  require_float(dtype)

  def cast_one(name, x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not is_float or name.endswith(("/frequency", "/log_slopes")):
      return x
    return np.asarray(x).astype(jnp.dtype(dtype))

  params = paths.map_named(cast_one, loaded.params)
  return dataclasses.replace(loaded, params=params)


def require_float(dtype: str) -> None:
  """Raises `ConfigError` unless a dtype is a floating-point one."""
  if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
    raise ConfigError(
      f"{dtype} would round parameters to whole numbers; use float32 or "
      "bfloat16 (int8 is for --format=onnx)"
    )


def _dense_shapes(loaded: Model) -> Any:
  """Returns the parameters of the dense baseline, as shapes."""
  rows = loaded.num_rows
  if isinstance(loaded.tokenizer, MappedTokenizer):
    rows = loaded.tokenizer.plain_size
  return param_shapes(
    make_model(loaded.shape.dense(), rows, len(loaded.labels))
  )


def dense_bytes(loaded: Model) -> int:
  """Returns the bytes of the dense baseline, in the type of the model."""
  leaves = jax.tree.leaves(_dense_shapes(loaded))
  return sum(x.size for x in leaves) * jnp.dtype(loaded.dtype).itemsize


def sizes(loaded: Model) -> dict[str, int]:
  """Returns bytes: "dense" of the dense baseline, "values" and "masks" stored.

  It counts the zeros of all parameters.
  """
  found = account(loaded.params, _dense_shapes(loaded))["bytes"]["overall"]
  return {
    "dense": found["dense"],
    "values": found["stored"],
    "masks": found["masks"],
  }
