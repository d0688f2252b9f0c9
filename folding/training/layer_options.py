"""Measures what each option of each layer saves and costs.

The parts of a layer are attention (its heads, the groups of W_Q and W_K, the
rank of W_V and W_O or a diagonal W_V) and the neurons of the MLP. Each option is
tried alone on the dense model. Its error is the first-order change of the model's
output (`sensitivities`). `allocate` chooses among the options.

If `fpp.granularity` is "weight", single weights of W_O and the MLP are pruned
instead of neurons, and W_V is dense or as `fold.values` asks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression import lowrank, oneshot
from folding.compression.lowrank import Moments
from folding.config import Config, Layer, ModelConfig, layers_of
from folding.models.transformer import Block
from folding.training.fold_layer import (
  fold_layer,
  fold_logits,
  head_moments,
  keep_heads,
)
from folding.training.sensitivity import MODULES, Sensitivities
from folding.training.stream import (
  READS,
  Batch,
  Stream,
  capture,
  dense_layers,
  halves,
  input_moments,
  make_block,
  total,
  usage_of,
)
from folding.typed import edited

EMBEDDING = (0, "embed")  # the decision about the rank of the embedding
_FRACTIONS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to prune, tried
_LINEAR = ("attn/o", "mlp/up", "mlp/gate", "mlp/down")


class Attention(NamedTuple):
  """A form of an attention layer.

  Attributes:
    groups: G; 0: dense.
    values: Kind of W_V, or its rank.
    heads: Remaining heads, in order.
  """

  groups: int
  values: str | int
  heads: tuple[int, ...]


class Option(NamedTuple):
  """One setting of one decision of a layer.

  Attributes:
    value: `Attention`, fraction pruned of the MLP, or rank of the embedding.
    stored: Parameters that the arrays of the decision store with it.
    error: Squared change of the model's output, see `sensitivities`.
  """

  value: Any
  stored: float
  error: float


Decision = tuple[int, str]  # layer and kind
Options = Mapping[Decision, Sequence[Option]]


def measure(
  config: Config,
  params: Mapping[str, Any],
  batches: Sequence[Batch],
  sensitivity: Sensitivities,
) -> dict[Decision, list[Option]]:
  """Returns the options of "attn" and "mlp" of each layer, from large to small.

  If the rank of the embedding is a decision, its key is (0, "embed").

  Args:
    config: Resolved.
    params: Parameters of its dense baseline.
    batches: Calibration text.
    sensitivity: From `sensitivities`.
  """
  options: dict[Decision, list[Option]] = {}
  if config.has_open_rank and config.compress.embedding == "errors":
    embedding_VD = np.asarray(params["embed"]["embedding"])
    options[EMBEDDING] = _embedding_options(
      embedding_VD, usage_of(batches, len(embedding_VD)), sensitivity["embed"]
    )
  layers = dense_layers(config, params, batches, "measuring")
  for n, block, stream, target in layers:
    sensitivity_n = {
      role: sensitivity[f"blocks_{n}/{module}"]
      for role, module in MODULES.items()
    }
    trial = _Trial(
      config=config,
      n=n,
      dense=block,
      old=params[f"blocks_{n}"],
      stream=stream,
      target=target,
      sensitivity=sensitivity_n,
    )
    options |= {
      (n, "attn"): _attention_options(trial),
      (n, "mlp"): _mlp_options(trial),
    }
  return options


class _Trial(NamedTuple):
  """A layer to try options on.

  Attributes:
    config: Resolved.
    n: Number of the layer.
    dense: The dense layer.
    old: Its parameters.
    stream: Its input.
    target: Values inside of it, from `dense_layers`.
    sensitivity: Sensitivities to errors of "o" and "down".
  """

  config: Config
  n: int
  dense: Block
  old: Mapping[str, Any]
  stream: Stream
  target: Sequence[Mapping[str, jax.Array]]
  sensitivity: Mapping[str, np.ndarray]

  @property
  def asked(self) -> Layer:
    """Shape of the layer that the config asks for."""
    return layers_of(self.config.model, self.config.fold)[self.n]

  def error(self, block: Block, params: Any, roles: tuple[str, ...]) -> float:
    """Returns the error of another layer on the same input.

    Args:
      block: The layer.
      params: Its parameters.
      roles: Modules whose output counts, "o" or "down".
    """
    part = functools.partial(_errors, block, roles, params, self.sensitivity)
    return float(np.divide(*total(part, *self.stream, self.target)))

  def moments(self, role: str) -> list[Moments]:
    """Returns the moments of the input of a module on each half of the text.

    A fit to one half is evaluated on the other, because its error on its own half
    is too low.
    """
    return [
      input_moments(
        self.dense, self.old, Stream(*zip(*half, strict=True)), (role,)
      )[role]
      for half in halves(*self.stream)
    ]

  def square(self, wrong: np.ndarray, moments: Moments, role: str) -> float:
    """Returns the error of a module whose output is off by `a @ wrong`.

    Args:
      wrong: float[inputs, D].
      moments: Moments of its inputs a.
      role: "o" or "down".
    """
    part = self.old["attn" if role == "o" else "mlp"][role]
    product = moments.around(part) @ wrong
    return float(np.sum(wrong * (product @ self.sensitivity[role])))


def embedding_size(shape: tuple[int, int], rank: int) -> int:
  """Returns the number of parameters of an embedding [V, D] of lower rank."""
  V, D = shape
  return rank * (V + D) + D


def _embedding_options(
  embedding_VD: np.ndarray, usage_V: np.ndarray, sensitivity: np.ndarray
) -> list[Option]:
  """Returns the options of the rank of the embedding; 0 is all of it."""
  shape = V, D = embedding_VD.shape
  found = lowrank.components(embedding_VD, usage_V, sensitivity)
  # Error that leaving out each component adds.
  weight_D = np.sum(found.decode_DD @ sensitivity * found.decode_DD, axis=1)
  added_D = found.variances_D * weight_D
  options = [Option(0, V * D, 0.0)]
  for rank in range(D // 8 * 8, 0, -8):
    error = float(added_D[rank:].sum())
    options.append(Option(rank, embedding_size(shape, rank), error))
  return options


def _attention_options(trial: _Trial) -> list[Option]:
  """Returns the options of attention, from large to small.

  The errors of logits and values are added. Those of logits are measured with all
  heads.
  """
  H = trial.config.model.num_heads
  pairs = itertools.product(_logits_options(trial), _values_options(trial))
  options = [
    Option(
      values.value._replace(groups=logits.value),
      logits.stored * len(values.value.heads) / H + values.stored,
      logits.error + values.error,
    )
    for logits, values in pairs
  ]
  return sorted(options, key=lambda option: -option.stored)


def _logits_options(trial: _Trial) -> list[Option]:
  """Returns the options of W_Q and W_K: numbers of groups, unfitted.

  A fit makes few groups look better than training can make them.
  """
  m, layer, old = trial.config.model, trial.asked, trial.old
  moments, options = head_moments(trial.dense, old, trial.stream), []
  for groups in _groups(m, layer):
    attn, error = old["attn"], 0.0
    if groups:
      tried = dataclasses.replace(
        trial.dense.layer, groups=groups, axis=layer.axis, rope=layer.rope
      )
      attn, _ = fold_logits(m, tried, attn, moments)
      block = trial.dense.clone(layer=tried)
      error = trial.error(block, {**old, "attn": attn}, ("o",))
    options.append(
      Option(groups, num_weights(attn, ("q", "k", "frequency")), error)
    )
  return options


def _values_options(trial: _Trial) -> list[Option]:
  """Returns the options of W_V and of the heads that stay, without groups."""
  config, attn = trial.config, trial.old["attn"]
  m, is_structured = config.model, config.fpp.granularity == "neuron"
  arrays = ("v", "o") if is_structured else ("v",)
  every = tuple(range(m.num_heads))
  if is_structured:
    options = _rank_options(trial)
  else:
    size = num_weights(attn, arrays)
    options = [Option(Attention(0, "dense", every), size, 0.0)]
  if (asked := trial.asked.values) != "dense":
    alone = {"fold.groups": 0, "fold.values": asked, "fold.value_rank": 0}
    block = make_block(edited(config, alone), trial.n)
    new, _ = fold_layer(
      block, trial.dense, trial.old, trial.stream, target=trial.target
    )
    error = trial.error(block, new, ("o",))
    size = num_weights(new["attn"], arrays)
    options.append(Option(Attention(0, asked, every), size, error))
  return options


def _rank_options(trial: _Trial) -> list[Option]:
  """Returns the options of W_V and W_O: some of the heads, each of rank r."""
  attn, m = trial.old["attn"], trial.config.model
  fitted, held_out = trial.moments("o")
  options = []
  for heads in _head_choices(attn, fitted, trial.sensitivity["o"]):
    kept, lost = keep_heads(attn, fitted, heads)
    rows = np.repeat(np.isin(range(m.num_heads), heads), m.head_dim)
    of_kept = Moments(fitted.second_II[rows][:, rows], fitted.mean_I[rows])
    ranks = _eighths(m.head_dim)
    folded = lowrank.fold_values(
      kept["v"],
      kept["o"],
      of_kept,
      ranks,
      sensitivity_DD=trial.sensitivity["o"],
    )
    for rank, low in zip(ranks, folded, strict=True):
      wrong = lost.copy()
      wrong[rows] += low.wrong
      size = num_weights({"v": low.v, "o": low.o}, ("v", "o"))
      value = rank if rank < m.head_dim else "dense"
      error = trial.square(wrong, held_out, "o")
      options.append(Option(Attention(0, value, heads), size, error))
  return options


def _head_choices(
  attn: Mapping[str, Any], moments: Moments, sensitivity: np.ndarray
) -> Iterator[tuple[int, ...]]:
  """Yields the remaining heads: first all, then ever fewer.

  The heads that the others replace best are removed first. Heads that share a key
  are removed together.

  Args:
    attn: Dense.
    moments: Moments of the input of W_O.
    sensitivity: Sensitivity to errors of its output.
  """
  H, K, D = attn["o"]["kernel"].shape
  J = attn["k"]["kernel"].shape[1]
  _, *fewer = _eighths(J)
  yield tuple(range(H))
  steps = oneshot.removals(
    np.reshape(attn["o"]["kernel"], (H * K, D)),
    moments.around(attn["o"]),
    fewer,
    unit=H * K // J,
    sensitivity_OO=sensitivity,
  )
  for new_ID in steps:
    stays_H = new_ID.reshape(H, K * D).any(1)
    yield tuple(np.flatnonzero(stays_H).tolist())


def _eighths(count: int) -> list[int]:
  """Returns the eighths of a number, rounded up, from all of it to the least."""
  return sorted({-(-count * i // 8) for i in range(1, 9)}, reverse=True)


def _mlp_options(trial: _Trial) -> list[Option]:
  """Returns the options of the MLP: of neurons, or of weights with those of W_O."""
  if trial.config.fpp.granularity == "neuron":
    return _neuron_options(trial)
  old = trial.old
  squares = total(
    functools.partial(_square_sums, trial.dense, old), *trial.stream
  )
  size = num_weights(old["attn"], ("o",))
  size += num_weights(old["mlp"], ("up", "gate", "down"))
  options = [Option(0.0, size, 0.0)]
  for fraction in _FRACTIONS:
    new = _pruned(old, squares, fraction)
    error = trial.error(trial.dense, new, ("o", "down"))
    options.append(Option(fraction, (1 - fraction) * size, error))
  return options


def _neuron_options(trial: _Trial) -> list[Option]:
  """Returns the options of an MLP with fewer neurons and W_down refitted."""
  mlp = trial.old["mlp"]
  w_FD = np.asarray(mlp["down"]["kernel"], np.float64)
  fitted, held_out = trial.moments("down")
  c_FF = fitted.around(mlp["down"])
  F = len(w_FD)
  fewer = {round_neurons(F * i / 16, F) for i in range(1, 16)} - {F}
  kept = sorted(fewer, reverse=True)
  size = num_weights(mlp, ("up", "gate", "down"))
  options = [Option(0.0, size, 0.0)]
  steps = oneshot.removals(
    w_FD, c_FF, kept, sensitivity_OO=trial.sensitivity["down"]
  )
  for count, new_FD in zip(kept, steps, strict=True):
    error = trial.square(w_FD - new_FD, held_out, "down")
    options.append(Option(1 - count / F, count / F * size, error))
  return options


def round_neurons(count: float, F: int) -> int:
  """Returns a number of neurons as a multiple of 8, as a shrink keeps them."""
  return min(F, max(8, int(count + 1e-6) // 8 * 8))


def num_weights(params: Mapping[str, Any], names: Sequence[str]) -> float:
  """Returns the number of elements of arrays and modules, without biases."""
  return float(
    sum(
      w.size
      for name, w in paths.flatten(dict(params)).items()
      if name.split("/")[0] in names and not name.endswith("bias")
    )
  )


def _groups(m: ModelConfig, layer: Layer) -> list[int]:
  """Returns the groups to try: dense (0), then from many to few."""
  if layer.groups == 0:
    return [0]  # as the config asks
  if layer.axis == "output" and m.positions == "rope":
    # In eighths of a head, by whole pairs, and a single pair.
    step = max(2, m.head_dim // 16 * 2)
    return [0, *range(m.head_dim - step, 2, -step), 2]
  size = m.head_dim if layer.axis == "output" else m.width
  # The sum over all channels of a LayerNorm is constant.
  least = 1 + (layer.axis == "input" and m.norm == "layernorm")
  return [0, *(g for g in range(size - 1, least - 1, -1) if size % g == 0)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _errors(block, roles, params, sensitivity, x, mask, target):
  """Returns the sum over tokens of e' F e, and the number of tokens.

  e is the error of an output; those of several outputs are added.
  """
  seen = capture(block, params, x, mask, outputs=roles)
  weight = mask.astype(jnp.float32)[..., None]
  found = 0.0
  for role in roles:
    e_BLD = (seen[role] - target[role]) * weight
    found += jnp.einsum("BLD,DE,BLE->", e_BLD, sensitivity[role], e_BLD)
  return found, weight.sum()


@functools.partial(jax.jit, static_argnums=0)
def _square_sums(block, params, x, mask):
  """Returns {linear layer: summed squares of its inputs}."""
  seen = capture(block, params, x, mask, ("o", "up", "down"))
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
