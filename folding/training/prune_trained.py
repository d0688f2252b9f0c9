"""Prunes trained weights before the first step, on calibration text.

Layer by layer, on top of the pruned layers below. `fpp` sets how much each array
loses; training then continues with the rest, and FPP holds the zeros.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from folding import paths
from folding.compression import oneshot
from folding.compression.lowrank import Moments
from folding.compression.sites import Rule, Site, make_sites
from folding.models.shape import Shape
from folding.training.fold_layer import Prune
from folding.training.progress import track
from folding.training.sensitivity import Sensitivities
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


def prune_trained(
  shape: Shape,
  params: Params,
  batches: Sequence[Batch],
  rules: Sequence[Rule],
  method: str,
  *,
  keeps_blocks: bool = False,
) -> dict[str, Any]:
  """Returns trained parameters with as many zeros as the rules ask for.

  Embeddings and the output layer, whose inputs are single tokens or whose outputs
  are many, are pruned by magnitude.

  Args:
    shape: Shape of the model.
    params: Its parameters.
    batches: Calibration text, as for `fold_pretrained`.
    rules: From `make_rules`.
    method: As `CompressConfig.prune`, for the kernels of blocks.
    keeps_blocks: Whether blocks stay as they are, since `neuron_pruner` has removed
      their neurons.

  Raises:
    ConfigError: there is too little text.
    ValueError: the moments of a layer's input cannot be inverted.
  """
  weights, _ = _targets(rules, params)
  by_moments = method in ("wanda", "sparsegpt")

  def prune(name, w):
    w = np.asarray(w, np.float32)
    in_block = name.startswith("blocks_")
    if name not in weights or (in_block and by_moments):
      return w
    return oneshot.magnitude(w, weights[name]).astype(np.float32)

  pruned = paths.map_named(prune, dict(params))
  if not by_moments or keeps_blocks:
    return pruned
  require_text(shape, batches)
  solve = getattr(oneshot, method)
  stream = embed_batches(shape, pruned, batches)
  for n in track(range(shape.num_layers), "pruning layers"):
    name, block = f"blocks_{n}", make_block(shape, n)
    moments = input_moments(block, pruned[name], stream)
    pruned[name] = _weights(name, pruned[name], moments, solve, weights)
    stream = advance(block, pruned[name], stream)
  return pruned


def neuron_pruner(
  shape: Shape,
  params: Params,
  rules: Sequence[Rule],
  sensitivity: Sensitivities | None = None,
) -> Callable[[int], Prune]:
  """Returns a function of the number of a layer: how it is pruned.

  While the model is folded, it removes the neurons whose rows of W_down the others replace best
  (`oneshot.remove_inputs`); the bias of W_down takes up their mean output.
  Attention matrices that are pruned by weight are pruned by SparseGPT.

  Args:
    shape: Shape of the folded model.
    params: Shapes of its parameters.
    rules: From `make_rules`; they prune neurons.
    sensitivity: How errors count, from `sensitivity.sensitivities`; None: all
      alike.
  """
  weights, units = _targets(rules, params)
  sensitivity = sensitivity or {}

  def prune_attention(n, layer, stream):
    name, block = f"blocks_{n}", make_block(shape, n)
    moments = input_moments(block, layer, stream, ("q", "o"))
    return _weights(name, layer, moments, oneshot.sparsegpt, weights)

  def prune_neurons(n, layer, moments):
    name = f"blocks_{n}"
    if (up := f"{name}/mlp/up/kernel") not in units:
      return layer
    site, fraction = units[up]
    w_FD = np.asarray(layer["mlp"]["down"]["kernel"], np.float64)
    new_FD = oneshot.remove_inputs(
      w_FD,
      moments.around(layer["mlp"]["down"]),
      fraction,
      sensitivity_OO=sensitivity.get(f"{name}/mlp/down"),
    )
    return _without_inputs(site, layer, new_FD, moments.mean_I)

  def prune(n):
    attention = functools.partial(prune_attention, n)
    if not any(name.startswith(f"blocks_{n}/attn/") for name in weights):
      attention = None
    return Prune(attention, functools.partial(prune_neurons, n))

  return prune


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
    if name not in fractions:
      return w
    kernel = name.removeprefix(f"{block}/").removesuffix("/kernel")
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
