"""Chooses how small each part of each layer of a trained model becomes.

`layer_options` measures the options. Each move takes the option with the least
added error per parameter saved, until the model is small enough. What the last
move saves beyond the target is given back to the MLP. Errors are assumed to add
up. Recovery by training is not modelled.

With `fpp.embedding_granularity` "rank" the embedding gets the highest rank that
saves its share (`compress.embedding` "share"), or its rank is one more decision
("errors"). With "errors" the embedding loses more and the MLP less. That model is
slower, as a lookup takes almost no time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from folding import paths
from folding.config import CompressConfig, FPPConfig
from folding.errors import ConfigError
from folding.model import Targets
from folding.models import hf_config
from folding.models.params import kind_of
from folding.models.shape import Layer, Shape, model_of
from folding.models.transformer import make_model, param_shapes
from folding.training.fold_pretrained import require_pairs
from folding.training.layer_options import (
  EMBEDDING,
  Attention,
  Decision,
  Options,
  Tried,
  embedding_shape,
  embedding_size,
  measure,
  num_weights,
  of_all_layers,
  round_neurons,
  smallest,
)
from folding.training.sensitivity import Sensitivities
from folding.training.stream import Batch

_KINDS = ("attn", "mlp", "embed")


class Asked(NamedTuple):
  """What a trained model is compressed to.

  Attributes:
    shape: Its layers have the axis of groups, and what may be folded at all.
    fpp: How much smaller, and by which units.
    compress: How the options are chosen.
    targets: Fractions of the plan that gave the shape; None: there was none yet.
  """

  shape: Shape
  fpp: FPPConfig
  compress: CompressConfig
  targets: Targets | None = None

  @property
  def has_open_rank(self) -> bool:
    """Whether a plan has yet to choose the rank of the embedding."""
    return self.fpp.leaves_open(self.shape.embedding_rank)

  @property
  def tried(self) -> Tried:
    """The options that a plan has to choose from."""
    m = model_of(self.shape)
    is_uniform = self.compress.uniform
    fewer = dataclasses.replace(
      m, num_heads=m.num_heads // m.num_kv_heads, num_kv_heads=1
    )
    return Tried(
      by_neuron=self.fpp.granularity == "neuron",
      embedding=self.has_open_rank and self.compress.embedding == "errors",
      # Not all families can express fewer heads.
      heads=not is_uniform or hf_config.is_known(fewer),
      ranks=not is_uniform,
    )


def allocate(
  asked: Asked,
  params: Mapping[str, Any],
  batches: Sequence[Batch],
  sensitivity: Sensitivities,
  measured: Options | None = None,
) -> tuple[Shape, Targets]:
  """Returns a plan: what each layer becomes, so that the model is as small as asked.

  That is by `fpp.saving`, or as small as the same folding and pruning in all layers
  would make it. The output layer and the embedding keep their targets; with
  `fpp.saving` these are `saving` and `fpp.embedding`, or, if that is None,
  1 - (1 - saving)**embedding_share.

  Args:
    asked: What the model is compressed to.
    params: Parameters of its dense baseline.
    batches: Calibration text, as for `fold_pretrained`.
    sensitivity: From `sensitivities`.
    measured: From `measured_options`; None: they are measured here.

  Returns:
    (heads and folding of each layer, and the rank of the embedding; fractions
    to prune).

  Raises:
    ConfigError: the target is out of reach, or there is too little text.
  """
  if measured is None:
    measured = measured_options(asked, params, batches, sensitivity)
  is_uniform = asked.compress.uniform
  options = of_all_layers(measured) if is_uniform else measured
  target = _target(asked, params)
  chosen = dict.fromkeys(options, 0)
  chosen = cheapest(options, chosen, _KINDS, target.budget)
  if is_uniform:
    chosen = {key: chosen[0, key[1]] for key in measured}
    options = measured
  rank = target.rank
  if EMBEDDING in options:
    rank = options[EMBEDDING][chosen[EMBEDDING]].value
  layers = tuple(
    _chosen_layer(layer, options[n, "attn"][chosen[n, "attn"]].value)
    for n, layer in enumerate(asked.shape.layers)
  )
  shape = dataclasses.replace(
    asked.shape,
    layers=layers,
    embedding_rank=rank,
    embedding_shared=asked.shape.embedding_shared and rank > 0,
  )
  linear = _linear_layers(asked.fpp, params, options, chosen, target.budget)
  return shape, Targets(linear, target.linear, target.embedding)


def measured_options(
  asked: Asked,
  params: Mapping[str, Any],
  batches: Sequence[Batch],
  sensitivity: Sensitivities,
) -> Options:
  """Returns the options of a plan; they do not depend on `fpp.saving`.

  The arguments are those of `allocate`.
  """
  require_pairs(asked.shape)
  return measure(asked.shape, params, batches, sensitivity, asked.tried)


def _chosen_layer(asked: Layer, option: Attention) -> Layer:
  """Returns a layer with the chosen form of attention."""
  J, H = asked.num_kv_heads, len(asked.heads)
  is_kind = isinstance(option.values, str)
  return dataclasses.replace(
    asked,
    heads=option.heads,
    num_kv_heads=len(option.heads) * J // H,
    groups=option.groups,
    values=option.values if is_kind else "dense",
    value_dim=asked.head_dim if is_kind else option.values,
  )


class _Target(NamedTuple):
  """What a plan has to reach.

  Attributes:
    sizes: From `_sizes`, with an embedding of low rank as "other".
    linear: Fraction to prune of the output layer.
    embedding: Fraction to prune of the embedding.
    rank: Rank of the embedding; 0: not low, or decided by its error.
    budget: Most parameters that the decisions may store.
  """

  sizes: dict[str, int]
  linear: float
  embedding: float
  rank: int
  budget: float


def _target(asked: Asked, params: Mapping[str, Any]) -> _Target:
  """Returns what a plan has to reach, from shapes alone."""
  sizes = _sizes(asked, params)
  linear, embedding = outer_fractions(asked.fpp)
  rank, shape = asked.shape.embedding_rank, embedding_shape(asked.shape, params)
  if asked.tried.embedding:
    embedding = 0.0  # the options of its rank count its parameters
    sizes["embedding"] -= math.prod(shape)
  elif asked.has_open_rank:
    rank = _embedding_rank(shape, embedding)
  if rank:
    rows = shape[0] * rank  # the rest, back to the width, is not pruned
    sizes["embedding"] += rows - math.prod(shape)
    sizes["other"] += embedding_size(shape, rank) - rows
    if asked.fpp.embedding_granularity != "trim":
      embedding = 0.0  # all tokens stay
  budget = _budget(asked, sizes, linear, embedding)
  return _Target(sizes, linear, embedding, rank, budget)


def require_reachable(asked: Asked, params: Mapping[str, Any]) -> None:
  """Checks that the smallest options of a plan save enough, before measuring.

  Args:
    asked: What the model is compressed to; without `fpp.saving` it passes.
    params: Parameters of its dense baseline, or shapes.

  Raises:
    ConfigError: they do not; it has the largest saving in reach.
  """
  if (saving := asked.fpp.saving) is None:
    return
  least = sum(smallest(asked.shape, params, asked.tried).values())

  def is_reachable(share: float) -> bool:
    fpp = dataclasses.replace(asked.fpp, saving=share)
    return _target(asked._replace(fpp=fpp), params).budget >= least

  if is_reachable(saving):
    return
  reachable = [p for p in range(1, 100) if is_reachable(p / 100)]
  most = f"at most {max(reachable)}%" if reachable else "less than 1%"
  raise ConfigError(
    f"no plan saves {saving:.0%} of this model: its parts can be made smaller by "
    f"{most}; lower the saving (in a config: fpp.saving)"
  )


def _linear_layers(
  fpp: FPPConfig,
  params: Mapping[str, Any],
  options: Options,
  chosen: Mapping[Decision, int],
  budget: float,
) -> tuple[float, ...]:
  """Returns the fraction to prune of the linear layers of each layer.

  Any fraction of them can be pruned, so they take up what the chosen options save
  beyond the budget.
  """
  spare = budget - _stored(options, chosen, _KINDS)
  whole = _stored(options, dict.fromkeys(options, 0), ("mlp",))
  pruned = whole - _stored(options, chosen, ("mlp",))
  part = max(0.0, 1 - spare / pruned) if pruned else 0.0
  fractions = []
  for n in sorted({n for n, kind in options if kind == "mlp"}):
    fraction = part * options[n, "mlp"][chosen[n, "mlp"]].value
    if fpp.granularity == "weight":
      fractions.append(math.ceil(fraction * 1e4) / 1e4)
    else:
      F = params[f"blocks_{n}"]["mlp"]["down"]["kernel"].shape[0]
      fractions.append(1 - round_neurons(F * (1 - fraction), F) / F)
  return tuple(fractions)


def _stored(
  options: Options, chosen: Mapping[Decision, int], kinds: Sequence[str]
) -> float:
  """Returns the parameters that the chosen options of some kinds store."""
  return sum(
    options[key][i].stored for key, i in chosen.items() if key[1] in kinds
  )


def cheapest(
  options: Options,
  chosen: Mapping[Decision, int],
  kinds: Sequence[str],
  limit: float,
) -> dict[Decision, int]:
  """Returns choices that store at most `limit` parameters.

  Each move takes the least error per parameter saved.

  Args:
    options: From `measure`.
    chosen: {decision: index of its option} to begin with.
    kinds: Kinds that may change, and that `limit` counts.
    limit: Number of parameters.

  Raises:
    ConfigError: the options cannot save as much.
  """
  chosen = dict(chosen)
  while _stored(options, chosen, kinds) > limit:
    moves = []
    for key, i in chosen.items():
      if key[1] not in kinds:
        continue
      now = options[key][i]
      for j, then in enumerate(options[key][i + 1 :], i + 1):
        if then.stored < now.stored:
          price = (then.error - now.error) / (now.stored - then.stored)
          moves.append((price, key, j))
    if not moves:
      raise ConfigError(
        "no plan reaches the target; lower the saving (in a config: fpp.saving)"
      )
    _, key, j = min(moves)
    chosen[key] = j
  return chosen


def _sizes(asked: Asked, params: Mapping[str, Any]) -> dict[str, int]:
  """Returns the number of parameters per kind, with the head as a kind.

  If embeddings are pruned by rows, that of positions counts as "other", unless it
  has the rank of the tokens.
  """
  by_rows = asked.fpp.embedding_granularity != "weight"
  sizes = {"qkv": 0, "linear": 0, "embedding": 0, "other": 0, "head": 0}
  for name, leaf in paths.flatten(params).items():
    kind = "head" if name == "head/kernel" else kind_of(name)
    is_apart = by_rows and not asked.shape.embedding_shared
    if is_apart and name == "position_embed/embedding":
      kind = "other"
    sizes[kind] += int(np.prod(leaf.shape))
  return sizes | {"all": sum(sizes.values())}


def outer_fractions(f: FPPConfig) -> tuple[float, float]:
  """Returns the fractions to prune of the output layer and the embedding."""
  if f.saving is not None:
    embedding = f.embedding
    if embedding is None:
      embedding = 1 - (1 - f.saving) ** (f.embedding_share or 0.0)
    head = f.saving if f.granularity == "weight" else 0.0
    return head, min(embedding, math.nextafter(1, 0))  # rounding gives 1
  return f.linear or 0.0, f.embedding or 0.0


def _embedding_rank(shape: tuple[int, int], fraction: float) -> int:
  """Returns the rank that saves a fraction of an embedding [V, D]; 0: none.

  It is a multiple of 8.
  """
  V, D = shape
  most = ((1 - fraction) * V * D - D) / (V + D)
  return min(D, max(8, int(most) // 8 * 8)) if fraction else 0


def _budget(
  asked: Asked, sizes: Mapping[str, int], linear: float, embedding: float
) -> float:
  """Returns how many parameters W_Q, W_K, W_V and linear layers may store."""
  if asked.fpp.saving is not None:
    part = 0.0  # the head of a classifier is never pruned
    if asked.shape.output == "tokens":
      is_trimmed = asked.fpp.embedding_granularity == "trim"
      part = embedding if is_trimmed else linear
    head = (1 - part) * sizes["head"]
    outside = (1 - embedding) * sizes["embedding"] + sizes["other"] + head
    return (1 - asked.fpp.saving) * sizes["all"] - outside
  shapes = param_shapes(make_model(asked.shape, 1, num_classes=1))
  qkv = sum(
    num_weights(block["attn"], ("q", "k", "v", "frequency"))
    for name, block in shapes.items()
    if name.startswith("blocks_")
  )
  return qkv + (1 - linear) * sizes["linear"]
