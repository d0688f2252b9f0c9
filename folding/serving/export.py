"""Models as folders: the compact form, which `load` reads, and other formats.

A compact export, from `export`, holds

config.json          {"format", "schema", "config": ours, resolved, "labels",
                     "sha256": {file: checksum} of the other files}
model.safetensors    parameters, zeros packed (see `save_packed`)
tokenizer.json       of the `tokenizers` library
token_map.json       if the tokenizer's ids are mapped to fewer rows
special_tokens.json  if pad and end tokens are known by more than their names

`export_hf` writes a dense folder for `transformers`, `export_stablehlo` a
program for `jax.export`, `onnx_export.export_onnx` one for onnxruntime, and
`gguf_export.export_gguf` a file for llama.cpp. Every folder also has a
checksums.json, see `files.write_checksums`.
"""

import os

import numpy as np

from folding import config as config_lib
from folding import files, paths
from folding.model import Model
from folding.models.hf_weights import CONFIG, TOKENIZER, WEIGHTS
from folding.serving.hf_export import export_hf as export_hf
from folding.serving.loaded import (
  FORMAT,
  SCHEMA,
  file_sha256,
  require_exportable,
  require_names,
  require_shapes,
  sizes,
)
from folding.serving.loaded import cast as cast
from folding.serving.loaded import load as load
from folding.serving.loaded import shrunk as shrunk
from folding.serving.packed import save_packed
from folding.serving.stablehlo_export import (
  export_stablehlo as export_stablehlo,
)


def export(path: str | os.PathLike, model: Model) -> dict[str, int]:
  """Writes a compact model to a new folder.

  Args:
    path: Created if it does not exist; must be empty.
    model: The model; zeros take no room, and the dtype is kept.

  Returns:
    {"dense": bytes of the dense baseline, "values" and "masks": bytes stored,
    as `folding.account` counts them, "files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty, a parameter is NaN, the parameters do
      not fit the shape and the labels, or the labels are not different strings.
    OSError: it cannot be written.
  """
  params, labels = model.params, model.labels
  path = require_exportable(path, params)
  shapes = {name: np.shape(w) for name, w in paths.flatten(params).items()}
  require_shapes(path, model.shape, len(labels), shapes)
  require_names(labels)
  os.makedirs(path, exist_ok=True)
  save_packed(params, os.path.join(path, WEIGHTS))
  model.tokenizer.save(os.path.join(path, TOKENIZER))
  values = {
    "format": FORMAT,
    "schema": SCHEMA,
    "labels": list(labels),
    "sha256": {
      name: file_sha256(os.path.join(path, name))
      for name in sorted(os.listdir(path))
    },
    "config": config_lib.to_dict(model.config),
  }
  # The last file of the model: it marks the folder as complete.
  files.write_json(os.path.join(path, CONFIG), values)
  files.write_checksums(path, files.all_files(path))
  return sizes(model) | {"files": files.folder_bytes(path)}
