"""Prunes trained weights before the first step, from calibration text.

Layer by layer, as the layers below are pruned already. Which arrays lose how
much is what `fpp` says; training then goes on with what is left, and FPP holds
the zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression import oneshot
from folding.compression.shrink import shrink
from folding.compression.sites import Site, make_sites
from folding.config import Config
from folding.training.fit_attention import total
from folding.training.fold_pretrained import (
  Batch,
  Prune,
  embed_batches,
  look,
  look_all,
  make_block,
)
from folding.training.optimizer import make_rules

# Which module's input a kernel of a block reads; v and gate may be missing.
_READS = {
  **{"attn/q": "q", "attn/k": "q", "attn/v": "q", "attn/o": "o"},
  **{"mlp/up": "up", "mlp/gate": "up", "mlp/down": "down"},
}
_MODULES = tuple(sorted(set(_READS.values())))


def prune_trained(
  config: Config,
  params: Mapping[str, Any],
  dense: Mapping[str, Any],
  batches: Sequence[Batch],
) -> dict[str, Any]:
  """Returns trained parameters with as many zeros as `fpp` asks for.

  Kernels of blocks go by `compress.prune`; embeddings and the output layer,
  whose inputs are single tokens or whose outputs are many, always by magnitude.
  Neurons have been removed by then (`neuron_pruner`), and the blocks are left as
  they are; so are tokens that are to leave the tokenizer.

  Args:
    config: Resolved; `compress.prune` is not "none".
    params: What is pruned, of the config's own shapes.
    dense: The dense twin's, or shapes; `fpp.overall` refers to them.
    batches: Calibration text, as for `fold_pretrained`.

  Raises:
    ConfigError: there is too little text.
    ValueError: the moments of a layer's input cannot be inverted.
  """
  method = config.compress.prune
  weights, _ = _targets(config, params, dense)
  by_moments = method in ("wanda", "sparsegpt")
  is_done = config.fpp.granularity == "neuron"  # by `neuron_pruner`

  def prune(name, w):
    w = np.asarray(w, np.float32)
    in_block = name.startswith("blocks_")
    if name not in weights or (in_block and by_moments):
      return w
    return oneshot.magnitude(w, weights[name]).astype(np.float32)

  pruned = paths.map_named(prune, dict(params))
  if by_moments and not is_done:
    solve = getattr(oneshot, method)
    x, kept = embed_batches(config, pruned, list(batches))
    for n in range(config.model.num_layers):
      name, block = f"blocks_{n}", make_block(config, n)
      moments = _moments(block, pruned[name], x, kept)
      pruned[name] = _weights(name, pruned[name], moments, solve, weights)
      x = [seen["out"] for seen in look_all(block, pruned[name], x, kept)]
  return pruned


def neuron_pruner(
  config: Config, params: Mapping[str, Any], dense: Mapping[str, Any]
) -> Prune:
  """Returns what removes neurons, layer by layer, while a model is folded.

  Those go whose rows of W_down the others best make up for
  (`oneshot.remove_inputs`); its bias takes up what they wrote on average. What
  is pruned by weight beside them goes by SparseGPT.

  Args:
    config: Resolved; its `fpp.granularity` is "neuron".
    params: Shapes of the folded parameters.
    dense: As in `prune_trained`.
  """
  weights, units = _targets(config, params, dense)

  def prune(n, layer, x, kept):
    name, block = f"blocks_{n}", make_block(config, n)
    # By weight goes no more than attention.
    moments = _moments(block, layer, x, kept, ("q", "o"))
    layer = _weights(name, layer, moments, oneshot.sparsegpt, weights)
    if (up := f"{name}/mlp/up/kernel") not in units:  # they all stay
      return layer
    moment = _moments(block, layer, x, kept, ("down",))["down"]
    return _neurons(*units[up], layer, moment)

  return prune


def _targets(
  config: Config, params: Mapping[str, Any], dense: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, tuple[Site, float]]]:
  """Returns {name: fraction} of what goes by weight, and the same of units."""
  rules = make_rules(config, params, dense)
  weights, units = {}, {}
  for site in make_sites(rules, params):
    fraction = rules[site.rule].target
    if site.members[site.name] is None:
      weights[site.name] = fraction
    else:
      units[site.name] = (site, fraction)
  return weights, units


def without_neurons(
  config: Config, params: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
  """Returns both without the neurons that are zero, in multiples of 8.

  What else is zero stays, held by FPP.
  """
  is_zero = paths.map_named(
    lambda name, w: ("/mlp/" in name) & (np.asarray(w) == 0), params
  )
  small = shrink(config, params, multiple=8, absorb=False, is_zero=is_zero)
  return small.config, small.params


class _Moment(NamedTuple):
  """E[a a'] and E[a] of what a module reads."""

  second_II: Any
  mean_I: Any


def _moments(block, params, x, kept, names=_MODULES) -> dict[str, _Moment]:
  """Returns those of modules of a block, by name."""
  sums = total(lambda *at: _sums(block, params, *at, names), x, kept)
  count = sum(int(keep.sum()) for keep in kept)
  return jax.tree.map(lambda a: a / count, sums)


def _weights(block, params, moments, solve, fractions) -> dict[str, Any]:
  """Returns the parameters of a block, weights pruned for what they read."""

  def prune(name, w):
    kernel = name.removeprefix(f"{block}/").removesuffix("/kernel")
    if name not in fractions:
      return w
    moment = moments[_READS[kernel]].second_II
    w_IO = np.asarray(w, np.float64).reshape(len(moment), -1)
    new = solve(w_IO, moment, fractions[name])
    return new.reshape(w.shape).astype(np.float32)

  return paths.map_named(prune, {block: params})[block]


def _neurons(site: Site, fraction, params, moment) -> dict[str, Any]:
  """Returns the parameters of a block without a fraction of its neurons."""
  w_FD = np.asarray(params["mlp"]["down"]["kernel"], np.float64)
  c_FF, mean_F = moment
  has_bias = "bias" in params["mlp"]["down"]
  if has_bias:  # it takes up the means
    c_FF = c_FF - np.outer(mean_F, mean_F)
  new_FD = oneshot.remove_inputs(w_FD, c_FF, fraction)
  gone_F = ~new_FD.any(axis=1)
  block = site.name.partition("/")[0]

  def remove(name, w):
    if name not in site.members:
      return w
    return np.where(site.expand(gone_F, name, np.ndim(w)), 0, w)

  new = paths.map_named(remove, {block: params})[block]
  down = {"kernel": new_FD.astype(np.float32)}
  if has_bias:
    bias_D = new["mlp"]["down"]["bias"] + mean_F @ (w_FD - new_FD)
    down["bias"] = bias_D.astype(np.float32)
  return {**new, "mlp": {**new["mlp"], "down": down}}


@jax.jit(static_argnames=("block", "names"))
def _sums(block, params, x, keep, names) -> dict[str, _Moment]:
  """Returns the sums of a a' and of a over tokens, of what each module reads."""
  seen = look(block, params, x, keep, names)

  def total(a):
    a = a.astype(jnp.float32).reshape(*keep.shape, -1) * keep[..., None]
    second = jnp.einsum("BLD,BLE->DE", a, a, precision="highest")
    return _Moment(second, a.sum((0, 1)))

  return {name: total(seen[name]) for name in names}
