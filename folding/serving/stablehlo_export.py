"""Programs of `jax.export`, which need only jax to run."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from folding import files
from folding.data.tokenizers import MappedTokenizer
from folding.errors import ConfigError
from folding.model import Model
from folding.models.hf_weights import TOKENIZER
from folding.serving.loaded import require_exportable
from folding.tasks import task_of

STABLEHLO, META = "model.stablehlo", "meta.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(path: str | os.PathLike, loaded: Model) -> dict[str, int]:
  """Writes a program of `jax.export` to a new folder.

  It maps (tokens int32[b, l], mask bool[b, l]), of any batch and length, to
  float32 logits: [b, C] of a text, [b, l, V] of a next-token model; of task
  "embed" to the vector of a text, [b, D]. A model with a segment embedding has a
  third input, segments int32[b, l]. The program contains the parameters as
  dense arrays. With jax and flatbuffers installed, model.stablehlo is read by
  `jax.export.deserialize(data)` and run by `.call(tokens, mask)`. The folder
  also has the tokenizer.json of the program's ids, and a meta.json that describes
  inputs, output and class names.

  Args:
    path: Created if it does not exist; must be empty.
    loaded: From `folding.load`.

  Returns:
    {"parameters": bytes of the arrays, "program": bytes of the file}.

  Raises:
    ConfigError: the folder is not empty, a parameter is NaN, or the program is
      too large.
    OSError: it cannot be written.
  """
  path = require_exportable(path, loaded.params)
  size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
  if size >= 1 << 31:  # a limit of flatbuffers
    raise ConfigError(
      f"a program holds less than 2 GiB of parameters; these are {size:,} bytes"
    )
  # Learned positions are limited; the others continue.
  length = loaded.shape.max_length
  longest = length if loaded.shape.positions == "learned" else None
  bounds = ["b >= 1", "l >= 1"]
  if longest:
    bounds.append(f"l <= {longest}")
  shape: Any = jax_export.symbolic_shape("b, l", constraints=bounds)
  inputs = {
    "tokens": "int32[b, l]: ids of tokenizer.json; any where mask is false",
    "mask": "bool[b, l]: true at tokens, false at padding, which comes last",
  }
  if loaded.shape.segments:
    inputs["segments"] = "int32[b, l]: 1 at the second text of a pair, else 0"
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.bool_ if name == "mask" else jnp.int32)
    for name in inputs
  ]
  export = jax_export.export(_forward_of(loaded), platforms=PLATFORMS)
  exported = export(*arguments)
  program = bytes(exported.serialize())
  meta = {
    "program": STABLEHLO,
    "inputs": inputs,
    "output": task_of(loaded).output,
    "labels": list(loaded.labels),
    "max_length": length,
    "longest": longest,
    "platforms": list(PLATFORMS),
    "jax": jax.__version__,
    "calling_convention": exported.calling_convention_version,
  }
  os.makedirs(path, exist_ok=True)
  files.write_file(os.path.join(path, STABLEHLO), program)
  files.write_file(os.path.join(path, TOKENIZER), loaded.tokenizer.to_json())
  files.write_json(os.path.join(path, META), meta)
  files.write_checksums(path, files.all_files(path))
  return {"parameters": size, "program": len(program)}


def _forward_of(loaded: Model) -> Any:
  """Returns the function (tokens, mask, segments or None) -> outputs."""
  model, tokenizer = loaded.module, loaded.tokenizer

  @jax.jit
  def forward(tokens_BL, mask_BL, segments_BL=None):
    # Padding may be any number, but ids beyond the last row embed as NaN.
    fill_BL = jnp.clip(tokens_BL, 0, tokenizer.plain_size - 1)
    tokens_BL = jnp.where(mask_BL, tokens_BL, fill_BL)
    if isinstance(tokenizer, MappedTokenizer):
      tokens_BL = jnp.asarray(tokenizer.token_map, jnp.int32)[tokens_BL]
    return model.apply(
      {"params": loaded.params}, tokens_BL, mask_BL, True, segments_BL
    )

  return forward
