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

from folding import config as config_lib
from folding import paths
from folding.config import Config
from folding.errors import ConfigError
from folding.models import hf_config
from folding.models.params import group_of
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.tasks import task_of
from folding.training.fold_pretrained import require_pairs
from folding.training.layer_options import (
  EMBEDDING,
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
from folding.typed import edited

_KINDS = ("attn", "mlp", "embed")


def allocate(
  config: Config,
  params: Mapping[str, Any],
  batches: Sequence[Batch],
  sensitivity: Sensitivities,
) -> Config:
  """Returns the config with heads, `fold` and `fpp.linear_layers` per layer.

  The model becomes as small as the config asks: by `fpp.overall`, or as small
  as the same folding and pruning in all layers would make it. The output layer
  and the embedding keep their targets; with `fpp.overall` these are `overall`
  and 1 - (1 - overall)**embedding_share. The returned config states all of
  this, and its `compress.plan` is "same".

  Args:
    config: Resolved.
    params: Parameters of its dense baseline.
    batches: Calibration text, as for `fold_pretrained`.
    sensitivity: From `sensitivities`.

  Raises:
    ConfigError: the target is out of reach, or there is too little text.
  """
  asked, tried = shape_of(config), _tried(config)
  require_pairs(asked)
  measured = measure(asked, params, batches, sensitivity, tried)
  is_uniform = config.compress.uniform
  options = of_all_layers(measured) if is_uniform else measured
  sizes, linear, embedding, rank, budget = _target(config, params)
  chosen = dict.fromkeys(options, 0)
  chosen = cheapest(options, chosen, _KINDS, budget)
  if is_uniform:
    chosen = {key: chosen[0, key[1]] for key in measured}
    options = measured
  if EMBEDDING in options:
    rank = options[EMBEDDING][chosen[EMBEDDING]].value

  attention = [
    options[n, "attn"][chosen[n, "attn"]].value
    for n in range(config.model.num_layers)
  ]
  groups, kinds, heads = zip(*attention, strict=True)
  layers = _linear_layers(config, params, options, chosen, budget)
  edits = {
    "fold.groups": groups,
    "fold.values": tuple(v if isinstance(v, str) else "dense" for v in kinds),
    "fold.value_rank": tuple(0 if isinstance(v, str) else v for v in kinds),
    "fold.embedding_rank": rank,
    "fold.embedding_shared": asked.embedding_shared and rank > 0,
    "fpp.overall": None,
    "fpp.linear": linear,
    "fpp.embedding": embedding,
    "fpp.linear_layers": layers,
    "compress.plan": "same",
    "compress.uniform": False,
    "compress.embedding": "share",
  }
  if not any((linear, embedding, *layers)):  # folding alone saves as much
    edits["compress.prune"] = "none"
  if any(len(kept) < config.model.num_heads for kept in heads):
    edits["model.heads"] = heads
  if config.fpp.embedding_granularity == "rank":
    edits["fpp.embedding_granularity"] = "weight"
  return config_lib.resolve(edited(config, edits))


def _tried(config: Config) -> Tried:
  """Returns which options a plan has to choose from."""
  m, compress = config.model, config.compress
  fewer = dataclasses.replace(
    m, num_heads=m.num_heads // m.num_kv_heads, num_kv_heads=1
  )
  return Tried(
    by_neuron=config.fpp.granularity == "neuron",
    embedding=config.has_open_rank and compress.embedding == "errors",
    # Not all families can express fewer heads.
    heads=not compress.uniform or hf_config.is_known(fewer),
    ranks=not compress.uniform,
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


def _target(config: Config, params: Mapping[str, Any]) -> _Target:
  """Returns what the plan of a config has to reach, from shapes alone."""
  sizes = _sizes(config, params)
  linear, embedding = outer_fractions(config)
  shape = embedding_shape(shape_of(config), params)
  rank = config.fold.embedding_rank
  if _tried(config).embedding:
    embedding = 0.0  # the options of its rank count its parameters
    sizes["embedding"] -= math.prod(shape)
  elif config.has_open_rank:
    rank = _embedding_rank(shape, embedding)
  if rank:
    rows = shape[0] * rank  # the rest, back to the width, is not pruned
    sizes["embedding"] += rows - math.prod(shape)
    sizes["other"] += embedding_size(shape, rank) - rows
    if config.fpp.embedding_granularity != "trim":
      embedding = 0.0  # all tokens stay
  budget = _budget(config, sizes, linear, embedding)
  return _Target(sizes, linear, embedding, rank, budget)


def require_reachable(config: Config, params: Mapping[str, Any]) -> None:
  """Checks that the smallest options of a plan save enough, before measuring.

  Args:
    config: Resolved; a config without `fpp.overall` passes.
    params: Parameters of its dense baseline, or shapes.

  Raises:
    ConfigError: they do not; it has the largest saving in reach.
  """
  if (asked := config.fpp.overall) is None:
    return
  least = sum(smallest(shape_of(config), params, _tried(config)).values())

  def is_reachable(overall: float) -> bool:
    tried = edited(config, {"fpp.overall": overall})
    return _target(tried, params).budget >= least

  if is_reachable(asked):
    return
  reachable = [p for p in range(1, 100) if is_reachable(p / 100)]
  most = f"at most {max(reachable)}%" if reachable else "less than 1%"
  raise ConfigError(
    f"no plan saves {asked:.0%} of this model: its parts can be made smaller by "
    f"{most}; lower the saving (in a config: fpp.overall)"
  )


def _linear_layers(
  config: Config,
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
  for n in range(config.model.num_layers):
    fraction = part * options[n, "mlp"][chosen[n, "mlp"]].value
    if config.fpp.granularity == "weight":
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
        "no plan reaches the target; lower the saving (in a config: fpp.overall)"
      )
    _, key, j = min(moves)
    chosen[key] = j
  return chosen


def _sizes(config: Config, params: Mapping[str, Any]) -> dict[str, int]:
  """Returns the number of parameters per group, with the head as a group.

  If embeddings are pruned by rows, that of positions counts as "other", unless it
  has the rank of the tokens.
  """
  by_rows = config.fpp.embedding_granularity != "weight"
  sizes = {"qkv": 0, "linear": 0, "embedding": 0, "other": 0, "head": 0}
  for name, leaf in paths.flatten(params).items():
    group = "head" if name == "head/kernel" else group_of(name)
    is_apart = by_rows and not config.fold.embedding_shared
    if is_apart and name == "position_embed/embedding":
      group = "other"
    sizes[group] += int(np.prod(leaf.shape))
  return sizes | {"all": sum(sizes.values())}


def outer_fractions(config: Config) -> tuple[float, float]:
  """Returns the fractions to prune of the output layer and the embedding."""
  f = config.fpp
  if f.overall is not None:
    embedding = 1 - (1 - f.overall) ** (f.embedding_share or 0.0)
    head = f.overall if f.granularity == "weight" else 0.0
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
  config: Config, sizes: Mapping[str, int], linear: float, embedding: float
) -> float:
  """Returns how many parameters W_Q, W_K, W_V and linear layers may store."""
  if config.fpp.overall is not None:
    # The head of a classifier is never pruned.
    is_pruned = task_of(config).predicts_tokens
    head = (1 - linear if is_pruned else 1) * sizes["head"]
    outside = (1 - embedding) * sizes["embedding"] + sizes["other"] + head
    return (1 - config.fpp.overall) * sizes["all"] - outside
  shapes = param_shapes(make_model(shape_of(config), 1, num_classes=1))
  qkv = sum(
    num_weights(block["attn"], ("q", "k", "v", "frequency"))
    for name, block in shapes.items()
    if name.startswith("blocks_")
  )
  return qkv + (1 - linear) * sizes["linear"]
