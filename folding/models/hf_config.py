"""config.json of Hugging Face models <-> `ModelConfig`, by `FAMILIES`."""

import dataclasses
from typing import Any

from folding import config as config_lib
from folding import typed
from folding.config import ModelConfig
from folding.errors import ConfigError
from folding.models import hf_family as hf
from folding.models.families import FAMILIES
from folding.tasks import TASKS

_CLASSIFIER = "ForSequenceClassification"
_ONE_CLASS = "single_label_classification"  # the default problem_type


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
  """Returns the description of a config.json with these fields.

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
  for field, only in (hf.SUPPORTED | family.only).items():
    hf.check_supported(field, values.get(field), only)
  config = _read(family, values)
  if config.causal:  # transformers since 5.2 makes any decoder bidirectional
    hf.check_supported("is_causal", values.get("is_causal"), True)
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
    token_types=_count(values, "type_vocab_size")
    if "type_vocab_size" in family.defaults and values.get("type_vocab_size")
    else 0,
    problem=problem,
    label_names=label_names,
  )


def _given(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that are not null, which stands for the default.

  `hf.NULLABLE` ones are kept. A null num_key_value_heads means num_attention_heads.
  """
  given = {
    field: value
    for field, value in values.items()
    if value is not None or field in hf.NULLABLE
  }
  if "num_key_value_heads" in values:
    given.setdefault("num_key_value_heads", values.get("num_attention_heads"))
  return given


def _read(family: hf.Family, values: dict[str, Any]) -> ModelConfig:
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
    value, known = values[theirs], hf.VALUES.get(ours)
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


def _write(family: hf.Family, config: ModelConfig) -> dict[str, Any]:
  """Returns config.json without sizes and labels, for any resolved config.

  What it cannot express is replaced or left out, so `_read` returns the same
  config only if the family computes it.
  """
  values: dict[str, Any] = {}
  for ours, theirs in family.fields.items():
    value = hf.first(getattr(config, ours))
    if known := hf.VALUES.get(ours):
      names = {x: name for name, x in reversed(known.items())}
      value = names.get(value, next(iter(known)))
    values[theirs] = value
  values |= {field: values[other] for field, other in family.equal.items()}
  for rule in family.rules:
    values |= rule.write(config)
  return values | family.writes


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
    family: Key of `families.FAMILIES`.
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
      if name in entry.fields and name in hf.VALUES:
        fits = dict.fromkeys(hf.VALUES[name].values())
      needs = " or ".join(map(repr, fits))
      return f"{family}{part} needs model.{name}={needs}; it is {value!r}"
  return None


def is_known(config: ModelConfig, num_classes: int = 0) -> bool:
  """Returns whether a family computes this model; arguments as for `misfit`."""
  return any(misfit(config, name, num_classes) is None for name in FAMILIES)


def family_of(config: ModelConfig, num_classes: int = 0) -> str:
  """Returns the first family that computes this model.

  Arguments are those of `misfit`.

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
