"""Prunes trained weights before the first step, on calibration text.

Layer by layer, on top of the pruned layers below. `fpp` sets how much each array
loses; training then continues with the rest, and FPP holds the zeros.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from folding import paths
from folding.compression import oneshot
from folding.compression.lowrank import Moments
from folding.compression.sites import Rule, Site, make_sites
from folding.models.shape import Shape
from folding.training.distributed import host_copy
from folding.training.fold_layer import Prune
from folding.training.progress import track
from folding.training.sensitivity import Sensitivities
from folding.training.sharding import put_like
from folding.training.stream import (
  READS,
  Batch,
  Params,
  advance,
  embed_batches,
  input_moments,
  make_block,
  require_text,
)

BY_MOMENTS = ("wanda", "sparsegpt")  # methods that need calibration text


def prune_trained(
  shape: Shape,
  params: Params,
  batches: Sequence[Batch],
  rules: Sequence[Rule],
  method: str,
) -> dict[str, Any]:
  """Returns trained parameters with as many zeros as the rules ask for.

  Nothing is fitted to the dense model; `fold_pretrained` with a `Pruner` does that.

  Embeddings and the output layer, whose inputs are single tokens or whose outputs
  are many, are pruned by magnitude.

  Args:
    shape: Shape of the model.
    params: Its parameters.
    batches: Calibration text, as for `fold_pretrained`.
    rules: From `make_rules`.
    method: As `CompressConfig.prune`, for the kernels of blocks.

  Raises:
    ConfigError: there is too little text.
    ValueError: the moments of a layer's input cannot be inverted.
  """
  weights, _ = _targets(rules, params)
  by_moments = method in BY_MOMENTS
  pruned = _prune_outer(weights, params, blocks=not by_moments)
  if not by_moments:
    return pruned
  require_text(shape, batches)
  solve = getattr(oneshot, method)
  stream = embed_batches(shape, pruned, batches)
  for n in track(range(shape.num_layers), "pruning layers"):
    name, block = f"blocks_{n}", make_block(shape, n)
    layer = host_copy(pruned[name])
    moments = input_moments(block, layer, stream)
    layer = _weights(name, layer, moments, solve, weights)
    stream = advance(block, layer, stream)
    pruned[name] = put_like(layer, stream.x[0])
  return pruned


class Pruner(NamedTuple):
  """How a model is pruned while it is folded.

  Attributes:
    outer: Returns the parameters, pruned outside the layers.
    layer: Returns how a layer of a number is pruned.
  """

  outer: Callable[[Params], dict[str, Any]]
  layer: Callable[[int], Prune]


def make_pruner(
  params: Params,
  rules: Sequence[Rule],
  method: str,
  sensitivity: Sensitivities | None = None,
) -> Pruner:
  """Returns how a model is pruned while it is folded.

  Neurons are removed whose rows of W_down the others replace best
  (`oneshot.remove_inputs`); the bias of W_down takes up their mean output.
  Matrices that are pruned by weight are pruned as by `prune_trained`, after the
  fit of the folded layer.

  Args:
    params: Shapes of the parameters of the folded model.
    rules: From `make_rules`.
    method: "wanda" or "sparsegpt".
    sensitivity: How errors count, from `sensitivity.sensitivities`; None: all
      alike.
  """
  weights, units = _targets(rules, params)
  sensitivity = sensitivity or {}
  solve = getattr(oneshot, method)

  def prune_weights(name, layer, moments):
    return _weights(name, layer, moments, solve, weights)

  def prune_neurons(name, layer, moments):
    if (up := f"{name}/mlp/up/kernel") not in units:
      return layer
    site, fraction = units[up]
    w_FD = np.asarray(layer["mlp"]["down"]["kernel"], np.float64)
    new_FD = oneshot.remove_inputs(
      w_FD,
      moments.around(layer["mlp"]["down"]),
      fraction,
      sensitivity_OO=host_copy(sensitivity.get(f"{name}/mlp/down")),
    )
    return _without_inputs(site, layer, new_FD, moments.mean_I)

  def layer(n):
    name = f"blocks_{n}"
    reads = {
      module for at, module in READS.items() if f"{name}/{at}/kernel" in weights
    }
    return Prune(
      frozenset(reads),
      functools.partial(prune_weights, name),
      functools.partial(prune_neurons, name),
    )

  return Pruner(functools.partial(_prune_outer, weights), layer)


def _prune_outer(
  weights: Mapping[str, float], params: Params, *, blocks: bool = False
) -> dict[str, Any]:
  """Returns parameters pruned by magnitude; those of blocks if asked for."""

  def prune(name, w):
    if name not in weights or (name.startswith("blocks_") and not blocks):
      return w
    whole = np.asarray(host_copy(w), np.float32)
    return put_like(oneshot.magnitude(whole, weights[name]), w)

  return paths.map_named(prune, dict(params))


def _targets(
  rules: Sequence[Rule], params: Params
) -> tuple[dict[str, float], dict[str, tuple[Site, float]]]:
  """Returns {name: fraction} of arrays pruned by weight, and of units."""
  weights, units = {}, {}
  for site in make_sites(rules, params):
    fraction = rules[site.rule].target
    if site.is_by_weight:
      weights[site.name] = fraction
    else:
      units[site.name] = (site, fraction)
  return weights, units


def zero_neurons(params: Params) -> Any:
  """Returns bools shaped like params, True at zeros of neurons."""
  return paths.map_named(
    lambda name, w: ("/mlp/" in name) & (np.asarray(w) == 0), params
  )


def _weights(
  block: str,
  params: Params,
  moments: Mapping[str, Moments],
  solve: Callable[..., np.ndarray],
  fractions: Mapping[str, float],
) -> dict[str, Any]:
  """Returns the parameters of a block, pruned by the moments of their input."""

  def prune(name, w):
    kernel = name.removeprefix(f"{block}/").removesuffix("/kernel")
    if name not in fractions or READS[kernel] not in moments:
      return w
    moment = moments[READS[kernel]].second_II
    w_IO = np.asarray(w, np.float64).reshape(len(moment), -1)
    new = solve(w_IO, moment, fractions[name])
    return new.reshape(w.shape).astype(np.float32)

  return paths.map_named(prune, {block: params})[block]


def _without_inputs(
  site: Site, params: Params, new_FD: np.ndarray, mean_F: np.ndarray
) -> dict[str, Any]:
  """Returns the parameters of a block without the neurons that W_down drops.

  Args:
    site: The neurons.
    params: Before.
    new_FD: The new W_down.
    mean_F: Mean of its inputs, which its bias takes up.
  """
  old = params["mlp"]["down"]
  gone_F = ~new_FD.any(axis=1)
  block = site.name.partition("/")[0]

  def remove(name, w):
    if name not in site.members:
      return w
    return np.where(site.expand(gone_F, name, np.ndim(w)), 0, w)

  new = paths.map_named(remove, {block: params})[block]
  down = {"kernel": new_FD.astype(np.float32)}
  if "bias" in old:
    bias_D = old["bias"] + mean_F @ (old["kernel"] - new_FD)
    down["bias"] = bias_D.astype(np.float32)
  return {**new, "mlp": {**new["mlp"], "down": down}}
