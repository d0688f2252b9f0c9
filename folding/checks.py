"""What a configuration must hold: ranges, and what fits what."""

from typing import Any

from folding.schema import require


def check(c: Any) -> None:
  """Checks ranges and combinations of a resolved `folding.config.Config`.

  Raises:
    ConfigError: a value is out of range, or two do not fit.
  """
  for name in (
    "data.length data.batch_size data.eval_batch_size data.vocab_size "
    "model.num_layers model.width model.num_heads model.num_kv_heads "
    "model.mlp_width train.steps train.log_every train.eval_every "
    "fpp.checks"
  ).split():
    value = _get(c, name)
    require(value >= 1, f"{name} must be at least 1; it is {value}")
  for name in ("fpp.linear", "fpp.embedding", "fpp.overall"):
    value = _get(c, name)
    require(
      value is None or 0 <= value < 1,
      f"{name} is a fraction to remove, in [0, 1); it is {value}",
    )
  for name in (
    "data.valid_fraction data.test_fraction model.dropout train.warmup "
    "train.label_smoothing train.b1 train.b2 fpp.decay"
  ).split():
    value = _get(c, name)
    require(0 <= value < 1, f"{name} must be in [0, 1); it is {value}")
  for name in (
    "train.learning_rate train.clip_norm model.norm_epsilon model.rope_base"
  ).split():
    value = _get(c, name)
    require(value > 0, f"{name} must be above 0; it is {value}")
  for name in (
    "data.max_bytes data.prefetch_batches train.eval_batches "
    "train.weight_decay train.final_learning_rate fpp.patience fpp.tolerance"
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
  _check_model(c)


def _check_model(c: Any) -> None:
  m, f = c.model, c.fold
  assert m.num_kv_heads is not None
  assert f.groups is not None and f.v_block is not None
  require(
    m.width % m.num_heads == 0,
    f"model.width {m.width} is not divisible by model.num_heads {m.num_heads}",
  )
  require(
    m.num_heads % m.num_kv_heads == 0,
    f"model.num_heads {m.num_heads} is not divisible by model.num_kv_heads "
    f"{m.num_kv_heads}",
  )
  require(
    m.positions != "rope" or m.head_dim % 2 == 0,
    f"rotary positions need an even head size; it is {m.head_dim}",
  )
  require(
    c.task != "lm" or m.causal,
    "task 'lm' predicts the next token and needs model.causal=True",
  )
  require(
    c.task == "lm" or not m.causal or m.pooling == "mean",
    "model.pooling='first' with model.causal=True would see the first token "
    "alone; use model.causal=False or model.pooling='mean'",
  )
  require(
    c.task != "lm" or c.data.length > 1, "task 'lm' needs data.length above 1"
  )
  require(f.groups >= 0, f"fold.groups must be 0 or more; it is {f.groups}")
  require(f.v_block >= 0, f"fold.v_block must be 0 or more; it is {f.v_block}")
  axis_size = m.head_dim if f.axis == "output" else m.width
  axis_name = "head size" if f.axis == "output" else "model.width"
  require(
    f.groups == 0 or axis_size % f.groups == 0,
    f"fold.groups {f.groups} does not divide the {axis_name} {axis_size} "
    f"(axis {f.axis!r})",
  )
  require(
    f.v_block == 0 or m.width % f.v_block == 0,
    f"fold.v_block {f.v_block} does not divide model.width {m.width}, so W_V "
    "cannot be block-diagonal; use a divisor, 1 (diagonal) or 0 (dense)",
  )
  require(
    not (f.axis == "input" and f.groups == 1 and m.norm == "layernorm"),
    "fold.axis='input' with fold.groups=1 sums the channels of a LayerNorm, "
    "which is 0 at the start, so attention would be uniform and never learn; "
    "use model.norm='rmsnorm', more groups, or fold.axis='output'",
  )


def _get(config: Any, dotted: str) -> Any:
  for name in dotted.split("."):
    config = getattr(config, name)
  return config
