"""config.json of Hugging Face models <-> `ModelConfig`, by one table.

`FAMILIES` has one entry per supported `model_type`; `describe` and `to_hf` read
it in both directions. To add a family, add an entry here and in `LAYOUTS` of
`folding.models.hf_weights`, which names its tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from folding import config as config_lib
from folding import typed
from folding.config import ModelConfig
from folding.errors import ConfigError
from folding.tasks import TASKS


class Rule(NamedTuple):
  """Fields that correspond by more than their names, in both directions."""

  # config.json -> ours
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
  # ours -> config.json
  write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """The entry of one `model_type`.

  Attributes:
    prefix: Start of its class names in transformers.
    lm: Name of its next-token model; "": `prefix` and "ForCausalLM".
    fields: {field of ModelConfig: field of config.json}. Values are the same,
      except those in `VALUES`.
    positions: Field of config.json with the number of positions.
    first_position: Row of the position embedding of the first token; None: the
      one after the pad id.
    counts_first: Whether `positions` counts the rows before that one.
    defaults: What transformers assumes for fields missing in config.json.
    computes: Fields of ModelConfig that the architecture fixes. All others that
      are neither in `fields` nor in `rules` have their defaults.
    classifier: The same of its sequence classifier; by default a linear layer
      on the last token.
    only: Fields of config.json with one supported value.
    equal: Fields of config.json that must equal another one.
    rules: Fields that correspond by more than their names.
    writes: Constant fields of config.json for the export.
  """

  prefix: str
  lm: str = ""
  fields: dict[str, str]
  positions: str = "max_position_embeddings"
  first_position: int | None = 0
  counts_first: bool = True
  defaults: dict[str, Any]
  computes: dict[str, Any]
  classifier: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {"pooling": "last"}
  )
  only: dict[str, Any] = dataclasses.field(default_factory=dict)
  equal: dict[str, str] = dataclasses.field(default_factory=dict)
  rules: tuple[Rule, ...] = ()
  writes: dict[str, Any] = dataclasses.field(default_factory=dict)

  def offset(self, pad_id: int) -> int:
    """Returns the row of the position embedding of the first token."""
    first = self.first_position
    return pad_id + 1 if first is None else first


_CLASSIFIER = "ForSequenceClassification"
_ONE_CLASS = "single_label_classification"  # the default problem_type

# Field of ModelConfig: {value in config.json: ours}. Of several values for one
# of ours, the first is written.
VALUES: dict[str, dict[str, str]] = {
  "activation": {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
  },
  "pooling": {"cls": "first", "mean": "mean"},
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
_NULLABLE = {"sliding_window", "local_rope_theta", *_CAPS.values()}


def _windows(
  is_sliding: Callable[[dict[str, Any], int], bool],
  *,
  field: str = "sliding_window",
  both_sides: bool = False,
  bases: Mapping[str, str] | None = None,
) -> Rule:
  """Returns the rule of a family in which only some layers have a window.

  Args:
    is_sliding: Whether layer n has one, from config.json without layer_types.
    field: Field of config.json with the size of the windows.
    both_sides: Whether that counts the tokens before and after, without the one
      between them; otherwise the last tokens.
    bases: {kind of layer: field of config.json with its rope_base}; None: all
      layers have the same.
  """

  def read(values):
    kinds = values.get("layer_types") or [
      _SLIDING if is_sliding(values, n) else _FULL
      for n in range(values["num_hidden_layers"])
    ]
    if not {*kinds} <= {_SLIDING, _FULL}:
      raise ConfigError(
        f"config.json: layer_types {sorted({*kinds})} is not supported; supported "
        f"are {_FULL} and {_SLIDING}"
      )
    size = values[field] or 0
    size = size // 2 + 1 if both_sides else size
    fields = {"window": [size if x == _SLIDING else 0 for x in kinds]}
    if bases:
      base_of = {
        kind: _read_base(values, kind, name) for kind, name in bases.items()
      }
      # Layers with windows may have no base of their own.
      fields["rope_base"] = [base_of[x] or base_of[_FULL] for x in kinds]
    return fields

  def write(config):
    sizes = config.by_layer(config.window or 0, "model.window")
    kinds = [_SLIDING if x else _FULL for x in sizes]
    values: dict[str, Any] = {"layer_types": kinds}
    if size := max(sizes):
      values[field] = 2 * (size - 1) if both_sides else size
    if bases:
      used = config.by_layer(config.rope_base, "model.rope_base")
      values |= {bases[x]: base for x, base in zip(kinds, used, strict=True)}
    return values

  return Rule(read, write)


def _read_base(values: dict[str, Any], kind: str, name: str) -> float | None:
  """Returns the rope_base of a kind of layer, which may not be scaled.

  None: this kind has none of its own.
  """
  scaling = values.get("rope_scaling") or {}
  # transformers 5 writes a dict per kind.
  rope = (values.get("rope_parameters") or {}).get(kind) or {}
  used = scaling.get("rope_type", scaling.get("type"))
  used = used or rope.get("rope_type", "default")
  if used != "default":
    raise ConfigError(
      f"config.json: rope_type {used!r} beside windows in some layers is "
      "not supported; only 'default' is"
    )
  return rope.get("rope_theta", values[name])


def _rope(base: str = "rope_theta", share: str | None = None) -> Rule:
  """Returns the rule of rotary positions that are the same in all layers.

  Args:
    base: Field of config.json with the rope_base, before transformers 5.
    share: Field of config.json with the rope_share, before transformers 5;
      None: all channels rotate.
  """

  def read(values):
    # transformers 5 writes one dict, earlier versions the base and a dict or
    # null. It reads the older one if there are both.
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope = {"rope_theta": values[base], _SHARE: values.get(share, 1.0)} | given
    if share is None:
      _check_supported(_SHARE, rope[_SHARE], SUPPORTED[_SHARE])
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
    return {
      "rope_base": rope["rope_theta"],
      "rope_scaling": [rope[name] for name in names] or None,
      "rope_share": rope[_SHARE],
    }

  def write(config):
    values = {base: _first(config.rope_base)}
    if share is not None:
      values[share] = config.rope_share
    for kind, names in ROPE_SCALINGS.items():
      if config.rope_scaling and len(config.rope_scaling) == len(names):
        scaling = dict(zip(names, config.rope_scaling, strict=True))
        if _LENGTH in scaling:
          scaling[_LENGTH] = int(scaling[_LENGTH])
        values["rope_scaling"] = {"rope_type": kind, **scaling}
    return values

  return Rule(read, write)


def _first(value: Any) -> Any:
  """Returns the value of the first layer."""
  return value[0] if isinstance(value, tuple) else value


_FIELDS = {
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "activation": "hidden_act",
}
_DECODER: dict[str, Any] = {"positions": "learned"}
_ENCODER = _DECODER | {"causal": False, "norm_position": "post"}
_FIRST: dict[str, Any] = {"pooling": "first", "pooler": True}

_BERT_DEFAULTS = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
  "max_position_embeddings": 512,
  "pad_token_id": 0,
}
_BERT = Family(
  prefix="Bert",
  fields=_FIELDS
  | {"norm_epsilon": "layer_norm_eps", "dropout": "hidden_dropout_prob"},
  defaults=_BERT_DEFAULTS | {"type_vocab_size": 2},
  computes=_ENCODER,
  classifier=_FIRST,
  writes={"attention_probs_dropout_prob": 0.0},
)
_ROBERTA = dataclasses.replace(
  _BERT,
  prefix="Roberta",
  first_position=None,
  defaults=_BERT.defaults | {"pad_token_id": 1},
)
_MPNET = dataclasses.replace(
  _BERT,
  prefix="MPNet",
  first_position=2,
  defaults=_BERT_DEFAULTS | {"pad_token_id": 1},
  computes=_ENCODER | {"relative_buckets": 32},
  # Its positions count the tokens that are not 1, whatever the pad token is.
  only={"relative_attention_num_buckets": 32, "pad_token_id": 1},
  writes=_BERT.writes | {"relative_attention_num_buckets": 32},
)
_ELECTRA = dataclasses.replace(
  _BERT,
  prefix="Electra",
  defaults=_BERT.defaults | {"embedding_size": 128},
  classifier=_FIRST | {"pooler_activation": "gelu"},
  rules=(
    Rule(
      lambda values: {
        "embed_width": values["embedding_size"]
        if values["embedding_size"] != values["hidden_size"]
        else 0
      },
      lambda config: {"embedding_size": config.embed_width or config.width},
    ),
  ),
)
_DISTILBERT = Family(
  prefix="DistilBert",
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
  fields=_FIELDS
  | {
    "activation": "hidden_activation",
    "norm_epsilon": "norm_eps",
    "pooling": "classifier_pooling",
  },
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
  computes={
    "causal": False,
    "embed_norm": True,
    "positions": "rope",
    "gated": True,
    "use_bias": False,
  },
  classifier={
    "pooler": True,
    "pooler_activation": "gelu",
    "pooler_norm": True,
  },
  only={
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
  },
  rules=(
    _windows(
      lambda values, n: n % values["global_attn_every_n_layers"] > 0,
      field="local_attention",
      both_sides=True,
      bases={_FULL: "global_rope_theta", _SLIDING: "local_rope_theta"},
    ),
  ),
)
_GPT2 = Family(
  prefix="GPT2",
  lm="GPT2LMHeadModel",
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
  rules=(Rule(write=lambda config: {"embd_pdrop": config.dropout}),),
  writes={"attn_pdrop": 0.0},
)
_OPT = Family(
  prefix="OPT",
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
  only={
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
  },
  equal={"word_embed_proj_dim": "hidden_size"},
  writes={"attention_dropout": 0.0},
)
_GPT_NEOX = Family(
  prefix="GPTNeoX",
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
  computes={"positions": "rope"},
  only={"attention_bias": True},
  rules=(_rope("rotary_emb_base", "rotary_pct"),),
  writes={"attention_dropout": 0.0},
)
_LLAMA_FIELDS = _FIELDS | {
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_epsilon": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_COMPUTES: dict[str, Any] = {
  "norm": "rmsnorm",
  "positions": "rope",
  "gated": True,
}
_LLAMA = Family(
  prefix="Llama",
  fields=_LLAMA_FIELDS | {"use_bias": "mlp_bias"},
  defaults={
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
  },
  computes=_LLAMA_COMPUTES,
  equal={"attention_bias": "mlp_bias"},
  rules=(_rope(),),
)
_MISTRAL = dataclasses.replace(
  _LLAMA,
  prefix="Mistral",
  fields=_LLAMA_FIELDS | {"window": "sliding_window"},
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False},
  equal={},
)
_QWEN2 = dataclasses.replace(
  _LLAMA,
  prefix="Qwen2",
  fields=_LLAMA_FIELDS,
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qkv_bias": True},
  equal={},
  rules=(
    _windows(lambda values, n: n >= values["max_window_layers"]),
    Rule(
      lambda values: {} if values["use_sliding_window"] else {"window": None},
      lambda config: {
        "use_sliding_window": config.window is not None,
        "max_window_layers": 0,
      },
    ),
    _rope(),
  ),
)
_QWEN3 = dataclasses.replace(
  _QWEN2,
  prefix="Qwen3",
  defaults=_QWEN2.defaults | {"head_dim": 128},
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qk_norm": True},
  only={"attention_bias": False},
)
_GEMMA2 = Family(
  prefix="Gemma2",
  fields=_LLAMA_FIELDS | {"activation": "hidden_activation"} | _CAPS,
  defaults={
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  computes=_LLAMA_COMPUTES
  | {"norm_position": "both", "use_bias": False, "scale_embeddings": True},
  only={"attention_bias": False, "use_bidirectional_attention": False},
  equal={"query_pre_attn_scalar": "head_dim"},
  rules=(_windows(lambda _, n: n % 2 == 0), _rope()),
)
_GEMMA3 = dataclasses.replace(
  _GEMMA2,
  prefix="Gemma3Text",
  lm="Gemma3ForCausalLM",
  fields=_LLAMA_FIELDS | {"activation": "hidden_activation"},
  defaults=_GEMMA2.defaults
  | {
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
  }
  | dict.fromkeys(_CAPS.values()),
  computes=_GEMMA2.computes | {"qk_norm": True},
  only=_GEMMA2.only | dict.fromkeys(_CAPS.values()),
  rules=(
    _windows(
      lambda values, n: (n + 1) % values["sliding_window_pattern"] > 0,
      bases={_FULL: "rope_theta", _SLIDING: "rope_local_base_freq"},
    ),
  ),
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

  family: str  # key of FAMILIES and of `hf_weights.LAYOUTS`
  config: ModelConfig  # resolved
  vocab_size: int  # V, rows of the embedding; may exceed the tokenizer's
  max_length: int  # P, positions
  pad_id: int = 0
  # Rows of BERT's segment embedding. Without `config.segments`, ours has row 0
  # in its positions.
  token_types: int = 0
  # Task of a sequence classifier, by problem_type; "embed": sentence vectors.
  problem: str = "classify"
  label_names: tuple[str, ...] = ()  # outputs of a sequence classifier

  @property
  def num_classes(self) -> int:
    """C, outputs of a sequence classifier; 0: it is none."""
    return len(self.label_names)

  @property
  def head(self) -> str:
    """Output layer of the checkpoint: "classify", "lm" or "none"."""
    if self.num_classes:
      return "classify"
    makes_vectors = TASKS[self.problem].makes_vectors
    return "lm" if self.config.causal and not makes_vectors else "none"

  @property
  def task(self) -> str:
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
  given = _given(values)
  values = family.defaults | given
  for field, only in (SUPPORTED | family.only).items():
    _check_supported(field, values.get(field), only)
  config = _read(family, values)
  if config.causal:  # transformers since 5.2 makes any decoder bidirectional
    _check_supported("is_causal", values.get("is_causal"), True)
  has_segments = "type_vocab_size" in family.defaults
  problem, label_names = _read_labels(values)
  pad_id = values.get("pad_token_id", 0)
  if type(pad_id) is not int:
    raise ConfigError(
      f"config.json: pad_token_id must be an integer; it is {pad_id!r}"
    )
  vocab_size = _count(values, "vocab_size")
  if "pad_token_id" in given and pad_id >= vocab_size:
    raise ConfigError(
      f"config.json: pad_token_id {pad_id} is not one of the {vocab_size} tokens"
    )
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


def _read(family: Family, values: dict[str, Any]) -> ModelConfig:
  """Returns the resolved config of a config.json with its defaults."""
  for field in ("num_layers", "width", "num_heads"):
    if family.fields[field] not in values:
      raise ConfigError(f"config.json: {family.fields[field]} is missing")
  for field, other in family.equal.items():
    value, needed = values.get(field, values[other]), values[other]
    if value != needed:
      raise ConfigError(
        f"config.json: {field}={value!r} with {other}={needed!r} is not "
        "supported; they must be equal"
      )
  fields: dict[str, Any] = {**family.computes, **family.classifier}
  for ours, theirs in family.fields.items():
    if theirs not in values:
      continue
    value, known = values[theirs], VALUES.get(ours)
    if known and value not in known:
      raise ConfigError(
        f"config.json: {theirs} {value!r} is not supported; supported are "
        f"{', '.join(known)}"
      )
    fields[ours] = known[value] if known else value
  for rule in family.rules:
    fields |= rule.read(values)
  model = typed.build(ModelConfig, fields, "config.json")
  task = "lm" if model.causal else "classify"
  run = config_lib.Config(task=task, preset="none", model=model)
  return config_lib.resolve(run).model


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
  """Returns config.json without sizes and labels, for any resolved config.

  What it cannot express is replaced or left out, so `_read` returns the same
  config only if the family computes it.
  """
  values: dict[str, Any] = {}
  for ours, theirs in family.fields.items():
    value = _first(getattr(config, ours))
    if known := VALUES.get(ours):
      names = {x: name for name, x in reversed(known.items())}
      value = names.get(value, next(iter(known)))
    values[theirs] = value
  values |= {field: values[other] for field, other in family.equal.items()}
  for rule in family.rules:
    values |= rule.write(config)
  return values | family.writes


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


def _read_labels(values: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
  """Returns task and names of a sequence classifier, () for other models."""
  architectures = values.get("architectures") or [""]
  if not str(architectures[0]).endswith(_CLASSIFIER):
    return "classify", ()
  labels = values.get("id2label")
  if not labels:
    count = _count({"num_labels": 2} | values, "num_labels")
    labels = {i: f"LABEL_{i}" for i in range(count)}
  # One output is a score, if nothing else is said, as in transformers.
  kind = values.get("problem_type") or (
    "regression" if len(labels) == 1 else _ONE_CLASS
  )
  known = _problems()
  if kind not in known or (kind == "regression") != (len(labels) == 1):
    raise ConfigError(
      f"config.json: problem_type={kind!r} with {len(labels)} labels is not "
      f"supported; supported are {', '.join(known)}, regression with one "
      "label and the others with two or more (to train another head, take the "
      "old one's name out of architectures)"
    )
  names = [x for x in labels.values() if isinstance(x, str) and x.strip()]
  ids = sorted(map(str, range(len(labels))))
  if sorted(map(str, labels)) != ids or len({*names}) != len(labels):
    raise ConfigError(
      "config.json: id2label must give the classes 0, 1, 2, ... a name each; "
      f"it is {labels!r}"
    )
  return known[kind], tuple(labels[i] for i in sorted(labels, key=int))


def _problems() -> dict[str, str]:
  """Returns {problem_type of config.json: name of the first task with it}."""
  found: dict[str, str] = {}
  for task in TASKS.values():
    if task.labels:
      found.setdefault(task.labels.problem_type, task.name)
  return found


def to_hf(described: Description) -> dict[str, Any]:
  """Returns the config.json of a description, the inverse of `describe`.

  Raises:
    ConfigError: the family does not compute this model, or its sequence
      classifier has another head; names what would fit.
  """
  config, name = described.config, described.family
  reason = misfit(config, name, described.num_classes)
  if reason is not None:
    raise ConfigError(f"no export as {name}: {reason}")
  family = FAMILIES[name]
  values: dict[str, Any] = {"model_type": name, **_write(family, config)}
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
  return values | _write_head(described)


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
  form = TASKS[described.problem].labels
  if form and form.problem_type != _ONE_CLASS:
    values["problem_type"] = form.problem_type
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
    >>> misfit(config_lib.resolve(config_lib.Config()).model, "gpt2")
    "gpt2 needs model.positions='learned'; it is 'alibi'"
  """
  entry = FAMILIES[family]
  if config.segments and "type_vocab_size" not in entry.defaults:
    return f"{family} has no segment embedding, which this model has"
  if config.heads is not None:
    return f"{family} has all heads in every layer; set removed ones to zero"
  if isinstance(config.mlp_width, tuple) and len(set(config.mlp_width)) > 1:
    return (
      f"{family} has one model.mlp_width for all layers; it is "
      f"{config.mlp_width}; pad with zeros"
    )
  try:
    nearest = _read(entry, entry.defaults | _write(entry, config))
  except ConfigError as error:
    return f"{family} does not have this shape: {error}"
  free = set() if config.positions == "rope" else {"rope_base"}
  # Families that norm by LayerNorm have all biases or none; those that a model
  # lacks are written as zeros.
  if nearest.norm == "layernorm" and nearest.use_bias:
    free |= {"use_bias", "qkv_bias"}
  head: tuple[str, ...] = ()
  if num_classes:
    head = config_lib.HEAD if config.pooler else ("pooling", "pooler")
  for name in config_lib.SHAPE + ("use_bias", "qkv_bias") + head:
    value, needed = getattr(config, name), getattr(nearest, name)
    if name not in free and value != needed:
      part = "'s sequence classifier" if name in head else ""
      fits = [needed]
      if name in entry.fields and name in VALUES:
        fits = dict.fromkeys(VALUES[name].values())
      needs = " or ".join(map(repr, fits))
      return f"{family}{part} needs model.{name}={needs}; it is {value!r}"
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
