"""Measures what each option of each layer saves and costs.

The parts of a layer are attention (its heads, the groups of W_Q and W_K, the
rank of W_V and W_O or a diagonal W_V) and the neurons of the MLP. Each option is
tried alone on the dense model. Its error is the first-order change of the model's
output (`sensitivities`). `allocate` chooses among the options.

If single weights of W_O and the MLP are pruned instead of neurons, W_V is dense or
as asked.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression import fold, lowrank, oneshot
from folding.compression.lowrank import Moments
from folding.models import exact_attention
from folding.models.shape import Layer, Shape
from folding.models.transformer import Block
from folding.training.distributed import host_copy
from folding.training.fold_layer import (
  fold_attention,
  fold_logits,
  head_moments,
  keep_heads,
  logit_terms,
  project,
)
from folding.training.progress import track
from folding.training.sensitivity import MODULES, Sensitivities
from folding.training.stream import (
  READS,
  Batch,
  Stream,
  add_halves,
  capture,
  embed_batches,
  embedding_tables,
  grams,
  make_block,
  spread,
  total,
)

EMBEDDING = (0, "embed")  # the decision about the rank of the embedding
_FRACTIONS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to prune, tried
# About as many tokens, and for errors that need a pass per option.
_TOKENS, _FEW = 16_384, 4096
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


class Tried(NamedTuple):
  """Which options are tried.

  Attributes:
    by_neuron: Whether neurons, heads and ranks leave, not single weights.
    embedding: Whether the rank of the embedding is a decision.
    heads: Whether heads may leave.
    ranks: Whether W_V and W_O may get a low rank.
  """

  by_neuron: bool
  embedding: bool
  heads: bool = True
  ranks: bool = True


Decision = tuple[int, str]  # layer and kind
Options = Mapping[Decision, Sequence[Option]]


def measure(
  asked: Shape,
  params: Mapping[str, Any],
  batches: Sequence[Batch],
  sensitivity: Sensitivities,
  tried: Tried,
) -> dict[Decision, list[Option]]:
  """Returns the options of "attn" and "mlp" of each layer, from large to small.

  If the rank of the embedding is a decision, its key is (0, "embed").

  Args:
    asked: Its layers have the axis of groups, and what may be folded at all.
    params: Parameters of its dense baseline.
    batches: Calibration text.
    sensitivity: From `sensitivities`.
    tried: Which options there are.
  """
  options: dict[Decision, list[Option]] = {}
  if tried.embedding:
    tables = embedding_tables(asked, params, batches)
    weight = host_copy(sensitivity["embed"])
    options[EMBEDDING] = _embedding_options(tables, weight)
  dense = asked.dense()
  sizes = [np.size(batch["tokens"]) for batch in batches]
  stream = embed_batches(dense, params, spread(batches, sizes, _TOKENS))
  found: dict[Decision, futures.Future[list[Option]]] = {}
  with futures.ThreadPoolExecutor(2) as pool:
    for n in track(range(asked.num_layers), "measuring layers"):
      block, layer = make_block(dense, n), host_copy(params[f"blocks_{n}"])
      out, halves = _read_layer(block, layer, stream, tried.by_neuron)
      for future in found.values():  # the sums of one layer wait at a time
        future.result()
      trial = _Trial(
        asked=asked.layers[n],
        tried=tried,
        dense=block,
        old=layer,
        stream=stream,
        halves=halves,
        sensitivity={
          role: host_copy(sensitivity[f"blocks_{n}/{module}"])
          for role, module in MODULES.items()
        },
      )
      # On the host, while the device reads the next layer. Several devices
      # have to start their programs in one order.
      parts = ("attn", _attention_options), ("mlp", _mlp_options)
      for kind, function in parts:
        found[n, kind] = pool.submit(function, trial)
        if len(out.x[0].sharding.device_set) > 1:
          found[n, kind].result()
      stream = out
  return options | {key: future.result() for key, future in found.items()}


def of_all_layers(options: Options) -> dict[Decision, list[Option]]:
  """Returns options that all layers take together, as decisions of layer 0."""
  layers: dict[Decision, list[Sequence[Option]]] = {}
  for (_, kind), found in options.items():
    layers.setdefault((0, kind), []).append(found)
  return {
    key: [
      Option(None, sum(x.stored for x in alike), sum(x.error for x in alike))
      for alike in zip(*found, strict=True)
    ]
    for key, found in layers.items()
  }


def _read_layer(
  block: Block, params: Mapping[str, Any], stream: Stream, by_neuron: bool
) -> tuple[Stream, list[dict[str, Any]]]:
  """Returns the output of a layer, and sums over what its modules read.

  The sums are those of each half of the text, {module: its `Gram`}. A fit to one
  half is evaluated on the other, because its error on its own half is too low. If
  single weights are pruned, they are {module: sums of squares}.
  """
  names, function = ("o", "down"), grams
  if not by_neuron:
    names, function = ("o", "up", "down"), _squares
  out: list[jax.Array] = []
  sums: list[Any] = [None, None]
  params = stream.put(params)
  for number, (x, mask) in enumerate(zip(*stream, strict=True)):
    seen = capture(block, params, x, mask, names, ("out",))
    out.append(seen.pop("out"))
    sums = add_halves(sums, function, None, number, (seen, mask))
  return Stream(out, stream.masks), sums


def _squares(_: None, tree: Any, mask: jax.Array) -> Any:
  """Returns the sums over tokens of the squares of each array of a tree."""
  weight = mask.astype(jnp.float32)
  return jax.tree.map(
    lambda a: jnp.einsum("BL...,BL->...", jnp.square(a), weight), tree
  )


def smallest(
  asked: Shape, params: Mapping[str, Any], tried: Tried
) -> dict[Decision, float]:
  """Returns the parameters that the smallest option of each decision stores.

  Args:
    asked: As for `measure`.
    params: Parameters of its dense baseline, or shapes.
    tried: As for `measure`.
  """
  found: dict[Decision, float] = {}
  if tried.embedding:
    shape = embedding_shape(asked, params)
    found[EMBEDDING] = float(embedding_size(shape, 8))
  for n, layer in enumerate(asked.layers):
    attn, mlp = (params[f"blocks_{n}"][part] for part in ("attn", "mlp"))
    J, K = asked.num_kv_heads, asked.head_dim
    logits = num_weights(attn, ("q", "k"))
    if groups := _groups(asked, layer)[-1]:
      logits *= groups / (K if layer.axis == "output" else asked.width)
      if asked.positions == "rope" and layer.axis == "output":
        logits += J * groups // 2
    arrays = ("v", "o") if tried.by_neuron else ("v",)
    whole = num_weights(attn, arrays)
    heads, rank = (_eighths(size)[-1] / size for size in (J, K))
    heads, rank = heads if tried.heads else 1, rank if tried.ranks else 1
    attention = (
      [heads * (logits + rank * whole)] if tried.by_neuron else [logits + whole]
    )
    if layer.values != "dense":
      kind = asked.num_heads * K if layer.values == "diagonal" else 0
      attention.append(logits + kind + num_weights(attn, arrays[1:]))
    size = num_weights(mlp, ("up", "gate", "down"))
    if tried.by_neuron:
      kept = _neurons(layer.mlp_width)[-1] / layer.mlp_width
    else:
      size += num_weights(attn, ("o",))
      kept = 1 - _FRACTIONS[-1]
    found |= {(n, "attn"): float(min(attention)), (n, "mlp"): kept * size}
  return found


class _Trial(NamedTuple):
  """A layer to try options on.

  Attributes:
    asked: Shape of the layer that is asked for.
    tried: As for `measure`.
    dense: The dense layer.
    old: Its parameters.
    stream: Its input.
    halves: Sums over each half of the text, from `_read_layer`.
    sensitivity: Sensitivities to errors of "o" and "down".
  """

  asked: Layer
  tried: Tried
  dense: Block
  old: Mapping[str, Any]
  stream: Stream
  halves: Sequence[Mapping[str, Any]]
  sensitivity: Mapping[str, np.ndarray]

  @property
  def few(self) -> Stream:
    """Part of the texts, for errors that need a pass per option."""
    x, masks = self.stream
    sizes = [mask.size for mask in masks]
    return Stream(*(spread(part, sizes, _FEW) for part in (x, masks)))

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


def embedding_shape(asked: Shape, params: Mapping[str, Any]) -> tuple[int, int]:
  """Returns the rows and the width of the embeddings that get one low rank."""
  V, D = params["embed"]["embedding"].shape
  if asked.embedding_shared:
    V += asked.max_length + asked.segments
  return V, D


def embedding_size(shape: tuple[int, int], rank: int) -> int:
  """Returns the number of parameters of an embedding [V, D] of lower rank.

  Several with one matrix have no bias, so they are smaller by D.
  """
  V, D = shape
  return rank * (V + D) + D


def _embedding_options(
  tables: lowrank.Tables, sensitivity: np.ndarray
) -> list[Option]:
  """Returns the options of the rank of embeddings; 0 is all of it."""
  found = lowrank.components(tables, sensitivity)
  V, D = sum(len(rows) for rows, _ in tables.values()), len(sensitivity)
  # Error that leaving out each component adds.
  weight_D = np.sum(found.decode_DD @ sensitivity * found.decode_DD, axis=1)
  added_D = found.variances_D * weight_D
  for_mean = int(len(tables) > 1)  # it takes one of the channels
  options = [Option(0, V * D, 0.0)]
  for rank in range(D // 8 * 8, 0, -8):
    error = float(added_D[rank - for_mean :].sum())
    options.append(Option(rank, embedding_size((V, D), rank), error))
  return options


def _attention_options(trial: _Trial) -> list[Option]:
  """Returns the options of attention, from large to small.

  The errors of logits and values are added. Those of logits are measured with all
  heads.
  """
  H = trial.dense.shape.num_heads
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
  m, layer, attn = trial.dense.shape, trial.asked, trial.old["attn"]
  options = [Option(0, num_weights(attn, ("q", "k")), 0.0)]
  groups = _groups(m, layer)[1:]
  if not groups:
    return options
  moments = head_moments(trial.dense, trial.old, trial.stream)
  if layer.axis == "input":
    tried = [dataclasses.replace(layer, groups=G) for G in groups]
    folded = [fold_logits(m, one, attn, moments)[0] for one in tried]
    heads = [
      fold.unfold({"attn": one}, head_dim=m.head_dim)["attn"] for one in folded
    ]
    stays = np.ones((1, attn["k"]["kernel"].shape[1], m.head_dim), bool)
    errors = [_logit_errors(trial, one, stays)[0] for one in heads]
  else:
    terms = logit_terms(m, trial.dense.layer, attn, moments)
    folded = [{"q": f.q, "k": f.k} for f in map(terms.fold, groups)]
    whole = terms.fold(m.head_dim)
    stays = np.zeros((len(groups), *terms.variance_JK.shape), bool)
    for one_JK, G in zip(stays, groups, strict=True):
      np.put_along_axis(one_JK, terms.channels(G), True, axis=1)
    errors = _logit_errors(trial, {**attn, "q": whole.q, "k": whole.k}, stays)
  for G, arrays, error in zip(groups, folded, errors, strict=True):
    size = num_weights(arrays, ("q", "k"))
    if m.positions == "rope" and layer.axis == "output":
      size += G // 2 * attn["k"]["kernel"].shape[1]  # frequencies
    options.append(Option(G, size, error))
  return options


def _logit_errors(
  trial: _Trial, attn: Mapping[str, Any], stays_NJK: np.ndarray
) -> list[float]:
  """Returns the error of each of N sets of channels that stay.

  Args:
    trial: The layer.
    attn: Dense attention whose logits are sums over these channels.
    stays_NJK: True at channels of keys that stay.
  """
  o_ID = np.asarray(trial.old["attn"]["o"]["kernel"], np.float64)
  o_ID = o_ID.reshape(-1, o_ID.shape[-1])
  weight_II = (o_ID @ trial.sensitivity["o"] @ o_ID.T).astype(np.float32)
  layers = (trial.old, {**trial.old, "attn": attn})
  part = functools.partial(
    _logit_error_sums, trial.dense, layers, stays_NJK, weight_II
  )
  sums, count = total(part, *trial.few)
  return (sums / count).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _logit_error_sums(block, layers, stays_NJK, weight_II, x, mask):
  """Returns the sums over tokens of e' F e for the output e, and their number."""
  position_L = jnp.arange(x.shape[1])

  def project(block: Block):
    return block.attn.project(block.attention_input(x), position_L)

  def mixed(block: Block, q, k, v):
    return exact_attention.attend(
      q,
      k.transpose(0, 2, 3, 1),
      v.swapaxes(1, 2),
      block.attn.bias(position_L, position_L),
      mask,
      **block.attn.logit_options,
    )

  def run(method, *args):
    return block.apply({"params": layers[0]}, *args, method=method)

  aim_BLHK = run(mixed, *run(project))
  q, k, v = block.apply({"params": layers[1]}, method=project)

  def error(stays_JK):
    e_BLHK = run(mixed, q, k * stays_JK[None, None], v) - aim_BLHK
    e_BLI = e_BLHK.reshape(*x.shape[:2], -1) * mask[..., None]
    return jnp.einsum("BLI,IJ,BLJ->", e_BLI, weight_II, e_BLI)

  return jax.lax.map(error, stays_NJK), mask.sum()


def _values_options(trial: _Trial) -> list[Option]:
  """Returns the options of W_V and of the heads that stay, without groups."""
  attn, asked = trial.old["attn"], trial.asked
  arrays = ("v", "o") if trial.tried.by_neuron else ("v",)
  every = trial.dense.layer.heads
  if trial.tried.by_neuron:
    options = _rank_options(trial)
  else:
    size = num_weights(attn, arrays)
    options = [Option(Attention(0, "dense", every), size, 0.0)]
  if asked.values != "dense":
    alone = dataclasses.replace(asked, groups=0, value_dim=asked.head_dim)
    block = trial.dense.clone(layer=alone)
    new, *_ = fold_attention(block, trial.dense, trial.old, trial.stream)
    layers = trial.stream.put((trial.old, {**trial.old, "attn": new}))
    blocks, weight = (trial.dense, block), trial.sensitivity["o"]
    part = functools.partial(_attention_error, blocks, layers, weight)
    error = float(np.divide(*total(part, *trial.few)))
    size = num_weights(new, arrays)
    options.append(Option(Attention(0, asked.values, every), size, error))
  return options


def _rank_options(trial: _Trial) -> list[Option]:
  """Returns the options of W_V and W_O: some of the heads, each of rank r."""
  attn, m = trial.old["attn"], trial.dense.shape
  fitted, held_out = (half["o"].moments for half in trial.halves)
  options = []
  for heads in _head_choices(attn, fitted, trial.sensitivity["o"]):
    if len(heads) < m.num_heads and not trial.tried.heads:
      break
    kept, lost = keep_heads(attn, fitted, heads)
    rows = np.repeat(np.isin(range(m.num_heads), heads), m.head_dim)
    of_kept = Moments(fitted.second_II[rows][:, rows], fitted.mean_I[rows])
    ranks = _eighths(m.head_dim)[: None if trial.tried.ranks else 1]
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
  if trial.tried.by_neuron:
    return _neuron_options(trial)
  old, squares = trial.old, jax.tree.map(np.add, *trial.halves)
  size = num_weights(old["attn"], ("o",))
  size += num_weights(old["mlp"], ("up", "gate", "down"))
  marks = trial.stream.put(_marks(old, squares))
  layer = trial.stream.put(old)  # once, not for each batch
  part = functools.partial(
    _pruned_errors, trial.dense, layer, marks, trial.sensitivity
  )
  sums, count = total(part, *trial.few)
  errors = (sums / count).tolist()
  return [Option(0.0, size, 0.0)] + [
    Option(fraction, (1 - fraction) * size, error)
    for fraction, error in zip(_FRACTIONS, errors, strict=True)
  ]


def _neuron_options(trial: _Trial) -> list[Option]:
  """Returns the options of an MLP with fewer neurons and W_down refitted."""
  mlp = trial.old["mlp"]
  w_FD = np.asarray(mlp["down"]["kernel"], np.float64)
  fitted, held_out = (half["down"].moments for half in trial.halves)
  c_FF = fitted.around(mlp["down"])
  F = len(w_FD)
  kept = _neurons(F)[1:]
  size = num_weights(mlp, ("up", "gate", "down"))
  options = [Option(0.0, size, 0.0)]
  f_DD = trial.sensitivity["down"]
  steps = oneshot.removals(w_FD, c_FF, kept, sensitivity_OO=f_DD)
  # The square of W - new, multiplied out, so that removed neurons cost nothing.
  c_FF = held_out.around(mlp["down"])
  cross_FD = c_FF @ w_FD
  whole = np.sum(cross_FD * (w_FD @ f_DD))
  for count, new_FD in zip(kept, steps, strict=True):
    stays = np.flatnonzero(new_FD.any(axis=1))
    new = new_FD[stays]
    own = 2 * cross_FD[stays] - c_FF[np.ix_(stays, stays)] @ new
    error = float(whole - np.sum(own * (new @ f_DD)))
    options.append(Option(1 - count / F, count / F * size, error))
  return options


def _neurons(F: int) -> list[int]:
  """Returns the numbers of neurons to try, from all to the least."""
  return sorted(
    {round_neurons(F * i / 16, F) for i in range(1, 17)}, reverse=True
  )


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


def _groups(m: Shape, layer: Layer) -> list[int]:
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


@functools.partial(jax.jit, static_argnums=0)
def _attention_error(blocks, layers, weight_DD, x, mask):
  """Returns the sum over tokens of e' F e, and the number of tokens.

  e is the difference between the outputs of attention of two layers.
  """
  ours, theirs = (
    capture(block, params, x, mask, outputs=("o",))["o"]
    for block, params in zip(blocks, layers, strict=True)
  )
  return _weighted(ours - theirs, weight_DD, mask), mask.sum()


def _weighted(e_BLD, weight_DD, mask):
  """Returns the sum over tokens of e' F e."""
  e_BLD *= mask[..., None]
  return jnp.einsum("BLD,DE,BLE->", e_BLD, weight_DD, e_BLD)


class _Mark(NamedTuple):
  """Which weights of a kernel are pruned for each fraction.

  Attributes:
    rms: Root mean squares of its inputs, up to a factor, as it is broadcast.
    limits_N: Scores |w| rms below this are pruned.
  """

  rms: Any
  limits_N: Any

  def prune(self, w: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns a kernel with zeros."""
    return jnp.where(jnp.abs(w) * self.rms < limit, 0, w)


def _marks(
  params: Mapping[str, Any], squares: Mapping[str, Any]
) -> dict[str, _Mark]:
  """Returns {linear layer: what `_FRACTIONS` prune of it, the lowest |w| rms}."""
  marks = {}
  for name, w in paths.flatten(dict(params)).items():
    role = name.removesuffix("/kernel")
    if role in _LINEAR:
      w = np.asarray(w)
      rms = np.sqrt(squares[READS[role]]).astype(np.float32)
      rms = rms.reshape(rms.shape + (1,) * (w.ndim - rms.ndim))
      counts = [int(fraction * w.size) for fraction in _FRACTIONS]
      score = np.partition(np.abs(w) * rms, counts, axis=None)
      marks[role] = _Mark(rms, score[counts])
  return marks


@functools.partial(jax.jit, static_argnums=0)
def _pruned_errors(block, params, marks, sensitivity, x, mask):
  """Returns the sums of e' F e for each of `_FRACTIONS`, and the number of tokens.

  The errors of the outputs of W_O and W_down are added.
  """
  aim = capture(block, params, x, mask, outputs=("o", "down"))
  a_BLHK = capture(block, params, x, mask, ("o",))["o"]

  def error(limits):
    def prune(name, w):
      role = name.removesuffix("/kernel")
      return marks[role].prune(w, limits[role]) if role in marks else w

    pruned = paths.map_named(prune, params)
    o_BLD = project(pruned["attn"]["o"], a_BLHK)
    seen = capture(
      block, pruned, x, mask, outputs=("down",), given={"attn": o_BLD}
    )
    return sum(
      _weighted(out - aim[role], sensitivity[role], mask)
      for role, out in {"o": o_BLD, **seen}.items()
    )

  limits = {role: mark.limits_N for role, mark in marks.items()}
  return jax.lax.map(error, limits), mask.sum()
