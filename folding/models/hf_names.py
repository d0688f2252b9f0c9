"""Names of Hugging Face tensors <-> our parameter paths, by one table.

A layout such as "HK D -> D H K" says that their axes are (H times K) and D,
ours D, H and K: from left to right it is the import, from right to left the
export, and the letters' sizes give both shapes. Letters as in
`folding.models`, and: P positions, E width again, t the number of our arrays
that one of their tensors holds.

Rotary positions pair channel i of a head with i + K/2 on both sides, so
queries and keys need no reordering.
"""

from typing import NamedTuple

from folding.models.hf_config import Description


class Tensor(NamedTuple):
  """One tensor of theirs and the arrays of ours that it holds."""

  name: str
  layout: str
  paths: tuple[str, ...]  # several: their leading axis in ours is t
  skip: int = 0  # rows that theirs has before ours
  plus: str = ""  # another tensor of theirs, whose first row ours includes
  optional: bool = False  # a checkpoint may come without it


# Ours, theirs, layout of the weight, layout of the bias.
_Row = tuple[str, str, str, str]

_BERT_BLOCK: tuple[_Row, ...] = (
  ("attn/q", "attention.self.query", "HK D -> D H K", "HK -> H K"),
  ("attn/k", "attention.self.key", "HK D -> D H K", "HK -> H K"),
  ("attn/v", "attention.self.value", "HK D -> D H K", "HK -> H K"),
  ("attn/o", "attention.output.dense", "D HK -> H K D", "D -> D"),
  ("norm_attn", "attention.output.LayerNorm", "D -> D", "D -> D"),
  ("mlp/up", "intermediate.dense", "F D -> D F", "F -> F"),
  ("mlp/down", "output.dense", "D F -> F D", "D -> D"),
  ("norm_mlp", "output.LayerNorm", "D -> D", "D -> D"),
)
_BLOCKS: dict[str, tuple[str, tuple[_Row, ...]]] = {
  "bert": ("encoder.layer", _BERT_BLOCK),
  "roberta": ("encoder.layer", _BERT_BLOCK),
  "distilbert": (
    "transformer.layer",
    (
      ("attn/q", "attention.q_lin", "HK D -> D H K", "HK -> H K"),
      ("attn/k", "attention.k_lin", "HK D -> D H K", "HK -> H K"),
      ("attn/v", "attention.v_lin", "HK D -> D H K", "HK -> H K"),
      ("attn/o", "attention.out_lin", "D HK -> H K D", "D -> D"),
      ("norm_attn", "sa_layer_norm", "D -> D", "D -> D"),
      ("mlp/up", "ffn.lin1", "F D -> D F", "F -> F"),
      ("mlp/down", "ffn.lin2", "D F -> F D", "D -> D"),
      ("norm_mlp", "output_layer_norm", "D -> D", "D -> D"),
    ),
  ),
  "gpt2": (  # its Conv1D kernels are [in, out], as ours
    "h",
    (
      ("norm_attn", "ln_1", "D -> D", "D -> D"),
      (
        "attn/q attn/k attn/v",
        *("attn.c_attn", "D tHK -> t D H K", "tHK -> t H K"),
      ),
      ("attn/o", "attn.c_proj", "HK D -> H K D", "D -> D"),
      ("norm_mlp", "ln_2", "D -> D", "D -> D"),
      ("mlp/up", "mlp.c_fc", "D F -> D F", "F -> F"),
      ("mlp/down", "mlp.c_proj", "F D -> F D", "D -> D"),
    ),
  ),
  "llama": (
    "layers",
    (
      ("norm_attn", "input_layernorm", "D -> D", ""),
      ("attn/q", "self_attn.q_proj", "HK D -> D H K", "HK -> H K"),
      ("attn/k", "self_attn.k_proj", "JK D -> D J K", "JK -> J K"),
      ("attn/v", "self_attn.v_proj", "JK D -> D J K", "JK -> J K"),
      ("attn/o", "self_attn.o_proj", "D HK -> H K D", "D -> D"),
      ("norm_mlp", "post_attention_layernorm", "D -> D", ""),
      ("mlp/gate", "mlp.gate_proj", "F D -> D F", "F -> F"),
      ("mlp/up", "mlp.up_proj", "F D -> D F", "F -> F"),
      ("mlp/down", "mlp.down_proj", "D F -> F D", "D -> D"),
    ),
  ),
}
# Around the blocks, of the model without a head.
_OUTER: dict[str, tuple[_Row, ...]] = {
  "bert": (
    ("embed", "embeddings.word_embeddings", "V D -> V D", ""),
    ("position_embed", "embeddings.position_embeddings", "P D -> P D", ""),
    ("norm_embed", "embeddings.LayerNorm", "D -> D", "D -> D"),
  ),
  "gpt2": (
    ("embed", "wte", "V D -> V D", ""),
    ("position_embed", "wpe", "P D -> P D", ""),
    ("norm_final", "ln_f", "D -> D", "D -> D"),
  ),
  "llama": (
    ("embed", "embed_tokens", "V D -> V D", ""),
    ("norm_final", "norm", "D -> D", ""),
  ),
}
_OUTER["roberta"] = _OUTER["distilbert"] = _OUTER["bert"]
_SEGMENTED = ("bert", "roberta")
_SEGMENTS = "embeddings.token_type_embeddings.weight"
PREFIXES = {
  "bert": "bert.",
  "roberta": "roberta.",
  "distilbert": "distilbert.",
  "gpt2": "transformer.",
  "llama": "model.",
}
_CLASSIFIERS: dict[str, tuple[_Row, ...]] = {
  "bert": (
    ("pooler", "bert.pooler.dense", "E D -> D E", "E -> E"),
    ("head", "classifier", "C D -> D C", "C -> C"),
  ),
  "roberta": (
    ("pooler", "classifier.dense", "E D -> D E", "E -> E"),
    ("head", "classifier.out_proj", "C D -> D C", "C -> C"),
  ),
  "distilbert": (
    ("pooler", "pre_classifier", "E D -> D E", "E -> E"),
    ("head", "classifier", "C D -> D C", "C -> C"),
  ),
  "gpt2": (("head", "score", "C D -> D C", ""),),
  "llama": (("head", "score", "C D -> D C", ""),),
}
_LM_HEAD: _Row = ("head", "lm_head", "V D -> D V", "")

# What a checkpoint may hold that a model of ours has no use for: buffers, and
# heads for other tasks. Names without the prefix.
UNUSED = {
  "bert": r"embeddings\.position_ids|(pooler|cls|classifier|qa_outputs)\..*",
  "roberta": (
    r"embeddings\.position_ids|(pooler|lm_head|classifier|qa_outputs)\..*"
  ),
  "distilbert": (
    r"embeddings\.position_ids"
    r"|(vocab_\w+|pre_classifier|classifier|qa_outputs)\..*"
  ),
  "gpt2": (
    r"h\.\d+\.attn\.(masked_)?bias"
    r"|(lm_head|score|classifier|qa_outputs|multiple_choice_head)\..*"
  ),
  "llama": (
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(lm_head|score|qa_outputs)\..*"
  ),
}


def tensors(described: Description, head: str) -> list[Tensor]:
  """Returns the table of a checkpoint, each of our paths in it once.

  Args:
    described: Of which family and size.
    head: "lm", "classify", or "none" for hidden states alone.
  """
  layout, config = described.layout, described.config
  prefix = PREFIXES[layout]
  blocks, block = _BLOCKS[layout]
  rows = [(ours, prefix + theirs, *x) for ours, theirs, *x in _OUTER[layout]]
  for n in range(config.num_layers):
    for ours, theirs, *layouts in block:
      modules = " ".join(f"blocks_{n}/{module}" for module in ours.split())
      rows.append((modules, f"{prefix}{blocks}.{n}.{theirs}", *layouts))
  if head == "classify":
    rows += _CLASSIFIERS[layout]
  elif head == "lm" and not config.tie_embeddings:
    rows.append(_LM_HEAD)
  elif layout == "bert":  # BertModel has a pooler, BertForMaskedLM has none
    rows.append(_CLASSIFIERS[layout][0])
  table = []
  for ours, theirs, weight, bias in rows:
    modules, optional = ours.split(), ours == "pooler" and head == "none"
    is_position, has_segments = ours == "position_embed", layout in _SEGMENTED
    names = tuple(f"{module}/{_weight_name(ours)}" for module in modules)
    table.append(
      Tensor(
        f"{theirs}.weight",
        weight,
        names,
        skip=described.position_offset if is_position else 0,
        plus=prefix + _SEGMENTS if is_position and has_segments else "",
        optional=optional,
      )
    )
    if bias and _has_bias(described, ours):
      names = tuple(f"{module}/bias" for module in modules)
      table.append(Tensor(f"{theirs}.bias", bias, names, optional=optional))
  return table


def _weight_name(ours: str) -> str:
  if ours in ("embed", "position_embed"):
    return "embedding"
  return "scale" if "norm_" in ours else "kernel"


def _has_bias(described: Description, ours: str) -> bool:
  """Llama has biases by choice, the families before it all of them."""
  config = described.config
  if described.layout != "llama":
    return True
  is_qkv = ours.endswith(("attn/q", "attn/k", "attn/v"))
  return bool(config.qkv_bias if is_qkv else config.use_bias)


def sizes(described: Description) -> dict[str, int]:
  """Returns {letter of a layout: size of the axis}."""
  c = described.config
  width = c.mlp_width[0] if isinstance(c.mlp_width, tuple) else c.mlp_width
  return {
    **{"D": c.width, "E": c.width, "F": width, "V": described.vocab_size},
    **{"H": c.num_heads, "J": c.num_kv_heads, "K": c.head_dim, "t": 3},
    **{"P": described.max_length, "C": described.num_classes},
  }
