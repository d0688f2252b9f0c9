"""What an entry of `families.FAMILIES` says about a kind of checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from folding.config import ModelConfig
from folding.errors import ConfigError

# Field of ModelConfig: {value in config.json: ours}. If several values stand for
# one of ours, the first is written.
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
  "is_decoder": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  _SHARE: 1.0,
  "quantization_config": None,
}

# Fields in which null means "none" rather than the default.
NULLABLE = {
  "sliding_window",
  "local_rope_theta",
  "attn_logit_softcapping",
  "final_logit_softcapping",
}

SLIDING, FULL = "sliding_attention", "full_attention"


class Rule(NamedTuple):
  """Fields that correspond by more than their names, in both directions."""

  # config.json -> ours
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}
  # ours -> config.json
  write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Modules of a family, as {ours: theirs}.

  Several of ours, such as "attn/q attn/k attn/v", are stacked along the output
  axis of one of theirs.

  Attributes:
    prefix: Start of the names of the model without its head; a checkpoint may
      lack it.
    outer: Modules around the blocks; a model may lack some.
    blocks: Where the blocks are.
    block: Modules of a block.
    classifier: Modules of the sequence classifier, with whole names.
    lm_head: Output layer of a language model, with its whole name.
    idle_pooler: A dense layer of the model without a head, which our vectors do
      not read. transformers draws it at random, with a warning, if it is missing.
    relative: A relative bias that all layers share.
    has_biases: Whether all norms and linear layers have biases, except the heads
      of causal models. If not, norms have none, and linear layers as the config
      says.
    is_transposed: Whether kernels of blocks are [in, out], as ours.
    is_stacked_by_head: Whether stacked modules are stacked within each head.
    norm_shift: Ours is the scale of theirs plus this, in norms.
  """

  prefix: str
  outer: dict[str, str]
  blocks: str
  block: dict[str, str]
  classifier: dict[str, str] = dataclasses.field(
    default_factory=lambda: {"head": "score"}
  )
  lm_head: str = "lm_head"
  idle_pooler: str = ""
  relative: str = ""
  has_biases: bool = False
  is_transposed: bool = False
  is_stacked_by_head: bool = False
  norm_shift: float = 0.0


class Architecture(NamedTuple):
  """An architecture of llama.cpp.

  Attributes:
    name: For layers of one shape.
    per_layer: For layers of several shapes; "": there is none.
    activation: Activation of the MLP.
    rotates_neighbours: Whether rotary positions pair channels 2i and 2i + 1, not
      i and i + K/2.
    scales_rotations: Whether it reads a factor per rotation.
  """

  name: str
  per_layer: str = ""
  activation: str = "silu"
  rotates_neighbours: bool = False
  scales_rotations: bool = False


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
    layout: Names of its tensors.
    gguf: Its architecture in llama.cpp; None: there is none.
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
  layout: Layout
  gguf: Architecture | None = None

  def offset(self, pad_id: int) -> int:
    """Returns the row of the position embedding of the first token."""
    first = self.first_position
    return pad_id + 1 if first is None else first


def windows(
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
      SLIDING if is_sliding(values, n) else FULL
      for n in range(values["num_hidden_layers"])
    ]
    if not {*kinds} <= {SLIDING, FULL}:
      raise ConfigError(
        f"config.json: layer_types {sorted({*kinds})} is not supported; supported "
        f"are {FULL} and {SLIDING}"
      )
    size = values[field] or 0
    size = size // 2 + 1 if both_sides else size
    fields = {"window": [size if x == SLIDING else 0 for x in kinds]}
    if bases:
      base_of = {
        kind: _read_base(values, kind, name) for kind, name in bases.items()
      }
      # Layers with windows may have no base of their own.
      fields["rope_base"] = [base_of[x] or base_of[FULL] for x in kinds]
    return fields

  def write(config):
    sizes = config.by_layer(config.window or 0, "model.window")
    kinds = [SLIDING if x else FULL for x in sizes]
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


def rope(base: str = "rope_theta", share: str | None = None) -> Rule:
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
      check_supported(_SHARE, rope[_SHARE], SUPPORTED[_SHARE])
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
    values = {base: first(config.rope_base)}
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


def first(value: Any) -> Any:
  """Returns the value of the first layer."""
  return value[0] if isinstance(value, tuple) else value


def check_supported(name: str, value: Any, only: Any) -> None:
  """Raises `ConfigError` if a field has another value than the one supported."""
  if value not in (None, only):
    hint = "" if only is None else f"; only {only!r} is"
    raise ConfigError(f"config.json: {name}={value!r} is not supported{hint}")
