"""What a configuration must hold: ranges, and what fits what."""

import re
from typing import Any

from folding import presets
from folding.model_checks import by_layer, check_model
from folding.schema import require, require_seed


def check(c: Any) -> None:
  """Checks ranges and combinations of a resolved `folding.config.Config`.

  Raises:
    ConfigError: a value is out of range, or two do not fit.
  """
  require_seed(c.seed)
  for name in (
    "data.length data.batch_size data.eval_batch_size data.vocab_size "
    "model.num_layers model.width model.num_heads model.num_kv_heads "
    "model.head_dim train.steps train.log_every train.eval_every "
    "train.accumulate train.eval_batches model.window "
    "fpp.checks compress.calibration"
  ).split():
    value = _get(c, name)
    if value is not None:
      require(value >= 1, f"{name} must be at least 1; it is {value}")
      require(value < 2**31, f"{name} must be below 2^31; it is {value}")
  for name in ("fpp.linear fpp.embedding fpp.overall compress.qkv").split():
    value = _get(c, name)
    require(
      value is None or 0 <= value < 1,
      f"{name} is a fraction to remove, in [0, 1); it is {value}",
    )
  if c.fpp.linear_layers is not None:
    parts = by_layer(c.model, c.fpp.linear_layers, "fpp.linear_layers")
    require(
      all(0 <= part < 1 for part in parts),
      f"fpp.linear_layers are fractions to remove, in [0, 1); they are {parts}",
    )
    require(
      c.fpp.overall is None,
      "fpp.overall and fpp.linear_layers both say how much to prune; drop one",
    )
  for name in (
    "data.valid_fraction data.test_fraction model.dropout train.warmup "
    "train.label_smoothing train.b1 train.b2 fpp.decay"
  ).split():
    value = _get(c, name)
    require(0 <= value < 1, f"{name} must be in [0, 1); it is {value}")
  for name in (
    "train.learning_rate train.clip_norm train.qk_rate train.v_rate "
    "train.slope_rate model.norm_epsilon model.rope_base"
  ).split():
    value = _get(c, name)
    require(value > 0, f"{name} must be above 0; it is {value}")
  for name in (
    "data.max_bytes data.first_batch data.prefetch_batches train.weight_decay "
    "compress.fit_steps "
    "train.final_learning_rate fpp.patience fpp.tolerance "
    "fpp.embedding_share"
  ).split():
    value = _get(c, name)
    require(
      value is None or value >= 0, f"{name} must be 0 or more; it is {value}"
    )
  require(
    c.data.valid_fraction + c.data.test_fraction < 1,
    "data.valid_fraction + data.test_fraction must leave text to train on",
  )
  require(
    0 <= c.fpp.begin < c.fpp.end <= 1,
    "fpp.begin and fpp.end are fractions of the steps, begin < end; they are "
    f"{c.fpp.begin} and {c.fpp.end}",
  )
  d = c.distill
  require(
    0 <= d.logits <= 1 and d.hidden >= 0 and d.temperature > 0,
    "distill.logits is a share, 0 to 1, distill.hidden 0 or more, "
    f"distill.temperature above 0; they are {d.logits}, {d.hidden} and "
    f"{d.temperature}",
  )
  require(
    not (d.logits or d.hidden) or bool(d.teacher or c.pretrained),
    "distill needs distill.teacher (a run) or pretrained",
  )
  require(
    c.fpp.embedding_granularity != "trim"
    or (c.task == "classify" and c.pretrained is not None),
    "fpp.embedding_granularity='trim' takes tokens out of the tokenizer of a "
    "trained classifier; give pretrained=PATH, or use 'row' or 'weight'",
  )
  require(
    c.compress.prune == "none" or c.pretrained is not None,
    f"compress.prune={c.compress.prune!r} prunes a trained model; give "
    "pretrained=PATH",
  )
  by_neuron = (c.compress.prune, c.fpp.granularity) == ("sparsegpt", "neuron")
  require(
    c.compress.prune == "none"
    or (c.fpp.granularity == "weight" or by_neuron)
    and c.fpp.attention != "heads"
    and c.fpp.embedding_granularity != "row",
    "compress.prune goes by weight, 'sparsegpt' by neuron too; use that, "
    "fpp.embedding_granularity='weight' or 'trim', and not fpp.attention='heads'",
  )
  require(
    c.compress.prune not in ("wanda", "sparsegpt")
    or c.fpp.attention == "output"
    or c.fold.axis == "output",
    f"compress.prune={c.compress.prune!r} knows no moments of the sums that "
    "fold.axis='input' makes; use fpp.attention='output'",
  )
  require(
    c.fpp.attention != "heads"
    or not any(by_layer(c.model, c.fold.v_block, "fold.v_block"))
    and c.model.num_kv_heads == c.model.num_heads,
    "fpp.attention='heads' needs heads with keys and values of their own; use "
    "fold.v_block=0 and model.num_kv_heads=0",
  )
  require(
    c.compress.plan == "same" or c.pretrained is not None,
    "compress.plan='auto' measures a trained model; give pretrained=PATH",
  )
  _check_parts(c)
  check_model(c)


def check_used(c: Any, asked: Any) -> None:
  """Checks that what is asked of a new run is of use to it.

  Args:
    c: The resolved config.
    asked: The same as it was given, resolved or not.

  Raises:
    ConfigError: a value would be passed over.
  """
  d, f = c.distill, asked.fpp
  filled = presets.PRESETS[c.preset]["fpp"]  # a resolved config has all of it
  if c.fpp.overall is not None and f.overall is not None:
    for name in ("linear", "embedding"):
      value, is_resolved = getattr(f, name), None not in (f.linear, f.embedding)
      require(
        value is None or is_resolved and value == filled[name],
        f"fpp.overall decides how much goes of what; set that or fpp.{name}, not "
        "both",
      )
  require(
    bool(d.logits or d.hidden or not d.teacher),
    "distill.teacher does nothing while distill.logits and distill.hidden are 0",
  )
  require(
    not c.fold.v_identity,
    "fold.v_identity is what removing a diagonal W_V leaves; use fold.v_block=1",
  )
  m = c.model
  require(
    c.pretrained is None or m.heads is None and m.dense_mlp_width is None,
    "model.heads and model.dense_mlp_width are what a shrink leaves, and no "
    "checkpoint has that shape; leave them out with pretrained",
  )
  require(
    m.positions == "rope" or (m.rope_scaling, c.fold.rope) == (None, "copy"),
    "model.rope_scaling and fold.rope='pairs' are of rotary positions; leave them "
    "out, or use model.positions='rope'",
  )
  require(
    c.compress.plan == "auto" or c.compress.qkv is None,
    "compress.qkv is for compress.plan='auto'; without it use fold.groups and "
    "fold.v_block",
  )
  if c.compress.prune != "none":
    require(
      asks_to_prune(c.fpp),
      "compress.prune prunes what fpp says, which is nothing; set fpp.overall, or "
      "leave compress.prune out of a dense run",
    )
    require(
      c.fpp.tolerance is None,
      "fpp.tolerance is for pruning while training; leave it out with "
      "compress.prune",
    )


def asks_to_prune(fpp: Any) -> bool:
  """Returns whether a section `fpp` of a config would have anything zeroed."""
  parts = (fpp.overall, fpp.linear, fpp.embedding, *(fpp.linear_layers or ()))
  return any(parts)


def _check_parts(c: Any) -> None:
  """Checks what shares out the work: processes, and parts of a batch."""
  count = c.train.accumulate
  require(
    c.data.batch_size % count == 0,
    f"data.batch_size {c.data.batch_size} does not divide into "
    f"train.accumulate={count} parts",
  )
  require(
    count == 1 or not c.distill.hidden,
    "distill.hidden compares whole batches; use train.accumulate=1",
  )
  found = re.fullmatch(r"[^,\s]+:\d+,(\d+),(\d+)", c.distributed)
  require(
    c.distributed in ("none", "auto")
    or found is not None
    and int(found[1]) < int(found[2]),
    "distributed is 'none', 'auto' or 'HOST:PORT,PROCESS,COUNT', such as "
    f"'10.0.0.1:1234,0,2', PROCESS below COUNT; it is {c.distributed!r}",
  )


def _get(config: Any, dotted: str) -> Any:
  for name in dotted.split("."):
    config = getattr(config, name)
  return config
