"""What a model must hold: shapes, and what can be folded of them."""

from typing import Any

from folding.schema import require


def check_model(c: Any) -> None:
  """Checks the model, and how it is folded, of a resolved config.

  Raises:
    ConfigError: a value is out of range, or two do not fit.
  """
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
  scaling = m.rope_scaling
  require(
    scaling is None
    or (len(scaling) in (1, 4) and min(scaling) > 0)
    and (len(scaling) == 1 or scaling[1] < scaling[2]),
    "model.rope_scaling is (factor,) or (factor, low, high, length), all above "
    f"0 and low < high; it is {scaling}",
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
  widths = by_layer(m, m.mlp_width, "model.mlp_width")
  for width in widths:
    require(width >= 1, f"model.mlp_width must be at least 1; it is {width}")
  if m.dense_mlp_width is not None:
    before = by_layer(m, m.dense_mlp_width, "model.dense_mlp_width")
    require(
      all(now <= then for now, then in zip(widths, before, strict=True)),
      f"model.dense_mlp_width {m.dense_mlp_width} is the width before neurons "
      f"were removed; model.mlp_width {m.mlp_width} is above it",
    )
  all_groups = by_layer(m, f.groups, "fold.groups")
  for groups in all_groups:
    _check_groups(m, f, groups)
  is_rank_1 = 1 in all_groups and f.axis == "output"
  require(
    m.attention != "linear"
    or c.dense
    or (is_rank_1 and m.positions != "rope" and m.window is None),
    "model.attention='linear' needs a layer with fold.groups=1 on the output "
    "axis, and neither rotary positions nor model.window",
  )
  for n, block in enumerate(by_layer(m, f.v_block, "fold.v_block")):
    require(block >= 0, f"fold.v_block must be 0 or more; it is {block}")
    is_dense = block == 0 or (f.first_dense and n == 0)
    require(
      m.heads is None
      or len(m.heads[n]) == m.num_heads
      or is_dense
      or m.head_dim % block == 0,
      f"fold.v_block {block} joins heads of {m.head_dim}, so none can be left "
      "out by model.heads; use a divisor, or 0 (dense)",
    )
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


def by_layer(m: Any, value: Any, name: str) -> tuple[Any, ...]:
  """Returns the value of each layer.

  Raises:
    ConfigError: there are too many, or too few.
  """
  values = value if isinstance(value, tuple) else (value,) * m.num_layers
  require(
    len(values) == m.num_layers,
    f"{name} has {len(values)} values for {m.num_layers} layers; give one, or "
    "one a layer",
  )
  return values


def _check_heads(m: Any) -> None:
  shared = m.num_heads // m.num_kv_heads
  for heads in by_layer(m, m.heads, "model.heads"):
    require(
      len(heads) > 0
      and heads == tuple(sorted(set(heads)))
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
