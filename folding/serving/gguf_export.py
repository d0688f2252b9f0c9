"""GGUF files, which llama.cpp and the programs around it read.

Arrays are dense. The architecture "deci" reads numbers of heads, key heads and
neurons per layer, so a model with smaller layers keeps its shapes.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from folding import files, paths
from folding.config import ModelConfig
from folding.data.tokenizers import Tokenizer
from folding.data.trim import plain_tokenizer
from folding.errors import ConfigError, require_package
from folding.model import Model
from folding.models import hf_config
from folding.models.attention import rope_frequencies
from folding.models.dense_form import unfolded
from folding.models.families import FAMILIES
from folding.models.hf_family import Architecture
from folding.models.params import axis_of
from folding.models.shape import model_of
from folding.serving.gguf_tokenizer import add_tokenizer
from folding.serving.loaded import require_finite_weights
from folding.tasks import task_of

ENDING = ".gguf"
Dtype = Literal[
  "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"
]
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_SIZE = 32  # numbers of a row that are quantised together

# {module of ours: of theirs}
_OUTER = {"embed": "token_embd", "norm_final": "output_norm", "head": "output"}
_BLOCK = {
  "norm_attn": "attn_norm",
  "attn/q": "attn_q",
  "attn/k": "attn_k",
  "attn/v": "attn_v",
  "attn/o": "attn_output",
  "attn/q_norm": "attn_q_norm",
  "attn/k_norm": "attn_k_norm",
  "norm_mlp": "ffn_norm",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
}


def export_gguf(
  path: str | os.PathLike,
  loaded: Model,
  dtype: Dtype = "float32",
  *,
  report: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
  """Writes a language model to a GGUF file for llama.cpp.

  Folded projections are written dense. Heads, neurons and tokens that were removed
  stay removed. The tokenizer and its chat template are in the file.

  Args:
    path: A new file; its name ends with ".gguf".
    loaded: From `folding.load`.
    dtype: Type of matrices and embeddings; vectors are float32. The quantised
      types are named as in llama.cpp.
    report: Called with the size of the arrays before they are written.

  Returns:
    {"parameters": bytes of the arrays, "file": bytes of the file}.

  Raises:
    ConfigError: the file exists, the package gguf is missing, or llama.cpp has
      no architecture or tokenizer for this model.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_new_file(path, ENDING)
  require_finite_weights(loaded.params)
  require_package("gguf")
  import gguf

  if dtype not in get_args(Dtype):
    raise ConfigError(
      f"a GGUF file has dtype {', '.join(get_args(Dtype))}; it is {dtype!r}"
    )
  m = _whole(loaded)
  architecture = _architecture_of(m, loaded)
  tokenizer = _tokenizer_of(loaded)
  params = unfolded(loaded.shape, loaded.params)
  count = _num_parameters(params)
  if dtype not in _FLOATS:
    params = paths.map_named(_whole_blocks, params)
  shape = _shape(m, params)
  name = _name_for(shape, architecture)
  arrays = _arrays(m, architecture, params)
  writer = gguf.GGUFWriter(None, name)
  _add_fields(writer, m, shape, loaded.shape.max_length)
  add_tokenizer(writer, tokenizer, len(params["embed"]["embedding"]))
  size = _add_arrays(writer, arrays, dtype)
  folded = _num_parameters(loaded.params)
  undone = (
    f"; folding is undone, which makes {count:,} parameters of {folded:,}"
  )
  report(
    f"About {size:,} bytes of arrays will be written, for llama.cpp's {name}"
    f"{undone if count > folded else ''}"
  )
  with files.replacing(path) as temporary:
    writer.write_header_to_file(pathlib.Path(temporary))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  return {"parameters": size, "file": os.path.getsize(path)}


def _whole(loaded: Model) -> ModelConfig:
  """Returns the shape of the model with all heads and one width of the MLP.

  A window that no text reaches is left out.
  """
  m = model_of(loaded.shape)
  windows = m.by_layer(m.window or 0, "model.window")
  is_full = all(not w or w >= loaded.shape.max_length for w in windows)
  return dataclasses.replace(
    m,
    mlp_width=int(np.max(m.mlp_width)),
    heads=None,
    window=None if is_full else m.window,
  )


def _architecture_of(m: ModelConfig, loaded: Model) -> Architecture:
  """Returns the architecture that computes a model.

  Raises:
    ConfigError: there is none; says why.
  """
  if not task_of(loaded).predicts_tokens:
    raise ConfigError(
      "--format=gguf writes language models; this model is of task "
      f"{loaded.task!r}"
    )
  known = {name: x.gguf for name, x in FAMILIES.items() if x.gguf}
  reasons = {name: hf_config.misfit(m, name) for name in known}
  fits = [name for name, reason in reasons.items() if reason is None]
  if not fits:
    raise ConfigError(f"--format=gguf cannot express this: {reasons['llama']}")
  found = known[fits[0]]
  if m.activation != found.activation:
    raise ConfigError(
      f"llama.cpp's {found.name} needs model.activation={found.activation!r}; "
      f"it is {m.activation!r}"
    )
  if m.window is not None:
    raise ConfigError(
      f"llama.cpp's {found.name} has no sliding window, and this model attends to "
      f"{m.window} of {loaded.shape.max_length} tokens; in Python, "
      "model.reading(LENGTH) returns it for texts no longer than its window"
    )
  if m.rope_scaling and not found.scales_rotations:
    raise ConfigError(
      f"--format=gguf writes no model.rope_scaling of {fits[0]}"
    )
  return found


def _tokenizer_of(loaded: Model) -> Tokenizer:
  """Returns the tokenizer of the tokens that the model has.

  Raises:
    ConfigError: tokens share rows of the embedding.
  """
  tokenizer, token_map = plain_tokenizer(loaded.tokenizer)
  if token_map is not None and not np.array_equal(
    token_map, np.arange(loaded.num_rows)
  ):
    raise ConfigError("llama.cpp has a row per token; here tokens share rows")
  return tokenizer


def _num_parameters(params: dict[str, Any]) -> int:
  return sum(w.size for w in paths.flatten(params).values())


def _whole_blocks(path: str, w: Any) -> np.ndarray:
  """Returns an array with neurons of zeros up to a whole number of blocks."""
  w = np.asarray(w)
  if (axis := axis_of(path, "F")) is None:
    return w
  widths = [(0, 0)] * w.ndim
  widths[axis] = (0, -w.shape[axis] % _BLOCK_SIZE)
  return np.pad(w, widths)


def _shape(m: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Returns sizes of the layers: a number, or a list if layers differ."""
  layers = [params[f"blocks_{n}"] for n in range(m.num_layers)]
  counts = {
    "head_count": [x["attn"]["q"]["kernel"].shape[1] for x in layers],
    "head_count_kv": [x["attn"]["k"]["kernel"].shape[1] for x in layers],
    "feed_forward_length": [x["mlp"]["up"]["kernel"].shape[1] for x in layers],
  }
  return {
    name: sizes if len(set(sizes)) > 1 else sizes[0]
    for name, sizes in counts.items()
  }


def _name_for(shape: dict[str, Any], architecture: Architecture) -> str:
  """Returns the name in llama.cpp of an architecture with layers of these sizes.

  Raises:
    ConfigError: the layers differ, and the architecture has one size for all.
  """
  if not any(isinstance(sizes, list) for sizes in shape.values()):
    return architecture.name
  if not architecture.per_layer:
    raise ConfigError(
      f"llama.cpp's {architecture.name} has one number of heads and neurons for "
      "all layers, and this model has several"
    )
  return architecture.per_layer


def _add_fields(
  writer: Any, m: ModelConfig, shape: dict[str, Any], length: int
) -> None:
  """Adds the sizes and options of the architecture."""
  writer.add_block_count(m.num_layers)
  writer.add_context_length(length)
  writer.add_embedding_length(m.width)
  writer.add_feed_forward_length(shape["feed_forward_length"])
  writer.add_head_count(shape["head_count"])
  writer.add_head_count_kv(shape["head_count_kv"])
  writer.add_key_length(m.head_dim)
  writer.add_value_length(m.head_dim)
  writer.add_rope_dimension_count(m.head_dim)
  writer.add_rope_freq_base(float(np.max(m.rope_base)))
  writer.add_layer_norm_rms_eps(m.norm_epsilon)


def _arrays(
  m: ModelConfig, architecture: Architecture, params: dict[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the float32 arrays, with matrices as [out, in]."""
  channels = np.arange(m.head_dim)
  if architecture.rotates_neighbours:
    channels = channels.reshape(2, -1).T.ravel()
  arrays = {}
  for path, leaf in paths.flatten(params).items():
    start = re.match(r"blocks_(\d+)/", path)
    module, _, kind = path[start.end() if start else 0 :].rpartition("/")
    name = (_BLOCK if start else _OUTER).get(module)
    if name is None or path == "head/bias":
      raise ConfigError(f"llama.cpp's {architecture.name} has no {path}")
    w = np.asarray(leaf, np.float32)
    if module in ("attn/q", "attn/k"):
      w = w[..., channels]
    if kind == "kernel":
      inputs = 2 if module == "attn/o" else 1
      w = w.reshape(np.prod(w.shape[:inputs]), -1).T
    elif kind == "bias":
      w = w.ravel()
    end = "bias" if kind == "bias" else "weight"
    prefix = f"blk.{start[1]}." if start else ""
    arrays[f"{prefix}{name}.{end}"] = np.ascontiguousarray(w)
  if m.rope_scaling:
    base = float(np.max(m.rope_base))
    plain, scaled = (
      rope_frequencies(m.head_dim, base, scaling)
      for scaling in (None, m.rope_scaling)
    )
    arrays["rope_freqs.weight"] = plain / scaled
  return arrays


def _add_arrays(
  writer: Any, arrays: dict[str, np.ndarray], dtype: Dtype
) -> int:
  """Adds the arrays and their type, and returns the bytes of the arrays."""
  import gguf

  kind = gguf.GGMLQuantizationType[_FLOATS.get(dtype, dtype.upper())]
  writer.add_file_type(
    gguf.LlamaFileType[
      "ALL_F32" if dtype == "float32" else f"MOSTLY_{kind.name}"
    ]
  )
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  size = 0
  for name, w in arrays.items():
    stored, stored_kind = _stored(name, w, kind)
    writer.add_tensor(name, stored, raw_dtype=stored_kind)
    size += stored.nbytes
  return size


def _stored(name: str, w: np.ndarray, kind: Any) -> tuple[np.ndarray, Any]:
  """Returns an array as it is stored, and its type.

  Raises `ConfigError` if numbers are too large for its type. Vectors are float32. Embedding and output layer have 8 bits or more. A matrix whose
  rows have no whole number of blocks is float16.
  """
  import gguf

  kinds = gguf.GGMLQuantizationType
  is_quantised = kind.name not in _FLOATS.values()
  if w.ndim == 1:
    kind = kinds.F32
  elif is_quantised and w.shape[-1] % _BLOCK_SIZE:
    kind = kinds.F16
  elif is_quantised and name in ("token_embd.weight", "output.weight"):
    kind = kinds.Q8_0
  with np.errstate(over="ignore", invalid="ignore"):
    stored = gguf.quantize(w, kind)
    is_whole = np.isfinite(gguf.dequantize(stored, kind)).all()
  if not is_whole:
    raise ConfigError(
      f"{name} has numbers up to {np.abs(w).max():.3g}, too large for "
      f"{kind.name}; write float32"
    )
  return stored, kind
