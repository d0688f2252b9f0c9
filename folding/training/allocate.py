"""Chooses groups, diagonal W_V and pruning for each layer of a trained model.

Each option is tried alone on the dense model: how far does the output of the
layer move, relative to the variance of the residual stream? Then the moves of
the least error per parameter saved are taken until the model is small enough,
and linear layers get back what the last move saves too much. Errors are assumed
to add up, and recovery by training is not foreseen.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import paths
from folding.config import Config
from folding.errors import ConfigError
from folding.models.params import group_of
from folding.models.transformer import make_model, param_shapes
from folding.training.fold_pretrained import (
  READS,
  STREAMS,
  Batch,
  Stream,
  embed_batches,
  fold_layer,
  layers_with_bar,
  look,
  look_all,
  make_block,
  require_pairs,
  total,
)

_FRACTIONS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to prune, tried
_LINEAR = ("attn/o", "mlp/up", "mlp/gate", "mlp/down")


class Option(NamedTuple):
  """One setting of one decision of a layer.

  Attributes:
    value: Groups, kind of W_V, or fraction pruned.
    stored: Number of parameters that the arrays of the decision then store.
    error: Of the residual stream after the layer, relative to its variance.
  """

  value: Any
  stored: float
  error: float


Options = Mapping[tuple[int, str], Sequence[Option]]  # of (layer, kind)


def allocate(
  config: Config, params: Mapping[str, Any], batches: Sequence[Batch]
) -> Config:
  """Returns the config with `fold` and `fpp.linear_layers` set per layer.

  The model becomes as small as the config asks: by `fpp.overall`, or as small
  as the same folding and pruning in all layers would make it. Folding alone
  reaches `compress.qkv`, if set, before anything is pruned. The output layer
  and the embedding keep their targets; with `fpp.overall` these are `overall`
  and 1 - (1 - overall)**embedding_share. The returned config states all of
  this, and its `compress.plan` is "same".

  Args:
    config: Resolved.
    params: Parameters of its dense baseline.
    batches: Calibration text, as for `fold_pretrained`.

  Raises:
    ConfigError: the target is out of reach, or there is too little text.
  """
  require_pairs(config)
  f = config.fpp
  if f.attention != "output" or f.linear_layers:
    raise ConfigError(
      "compress.plan='auto' decides what is pruned of W_O and the MLP; leave "
      "out fpp.attention and fpp.linear_layers"
    )
  options = measure(config, params, batches)
  sizes = _sizes(config, params)
  linear, embedding = outer_fractions(config)
  budget = _budget(config, sizes, linear, embedding)
  chosen = dict.fromkeys(options, 0)
  if config.compress.qkv is not None:
    limit = (1 - config.compress.qkv) * sizes["qkv"]
    chosen = cheapest(options, chosen, ("qk", "v"), limit)
  chosen = cheapest(options, chosen, ("qk", "v", "linear"), budget)

  # Linear layers, which are pruned by any fraction, get the rest back.
  spare = budget - _stored(options, chosen, ("qk", "v", "linear"))
  whole = _stored(options, dict.fromkeys(options, 0), ("linear",))
  pruned = whole - _stored(options, chosen, ("linear",))
  part = max(0.0, 1 - spare / pruned) if pruned else 0.0

  def values(kind):
    layers = range(config.model.num_layers)
    return tuple(options[n, kind][chosen[n, kind]].value for n in layers)

  compress = dataclasses.replace(config.compress, plan="same", qkv=None)
  fold = dataclasses.replace(
    config.fold, groups=values("qk"), values=values("v")
  )
  fractions = (part * fraction for fraction in values("linear"))
  fpp = dataclasses.replace(
    f,
    overall=None,
    linear=linear,
    embedding=embedding,
    linear_layers=tuple(math.ceil(f * 1e4) / 1e4 for f in fractions),
  )
  return config_lib.resolve(
    dataclasses.replace(config, compress=compress, fold=fold, fpp=fpp)
  )


def _stored(
  options: Options, chosen: Mapping[tuple[int, str], int], kinds: Sequence[str]
) -> float:
  """Returns the parameters that the chosen options of some kinds store."""
  return sum(
    options[key][i].stored for key, i in chosen.items() if key[1] in kinds
  )


def cheapest(
  options: Options,
  chosen: Mapping[tuple[int, str], int],
  kinds: Sequence[str],
  limit: float,
) -> dict[tuple[int, str], int]:
  """Returns choices that store at most `limit` parameters.

  Each move takes the least error per parameter saved.

  Args:
    options: From `measure`.
    chosen: {(layer, kind): index of its option} to begin with.
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
      raise ConfigError("no plan reaches the target; ask for less")
    _, key, j = min(moves)
    chosen[key] = j
  return chosen


def _sizes(config: Config, params: Mapping[str, Any]) -> dict[str, int]:
  """Returns the number of parameters per group, with the head as a group.

  Positions are no part of an embedding that is pruned by rows.
  """
  by_rows = config.fpp.embedding_granularity != "weight"
  sizes = {"qkv": 0, "linear": 0, "embedding": 0, "other": 0, "head": 0}
  for name, leaf in paths.flatten(params).items():
    group = "head" if name == "head/kernel" else group_of(name)
    if by_rows and name == "position_embed/embedding":
      group = "other"
    sizes[group] += int(np.prod(leaf.shape))
  return sizes | {"all": sum(sizes.values())}


def outer_fractions(config: Config) -> tuple[float, float]:
  """Returns the fractions to prune of the output layer and the embedding."""
  f = config.fpp
  if f.overall is not None:
    embedding = 1 - (1 - f.overall) ** (f.embedding_share or 0.0)
    return f.overall, min(embedding, math.nextafter(1, 0))  # rounding gives 1
  return f.linear or 0.0, f.embedding or 0.0


def _budget(
  config: Config, sizes: Mapping[str, int], linear: float, embedding: float
) -> float:
  """Returns how many parameters W_Q, W_K, W_V and linear layers may store."""
  if config.fpp.overall is not None:
    # The head of a classifier is never pruned.
    head = (1 - linear if config.task == "lm" else 1) * sizes["head"]
    outside = (1 - embedding) * sizes["embedding"] + sizes["other"] + head
    return (1 - config.fpp.overall) * sizes["all"] - outside
  shapes = param_shapes(make_model(config, vocab_size=1, num_classes=1))
  qkv = sum(
    sum(_attention_sizes(block["attn"]).values())
    for name, block in shapes.items()
    if name.startswith("blocks_")
  )
  return qkv + (1 - linear) * sizes["linear"]


def _attention_sizes(attn: Mapping[str, Any]) -> dict[str, float]:
  """Returns the sizes of W_Q and W_K, with their frequencies, and of W_V."""
  sizes = {name: w.size for name, w in paths.flatten(attn).items()}
  names = {
    "qk": ("q/kernel", "k/kernel", "frequency"),
    "v": ("v/kernel", "v/diagonal"),
  }
  return {
    kind: float(sum(sizes.get(name, 0) for name in each))
    for kind, each in names.items()
  }


def measure(
  config: Config, params: Mapping[str, Any], batches: Sequence[Batch]
) -> dict[tuple[int, str], list[Option]]:
  """Returns the options of each layer and kind: "qk", "v" and "linear".

  Args:
    config: Resolved.
    params: Parameters of its dense baseline.
    batches: Calibration text.
  """
  dense = config_lib.dense_twin(config)
  stream = embed_batches(config, params, batches)
  options = {}
  for n in layers_with_bar(config, "measuring"):
    old = params[f"blocks_{n}"]
    target = look_all(make_block(dense, n), old, stream, STREAMS)
    found = _measure_layer(config, n, old, stream, target)
    options |= {(n, kind): each for kind, each in found.items()}
    stream = Stream([seen["out"] for seen in target], stream.masks)
  return options


def _measure_layer(
  config: Config,
  n: int,
  old: Mapping[str, Any],
  stream: Stream,
  target: Sequence[Mapping[str, jax.Array]],
) -> dict[str, list[Option]]:
  """Returns {kind: options} of layer n; arguments as for `fold_layer`."""
  dense = make_block(config_lib.dense_twin(config), n)
  out = [seen["out"] for seen in target]

  def error(block, new):
    part = functools.partial(_error_sums, block, new)
    return float(np.divide(*total(part, *stream, out)))

  def folded(kind, groups, values):
    value = groups if kind == "qk" else values
    if not groups and values == "dense":
      return Option(value, _attention_sizes(old["attn"])[kind], 0.0)
    trial = _trial(config, groups, values)
    new, _ = fold_layer(trial, n, old, stream, target=target)
    stored = _attention_sizes(new["attn"])[kind]
    return Option(value, stored, error(make_block(trial, n), new))

  squares = total(functools.partial(_square_sums, dense, old), *stream)
  size = sum(
    w.size
    for name, w in paths.flatten(old).items()
    if group_of(name) == "linear"
  )

  def pruned(fraction):
    wrong = error(dense, _pruned(old, squares, fraction)) if fraction else 0.0
    return Option(fraction, (1 - fraction) * size, wrong)

  return {
    "qk": [folded("qk", groups, "dense") for groups in _groups(config, n)],
    "v": [folded("v", 0, values) for values in _values(config, n)],
    "linear": [pruned(fraction) for fraction in _FRACTIONS],
  }


def _trial(config: Config, groups: int, values: Any) -> Config:
  # Unfitted: a fit makes few groups look better than training can make them.
  return dataclasses.replace(
    config,
    fold=dataclasses.replace(config.fold, groups=groups, values=values),
    compress=dataclasses.replace(config.compress, fit_steps=0),
  )


def _groups(config: Config, n: int) -> list[int]:
  """Returns the groups to try: dense (0), then from many to few."""
  m, f = config.model, config.fold
  if config_lib.layers_of(m, f)[n].groups == 0:
    return [0]  # as the config asks
  if f.axis == "output" and m.positions == "rope":
    # In eighths of a head, by whole pairs, and a single pair.
    step = max(2, m.head_dim // 16 * 2)
    return [0, *range(m.head_dim - step, 2, -step), 2]
  size = m.head_dim if f.axis == "output" else m.width
  # The sum over all channels of a LayerNorm is constant.
  least = 1 + (f.axis == "input" and m.norm == "layernorm")
  return [0, *(g for g in range(size - 1, least - 1, -1) if size % g == 0)]


def _values(config: Config, n: int) -> tuple[str, ...]:
  """Returns the kinds of W_V to try: dense, and the asked one if possible."""
  m = config.model
  is_free = m.num_heads * m.head_dim == m.width
  asked = config_lib.layers_of(m, config.fold)[n].values
  return ("dense", asked) if is_free and asked != "dense" else ("dense",)


@functools.partial(jax.jit, static_argnums=0)
def _error_sums(block, params, x, mask, out):
  """Returns the squared error of a block, and the variance of the target."""
  weight = mask.astype(jnp.float32)[..., None]
  wrong = (look(block, params, x, mask)["out"] - out) * weight
  mean = (out * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)
  around = (out - mean[None, None]) * weight
  return jnp.sum(jnp.square(wrong)), jnp.sum(jnp.square(around))


@functools.partial(jax.jit, static_argnums=0)
def _square_sums(block, params, x, mask):
  """Returns {linear layer: summed squares of its inputs}."""
  seen = look(block, params, x, mask, ("o", "up", "down"))
  weight = mask.astype(jnp.float32)
  return {
    name: jnp.einsum("BL...,BL->...", jnp.square(seen[READS[name]]), weight)
    for name in _LINEAR
    if name.split("/")[1] in params[name.split("/")[0]]
  }


def _pruned(
  params: Mapping[str, Any], squares: Mapping[str, Any], fraction: float
) -> Any:
  """Returns the layer without the lowest |w| rms(a) of each linear layer."""

  def prune(name, w):
    role = name.rpartition("/")[0]
    if role not in squares or not name.endswith("kernel"):
      return w
    w = np.asarray(w)
    rms = np.sqrt(squares[role])  # up to a factor
    rms = rms.reshape(*rms.shape, *(1,) * (w.ndim - rms.ndim))
    score = np.abs(w) * rms
    count = int(fraction * w.size)
    limit = np.partition(score.reshape(-1), count)[count]
    return np.where(score < limit, 0, w)

  return paths.map_named(prune, params)
