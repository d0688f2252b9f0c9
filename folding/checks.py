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
    "model.head_dim train.steps train.log_every train.eval_every "
    "fpp.checks"
  ).split():
    value = _get(c, name)
    require(value >= 1, f"{name} must be at least 1; it is {value}")
  require(
    c.model.window is None or c.model.window >= 1,
    f"model.window must be at least 1; it is {c.model.window}",
  )
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
  require(
    m.width % m.num_heads == 0 or m.head_dim != m.width // m.num_heads,
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
    c.task == "lm" or not m.causal or m.pooling != "first",
    "model.pooling='first' with model.causal=True would see the first token "
    "alone; use model.causal=False, or model.pooling='mean' or 'last'",
  )
  require(
    c.task != "lm" or c.data.length > 1, "task 'lm' needs data.length above 1"
  )
  if m.heads is not None:
    _check_heads(m)
  for width in _layers(m, m.mlp_width, "model.mlp_width"):
    require(width >= 1, f"model.mlp_width must be at least 1; it is {width}")
  for groups in _layers(m, f.groups, "fold.groups"):
    _check_groups(m, f, groups)
  for block in _layers(m, f.v_block, "fold.v_block"):
    require(block >= 0, f"fold.v_block must be 0 or more; it is {block}")
    require(
      block == 0 or m.width % block == 0,
      f"fold.v_block {block} does not divide model.width {m.width}, so W_V "
      "cannot be block-diagonal; use a divisor, 1 (diagonal) or 0 (dense)",
    )
    require(
      block == 0 or m.num_heads * m.head_dim == m.width,
      f"fold.v_block {block} needs heads that share out model.width {m.width}; "
      f"there are {m.num_heads} of {m.head_dim}; use fold.v_block=0",
    )


def _layers(m: Any, value: Any, name: str) -> tuple[Any, ...]:
  """Returns the value of each layer."""
  values = value if isinstance(value, tuple) else (value,) * m.num_layers
  require(
    len(values) == m.num_layers,
    f"{name} has {len(values)} values for {m.num_layers} layers; give one, or "
    "one a layer",
  )
  return values


def _check_heads(m: Any) -> None:
  shared = m.num_heads // m.num_kv_heads
  for heads in _layers(m, m.heads, "model.heads"):
    require(
      heads == tuple(sorted(set(heads)))
      and all(0 <= h < m.num_heads for h in heads)
      and all(
        h in heads
        for one in heads
        for h in range(one // shared * shared, (one // shared + 1) * shared)
      ),
      f"model.heads lists the heads of a layer in order, out of {m.num_heads} "
      f"and by whole groups of {shared} that share a key; it is {heads}",
    )


def _check_groups(m: Any, f: Any, groups: int) -> None:
  require(groups >= 0, f"fold.groups must be 0 or more; it is {groups}")
  if m.positions == "rope" and f.rope == "pairs" and groups:
    require(
      f.axis == "output" and groups % 2 == 0 and groups <= m.head_dim,
      f"fold.rope='pairs' keeps an even number of channels a head, at most "
      f"{m.head_dim}, on the output axis; fold.groups is {groups}",
    )
    return
  axis_size = m.head_dim if f.axis == "output" else m.width
  axis_name = "head size" if f.axis == "output" else "model.width"
  require(
    groups == 0 or axis_size % groups == 0,
    f"fold.groups {groups} does not divide the {axis_name} {axis_size} "
    f"(axis {f.axis!r})",
  )
  require(
    not (f.axis == "input" and groups == 1 and m.norm == "layernorm"),
    "fold.axis='input' with fold.groups=1 sums the channels of a LayerNorm, "
    "which is 0 at the start, so attention would be uniform and never learn; "
    "use model.norm='rmsnorm', more groups, or fold.axis='output'",
  )


def _get(config: Any, dotted: str) -> Any:
  for name in dotted.split("."):
    config = getattr(config, name)
  return config
