"""Hugging Face checkpoints <-> our parameters, by one table of tensors.

`LAYOUTS` names the tensors of each family and their axes. A layout such as
"HK D -> D H K" says that their axes are (H times K) and D, ours D, H and K:
read from left to right it is the import, from right to left the export, and the
sizes of the letters give both shapes. Letters as in `folding.models.params`, and
t for the number of our arrays in one of their tensors.

Rotary positions pair channel i of a head with i + K/2 on both sides, so queries
and keys need no reordering unless some channels do not rotate (`_channels`).

A folder holds config.json, tokenizer.json, and model.safetensors or its shards
with an index. Pickles are never opened.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from folding import errors, files, paths
from folding.config import Task
from folding.errors import ConfigError
from folding.models import hf_config
from folding.models.hf_config import Description

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HINT = (
  "load it with transformers and write it again by save_pretrained(), model and "
  "tokenizer"
)


class Kind(NamedTuple):
  """Layouts of a module's weight and bias; bias "": it has none."""

  weight: str
  bias: str = ""
  leaf: str = "kernel"  # our name of the weight
  shift: float = 0.0  # added to theirs


_HEADS = Kind("HK D -> D H K", "HK -> H K")
_KEY_HEADS = Kind("JK D -> D J K", "JK -> J K")
_FROM_HEADS = Kind("D HK -> H K D", "D -> D")
_UP = Kind("F D -> D F", "F -> F")
_DOWN = Kind("D F -> F D", "D -> D")
_NORM = Kind("D -> D", "D -> D", leaf="scale")
_RMS_NORM = Kind("D -> D", leaf="scale")
_HEAD_NORM = Kind("K -> K", leaf="scale")
# Gemma scales by one more than it stores.
_SHIFTED_NORM = _RMS_NORM._replace(shift=1.0)
_SHIFTED_HEAD_NORM = _HEAD_NORM._replace(shift=1.0)
_EMBED = Kind("V e -> V e", leaf="embedding")
_POSITIONS = Kind("P e -> P e", leaf="embedding")
_SEGMENTS = Kind("S e -> S e", leaf="embedding")
_EMBED_NORM = Kind("e -> e", "e -> e", leaf="scale")
_EMBED_PROJECT = Kind("D e -> e D", "D -> D")
_POOLER = Kind("E D -> D E", "E -> E")
_CLASSES = Kind("C D -> D C", "C -> C")
_BARE_CLASSES = Kind("C D -> D C")
_LM_HEAD = Kind("V D -> D V")
_FUSED_QKV = Kind("tHK D -> t D H K")
_FUSED_QKV_BY_HEAD = Kind("HtK D -> t D H K", "HtK -> t H K")
_FUSED_UP = Kind("tF D -> t D F")
# GPT-2's Conv1D kernels are [in, out], as ours.
_CONV_QKV = Kind("D tHK -> t D H K", "tHK -> t H K")
_CONV_FROM_HEADS = Kind("HK D -> H K D", "D -> D")
_CONV_UP = Kind("D F -> D F", "F -> F")
_CONV_DOWN = Kind("F D -> F D", "D -> D")

_QUERY_OR_KEY = re.compile("/attn/[qk]/")

Row = tuple[str, str, Kind]  # module of ours (or several), of theirs, its kind
_DENSE_CLASSIFIER: tuple[Row, ...] = (
  ("pooler", "classifier.dense", _POOLER),
  ("head", "classifier.out_proj", _CLASSES),
)
_SCORE: tuple[Row, ...] = (("head", "score", _BARE_CLASSES),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Names of the tensors of one or more families.

  Attributes:
    prefix: Of the model without its head; a checkpoint may lack it.
    outer: Rows around the blocks. BERT's segment embedding and ELECTRA's
      projection of narrow embeddings are for models that have one; a model of
      single texts has the first segment in its positions.
    blocks: Where the blocks are.
    block: Rows of a block.
    classifier: Rows of the sequence classifier, with whole names.
    lm_head: Output layer of a language model, with its whole name.
    relative: A relative bias that all layers share.
    may_have_pooler: A checkpoint without head may have the classifier's pooler.
    unused: Pattern of tensors that ours does not need: buffers, and heads for
      other tasks. Names without the prefix.
  """

  prefix: str
  outer: tuple[Row, ...]
  blocks: str
  block: tuple[Row, ...]
  classifier: tuple[Row, ...]
  lm_head: str = "lm_head"
  relative: str = ""
  may_have_pooler: bool = False
  unused: str


_EMBEDDINGS: tuple[Row, ...] = (
  ("embed", "embeddings.word_embeddings", _EMBED),
  ("position_embed", "embeddings.position_embeddings", _POSITIONS),
  ("norm_embed", "embeddings.LayerNorm", _EMBED_NORM),
)
_BERT = Layout(
  prefix="bert.",
  outer=(
    *_EMBEDDINGS,
    ("segment_embed", "embeddings.token_type_embeddings", _SEGMENTS),
  ),
  blocks="encoder.layer",
  block=(
    ("attn/q", "attention.self.query", _HEADS),
    ("attn/k", "attention.self.key", _HEADS),
    ("attn/v", "attention.self.value", _HEADS),
    ("attn/o", "attention.output.dense", _FROM_HEADS),
    ("norm_attn", "attention.output.LayerNorm", _NORM),
    ("mlp/up", "intermediate.dense", _UP),
    ("mlp/down", "output.dense", _DOWN),
    ("norm_mlp", "output.LayerNorm", _NORM),
  ),
  classifier=(
    ("pooler", "bert.pooler.dense", _POOLER),
    ("head", "classifier", _CLASSES),
  ),
  may_have_pooler=True,
  unused=r"embeddings\.position_ids|(pooler|cls|classifier|qa_outputs)\..*",
)
_ROBERTA = dataclasses.replace(
  _BERT,
  prefix="roberta.",
  classifier=_DENSE_CLASSIFIER,
  may_have_pooler=False,  # its classifier does not read that one
  unused=(
    r"embeddings\.position_ids|(pooler|lm_head|classifier|qa_outputs)\..*"
  ),
)
_LLAMA = Layout(
  prefix="model.",
  outer=(
    ("embed", "embed_tokens", _EMBED),
    ("norm_final", "norm", _RMS_NORM),
  ),
  blocks="layers",
  block=(
    ("norm_attn", "input_layernorm", _RMS_NORM),
    ("attn/q", "self_attn.q_proj", _HEADS),
    ("attn/k", "self_attn.k_proj", _KEY_HEADS),
    ("attn/v", "self_attn.v_proj", _KEY_HEADS),
    ("attn/o", "self_attn.o_proj", _FROM_HEADS),
    ("norm_mlp", "post_attention_layernorm", _RMS_NORM),
    ("mlp/gate", "mlp.gate_proj", _UP),
    ("mlp/up", "mlp.up_proj", _UP),
    ("mlp/down", "mlp.down_proj", _DOWN),
  ),
  classifier=_SCORE,
  unused=(
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(lm_head|score|qa_outputs)\..*"
  ),
)
_GEMMA2 = dataclasses.replace(
  _LLAMA,
  outer=(_LLAMA.outer[0], ("norm_final", "norm", _SHIFTED_NORM)),
  block=(
    ("norm_attn", "input_layernorm", _SHIFTED_NORM),
    *(row for row in _LLAMA.block if not row[0].startswith("norm_")),
    ("norm_attn_out", "post_attention_layernorm", _SHIFTED_NORM),
    ("norm_mlp", "pre_feedforward_layernorm", _SHIFTED_NORM),
    ("norm_mlp_out", "post_feedforward_layernorm", _SHIFTED_NORM),
  ),
)
LAYOUTS: dict[str, Layout] = {
  "bert": _BERT,
  "roberta": _ROBERTA,
  "mpnet": dataclasses.replace(
    _ROBERTA,
    prefix="mpnet.",
    outer=_EMBEDDINGS,
    block=(
      ("attn/q", "attention.attn.q", _HEADS),
      ("attn/k", "attention.attn.k", _HEADS),
      ("attn/v", "attention.attn.v", _HEADS),
      ("attn/o", "attention.attn.o", _FROM_HEADS),
      ("norm_attn", "attention.LayerNorm", _NORM),
      *_BERT.block[5:],
    ),
    relative="encoder.relative_attention_bias",
  ),
  "electra": dataclasses.replace(
    _BERT,
    prefix="electra.",
    outer=(
      *_BERT.outer,
      ("embed_project", "embeddings_project", _EMBED_PROJECT),
    ),
    classifier=_DENSE_CLASSIFIER,
    may_have_pooler=False,
    unused=(
      r"embeddings\.position_ids|(discriminator_predictions|sequence_summary"
      r"|generator_predictions|generator_lm_head|classifier|qa_outputs)\..*"
    ),
  ),
  "distilbert": Layout(
    prefix="distilbert.",
    outer=_EMBEDDINGS,
    blocks="transformer.layer",
    block=(
      ("attn/q", "attention.q_lin", _HEADS),
      ("attn/k", "attention.k_lin", _HEADS),
      ("attn/v", "attention.v_lin", _HEADS),
      ("attn/o", "attention.out_lin", _FROM_HEADS),
      ("norm_attn", "sa_layer_norm", _NORM),
      ("mlp/up", "ffn.lin1", _UP),
      ("mlp/down", "ffn.lin2", _DOWN),
      ("norm_mlp", "output_layer_norm", _NORM),
    ),
    classifier=(
      ("pooler", "pre_classifier", _POOLER),
      ("head", "classifier", _CLASSES),
    ),
    unused=(
      r"embeddings\.position_ids"
      r"|(vocab_\w+|pre_classifier|classifier|qa_outputs)\..*"
    ),
  ),
  "gpt2": Layout(
    prefix="transformer.",
    outer=(
      ("embed", "wte", _EMBED),
      ("position_embed", "wpe", _POSITIONS),
      ("norm_final", "ln_f", _NORM),
    ),
    blocks="h",
    block=(
      ("norm_attn", "ln_1", _NORM),
      ("attn/q attn/k attn/v", "attn.c_attn", _CONV_QKV),
      ("attn/o", "attn.c_proj", _CONV_FROM_HEADS),
      ("norm_mlp", "ln_2", _NORM),
      ("mlp/up", "mlp.c_fc", _CONV_UP),
      ("mlp/down", "mlp.c_proj", _CONV_DOWN),
    ),
    classifier=_SCORE,
    unused=(
      r"h\.\d+\.attn\.(masked_)?bias"
      r"|(lm_head|score|classifier|qa_outputs|multiple_choice_head)\..*"
    ),
  ),
  "modernbert": Layout(
    prefix="model.",
    outer=(
      ("embed", "embeddings.tok_embeddings", _EMBED),
      ("norm_embed", "embeddings.norm", _EMBED_NORM._replace(bias="")),
      ("norm_final", "final_norm", _RMS_NORM),
    ),
    blocks="layers",
    block=(
      ("norm_attn", "attn_norm", _RMS_NORM),
      ("attn/q attn/k attn/v", "attn.Wqkv", _FUSED_QKV),
      ("attn/o", "attn.Wo", _FROM_HEADS._replace(bias="")),
      ("norm_mlp", "mlp_norm", _RMS_NORM),
      ("mlp/gate mlp/up", "mlp.Wi", _FUSED_UP),
      ("mlp/down", "mlp.Wo", _DOWN._replace(bias="")),
    ),
    classifier=(
      ("pooler", "head.dense", _POOLER._replace(bias="")),
      ("norm_pooler", "head.norm", _RMS_NORM),
      ("head", "classifier", _CLASSES),
    ),
    unused=r"(head|decoder|classifier)\..*",
  ),
  "opt": Layout(
    prefix="model.",
    outer=(
      ("embed", "decoder.embed_tokens", _EMBED),
      ("position_embed", "decoder.embed_positions", _POSITIONS),
      ("norm_final", "decoder.final_layer_norm", _NORM),
    ),
    blocks="decoder.layers",
    block=(
      ("norm_attn", "self_attn_layer_norm", _NORM),
      ("attn/q", "self_attn.q_proj", _HEADS),
      ("attn/k", "self_attn.k_proj", _HEADS),
      ("attn/v", "self_attn.v_proj", _HEADS),
      ("attn/o", "self_attn.out_proj", _FROM_HEADS),
      ("norm_mlp", "final_layer_norm", _NORM),
      ("mlp/up", "fc1", _UP),
      ("mlp/down", "fc2", _DOWN),
    ),
    classifier=_SCORE,
    unused=r"(lm_head|score|qa_outputs)\..*",
  ),
  "gpt_neox": Layout(
    prefix="gpt_neox.",
    outer=(
      ("embed", "embed_in", _EMBED),
      ("norm_final", "final_layer_norm", _NORM),
    ),
    blocks="layers",
    block=(
      ("norm_attn", "input_layernorm", _NORM),
      ("attn/q attn/k attn/v", "attention.query_key_value", _FUSED_QKV_BY_HEAD),
      ("attn/o", "attention.dense", _FROM_HEADS),
      ("norm_mlp", "post_attention_layernorm", _NORM),
      ("mlp/up", "mlp.dense_h_to_4h", _UP),
      ("mlp/down", "mlp.dense_4h_to_h", _DOWN),
    ),
    classifier=_SCORE,
    lm_head="embed_out",
    unused=(
      r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
      r"|(embed_out|score|classifier|qa_outputs)\..*"
    ),
  ),
  "llama": _LLAMA,
  "qwen3": dataclasses.replace(
    _LLAMA,
    block=(
      *_LLAMA.block,
      ("attn/q_norm", "self_attn.q_norm", _HEAD_NORM),
      ("attn/k_norm", "self_attn.k_norm", _HEAD_NORM),
    ),
  ),
  "gemma2": _GEMMA2,
  "gemma3": dataclasses.replace(
    _GEMMA2,
    block=(
      *_GEMMA2.block,
      ("attn/q_norm", "self_attn.q_norm", _SHIFTED_HEAD_NORM),
      ("attn/k_norm", "self_attn.k_norm", _SHIFTED_HEAD_NORM),
    ),
  ),
}


class Tensor(NamedTuple):
  """One tensor of theirs and the arrays of ours that it holds."""

  name: str
  layout: str
  paths: tuple[str, ...]  # several: their leading axis in ours is t
  is_shared: bool = False  # or each of them is a copy
  shift: float = 0.0  # added to theirs
  skip: int = 0  # rows that theirs has before ours
  plus: str = ""  # another tensor of theirs, whose first row ours includes


def tensors(
  described: Description, head: str, has_pooler: bool = False
) -> list[Tensor]:
  """Returns the tensors of a checkpoint; each path of ours occurs once.

  Args:
    described: Its family and sizes.
    head: "lm", "classify", or "none" for hidden states alone.
    has_pooler: Whether a checkpoint without head has the classifier's pooler.
  """
  layout, config = LAYOUTS[described.layout], described.config
  has = {"segment_embed": config.segments, "embed_project": config.embed_width}
  rows, segments = [], ""
  for ours, theirs, kind in layout.outer:
    if has.get(ours, True):
      rows.append((ours, layout.prefix + theirs, kind))
    elif ours == "segment_embed":
      segments = f"{layout.prefix}{theirs}.weight"
  for n in range(config.num_layers):
    for modules, theirs, kind in layout.block:
      if n == 0 and modules == "norm_attn" and config.embed_norm:
        continue  # an identity
      ours = " ".join(f"blocks_{n}/{module}" for module in modules.split())
      rows.append((ours, f"{layout.prefix}{layout.blocks}.{n}.{theirs}", kind))
  if head == "classify":
    rows += layout.classifier
  elif head == "lm" and not config.tie_embeddings:
    rows.append(("head", layout.lm_head, _LM_HEAD))
  elif layout.may_have_pooler and has_pooler:
    rows += [row for row in layout.classifier if row[0] == "pooler"]
  table = []
  for ours, theirs, kind in rows:
    modules = ours.split()
    names = tuple(f"{module}/{kind.leaf}" for module in modules)
    tensor = Tensor(f"{theirs}.weight", kind.weight, names, shift=kind.shift)
    if kind == _POSITIONS:
      skip = described.position_offset
      tensor = tensor._replace(skip=skip, plus=segments)
    table.append(tensor)
    if kind.bias and _has_bias(described, ours):
      names = tuple(f"{module}/bias" for module in modules)
      table.append(Tensor(f"{theirs}.bias", kind.bias, names))
  if config.relative_buckets:
    names = tuple(
      f"blocks_{n}/attn/relative_bias" for n in range(config.num_layers)
    )
    theirs = f"{layout.prefix}{layout.relative}.weight"
    table.append(Tensor(theirs, "R H -> R H", names, is_shared=True))
  return table


def _has_bias(described: Description, ours: str) -> bool:
  """Biases are optional in families that norm by RMS; others have all."""
  config = described.config
  if config.norm != "rmsnorm":
    return True
  is_qkv = ours.endswith(("attn/q", "attn/k", "attn/v"))
  return bool(config.qkv_bias if is_qkv else config.use_bias)


def _sizes(described: Description) -> dict[str, int]:
  """Returns {letter of a layout: size of the axis}."""
  c = described.config
  width = c.mlp_width[0] if isinstance(c.mlp_width, tuple) else c.mlp_width
  return {
    "C": described.num_classes,
    "D": c.width,
    "E": c.width,
    "F": width,
    "H": c.num_heads,
    "J": c.num_kv_heads,
    "K": c.head_dim,
    "P": described.max_length,
    "R": c.relative_buckets,
    "S": c.segments,
    "V": described.vocab_size,
    "e": c.embed_width or c.width,
  }


def _their_shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
  axes = tensor.layout.split(" -> ")[0].split()
  sizes = {**sizes, "t": len(tensor.paths)}
  first, *rest = [math.prod(sizes[x] for x in letters) for letters in axes]
  return (first + tensor.skip, *rest)


def _our_shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
  letters = tensor.layout.split(" -> ")[1].split()
  return tuple(sizes[x] for x in letters if x != "t")


def _split(
  theirs: np.ndarray, tensor: Tensor, sizes: Mapping[str, int]
) -> list[np.ndarray]:
  """Returns our arrays in one of theirs, as views."""
  left, right = tensor.layout.split(" -> ")
  letters = left.replace(" ", "")
  whole = theirs.reshape([sizes.get(x, -1) for x in letters])  # t is inferred
  ours = whole.transpose([letters.index(x) for x in right.split()])
  if tensor.is_shared:
    return [ours] * len(tensor.paths)
  return list(ours) if len(tensor.paths) > 1 else [ours]


def _join(
  ours: list[np.ndarray], tensor: Tensor, sizes: Mapping[str, int]
) -> np.ndarray:
  """The inverse of `_split`; rows that ours lacks are zero."""
  if tensor.is_shared:
    if any(not np.array_equal(x, ours[0]) for x in ours):
      raise ConfigError(
        f"the layers share {tensor.name}, and {tensor.paths[0]} is not that of "
        "each other layer"
      )
    ours = ours[:1]
  left, right = tensor.layout.split(" -> ")
  letters = right.split()
  whole = np.stack(ours) if len(ours) > 1 else ours[0]
  order = [letters.index(x) for x in left.replace(" ", "")]
  theirs = np.zeros(_their_shape(tensor, sizes), np.float32)
  rows = theirs[tensor.skip :]
  rows[...] = whole.transpose(order).reshape(rows.shape)
  rows -= np.float32(tensor.shift)
  return theirs


def _channels(described: Description) -> np.ndarray | None:
  """Returns the channel of theirs for each of ours in a query or key.

  The R of theirs that rotate come first, and i is paired with i + R/2. Of our
  pairs, i and i + K/2, those that rotate come first. None: the order is equal.
  """
  c = described.config
  if c.rope_share == 1:
    return None
  R = int(c.head_dim * c.rope_share)
  pairs_2 = np.arange(R).reshape(2, -1), np.arange(R, c.head_dim).reshape(2, -1)
  return np.concatenate(pairs_2, axis=1).reshape(-1)


def import_params(
  described: Description,
  head: str,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> tuple[dict[str, Any], list[str]]:
  """Returns our parameters, and the names of the tensors left out.

  Names and shapes are checked before the first tensor is read. Each tensor is
  read once. Without `config.segments`, BERT's segment 0 is added to every
  position. A score layer without a bias gets one of zeros if the model has
  biases.

  Args:
    described: From config.json.
    head: As for `tensors`.
    shapes: Name and shape of each tensor of the checkpoint, named with or
      without the layout's prefix.
    read: Returns a tensor by its name, in float32.

  Raises:
    ConfigError: a tensor is missing, left over, or of another shape; names it.
  """
  sizes, prefix = _sizes(described), LAYOUTS[described.layout].prefix
  has_prefix = any(name.startswith(prefix) for name in shapes)

  def find(name: str) -> str:
    name = name if has_prefix else name.removeprefix(prefix)
    older = re.sub(r"(?<=LayerNorm\.)weight$", "gamma", name)
    older = re.sub(r"(?<=LayerNorm\.)bias$", "beta", older)
    return older if older in shapes else name

  has_pooler = find(f"{prefix}pooler.dense.weight") in shapes
  table = tensors(described, head, has_pooler)
  needed = {find(t.name): _their_shape(t, sizes) for t in table}
  segments = (described.token_types, sizes["e"])
  needed |= {find(t.plus): segments for t in table if t.plus}
  others = _check_tensors(described, shapes, needed)
  if head == "lm" and described.config.tie_embeddings:
    output = f"{LAYOUTS[described.layout].lm_head}.weight"
    _check_tied(output, find(table[0].name), shapes, read)
  flat, channels = {}, _channels(described)
  for tensor in table:
    theirs = read(find(tensor.name))[tensor.skip :]
    if tensor.plus:
      theirs = theirs + read(find(tensor.plus))[:1]
    if tensor.shift:
      theirs = theirs + np.float32(tensor.shift)
    for path, ours in zip(
      tensor.paths, _split(theirs, tensor, sizes), strict=True
    ):
      if channels is not None and _QUERY_OR_KEY.search(path):
        ours = ours[..., channels]
      flat[path] = np.ascontiguousarray(ours)
  is_bare = head == "classify" and "head/bias" not in flat
  if is_bare and described.config.use_bias:
    flat["head/bias"] = np.zeros(sizes["C"], np.float32)
  return traverse_util.unflatten_dict(flat, sep="/"), others


def _check_tensors(
  described: Description,
  shapes: Mapping[str, tuple[int, ...]],
  needed: Mapping[str, tuple[int, ...]],
) -> list[str]:
  """Returns the names of the tensors that ours does not need."""
  missing = [name for name in needed if name not in shapes]
  if missing:
    raise ConfigError(f"tensor {_first(missing)} is missing")
  for name, shape in needed.items():
    if tuple(shapes[name]) != shape:
      raise ConfigError(
        f"tensor {name} is of shape {list(shapes[name])}; config.json asks for "
        f"{list(shape)}"
      )
  layout = LAYOUTS[described.layout]
  others = [name for name in shapes if name not in needed]
  bare = {name: name.removeprefix(layout.prefix) for name in others}
  left = [x for x in others if not re.fullmatch(layout.unused, bare[x])]
  if left:
    raise ConfigError(
      f"tensor {_first(left)} has no place in a {described.family} model with "
      "this config.json"
    )
  return others


def _check_tied(
  name: str,
  embedding: str,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Refuses an output layer that differs from the embedding that it shares."""
  if name in shapes and not np.array_equal(read(name), read(embedding)):
    raise ConfigError(
      f"tensor {name} is not {embedding}, which config.json says it is; set "
      "tie_word_embeddings to false there"
    )


def _first(names: list[str]) -> str:
  more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
  return f"{names[0]}{more}"


def export_tensors(
  described: Description, head: str, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint, the inverse of `import_params`.

  Biases that the family has and the model lacks are zero, and so is a segment
  embedding. GPT-2's score layer has no bias: ours moves into that of
  the last norm, which nothing else reads.

  Args:
    described: Family and sizes.
    head: As for `tensors`.
    params: Dense parameters (see `folding.unfold`).

  Raises:
    ConfigError: a parameter is missing, left over, or of another shape; names
      it. Or the head has a bias that the family cannot express.
  """
  sizes, layout = _sizes(described), LAYOUTS[described.layout]
  # The model without a head is saved without the prefix.
  prefix = layout.prefix if head == "none" else ""
  arrays = {
    path: np.asarray(leaf, np.float32)
    for path, leaf in paths.flatten(params).items()
  }
  if head == "classify" and layout.classifier[-1][-1] == _BARE_CLASSES:
    _move_head_bias(arrays, described)
  theirs: dict[str, np.ndarray] = {}
  channels = _channels(described)
  for tensor in tensors(described, head, "pooler/kernel" in arrays):
    shape, ours = _our_shape(tensor, sizes), []
    for path in tensor.paths:
      array = arrays.pop(path, None)
      if array is None and path.endswith("/bias"):
        array = np.zeros(shape, np.float32)
      if array is None:
        raise ConfigError(
          f"parameter {path} is missing; a dense {described.family} has it"
        )
      if array.shape != shape:
        raise ConfigError(
          f"parameter {path} is of shape {list(array.shape)}; a dense "
          f"{described.family} has {list(shape)}"
        )
      if channels is not None and _QUERY_OR_KEY.search(path):
        array = array[..., np.argsort(channels)]
      ours.append(array)
    theirs[tensor.name.removeprefix(prefix)] = _join(ours, tensor, sizes)
    if tensor.plus:
      segments = np.zeros((described.token_types, sizes["e"]), np.float32)
      theirs[tensor.plus.removeprefix(prefix)] = segments
  if arrays:
    raise ConfigError(
      f"parameter {_first(list(arrays))} has no place in a dense "
      f"{described.family}"
    )
  return theirs


def _move_head_bias(
  arrays: dict[str, np.ndarray], described: Description
) -> None:
  """Moves the head's bias c into that of the norm before: W^T delta = c."""
  bias_C = arrays.pop("head/bias", np.zeros(1))
  if not bias_C.any():
    return
  kernel_DC = arrays["head/kernel"].astype(np.float64)
  delta_D = np.linalg.lstsq(kernel_DC.T, bias_C.astype(np.float64))[0]
  is_solved = np.allclose(kernel_DC.T @ delta_D, bias_C, rtol=1e-6, atol=1e-9)
  if described.config.norm != "layernorm" or not is_solved:
    raise ConfigError(
      f"no export as {described.family}: its sequence classifier has no bias, "
      "and head/bias is not zero"
    )
  norm_D = arrays.get("norm_final/bias", np.zeros_like(delta_D))
  arrays["norm_final/bias"] = (norm_D + delta_D).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Description):
  """A checkpoint with its arrays.

  Attributes:
    params: Our parameters, NumPy float32. A checkpoint without a classifier
      has no "head" and may have no "pooler".
    tokenizer_path: Its tokenizer.json.
    left_out: Names of tensors that our model does not need.
  """

  params: dict[str, Any]
  tokenizer_path: pathlib.Path
  left_out: tuple[str, ...] = ()


def load_pretrained(
  path_or_hub_id: str | pathlib.Path,
  *,
  task: Task | None = None,
  segments: bool = False,
) -> Pretrained:
  """Returns a checkpoint as our configuration and parameters.

  Tensors are read one at a time, so there is one copy of the weights.

  Args:
    path_or_hub_id: A folder, or a name on the Hugging Face hub.
    task: "lm" reads the output layer, "embed" no head, another task the head of
      a sequence classifier if there is one for it. None: the head that the
      checkpoint has.
    segments: Whether to keep a segment embedding of two rows apart, for pairs.

  Raises:
    ConfigError: the folder or a file in it is missing, damaged, a pickle, or
      of an unsupported kind; names it.
  """
  folder = find_pretrained(path_or_hub_id)
  described = describe_pretrained(folder)
  if task == "lm":
    if not described.config.causal:
      raise ConfigError(
        f"{folder}: a {described.family} model does not predict the next token; "
        "use task 'classify'"
      )
    described = dataclasses.replace(described, label_names=())
  if segments and described.token_types == 2:
    model = dataclasses.replace(described.config, segments=2)
    described = dataclasses.replace(described, config=model)
  if task == "embed":
    described = dataclasses.replace(described, label_names=(), problem="embed")
  head = described.head
  if task not in (None, "lm") and task != described.task:
    head = "none"
  tokenizer_path = folder / TOKENIZER
  if not tokenizer_path.is_file():
    raise ConfigError(f"{folder} has no {TOKENIZER}; {_HINT}")
  with contextlib.ExitStack() as stack:
    where = _open_weights(folder, stack)
    shapes = {
      name: tuple(file.get_slice(name).get_shape())
      for name, file in where.items()
    }
    try:
      params, left_out = import_params(
        described, head, shapes, lambda name: _read(where[name], name)
      )
    except ConfigError as error:
      raise ConfigError(f"{folder}: {error}") from None
  return Pretrained(
    **vars(described),
    params=params,
    tokenizer_path=tokenizer_path,
    left_out=tuple(left_out),
  )


def find_pretrained(path_or_hub_id: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder of a checkpoint, downloaded if it is a hub id.

  Raises:
    ConfigError: there is no such folder, or it cannot be downloaded.
  """
  name, folder = str(path_or_hub_id), pathlib.Path(path_or_hub_id).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise ConfigError(f"{folder} is a file; name the folder that holds it")
  if name.startswith((".", "/", "~")):
    raise ConfigError(f"there is no folder {name}")
  import huggingface_hub  # only needed for a download

  patterns = ["*.json", "*.jinja", "model*.safetensors"]
  try:
    found = huggingface_hub.snapshot_download(name, allow_patterns=patterns)
  # Offline, no such name, no permission: each raises another exception.
  except Exception as error:
    raise ConfigError(
      f"there is no folder {name}, and the Hugging Face hub did not send it "
      f"({errors.first_line(error)})"
    ) from error
  return pathlib.Path(found)


def describe_pretrained(folder: pathlib.Path) -> Description:
  """Returns the description of the config.json in a folder.

  Raises:
    ConfigError: it is missing, damaged, or of an unsupported model.
  """
  values = _read_json(folder / CONFIG)
  try:
    return hf_config.describe(values)
  except ConfigError as error:
    raise ConfigError(f"{folder}: {error}") from None
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    # Some value is of another type than in transformers.
    raise ConfigError(
      f"{folder}: {CONFIG} is broken: {errors.reason(error)}"
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ConfigError(f"there is no {path}")
  return files.read_json(str(path), dict)


def _open_weights(
  folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Returns {name of a tensor: open file that holds it}."""
  if (folder / WEIGHTS).is_file():
    file = _open_file(folder / WEIGHTS, stack)
    return dict.fromkeys(file.keys(), file)
  index = folder / INDEX
  if not index.is_file():
    raise ConfigError(
      f"{folder} has no {WEIGHTS} and no {INDEX}, and pickles are not read; "
      f"{_HINT}"
    )
  where = _read_json(index).get("weight_map")
  if not isinstance(where, dict):
    raise ConfigError(f"{index} must have a weight_map of names and files")
  opened = [_open_file(folder / x, stack) for x in sorted({*where.values()})]
  return {name: file for file in opened for name in file.keys()}


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  if not path.is_file():
    raise ConfigError(f"there is no {path}, which {INDEX} names")
  try:
    return stack.enter_context(safetensors.safe_open(path, "numpy"))
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f"{path} is truncated or not a safetensors file ({error})"
    ) from None


def _read(file: Any, name: str) -> np.ndarray:
  kind = file.get_slice(name).get_dtype()
  if kind not in _FLOATS:
    raise ConfigError(
      f"tensor {name} is stored as {kind}; only {', '.join(_FLOATS)} are read"
    )
  return file.get_tensor(name).astype(np.float32, copy=False)


def save_pretrained(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  described: Description,
  *,
  dtype: str = "float32",
  **fields: Any,
) -> None:
  """Writes config.json and model.safetensors of a checkpoint.

  Args:
    path: The folder; created if it does not exist.
    params: Dense parameters (see `folding.unfold`).
    described: Its family and sizes. The head is a sequence classifier if it
      has classes, else the output layer of a causal model.
    dtype: Type of the stored arrays.
    **fields: More fields of config.json.

  Raises:
    ConfigError: the family does not compute this model, or the parameters do
      not fit; nothing is written.
    OSError: a file cannot be written.
  """
  values = hf_config.to_hf(described) | fields | {"torch_dtype": dtype}
  arrays = {
    name: array.astype(dtype, copy=False)
    for name, array in export_tensors(described, described.head, params).items()
  }
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  save_tensors(folder / WEIGHTS, arrays, {"format": "pt"})
  files.write_json(str(folder / CONFIG), values)


def save_tensors(
  path: str | os.PathLike, arrays: dict[str, Any], metadata: dict[str, str]
) -> None:
  """Writes a safetensors file with the permissions of an ordinary new file.

  Raises:
    OSError: it cannot be written.
  """
  with open(path, "wb") as file:
    mode = os.fstat(file.fileno()).st_mode
  try:
    safetensors.numpy.save_file(arrays, path, metadata)
  except safetensors.SafetensorError as error:  # such as a full disk
    raise OSError(f"cannot write {path} ({error})") from error
  os.chmod(path, mode)  # the library makes it readable by its owner alone
