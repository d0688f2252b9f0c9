"""Chooses groups, diagonal W_V and pruning layer by layer.

Every choice is tried by itself on a dense trained model: how far does what the
layer writes move, relative to the residual stream there? Then the cheapest
moves, in error a parameter saved, are taken until the model is small enough, and
linear layers get back what the last of them saves too much.
Errors are taken to add up, and recovery by training is not foreseen.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import paths
from folding.compression.accounting import group_of
from folding.config import Config
from folding.schema import require
from folding.training.fit_attention import total
from folding.training.fold_pretrained import (
  STREAMS,
  Watch,
  embed_batches,
  fold_layer,
  look,
  look_all,
  make_block,
  require_pairs,
)

_FRACTIONS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to prune, tried
_LINEAR = ("attn/o", "mlp/up", "mlp/gate", "mlp/down")


@dataclasses.dataclass(frozen=True)
class Option:
  """One setting of one decision of a layer.

  Attributes:
    value: Groups, block of W_V, or fraction pruned.
    stored: Parameters that the decision's arrays then store.
    error: Of the residual stream after the layer, relative to its variance.
  """

  value: Any
  stored: float
  error: float


def plan(
  config: Config,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  watch: Watch = iter,
) -> Config:
  """Returns the config with `fold` and `fpp.linear_layers` set by layer.

  The model is to be as small as the config asks: `fpp.overall`, or else what
  its folding and pruning alike in all layers would give. `compress.qkv`, where
  set, is reached by folding alone, before anything is pruned. The output
  layer and the embedding keep their targets, or where `fpp.overall` is set lose
  that, and 1 - (1 - overall)**embedding_share.
  What is returned says all of this itself: its `compress.plan` is "same".

  Args:
    config: Resolved.
    params: Of its dense twin.
    batches: Calibration text, as for `fold_pretrained`.
    watch: As there.

  Raises:
    ConfigError: the target is out of reach, or there is too little text.
  """
  require_pairs(config)
  f = config.fpp
  require(
    f.attention == "output" and f.exclude is None and f.linear_layers is None,
    "compress.plan='auto' decides what is pruned of W_O and the MLP; leave out "
    "fpp.attention, fpp.exclude and fpp.linear_layers",
  )
  options = measure(config, params, batches, watch)
  sizes = _sizes(config, params)
  linear, embedding = outer_fractions(config)
  budget = _budget(config, sizes, linear, embedding)
  chosen = {key: 0 for key in options}

  def stored(*kinds):
    return sum(
      options[key][i].stored for key, i in chosen.items() if key[1] in kinds
    )

  def reduce(kinds, limit):
    while stored(*kinds) > limit:
      moves = [
        (gain, key, j)
        for key, i in chosen.items()
        if key[1] in kinds
        for j in range(i + 1, len(options[key]))
        if (gain := _price(options[key][i], options[key][j])) is not None
      ]
      require(bool(moves), "no plan reaches the target; ask for less")
      _, key, j = min(moves)
      chosen[key] = j

  if config.compress.qkv is not None:
    reduce(("qk", "v"), (1 - config.compress.qkv) * sizes["qkv"])
  reduce(("qk", "v", "linear"), budget)

  def values(kind):
    return tuple(
      options[n, kind][chosen[n, kind]].value
      for n in range(config.model.num_layers)
    )

  # The last move may save too much; linear layers, which are pruned by any
  # fraction, get that back.
  spare = budget - stored("qk", "v", "linear")
  whole = sum(o[0].stored for key, o in options.items() if key[1] == "linear")
  pruned = whole - stored("linear")
  part = max(0.0, 1 - spare / pruned) if pruned else 0.0

  return config_lib.resolve(
    dataclasses.replace(
      config,
      compress=dataclasses.replace(config.compress, plan="same", qkv=None),
      fold=dataclasses.replace(
        config.fold, groups=values("qk"), values=values("v")
      ),
      fpp=dataclasses.replace(
        config.fpp,
        overall=None,
        linear=linear,
        embedding=embedding,
        linear_layers=tuple(
          math.ceil(part * fraction * 1e4) / 1e4
          for fraction in values("linear")
        ),
      ),
    )
  )


def _price(now: Option, then: Option) -> float | None:
  """Returns error a parameter saved; None if nothing is saved."""
  saved = now.stored - then.stored
  return (then.error - now.error) / saved if saved > 0 else None


def _sizes(config: Config, params) -> dict[str, int]:
  """Returns parameters by group, with those of the head by themselves.

  Where an embedding is pruned by rows, positions are not of that group.
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
  """Returns what is pruned of the output layer and of the embedding."""
  f = config.fpp
  if f.overall is not None:
    assert f.embedding_share is not None
    embedding = 1 - (1 - f.overall) ** f.embedding_share
    return f.overall, min(embedding, math.nextafter(1, 0))  # as is rounded
  return f.linear or 0.0, f.embedding or 0.0


def _budget(config: Config, sizes, linear: float, embedding: float) -> float:
  """Returns the parameters of W_Q, W_K, W_V and linear layers to store."""
  if config.fpp.overall is not None:
    # The head of a classifier is never pruned.
    head = (1 - linear if config.task == "lm" else 1) * sizes["head"]
    outside = (1 - embedding) * sizes["embedding"] + sizes["other"] + head
    return (1 - config.fpp.overall) * sizes["all"] - outside
  m, f = config.model, config.fold
  qkv = 0.0
  for layer in config_lib.layers_of(m, f):
    qkv += sum(_stored_qkv(config, layer.groups, layer.values))
  return qkv + (1 - linear) * sizes["linear"]


def _stored_qkv(config: Config, groups: int, values: str) -> tuple[int, int]:
  """Returns the sizes of W_Q and W_K, and of W_V, of one layer."""
  m, f = config.model, config.fold
  heads = m.num_heads + m.num_kv_heads
  qk = m.width * heads * (groups or m.head_dim)
  if groups and f.axis == "input":
    qk = groups * heads * m.head_dim
  elif groups and m.positions == "rope":
    qk += m.num_kv_heads * groups // 2  # the frequencies
  v = {
    "dense": m.width * m.num_kv_heads * m.head_dim,
    "diagonal": m.width,
    "identity": 0,
  }
  return qk, v[values]


def measure(
  config: Config,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  watch: Watch = iter,
) -> dict[tuple[int, str], list[Option]]:
  """Returns the options of each layer and decision: "qk", "v", "linear"."""
  dense = config_lib.dense_twin(config)
  # A fit makes few groups look as good as many, but training does not make them.
  unfitted = dataclasses.replace(config.compress, fit_steps=0)
  x, kept = embed_batches(config, params, list(batches))
  options: dict[tuple[int, str], list[Option]] = {}
  for n in watch(range(config.model.num_layers)):
    old = params[f"blocks_{n}"]
    block = make_block(dense, n)
    target = look_all(block, old, x, kept, STREAMS)
    out = [seen["out"] for seen in target]

    def error(config, new, n=n, x=x, out=out):
      part = functools.partial(_error_sums, make_block(config, n), new)
      return float(np.divide(*total(part, x, kept, out)))

    for kind, settings in (
      ("qk", _groups(config, n)),
      ("v", _values(config, n)),
    ):
      found = []
      for value in settings:
        groups, values = (value, "dense") if kind == "qk" else (0, value)
        fold = dataclasses.replace(config.fold, groups=groups, values=values)
        trial = dataclasses.replace(config, fold=fold, compress=unfitted)
        wrong = 0.0
        if value not in (0, "dense"):
          new, _ = fold_layer(trial, n, old, x, target, kept)
          wrong = error(trial, new)
        size = _stored_qkv(config, groups, values)[kind == "v"]
        found.append(Option(value, float(size), wrong))
      options[n, kind] = found
    size = sum(
      int(np.prod(w.shape))
      for name, w in paths.flatten(old).items()
      if group_of(name) == "linear"
    )
    squares = total(functools.partial(_square_sums, block, old), x, kept)
    options[n, "linear"] = [
      Option(
        fraction,
        (1 - fraction) * size,
        error(dense, _pruned(old, squares, fraction)) if fraction else 0.0,
      )
      for fraction in _FRACTIONS
    ]
    x = out
  return options


def _groups(config: Config, n: int) -> list[int]:
  """Returns the groups to try: dense (0), then from many to few."""
  m, f = config.model, config.fold
  if config_lib.layers_of(m, f)[n].groups == 0:
    return [0]  # as asked
  if f.axis == "output" and m.positions == "rope":
    # In eighths of a head, by whole pairs, and a single pair.
    step = max(2, m.head_dim // 16 * 2)
    return [0, *range(m.head_dim - step, 2, -step), 2]
  size = m.head_dim if f.axis == "output" else m.width
  # The sum of all channels of a LayerNorm says nothing.
  least = 1 + (f.axis == "input" and m.norm == "layernorm")
  return [0, *(g for g in range(size - 1, least - 1, -1) if size % g == 0)]


def _values(config: Config, n: int) -> tuple[str, ...]:
  """Returns the kinds of W_V to try: dense, and a diagonal if it may be."""
  m = config.model
  is_free = m.num_heads * m.head_dim == m.width
  asked = config_lib.layers_of(m, config.fold)[n].values
  return ("dense", asked) if is_free and asked != "dense" else ("dense",)


@functools.partial(jax.jit, static_argnums=0)
def _error_sums(block, params, x, keep, out):
  weight = keep.astype(jnp.float32)[..., None]
  wrong = (look(block, params, x, keep)["out"] - out) * weight
  mean = (out * weight).sum((0, 1)) / jnp.maximum(weight.sum(), 1)
  around = (out - mean[None, None]) * weight
  return jnp.sum(jnp.square(wrong)), jnp.sum(jnp.square(around))


@functools.partial(jax.jit, static_argnums=0)
def _square_sums(block, params, x, keep):
  """Returns sums of squares of what the linear layers read, by their names."""
  seen = look(block, params, x, keep, ("o", "up", "down"))
  weight = keep.astype(jnp.float32)
  return {
    f"{part}/{name}": jnp.einsum(
      "BL...,BL->...",
      jnp.square(seen["up" if name == "gate" else name]),
      weight,
    )
    for part, name in (name.split("/") for name in _LINEAR)
    if name in params[part]
  }


def _pruned(params, squares, fraction: float):
  """Returns the layer without its least |w| rms(a), in each linear layer."""

  def prune(name, w):
    role = name.rpartition("/")[0]
    if role not in squares or not name.endswith("kernel"):
      return w
    w = np.asarray(w)
    rms = np.sqrt(squares[role])  # times a constant
    rms = rms.reshape(*rms.shape, *(1,) * (w.ndim - rms.ndim))
    score = np.abs(w) * rms
    count = int(fraction * w.size)
    limit = np.partition(score.reshape(-1), count)[count]
    return np.where(score < limit, 0, w)

  return paths.map_named(prune, params)
