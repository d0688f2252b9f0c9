"""The shape of a model: which arrays it has, and how they compute.

`shape_of` reads the sections `model` and `fold` of a config, and `with_shape` writes
them, which is the form of a shape on disk.
"""

import dataclasses
from typing import Any, Literal

from folding import config as config_lib
from folding.config import (
  Config,
  Design,
  FoldConfig,
  ModelConfig,
  Values,
  joined,
)
from folding.tasks import Output, task_of


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
  """The shape of one layer.

  Attributes:
    heads: Indices of the heads that are left, in increasing order.
    num_kv_heads: J, the number of key and value heads that are left.
    head_dim: K.
    value_dim: r, numbers per head of the values; K unless W_V has low rank.
    mlp_width: F.
    whole_mlp_width: F before any shrink.
    qkv_bias: Whether W_Q, W_K and W_V have a bias.
    groups: G, row groups of W_Q and W_K; 0: dense.
    axis: Axis that the groups run over, see `FoldConfig.axis`.
    rope: How the G numbers are rotated, see `FoldConfig.rope`.
    values: Kind of W_V, see `FoldConfig.values`.
    window: Number of last tokens that a token attends to; None: all.
    rope_base: Base of the rotations.
    has_norm_attn: False if `Design.embed_norm` replaces the norm of attention.
  """

  heads: tuple[int, ...]
  num_kv_heads: int
  head_dim: int
  value_dim: int
  mlp_width: int
  whole_mlp_width: int
  qkv_bias: bool
  groups: int
  axis: Literal["output", "input"]
  rope: Literal["copy", "pairs"]
  values: Values
  window: int | None
  rope_base: float
  has_norm_attn: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)  # static in jit
class Shape(Design):
  """The shape of a model, apart from the sizes of its vocabulary and head.

  Attributes:
    layers: From the first to the last.
    num_heads: H of a layer with all of its heads.
    num_kv_heads: J of such a layer.
    head_dim: K.
    embedding_rank: r, rank of the embedding; 0: the full rank.
    embedding_shared: Whether positions and segments have that rank too.
    max_length: Most tokens, and rows of learned positions.
    output: Next-token logits, scores of a text, or the vector of a text.
  """

  layers: tuple[Layer, ...]
  num_heads: int
  num_kv_heads: int
  head_dim: int
  embedding_rank: int
  embedding_shared: bool
  max_length: int
  output: Output

  @property
  def num_layers(self) -> int:
    """N."""
    return len(self.layers)

  @property
  def shared_rank(self) -> int:
    """Rank of the embeddings of positions and segments; 0: the full rank."""
    return self.embedding_rank if self.embedding_shared else 0

  def whole(self, *, keeps_heads: bool = False) -> "Shape":
    """Returns the shape before any shrink: with all neurons, and all heads.

    If `keeps_heads`, removed heads stay removed.
    """

    def whole(layer: Layer) -> Layer:
      if not keeps_heads:
        layer = dataclasses.replace(
          layer,
          heads=tuple(range(self.num_heads)),
          num_kv_heads=self.num_kv_heads,
        )
      return dataclasses.replace(
        layer,
        mlp_width=layer.whole_mlp_width,
        values="diagonal" if layer.values == "identity" else layer.values,
      )

    return dataclasses.replace(self, layers=tuple(map(whole, self.layers)))

  def dense(self) -> "Shape":
    """Returns the shape of the dense baseline."""

    def dense(layer: Layer) -> Layer:
      return dataclasses.replace(
        layer,
        value_dim=layer.head_dim,
        groups=0,
        axis="output",
        rope="copy",
        values="dense",
      )

    layers = tuple(map(dense, self.whole().layers))
    return dataclasses.replace(
      self, layers=layers, embedding_rank=0, embedding_shared=False
    )

  @property
  def is_dense(self) -> bool:
    """Whether nothing is folded or removed."""
    return self == self.dense()


def shape_of(config: Config) -> Shape:
  """Returns the shape that a config describes."""
  config = config_lib.filled(config)
  output = task_of(config).output_kind
  return make_shape(config.model, config.fold, output, config.data.length)


def make_shape(
  m: ModelConfig, f: FoldConfig, output: Output, length: int
) -> Shape:
  """Returns the shape that sections of a resolved config describe.

  `length` is that of the texts, which the model reads at least.
  """
  return Shape(
    **{x.name: getattr(m, x.name) for x in dataclasses.fields(Design)},
    layers=tuple(_layer(m, f, n) for n in range(m.num_layers)),
    num_heads=m.num_heads,
    num_kv_heads=m.num_kv_heads,
    head_dim=m.head_dim,
    embedding_rank=f.embedding_rank,
    embedding_shared=f.embedding_shared,
    max_length=max(m.max_length, length),
    output=output,
  )


def _layer(m: ModelConfig, f: FoldConfig, n: int) -> Layer:
  def at(value: Any) -> Any:
    return value[n] if isinstance(value, tuple) else value

  heads = m.heads[n] if m.heads else tuple(range(m.num_heads))
  before = m.mlp_width if m.dense_mlp_width is None else m.dense_mlp_width
  return Layer(
    heads=heads,
    num_kv_heads=len(heads) * m.num_kv_heads // m.num_heads,
    head_dim=m.head_dim,
    value_dim=at(f.value_rank) or m.head_dim,
    mlp_width=at(m.mlp_width),
    whole_mlp_width=at(before),
    qkv_bias=bool(m.qkv_bias),
    groups=at(f.groups),
    axis=f.axis,
    rope=f.rope,
    values=at(f.values),
    window=at(m.window) or None,
    rope_base=at(m.rope_base),
    has_norm_attn=n > 0 or not m.embed_norm,
  )


def with_shape(config: Config, shape: Shape) -> Config:
  """Returns a config whose sections `model` and `fold` describe a shape."""
  model = model_of(shape)
  if model.max_length <= config.data.length:
    model = dataclasses.replace(model, max_length=0)  # as in a resolved config
  return dataclasses.replace(config, model=model, fold=fold_of(shape))


def model_of(shape: Shape) -> ModelConfig:
  """Returns the section `model` of a shape."""
  layers = shape.layers
  is_whole = all(len(x.heads) == shape.num_heads for x in layers)
  is_cut = any(x.mlp_width != x.whole_mlp_width for x in layers)
  return ModelConfig(
    **{x.name: getattr(shape, x.name) for x in dataclasses.fields(Design)},
    num_layers=shape.num_layers,
    num_heads=shape.num_heads,
    num_kv_heads=shape.num_kv_heads,
    head_dim=shape.head_dim,
    mlp_width=_each(shape, "mlp_width"),
    dense_mlp_width=_each(shape, "whole_mlp_width") if is_cut else None,
    heads=None if is_whole else tuple(x.heads for x in layers),
    window=joined(tuple(x.window or 0 for x in layers)) or None,
    rope_base=_each(shape, "rope_base"),
    qkv_bias=layers[0].qkv_bias,
    max_length=shape.max_length,
  )


def fold_of(shape: Shape) -> FoldConfig:
  """Returns the section `fold` of a shape."""
  layers = shape.layers
  return FoldConfig(
    groups=_each(shape, "groups"),
    axis=layers[0].axis,
    rope=layers[0].rope,
    values=_each(shape, "values"),
    value_rank=joined(tuple(x.value_dim % shape.head_dim for x in layers)),
    embedding_rank=shape.embedding_rank,
    embedding_shared=shape.embedding_shared,
  )


def _each(shape: Shape, name: str) -> Any:
  return joined(tuple(getattr(layer, name) for layer in shape.layers))
