"""A model as a folder of a few files, that `load` reads back.

config.json       {"format", "schema", "config": ours, resolved, "labels",
                  "sha256": {file: checksum} of the others}
model.safetensors parameters, see `folding.serving.packed`
tokenizer.json    of the `tokenizers` library
token_map.json    where its ids are mapped to fewer rows
special_tokens.json  where more is known of what pads and ends than names tell
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import files, paths
from folding.compression.accounting import account
from folding.compression.shrink import shrink
from folding.config import Config
from folding.data.tokenizers import (
  MappedTokenizer,
  Tokenizer,
  load_tokenizer,
)
from folding.models.pretrained import load_pretrained
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.schema import ConfigError, require
from folding.serving.packed import load_packed, save_packed
from folding.training.restore import load_labels, load_run

FORMAT, SCHEMA = "folding", 1
CONFIG, WEIGHTS, TOKENIZER = (
  "config.json",
  "model.safetensors",
  "tokenizer.json",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model ready for use.

  Attributes:
    config: Resolved.
    params: Nested dicts of arrays.
    tokenizer: Text to the ids that the model reads.
    labels: Class names in id order; () for a next-token model.
  """

  config: Config
  params: dict[str, Any]
  tokenizer: Tokenizer
  labels: tuple[str, ...] = ()

  @property
  def model(self) -> Transformer:
    """The Linen module: `model.apply({"params": params}, tokens, mask)`."""
    rows = self.params["embed"]["embedding"].shape[0]
    return make_model(self.config, rows, len(self.labels))


def load(path: str | os.PathLike) -> Loaded:
  """Reads a model for use.

  Args:
    path: A folder: what `folding export` or `export` wrote, a run (its best
      checkpoint, else the newest), or a Hugging Face checkpoint.

  Raises:
    ConfigError: it is none of them, of another schema, truncated, or not what
      its checksum says.
  """
  path = os.fspath(path)
  config_path = os.path.join(path, CONFIG)
  require(
    os.path.isfile(config_path),
    f"{path} is no run and no exported model: it has no {CONFIG}",
  )
  values = files.read_json(config_path, dict)
  if values.get("format") == FORMAT:
    return _load_export(path, values)
  if "model_type" in values:
    return _load_pretrained(path)
  config, params, tokenizer = load_run(path)
  return Loaded(config, params, tokenizer, _labels_of(path, config, params))


def export(
  path: str | os.PathLike,
  config: Config,
  params: dict[str, Any],
  tokenizer: Tokenizer,
  labels: Sequence[str] = (),
) -> dict[str, int]:
  """Writes a model to a new folder.

  Args:
    path: Made if need be; it must be empty.
    config: Resolved.
    params: Its parameters; zeros take no room, and the dtype is kept.
    tokenizer: Of the parameters.
    labels: One name a class; () for a next-token model.

  Returns:
    {"dense": bytes of the dense twin, "values" and "masks": bytes of what is
    stored, as `folding.account` counts them, "files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_empty(path)
  os.makedirs(path, exist_ok=True)
  save_packed(params, os.path.join(path, WEIGHTS))
  tokenizer.save(os.path.join(path, TOKENIZER))
  values = {
    "format": FORMAT,
    "schema": SCHEMA,
    "labels": list(labels),
    "sha256": {
      name: _checksum(os.path.join(path, name))
      for name in sorted(os.listdir(path))
    },
    "config": config_lib.to_dict(config),
  }
  # Last: it marks the folder as whole.
  text = json.dumps(values, indent=2, ensure_ascii=False)
  files.write_file(os.path.join(path, CONFIG), text + "\n")
  return sizes(Loaded(config, params, tokenizer, tuple(labels))) | {
    "files": sum(e.stat().st_size for e in os.scandir(path) if e.is_file())
  }


def sizes(loaded: Loaded) -> dict[str, int]:
  """Returns bytes: "dense", of the dense twin; "values" and "masks", stored."""
  rows = loaded.params["embed"]["embedding"].shape[0]
  if isinstance(loaded.tokenizer, MappedTokenizer):
    rows = loaded.tokenizer.plain_size
  twin = make_model(
    config_lib.dense_twin(loaded.config), rows, len(loaded.labels)
  )
  found = account(loaded.params, param_shapes(twin))["bytes"]["overall"]
  return {
    "dense": found["dense"],
    "values": found["stored"],
    "masks": found["masks"],
  }


def shrunk(loaded: Loaded) -> Loaded:
  """Returns the model of `folding.shrink`, its tokenizer mapped where rows go."""
  config, params, cut = shrink(loaded.config, loaded.params)
  tokenizer = loaded.tokenizer
  rows = loaded.params["embed"]["embedding"].shape[0]
  if params["embed"]["embedding"].shape[0] < rows:
    tokenizer = MappedTokenizer(tokenizer, cut.token_map)
  params = jax.tree.map(np.asarray, params)
  return Loaded(config, params, tokenizer, loaded.labels)


def cast(loaded: Loaded, dtype: str) -> Loaded:
  """Returns the model with its floating-point arrays in another dtype.

  Rotary frequencies stay what they are: their rounding grows with the position.
  """

  def cast_one(name, x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not is_float or name.endswith("/frequency"):
      return x
    return np.asarray(x).astype(jnp.dtype(dtype))

  params = paths.map_named(cast_one, loaded.params)
  return dataclasses.replace(loaded, params=params)


def _load_export(path: str, values: dict[str, Any]) -> Loaded:
  found = values.get("schema")
  require(
    found == SCHEMA,
    f"{path} is an export of schema {found!r}, and this version of folding "
    f"reads schema {SCHEMA}",
  )
  try:
    config = config_lib.resolve(config_lib.from_dict(values["config"]))
    labels = values["labels"]
    checksums = values["sha256"]
  except (KeyError, TypeError) as error:
    raise ConfigError(f"{path}/{CONFIG} lacks {error}") from None
  require(
    isinstance(labels, list)
    and all(isinstance(label, str) for label in labels)
    and len(set(labels)) == len(labels),
    f"{path}/{CONFIG}: labels are a list of different names; they are {labels!r}",
  )
  require(
    isinstance(checksums, dict),
    f"{path}/{CONFIG}: sha256 is a checksum by file; it is {checksums!r}",
  )
  for name, expected in ({WEIGHTS: "", TOKENIZER: ""} | checksums).items():
    file = os.path.join(path, name)
    require(os.path.isfile(file), f"{path} has no {name}")
    require(
      _checksum(file) == expected,
      f"{file} is not the file that was exported: its checksum differs from "
      f"that in {CONFIG}; copy it again",
    )
  params = load_packed(os.path.join(path, WEIGHTS))
  tokenizer = load_tokenizer(os.path.join(path, TOKENIZER))
  loaded = Loaded(config, params, tokenizer, tuple(labels))
  _check_fit(loaded, path)
  return loaded


def _load_pretrained(path: str) -> Loaded:
  found = load_pretrained(path)
  is_lm = found.config.causal and not found.num_classes
  config = Config(
    task="lm" if is_lm else "classify",
    preset="none",
    data=config_lib.DataConfig(path=path, length=found.max_length),
    model=found.config,
  )
  labels = found.label_names or _numbers(found.num_classes)
  params = dict(found.params)
  if not labels:
    params.pop("pooler", None)  # an encoder alone: nothing reads it
  loaded = Loaded(
    config_lib.resolve(config),
    params,
    load_tokenizer(found.tokenizer_path),
    labels,
  )
  _check_fit(loaded, path)
  return loaded


def _check_fit(loaded: Loaded, path: str) -> None:
  """Refuses parameters that are not those of the config."""
  expected = {
    n: x.shape for n, x in paths.flatten(param_shapes(loaded.model)).items()
  }
  found = {n: np.shape(x) for n, x in paths.flatten(loaded.params).items()}
  for name in sorted(expected.keys() | found.keys()):
    require(
      expected.get(name) == found.get(name),
      f"the parameters in {path} are not of its config: {name} is "
      f"{found.get(name)}, not {expected.get(name)}",
    )


def _labels_of(
  path: str, config: Config, params: dict[str, Any]
) -> tuple[str, ...]:
  if config.task == "lm":
    return ()
  return load_labels(path) or _numbers(params["head"]["kernel"].shape[1])


def _numbers(count: int) -> tuple[str, ...]:
  return tuple(map(str, range(count)))


def _checksum(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
