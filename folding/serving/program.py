"""A model as a program that runs without `folding`: StableHLO or ONNX.

A program maps (tokens int32[b, l], mask bool[b, l]) to float32 logits, [b, C]
of a classifier and [b, l, V] of a next-token model. The parameters are inside,
as dense arrays. Its folder has also

meta.json        the same in words, with the class names
tokenizer.json   whose ids the program reads
"""

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from folding import files
from folding.data.tokenizers import MappedTokenizer
from folding.schema import ConfigError, first_line, require
from folding.serving.export import TOKENIZER, Loaded

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO, ONNX, META = "model.stablehlo", "model.onnx", "meta.json"


def export_stablehlo(path: str | os.PathLike, loaded: Loaded) -> dict[str, int]:
  """Writes a program of `jax.export`, of any batch and length, to a new folder.

  With jax and flatbuffers installed, `jax.export.deserialize(data)` reads
  model.stablehlo, and `.call(tokens, mask)` runs it.

  Args:
    path: Made if need be; it must be empty.
    loaded: From `folding.load`.

  Returns:
    {"parameters": bytes of the arrays, "program": bytes of the file}.

  Raises:
    ConfigError: the folder is not empty, or the program is too large.
    OSError: it cannot be written.
  """
  forward, size = _prepare(path, loaded)
  # Learned positions end; others go on beyond the length of training.
  limit = loaded.config.data.length
  is_limited = loaded.config.model.positions == "learned"
  bounds = ["b >= 1", "l >= 1", *([f"l <= {limit}"] if is_limited else [])]
  shape: Any = jax_export.symbolic_shape("b, l", constraints=bounds)
  exported = jax_export.export(jax.jit(forward), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct(shape, jnp.bool_),
  )
  program = bytes(exported.serialize())
  about = {
    "longest": limit if is_limited else None,
    "platforms": list(PLATFORMS),
    "calling_convention": exported.calling_convention_version,
  }
  _write(path, loaded, STABLEHLO, program, about)
  return {"parameters": size, "program": len(program)}


def export_onnx(path: str | os.PathLike, loaded: Loaded) -> dict[str, int]:
  """Writes an ONNX model, of any batch and one length, to a new folder.

  The converter, jax2onnx, does not take a free length: l is `data.length`, and
  shorter texts are padded. It is no extra of ours, as it asks for an Orbax
  older than the one that runs are saved by, and does not use it here.

  Args:
    path: Made if need be; it must be empty.
    loaded: From `folding.load`.

  Returns:
    {"parameters": bytes of the arrays, "program": bytes of the file}.

  Raises:
    ConfigError: the folder is not empty, the model is too large, or the
      converter is not installed or does not know it.
    OSError: it cannot be written.
  """
  forward, size = _prepare(path, loaded)
  length = loaded.config.data.length
  disabled = logging.root.manager.disable
  logging.disable(logging.WARNING)  # of examples that lack their libraries
  try:
    import jax2onnx  # pyright: ignore[reportMissingImports]

    model = jax2onnx.to_onnx(
      forward,
      [_Spec(("b", length), jnp.int32), _Spec(("b", length), jnp.bool_)],
      input_names=["tokens", "mask"],
      output_names=["logits"],
    )
  except ImportError:
    raise ConfigError(
      "--format=onnx needs a converter: pip install --no-deps jax2onnx onnx "
      "onnx-ir"
    ) from None
  # The converter raises many kinds for what it does not know.
  except Exception as error:
    raise ConfigError(
      f"jax2onnx does not convert it ({first_line(error)})"
    ) from error
  finally:
    logging.disable(disabled)
  program = model.SerializeToString()
  about = {"longest": length, "shortest": length}
  _write(path, loaded, ONNX, program, about)
  return {"parameters": size, "program": len(program)}


class _Spec:
  """Shape and dtype of an input, as jax2onnx reads them."""

  def __init__(self, shape: tuple[Any, ...], dtype: Any):
    self.shape, self.dtype = shape, dtype


def _prepare(
  path: str | os.PathLike, loaded: Loaded
) -> tuple[Callable[..., Any], int]:
  """Returns the function of a program, and the bytes of its parameters."""
  files.require_empty(os.fspath(path))
  require(
    loaded.config.task == "lm" or bool(loaded.labels),
    "this encoder has no head, and a program gives logits; use --format=hf",
  )
  size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
  require(
    size < 1 << 31,  # a limit of flatbuffers and of protobuf
    f"a program holds less than 2 GiB of parameters; these are {size:,} bytes",
  )
  model, tokenizer = loaded.model, loaded.tokenizer

  def forward(tokens_BL, keep_BL):
    # Any number may stand for padding, and one beyond the last embeds as NaN.
    fill_BL = jnp.clip(tokens_BL, 0, tokenizer.plain_size - 1)
    tokens_BL = jnp.where(keep_BL, tokens_BL, fill_BL)
    if isinstance(tokenizer, MappedTokenizer):
      tokens_BL = jnp.asarray(tokenizer.token_map, jnp.int32)[tokens_BL]
    return model.apply({"params": loaded.params}, tokens_BL, keep_BL)

  return forward, size


def _write(
  path: str | os.PathLike,
  loaded: Loaded,
  name: str,
  program: bytes,
  about: dict[str, Any],
) -> None:
  meta = {
    "program": name,
    "inputs": {
      "tokens": "int32[b, l]: ids of tokenizer.json; any where mask is false",
      "mask": "bool[b, l]: true at tokens, false at padding, which comes last",
    },
    "output": f"float32[b, {'C' if loaded.labels else 'l, V'}]: logits",
    "labels": list(loaded.labels),
    "trained_length": loaded.config.data.length,
    "jax": jax.__version__,
    **about,
  }
  os.makedirs(path, exist_ok=True)
  written = {name: program, TOKENIZER: loaded.tokenizer.to_json()}
  written[META] = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
  for file, content in written.items():
    files.write_file(os.path.join(path, file), content)
