"""config.json of Hugging Face models <-> `ModelConfig`, by one table.

`FAMILIES` has one entry per supported `model_type`; `describe` and `to_hf` read
it in both directions. To add a family, add an entry. If its tensors have names
of their own, add these to `folding.models.hf_weights`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from folding import config as config_lib
from folding import typed
from folding.config import ModelConfig, Pooling, Task
from folding.errors import ConfigError


class Rule(NamedTuple):
  """Fields that correspond by more than their names, in both directions."""

  # config.json -> ours
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
  # ours -> config.json
  write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What is known of one `model_type`.

  Attributes:
    prefix: Start of its class names in transformers.
    lm: Name of its next-token model; "": `prefix` and "ForCausalLM".
    layout: Entry of `hf_weights.LAYOUTS` that has its tensors.
    fields: {field of ModelConfig: field of config.json}, same value.
    positions: Field of config.json with the number of positions.
    first_position: Row of the position embedding of the first token; None: the
      one after the pad id.
    counts_first: Whether `positions` counts the rows before that one.
    defaults: What transformers assumes for fields missing in config.json.
    computes: Fields of ModelConfig that the architecture fixes.
    classifier: Fields of ModelConfig that its sequence classifier fixes.
    poolings: {classifier_pooling of config.json: ours}; {}: `classifier` has
      the only one.
    only: Fields of config.json with one supported value.
    rules: Fields that correspond by more than their names.
    writes: Constant fields of config.json for the export.
    bases: Fields of config.json with the rope_base of layers without a window
      and with one; (): all layers have one.
  """

  prefix: str
  lm: str = ""
  layout: str
  fields: dict[str, str]
  positions: str = "max_position_embeddings"
  first_position: int | None = 0
  counts_first: bool = True
  defaults: dict[str, Any]
  computes: dict[str, Any]
  classifier: dict[str, Any]
  poolings: dict[str, Pooling] = dataclasses.field(default_factory=dict)
  only: dict[str, Any] = dataclasses.field(default_factory=dict)
  rules: tuple[Rule, ...] = ()
  writes: dict[str, Any] = dataclasses.field(default_factory=dict)
  bases: tuple[str, ...] = ()

  def offset(self, pad_id: int) -> int:
    """Returns the row of the position embedding of the first token."""
    first = self.first_position
    return pad_id + 1 if first is None else first


_CLASSIFIER = "ForSequenceClassification"
_PROBLEMS: dict[str, Task] = {  # problem_type of config.json: task
  "single_label_classification": "classify",
  "multi_label_classification": "multilabel",
  "regression": "regress",
}

# Name in config.json: ours. Of several names for one, the first is written.
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
}

_SHARE = "partial_rotary_factor"
_LENGTH = "original_max_position_embeddings"
# Kind of rotary scaling: the fields that `ModelConfig.rope_scaling` lists.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
}

# Options that change the computation: the one value that is supported.
SUPPORTED: dict[str, Any] = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  _SHARE: 1.0,
  "quantization_config": None,
}


_SLIDING, _FULL = "sliding_attention", "full_attention"
_CAPS = {  # field of ModelConfig: of config.json
  "attention_cap": "attn_logit_softcapping",
  "logit_cap": "final_logit_softcapping",
}
# Fields in which null means "none" rather than the default.
_NULLABLE = {"sliding_window", *_CAPS.values()}


def _read_biases(values: dict[str, Any]) -> dict[str, Any]:
  bias = values["attention_bias"]
  if values["mlp_bias"] != bias:
    raise ConfigError(
      f"config.json: attention_bias={bias} with mlp_bias={not bias} is not "
      "supported; both or neither are"
    )
  return {"use_bias": bias}


def _write_biases(config: ModelConfig) -> dict[str, Any]:
  return {"attention_bias": config.use_bias, "mlp_bias": config.use_bias}


def _read_windows(
  values: dict[str, Any],
  size: int,
  is_sliding: Callable[[int], bool],
  bases: tuple[str, ...] = (),
) -> dict[str, Any]:
  """Returns the window of each layer, and its rope_base if these differ.

  Args:
    values: Fields of config.json.
    size: The window of the layers that have one.
    is_sliding: Whether layer n has one, if layer_types does not say.
    bases: As `Family.bases`; transformers 5 writes a dict per kind instead.
  """
  kinds = values.get("layer_types") or [
    _SLIDING if is_sliding(n) else _FULL
    for n in range(values["num_hidden_layers"])
  ]
  if not {*kinds} <= {_SLIDING, _FULL}:
    raise ConfigError(
      f"config.json: layer_types {sorted({*kinds})} is not supported; supported "
      f"are {_FULL} and {_SLIDING}"
    )
  fields = {"window": [size if x == _SLIDING else 0 for x in kinds]}
  if not bases:
    return fields
  scaling = values.get("rope_scaling") or {}
  nested, base_of = values.get("rope_parameters") or {}, {}
  for kind, name in zip((_FULL, _SLIDING), bases, strict=True):
    rope = nested.get(kind) or {}
    used = scaling.get("rope_type", scaling.get("type"))
    used = used or rope.get("rope_type", "default")
    if used != "default":
      raise ConfigError(
        f"config.json: rope_type {used!r} beside windows in some layers is "
        "not supported; only 'default' is"
      )
    base_of[kind] = rope.get("rope_theta", values[name])
  return fields | {"rope_base": [base_of[x] for x in kinds]}


def _write_windows(
  config: ModelConfig, bases: tuple[str, ...] = ()
) -> dict[str, Any]:
  """Returns which layers have a window, and the bases of both kinds."""
  has_window = [x > 0 for x in _windows(config)]
  values: dict[str, Any] = {
    "layer_types": [_SLIDING if x else _FULL for x in has_window]
  }
  if bases:
    used = config.by_layer(config.rope_base, "model.rope_base")
    # False and True are the indices of the names.
    values |= {bases[x]: b for x, b in zip(has_window, used, strict=True)}
  return values


def _windows(config: ModelConfig) -> tuple[int, ...]:
  """Returns the window of each layer; 0: it has none."""
  return config.by_layer(config.window or 0, "model.window")


def _read_qwen_window(values: dict[str, Any]) -> dict[str, Any]:
  if not values["use_sliding_window"]:
    return {}
  first = values["max_window_layers"]
  return _read_windows(values, values["sliding_window"], lambda n: n >= first)


def _write_qwen_window(config: ModelConfig) -> dict[str, Any]:
  is_used = config.window is not None
  return {
    "sliding_window": max(_windows(config)) or None,
    "use_sliding_window": is_used,
    "max_window_layers": 0,
  } | (_write_windows(config) if is_used else {})


def _read_rope(values: dict[str, Any]) -> dict[str, Any]:
  read = _read_partial_rope(values)
  _check_supported(_SHARE, read["rope_share"], SUPPORTED[_SHARE])
  return read


def _read_partial_rope(values: dict[str, Any]) -> dict[str, Any]:
  # transformers 5 writes one dict, earlier versions rope_theta and a dict or
  # null. It reads the older one if there are both.
  given = values.get("rope_scaling") or values.get("rope_parameters") or {}
  rope = {"rope_theta": values.get("rope_theta", 10000.0), _SHARE: 1.0} | given
  if _LENGTH in values:
    rope[_LENGTH] = values[_LENGTH]
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ROPE_SCALINGS:
    raise ConfigError(
      f"config.json: rope_type {kind!r} is not supported; supported are "
      f"{', '.join(ROPE_SCALINGS)}"
    )
  names = ROPE_SCALINGS[kind]
  missing = [name for name in names if name not in rope]
  if missing:
    raise ConfigError(f"config.json: rope_type {kind} needs {missing}")
  scaling = [rope[name] for name in names] or None
  return {
    "rope_base": rope["rope_theta"],
    "rope_scaling": scaling,
    "rope_share": rope[_SHARE],
  }


def _write_rope(config: ModelConfig) -> dict[str, Any]:
  values: dict[str, Any] = {"rope_theta": config.rope_base}
  for kind, names in ROPE_SCALINGS.items():
    if config.rope_scaling and len(config.rope_scaling) == len(names):
      scaling = dict(zip(names, config.rope_scaling, strict=True))
      if _LENGTH in scaling:
        scaling[_LENGTH] = int(scaling[_LENGTH])
      values["rope_scaling"] = {"rope_type": kind, **scaling}
  return values


def _read_neox_rope(values: dict[str, Any]) -> dict[str, Any]:
  # It had names of its own before transformers 5.
  base, share = values["rotary_emb_base"], values["rotary_pct"]
  given = values.get("rope_scaling") or values.get("rope_parameters") or {}
  older = {"rope_theta": base, _SHARE: share}
  return _read_partial_rope({"rope_parameters": older | given})


def _write_neox_rope(config: ModelConfig) -> dict[str, Any]:
  values = _write_rope(config)
  values["rotary_emb_base"] = values.pop("rope_theta")
  return values | {"rotary_pct": config.rope_share}


_GEMMA3_BASES = ("rope_theta", "rope_local_base_freq")


def _check_query_scale(values: dict[str, Any]) -> None:
  if values["query_pre_attn_scalar"] != values["head_dim"]:
    raise ConfigError(
      f"config.json: query_pre_attn_scalar={values['query_pre_attn_scalar']} is "
      "not supported; only head_dim is"
    )


def _read_gemma2(values: dict[str, Any]) -> dict[str, Any]:
  _check_query_scale(values)
  return _read_windows(values, values["sliding_window"], lambda n: n % 2 == 0)


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
  return {
    "query_pre_attn_scalar": config.head_dim,
    "sliding_window": max(_windows(config)) or None,
    **_write_windows(config),
  }


def _read_gemma3(values: dict[str, Any]) -> dict[str, Any]:
  _check_query_scale(values)
  pattern = values["sliding_window_pattern"]
  return _read_windows(
    values,
    values["sliding_window"],
    lambda n: bool((n + 1) % pattern),
    _GEMMA3_BASES,
  )


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
  return _write_gemma2(config) | _write_windows(config, _GEMMA3_BASES)


_MODERNBERT_BASES = ("global_rope_theta", "local_rope_theta")
_MODERNBERT_POOLINGS: dict[str, Pooling] = {"cls": "first", "mean": "mean"}


def _read_modernbert(values: dict[str, Any]) -> dict[str, Any]:
  every = values["global_attn_every_n_layers"]
  # Of an even number of tokens around each, half are before it.
  size = values["local_attention"] // 2 + 1
  pooling = _MODERNBERT_POOLINGS[values["classifier_pooling"]]
  windows = _read_windows(
    values, size, lambda n: bool(n % every), _MODERNBERT_BASES
  )
  return {"pooling": pooling, **windows}


def _write_modernbert(config: ModelConfig) -> dict[str, Any]:
  size = max(_windows(config))
  is_mean = config.pooling == "mean"
  return {
    "classifier_pooling": "mean" if is_mean else "cls",
    **({"local_attention": 2 * (size - 1)} if size else {}),
    **_write_windows(config, _MODERNBERT_BASES),
  }


def _read_embed_width(values: dict[str, Any]) -> dict[str, Any]:
  size = values["embedding_size"]
  return {"embed_width": 0 if size == values["hidden_size"] else size}


def _write_embed_width(config: ModelConfig) -> dict[str, Any]:
  return {"embedding_size": config.embed_width or config.width}


def _read_no_projection(values: dict[str, Any]) -> dict[str, Any]:
  size = values.get("word_embed_proj_dim", values["hidden_size"])
  if size != values["hidden_size"]:
    raise ConfigError(
      f"config.json: word_embed_proj_dim={size} is not supported; only "
      "hidden_size is"
    )
  return {}


_BIASES = Rule(_read_biases, _write_biases)
_ROPE = Rule(_read_rope, _write_rope)

_FIELDS = {
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "activation": "hidden_act",
}
# What a family has only if its entry says so.
_PLAIN: dict[str, Any] = {
  "parallel": False,
  "rope_share": 1.0,
  "embed_norm": False,
  "embed_width": 0,
  "relative_buckets": 0,
  "qk_norm": False,
  "attention_cap": None,
  "logit_cap": None,
  "scale_embeddings": False,
}


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
  return {name: x for name, x in fields.items() if name not in names}


_DECODER: dict[str, Any] = _PLAIN | {
  "causal": True,
  "norm": "layernorm",
  "norm_position": "pre",
  "positions": "learned",
  "window": None,
  "gated": False,
}
_ENCODER = _DECODER | {"causal": False, "norm_position": "post"}
_POOLER = {"pooler": True, "pooler_activation": "tanh", "pooler_norm": False}
_FIRST = {"pooling": "first", **_POOLER}
_LAST = {"pooling": "last", "pooler": False}

_BERT = Family(
  prefix="Bert",
  layout="bert",
  fields=_FIELDS
  | {"norm_epsilon": "layer_norm_eps", "dropout": "hidden_dropout_prob"},
  defaults={
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
  },
  computes=_ENCODER,
  classifier=_FIRST,
  writes={"attention_probs_dropout_prob": 0.0},
)
_ROBERTA = dataclasses.replace(
  _BERT,
  prefix="Roberta",
  layout="roberta",
  first_position=None,
  defaults=_BERT.defaults | {"pad_token_id": 1},
)
_MPNET = dataclasses.replace(
  _BERT,
  prefix="MPNet",
  layout="mpnet",
  first_position=2,
  defaults=_without(_ROBERTA.defaults, "type_vocab_size"),
  computes=_ENCODER | {"relative_buckets": 32},
  # Its positions count the tokens that are not 1, whatever the pad token is.
  only={"relative_attention_num_buckets": 32, "pad_token_id": 1},
  writes=_BERT.writes | {"relative_attention_num_buckets": 32},
)
_ELECTRA = dataclasses.replace(
  _BERT,
  prefix="Electra",
  layout="electra",
  defaults=_BERT.defaults | {"embedding_size": 128},
  computes=_without(_ENCODER, "embed_width"),
  classifier=_FIRST | {"pooler_activation": "gelu"},
  rules=(Rule(_read_embed_width, _write_embed_width),),
)
_DISTILBERT = Family(
  prefix="DistilBert",
  layout="distilbert",
  fields={
    "num_layers": "n_layers",
    "width": "dim",
    "num_heads": "n_heads",
    "mlp_width": "hidden_dim",
    "activation": "activation",
    "dropout": "dropout",
  },
  defaults={
    "activation": "gelu",
    "dropout": 0.1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
  },
  computes=_ENCODER | {"norm_epsilon": 1e-12},
  classifier=_FIRST | {"pooler_activation": "relu"},
  writes={"attention_dropout": 0.0},
)
_MODERNBERT = Family(
  prefix="ModernBert",
  layout="modernbert",
  fields=_FIELDS
  | {"activation": "hidden_activation", "norm_epsilon": "norm_eps"},
  defaults={
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "pad_token_id": 50283,
    "classifier_pooling": "cls",
  },
  computes=_without(_ENCODER, "window")
  | {
    "norm_position": "pre",
    "embed_norm": True,
    "positions": "rope",
    "rope_scaling": None,
    "gated": True,
    "use_bias": False,
    "qkv_bias": False,
  },
  classifier=_POOLER | {"pooler_activation": "gelu", "pooler_norm": True},
  poolings=_MODERNBERT_POOLINGS,
  only={
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
  },
  rules=(Rule(_read_modernbert, _write_modernbert),),
  bases=_MODERNBERT_BASES,
)
_GPT2 = Family(
  prefix="GPT2",
  lm="GPT2LMHeadModel",
  layout="gpt2",
  fields={
    "num_layers": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "mlp_width": "n_inner",
    "activation": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
    "tie_embeddings": "tie_word_embeddings",
  },
  positions="n_positions",
  defaults={
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "n_positions": 1024,
  },
  computes=_DECODER,
  classifier=_LAST,
  rules=(Rule(write=lambda config: {"embd_pdrop": config.dropout}),),
  writes={"attn_pdrop": 0.0},
)
_OPT = Family(
  prefix="OPT",
  layout="opt",
  fields=_FIELDS
  | {
    "mlp_width": "ffn_dim",
    "activation": "activation_function",
    "dropout": "dropout",
    "tie_embeddings": "tie_word_embeddings",
  },
  first_position=2,
  counts_first=False,
  defaults={
    "activation_function": "relu",
    "dropout": 0.1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
  },
  computes=_DECODER | {"norm_epsilon": 1e-5},
  classifier=_LAST,
  only={
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
  },
  rules=(Rule(read=_read_no_projection),),
  writes={"attention_dropout": 0.0},
)
_GPT_NEOX = Family(
  prefix="GPTNeoX",
  layout="gpt_neox",
  fields=_FIELDS
  | {
    "norm_epsilon": "layer_norm_eps",
    "dropout": "hidden_dropout",
    "tie_embeddings": "tie_word_embeddings",
    "parallel": "use_parallel_residual",
  },
  defaults={
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
  },
  computes=_without(_DECODER, "parallel", "rope_share") | {"positions": "rope"},
  classifier=_LAST,
  only={"attention_bias": True},
  rules=(Rule(_read_neox_rope, _write_neox_rope),),
  writes={"attention_dropout": 0.0},
)
_LLAMA_COMPUTES: dict[str, Any] = _PLAIN | {
  "causal": True,
  "norm": "rmsnorm",
  "norm_position": "pre",
  "positions": "rope",
  "gated": True,
}
_LLAMA = Family(
  prefix="Llama",
  layout="llama",
  fields=_FIELDS
  | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
  },
  defaults={
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
  },
  computes=_LLAMA_COMPUTES | {"window": None},
  classifier=_LAST,
  rules=(_BIASES, _ROPE),
)
_MISTRAL = dataclasses.replace(
  _LLAMA,
  prefix="Mistral",
  fields=_LLAMA.fields | {"window": "sliding_window"},
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qkv_bias": False},
  rules=(_ROPE,),
)
_QWEN2 = dataclasses.replace(
  _LLAMA,
  prefix="Qwen2",
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qkv_bias": True},
  rules=(Rule(_read_qwen_window, _write_qwen_window), _ROPE),
)
_QWEN3 = dataclasses.replace(
  _QWEN2,
  prefix="Qwen3",
  layout="qwen3",
  defaults=_QWEN2.defaults | {"head_dim": 128},
  computes=_LLAMA_COMPUTES
  | {"use_bias": False, "qkv_bias": False, "qk_norm": True},
  only={"attention_bias": False},
)
_GEMMA2 = Family(
  prefix="Gemma2",
  layout="gemma2",
  fields=_LLAMA.fields | {"activation": "hidden_activation"} | _CAPS,
  defaults={
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  computes=_without(_LLAMA_COMPUTES, *_CAPS)
  | {
    "norm_position": "both",
    "use_bias": False,
    "qkv_bias": False,
    "scale_embeddings": True,
  },
  classifier=_LAST,
  only={"attention_bias": False, "use_bidirectional_attention": False},
  rules=(Rule(_read_gemma2, _write_gemma2), _ROPE),
)
_GEMMA3 = dataclasses.replace(
  _GEMMA2,
  prefix="Gemma3Text",
  lm="Gemma3ForCausalLM",
  layout="gemma3",
  fields=_without(_GEMMA2.fields, *_CAPS),
  defaults=_without(_GEMMA2.defaults, *_CAPS.values())
  | {
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
  },
  computes=_LLAMA_COMPUTES
  | _GEMMA2.computes
  | {"qk_norm": True, "rope_scaling": None},
  only=_GEMMA2.only | dict.fromkeys(_CAPS.values()),
  rules=(Rule(_read_gemma3, _write_gemma3),),
  bases=_GEMMA3_BASES,
)

# In the order in which `family_of` tries them.
FAMILIES: dict[str, Family] = {
  "bert": _BERT,
  "roberta": _ROBERTA,
  "xlm-roberta": dataclasses.replace(_ROBERTA, prefix="XLMRoberta"),
  "distilbert": _DISTILBERT,
  "electra": _ELECTRA,
  "mpnet": _MPNET,
  "modernbert": _MODERNBERT,
  "gpt2": _GPT2,
  "opt": _OPT,
  "gpt_neox": _GPT_NEOX,
  "llama": _LLAMA,
  "mistral": _MISTRAL,
  "qwen2": _QWEN2,
  "qwen3": _QWEN3,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA3,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """A checkpoint without its arrays.

  `config.pooling` and `config.pooler` are those of the family's classifier,
  even if the checkpoint has none.
  """

  family: str  # key of FAMILIES
  config: ModelConfig  # resolved
  vocab_size: int  # V, rows of the embedding; may exceed the tokenizer's
  max_length: int  # P, positions
  pad_id: int = 0
  # Rows of BERT's segment embedding. Without `config.segments`, ours has row 0
  # in its positions.
  token_types: int = 0
  # Of a sequence classifier, by problem_type; "embed": an encoder of sentences.
  problem: Task = "classify"
  label_names: tuple[str, ...] = ()  # outputs of a sequence classifier

  @property
  def layout(self) -> str:
    """Entry of `hf_weights.LAYOUTS`."""
    return FAMILIES[self.family].layout

  @property
  def num_classes(self) -> int:
    """C, outputs of a sequence classifier; 0: it is none."""
    return len(self.label_names)

  @property
  def head(self) -> str:
    """Output layer of the checkpoint: "classify", "lm" or "none"."""
    if self.num_classes:
      return "classify"
    is_lm = self.config.causal and self.problem != "embed"
    return "lm" if is_lm else "none"

  @property
  def task(self) -> Task:
    """Task of its output layer; without one, the task to fine-tune it for."""
    return "lm" if self.head == "lm" else self.problem

  @property
  def position_offset(self) -> int:
    """Rows of the position embedding before that of the first token."""
    return FAMILIES[self.family].offset(self.pad_id)


def describe(values: dict[str, Any]) -> Description:
  """Returns the description of a config.json.

  Args:
    values: Its fields.

  Raises:
    ConfigError: an architecture or option that is not supported, or a size
      that is missing or out of range; names it.
  """
  name = values.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise ConfigError(
      f"config.json: model_type {name!r} is not supported; supported are "
      f"{', '.join(FAMILIES)}"
    )
  family = FAMILIES[name]
  values = family.defaults | _given(values)
  for field, only in (SUPPORTED | family.only).items():
    _check_supported(field, values.get(field), only)
  fields = _model_fields(family, values)
  model = typed.build(ModelConfig, fields, "config.json")
  task = "lm" if model.causal else "classify"
  run = config_lib.Config(task=task, preset="none", model=model)
  has_segments = "type_vocab_size" in family.defaults
  problem, label_names = _read_labels(values)
  pad_id = values.get("pad_token_id", 0)
  if type(pad_id) is not int:
    raise ConfigError(
      f"config.json: pad_token_id must be an integer; it is {pad_id!r}"
    )
  config = config_lib.resolve(run).model
  vocab_size = _count(values, "vocab_size")
  max_length = _count(values, family.positions)
  if family.counts_first:
    max_length -= family.offset(pad_id)
  if max_length < 1:
    raise ConfigError("config.json: no positions left")
  return Description(
    family=name,
    config=config,
    vocab_size=vocab_size,
    max_length=max_length,
    pad_id=pad_id,
    token_types=_count(values, "type_vocab_size") if has_segments else 0,
    problem=problem,
    label_names=label_names,
  )


def _given(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that are not null, which stands for the default.

  Those of `_NULLABLE` are kept, and a null num_key_value_heads means as many as
  there are heads.
  """
  given = {
    field: value
    for field, value in values.items()
    if value is not None or field in _NULLABLE
  }
  if "num_key_value_heads" in values:
    given.setdefault("num_key_value_heads", values.get("num_attention_heads"))
  return given


def _model_fields(family: Family, values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of ModelConfig."""
  for field in ("num_layers", "width", "num_heads"):
    if family.fields[field] not in values:
      raise ConfigError(f"config.json: {family.fields[field]} is missing")
  fields: dict[str, Any] = {**family.computes, **family.classifier}
  for ours, theirs in family.fields.items():
    if theirs in values:
      fields[ours] = values[theirs]
  if fields["activation"] not in ACTIVATIONS:
    raise ConfigError(
      f"config.json: activation {fields['activation']!r} is not supported; "
      f"supported are {', '.join(ACTIVATIONS)}"
    )
  fields["activation"] = ACTIVATIONS[fields["activation"]]
  for rule in family.rules:
    fields |= rule.read(values)
  return fields


def _check_supported(name: str, value: Any, only: Any) -> None:
  if value not in (None, only):
    hint = "" if only is None else f"; only {only!r} is"
    raise ConfigError(f"config.json: {name}={value!r} is not supported{hint}")


def _count(values: dict[str, Any], name: str) -> int:
  value = values.get(name)
  if type(value) is not int or value < 1:
    raise ConfigError(
      f"config.json: {name} must be a number above 0; it is {value!r}"
    )
  return value


def _read_labels(values: dict[str, Any]) -> tuple[Task, tuple[str, ...]]:
  """Returns task and names of a sequence classifier, () for other models."""
  architectures = values.get("architectures") or [""]
  if not str(architectures[0]).endswith(_CLASSIFIER):
    return "classify", ()
  labels = values.get("id2label")
  if labels:
    num_labels = len(labels)
  else:
    num_labels = _count({"num_labels": 2} | values, "num_labels")
  # One output is a score, if nothing else is said, as in transformers.
  kind = values.get("problem_type") or (
    "regression" if num_labels == 1 else "single_label_classification"
  )
  if kind not in _PROBLEMS or (kind == "regression") != (num_labels == 1):
    raise ConfigError(
      f"config.json: problem_type={kind!r} with {num_labels} labels is not "
      f"supported; supported are {', '.join(_PROBLEMS)}, regression with one "
      "label and the others with two or more (to train another head, take the "
      "old one's name out of architectures)"
    )
  task = _PROBLEMS[kind]
  if not labels:
    return task, tuple(f"LABEL_{i}" for i in range(num_labels))
  names = [label for label in labels.values() if isinstance(label, str)]
  ids = sorted(map(str, range(len(labels))))
  if sorted(map(str, labels)) != ids or len({*names}) != len(labels):
    raise ConfigError(
      "config.json: id2label must give the classes 0, 1, 2, ... a name each; "
      f"it is {labels!r}"
    )
  return task, tuple(labels[i] for i in sorted(labels, key=int))


def to_hf(described: Description) -> dict[str, Any]:
  """Returns the config.json of a description, the inverse of `describe`.

  Raises:
    ConfigError: the family does not compute this model, or its sequence
      classifier has another head; says what would fit.
  """
  config, name = described.config, described.family
  reason = misfit(config, name, described.num_classes)
  if reason is not None:
    raise ConfigError(f"no export as {name}: {reason}")
  family = FAMILIES[name]
  values: dict[str, Any] = {"model_type": name}
  for ours, theirs in family.fields.items():
    values[theirs] = getattr(config, ours)
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  values[family.fields["activation"]] = names[config.activation]
  if isinstance(config.mlp_width, tuple):  # all equal; see `misfit`
    values[family.fields["mlp_width"]] = config.mlp_width[0]
  values["vocab_size"] = described.vocab_size
  values[family.positions] = described.max_length
  if family.counts_first:
    values[family.positions] += described.position_offset
  values["pad_token_id"] = described.pad_id
  if "type_vocab_size" in family.defaults:
    values["type_vocab_size"] = described.token_types
  for field, only in family.only.items():
    if values.get(field, only) != only:
      raise ConfigError(
        f"no export as {name}: {field} must be {only}; it is {values[field]}"
      )
  for rule in family.rules:
    values |= rule.write(config)
  return values | family.writes | _write_head(described)


def _write_head(described: Description) -> dict[str, Any]:
  """Returns the class of the model, and the names of its classes."""
  family = FAMILIES[described.family]
  ends = {"classify": _CLASSIFIER, "lm": "ForCausalLM", "none": "Model"}
  name = family.prefix + ends[described.head]
  if described.head == "lm" and family.lm:
    name = family.lm
  values: dict[str, Any] = {"architectures": [name]}
  if described.head != "classify":
    return values
  labels = described.label_names
  values["id2label"] = {str(i): label for i, label in enumerate(labels)}
  values["label2id"] = {label: i for i, label in enumerate(labels)}
  if described.problem != "classify":
    kinds = {task: kind for kind, task in _PROBLEMS.items()}
    values["problem_type"] = kinds[described.problem]
  return values


def misfit(
  config: ModelConfig, family: str, num_classes: int = 0
) -> str | None:
  """Returns why a family does not compute this model; None: it does.

  Args:
    config: Resolved.
    family: Key of `FAMILIES`.
    num_classes: C; above 0, its sequence classifier must fit too.

  Example:
    >>> misfit(config_lib.ModelConfig(), "gpt2")
    "gpt2 needs model.positions='learned'; it is 'alibi'"
  """
  entry = FAMILIES[family]
  classifier = entry.classifier if num_classes else {}
  for name, needed in (entry.computes | classifier).items():
    value = getattr(config, name)
    if value != needed:
      part = "'s sequence classifier" if name in classifier else ""
      return f"{family}{part} needs model.{name}={needed!r}; it is {value!r}"
  poolings = entry.poolings.values()
  if num_classes and poolings and config.pooling not in poolings:
    return (
      f"{family}'s sequence classifier needs model.pooling in "
      f"{', '.join(poolings)}; it is {config.pooling!r}"
    )
  if config.segments and "type_vocab_size" not in entry.defaults:
    return f"{family} has no segment embedding, which this model has"
  if config.heads is not None:
    return f"{family} has all heads in every layer; set removed ones to zero"
  if isinstance(config.mlp_width, tuple) and len(set(config.mlp_width)) > 1:
    return (
      f"{family} has one model.mlp_width for all layers; it is "
      f"{config.mlp_width}; fill up with zeros"
    )
  windows = _windows(config)
  is_mixed = len({*windows}) > 1
  if len({*windows} - {0}) > 1 or (is_mixed and "window" in entry.fields):
    return f"{family} does not have the windows {config.window}"
  bases = config.by_layer(config.rope_base, "model.rope_base")
  # With two names, each of the two kinds of layers has one.
  kinds = [(x > 0 if entry.bases else None) for x in windows]
  if len({*zip(kinds, bases, strict=True)}) > len({*kinds}):
    return f"{family} has one model.rope_base for all layers"
  if _BIASES in entry.rules and config.qkv_bias != config.use_bias:
    return f"{family} needs model.qkv_bias={config.use_bias}"
  H, given = config.num_heads, entry.fields
  if "num_kv_heads" not in given and config.num_kv_heads != H:
    return f"{family} needs as many model.num_kv_heads as model.num_heads"
  if "head_dim" not in given and config.head_dim != config.width // H:
    return f"{family} needs model.head_dim = model.width / model.num_heads"
  return None


def family_of(config: ModelConfig, num_classes: int = 0) -> str:
  """Returns the first family that computes this model.

  Args:
    config: Resolved.
    num_classes: C, as for `misfit`.

  Raises:
    ConfigError: none does; gives the reasons of the best known ones.

  Example:
    >>> run = config_lib.Config(model=config_lib.llama(window=8))
    >>> family_of(config_lib.resolve(run).model)
    'mistral'
  """
  reasons = {name: misfit(config, name, num_classes) for name in FAMILIES}
  for family, reason in reasons.items():
    if reason is None:
      return family
  shown = "; ".join(str(reasons[name]) for name in ("gpt2", "llama", "bert"))
  raise ConfigError(f"no model of transformers computes this one: {shown}")
