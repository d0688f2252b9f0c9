"""What a Hugging Face config.json says <-> our model configuration.

What is known of a family of models, but its arrays: those are in `hf_weights`.
"""

import dataclasses
from typing import Any

from folding import config as config_lib
from folding import schema
from folding.config import ModelConfig
from folding.models import hf_families as families


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """A checkpoint without its arrays.

  `config.pooling` and `config.pooler` are those of the family's classifier,
  also where the checkpoint is none.
  """

  family: str
  config: ModelConfig  # resolved
  vocab_size: int  # V, rows of the embedding; may exceed the tokenizer's
  max_length: int  # P, positions
  pad_id: int = 0
  token_types: int = 0  # rows of BERT's segment embedding; ours are segment 0
  num_classes: int = 0  # C, of a sequence classifier; 0: it is none
  label_names: tuple[str, ...] = ()

  @property
  def layout(self) -> str:
    """The family whose names of tensors this one shares."""
    return families.LAYOUTS[self.family]

  @property
  def position_offset(self) -> int:
    """RoBERTa counts positions from here; the rows before are for padding."""
    return self.pad_id + 1 if self.layout == "roberta" else 0


def describe(values: dict[str, Any]) -> Description:
  """Returns what a config.json, read as a dict, describes.

  Raises:
    schema.ConfigError: an architecture or option that this library does not
      have, named; or a size that is missing or makes no sense.
  """
  family = values.get("model_type")
  schema.require(
    isinstance(family, str) and family in families.FAMILIES,
    f"config.json: model_type {family!r} is not supported; supported are "
    f"{', '.join(families.FAMILIES)}",
  )
  assert isinstance(family, str)
  layout = families.LAYOUTS[family]
  given = {k: v for k, v in values.items() if v is not None}
  heads = values.get("num_attention_heads")
  nulls = {"sliding_window": None, "num_key_value_heads": heads}
  # Null is the default elsewhere, and where these are not named at all.
  given |= {k: v for k, v in nulls.items() if k in values and k not in given}
  values = families.DEFAULTS[family] | given
  for name, only in families.ONLY.items():
    _require_only(name, values.get(name), only)
  fields: dict[str, Any] = {
    "norm_epsilon": 1e-12,  # of DistilBERT, which does not say
    **families.COMPUTES[family],
    **families.CLASSIFIER_FIELDS[family],
  }
  for ours, theirs in families.FIELD_NAMES[layout].items():
    if theirs in values:
      fields[ours] = values[theirs]
  for theirs in ("num_layers", "width", "num_heads"):
    theirs = families.FIELD_NAMES[layout][theirs]
    schema.require(theirs in values, f"config.json: {theirs} is missing")
  activation = fields["activation"]
  schema.require(
    activation in families.ACTIVATIONS,
    f"config.json: activation {activation!r} is not supported; supported are "
    f"{', '.join(families.ACTIVATIONS)}",
  )
  fields["activation"] = families.ACTIVATIONS[activation]
  if layout == "llama":
    fields |= _llama_fields(values, family)
  model = schema.build(ModelConfig, fields, "config.json")
  resolved = config_lib.resolve(
    config_lib.Config(
      task="lm" if model.causal else "classify", preset="none", model=model
    )
  )
  labels = _label_names(values)
  pad_id = values.get("pad_token_id", 0)
  described = Description(
    family=family,
    config=resolved.model,
    vocab_size=_count(values, "vocab_size"),
    max_length=_count(values, families.POSITION_NAMES[layout]),
    pad_id=pad_id if type(pad_id) is int else 0,
    token_types=values.get("type_vocab_size", 0),
    num_classes=len(labels),
    label_names=labels,
  )
  left = described.max_length - described.position_offset
  schema.require(left > 0, "config.json: there are no positions left")
  return dataclasses.replace(described, max_length=left)


def _require_only(name: str, value: Any, only: Any) -> None:
  schema.require(
    value in (None, only),
    f"config.json: {name}={value!r} is not supported"
    + ("" if only is None else f"; only {only!r} is"),
  )


def _count(values: dict[str, Any], name: str) -> int:
  value = values.get(name)
  schema.require(
    type(value) is int and value > 0,
    f"config.json: {name} must be a number above 0; it is {value!r}",
  )
  assert isinstance(value, int)
  return value


def _llama_fields(values: dict[str, Any], family: str) -> dict[str, Any]:
  """Returns biases, window and rotation."""
  fields: dict[str, Any] = {}
  if family == "llama":
    bias = values["attention_bias"]
    schema.require(
      values["mlp_bias"] == bias,
      f"config.json: attention_bias={bias} with mlp_bias={not bias} is not "
      "supported; both or neither are",
    )
    fields["use_bias"] = bias
  if family == "mistral" or (
    family == "qwen2" and values.get("use_sliding_window")
  ):
    fields["window"] = _window(values, family)
  # transformers 5 writes one dict, earlier ones rope_theta and a dict or null;
  # what it takes where there are both.
  given = values.get("rope_scaling") or values.get("rope_parameters") or {}
  rope = {"rope_theta": values.get("rope_theta", 10000.0)} | given
  length = "original_max_position_embeddings"
  if length in values:
    rope[length] = values[length]
  name = "partial_rotary_factor"
  _require_only(name, rope.get(name), families.ONLY[name])
  fields["rope_base"] = rope["rope_theta"]
  kind = rope.get("rope_type", rope.get("type", "default"))
  schema.require(
    kind in families.ROPE_SCALINGS,
    f"config.json: rope_type {kind!r} is not supported; supported are "
    f"{', '.join(families.ROPE_SCALINGS)}",
  )
  names = families.ROPE_SCALINGS[kind]
  missing = [name for name in names if name not in rope]
  schema.require(not missing, f"config.json: rope_type {kind} needs {missing}")
  if names:
    fields["rope_scaling"] = [rope[name] for name in names]
  return fields


def _window(values: dict[str, Any], family: str) -> int | None:
  # All layers of a Mistral where it does not say.
  first = 0 if family == "mistral" else values["max_window_layers"]
  kinds = values.get("layer_types") or [
    "full_attention" if n < first else "sliding_attention"
    for n in range(values["num_hidden_layers"])
  ]
  if set(kinds) == {"full_attention"} and family != "mistral":
    return None
  schema.require(
    set(kinds) in ({"sliding_attention"}, {"full_attention"}),
    "config.json: a sliding window for some layers only is not supported (see "
    "max_window_layers or layer_types)",
  )
  return values["sliding_window"]


def _label_names(values: dict[str, Any]) -> tuple[str, ...]:
  """Returns one name a class of a sequence classifier, none for others."""
  architectures = values.get("architectures") or [""]
  if not str(architectures[0]).endswith("ForSequenceClassification"):
    return ()
  labels = values.get("id2label")
  kind = values.get("problem_type")
  schema.require(
    kind in (None, "single_label_classification")
    and values.get("num_labels", 2) != 1
    and (not labels or len(labels) > 1),
    f"config.json: a classifier of problem_type={kind!r} or of one label is not "
    "supported; only single_label_classification of two or more is (to train "
    "another head on an encoder, take the old one's name out of architectures)",
  )
  if not labels:
    num_labels = _count({"num_labels": 2} | values, "num_labels")
    return tuple(f"LABEL_{i}" for i in range(num_labels))
  schema.require(
    isinstance(labels, dict)
    and sorted(map(str, labels)) == sorted(map(str, range(len(labels)))),
    "config.json: id2label must name the classes 0, 1, 2, ...; it is "
    f"{labels!r}",
  )
  names = tuple(str(labels[i]) for i in sorted(labels, key=int))
  schema.require(
    len({*names}) == len(names),
    f"config.json: id2label has one name for two classes; it is {labels!r}",
  )
  return names


def head_of(described: Description) -> str:
  """Returns "classify", "lm", or "none": what a checkpoint has as its head."""
  if described.num_classes:
    return "classify"
  return "lm" if described.config.causal else "none"


def misfit(
  config: ModelConfig, family: str, num_classes: int = 0
) -> str | None:
  """Returns why the family does not compute this model; None: it does.

  Args:
    config: Resolved.
    family: One of `hf_families.FAMILIES`.
    num_classes: C; above 0, its sequence classifier must fit too.

  Example:
    >>> misfit(config_lib.ModelConfig(), "gpt2")
    "gpt2 needs model.positions='learned'; it is 'alibi'"
  """
  classifier = families.CLASSIFIER_FIELDS[family] if num_classes else {}
  for name, needed in (families.COMPUTES[family] | classifier).items():
    value = getattr(config, name)
    if value != needed:
      part = "'s sequence classifier" if name in classifier else ""
      return f"{family}{part} needs model.{name}={needed!r}; it is {value!r}"
  if config.heads is not None:
    return f"{family} has all heads in every layer; set those gone to zero"
  if isinstance(config.mlp_width, tuple) and len(set(config.mlp_width)) > 1:
    return (
      f"{family} has one model.mlp_width for all layers; it is "
      f"{config.mlp_width}; fill up with zeros"
    )
  if families.LAYOUTS[family] == "llama":
    if family == "llama" and config.qkv_bias != config.use_bias:
      return f"llama needs model.qkv_bias={config.use_bias}"
    return None
  if config.num_kv_heads not in (0, config.num_heads):
    return f"{family} needs as many model.num_kv_heads as model.num_heads"
  if config.head_dim not in (None, config.width // config.num_heads):
    return f"{family} needs heads that share out model.width"
  return None


def family_of(config: ModelConfig, num_classes: int = 0) -> str:
  """Returns the first family that computes this model.

  Args:
    config: Resolved.
    num_classes: C, as for `misfit`.

  Raises:
    schema.ConfigError: none does; says why of the best known ones.

  Example:
    >>> run = config_lib.Config(model=config_lib.llama(window=8))
    >>> family_of(config_lib.resolve(run).model)
    'mistral'
  """
  order = ("gpt2", "llama", "mistral", "qwen2", "bert", "distilbert")
  reasons = {family: misfit(config, family, num_classes) for family in order}
  fitting = [family for family, reason in reasons.items() if reason is None]
  schema.require(
    bool(fitting),
    "no model of transformers computes this one: "
    + "; ".join(str(reasons[f]) for f in ("gpt2", "llama", "bert")),
  )
  return fitting[0]
