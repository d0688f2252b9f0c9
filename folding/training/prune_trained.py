"""Prunes trained weights before the first step, from calibration text.

Layer by layer, as the layers below are pruned already. Which arrays lose how
much is what `fpp` says; training then goes on with what is left, and FPP holds
the zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression import sparsegpt
from folding.compression.rules import make_sites
from folding.config import Config
from folding.training.fold_pretrained import (
  Batch,
  embed_batches,
  look,
  make_block,
)
from folding.training.optimizer import make_rules

# Which module's input a kernel of a block reads; v and gate may be missing.
_READS = {
  **{"attn/q": "q", "attn/k": "q", "attn/v": "q", "attn/o": "o"},
  **{"mlp/up": "up", "mlp/gate": "up", "mlp/down": "down"},
}


def prune_trained(
  config: Config,
  params: Mapping[str, Any],
  dense: Mapping[str, Any],
  batches: Sequence[Batch],
  drawn: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns trained parameters with as many zeros as `fpp` asks for.

  Kernels of blocks go by `compress.prune`; embeddings and the output layer,
  whose inputs are single tokens or whose outputs are many, always by magnitude.

  Args:
    config: Resolved; `compress.prune` is not "none".
    params: What is pruned, of the config's own shapes.
    dense: The dense twin's, or shapes; `fpp.overall` refers to them.
    batches: Calibration text, as for `fold_pretrained`.
    drawn: Parameters before any training, of the shapes of `params`; what is
      left of a "ticket" begins as they are.

  Raises:
    ConfigError: there is too little text.
    ValueError: the moments of a layer's input cannot be inverted.
  """
  method = config.compress.prune
  rules = make_rules(config, params, dense)
  fractions = {
    site.name: rules[site.rule].target for site in make_sites(rules, params)
  }
  by_moments = method in ("wanda", "sparsegpt")

  def prune(name, w):
    w = np.asarray(w, np.float32)
    in_block = name.startswith("blocks_")
    if name not in fractions or (in_block and by_moments):
      return w
    return sparsegpt.magnitude(w, fractions[name]).astype(np.float32)

  pruned = paths.map_named(prune, dict(params))
  if by_moments:
    solve = getattr(sparsegpt, method)
    x, kept = embed_batches(config, pruned, list(batches))
    for n in range(config.model.num_layers):
      name, block = f"blocks_{n}", make_block(config, n)
      pruned[name] = _layer(
        block, pruned[name], x, kept, solve, _within(fractions, name)
      )
      x = [
        look(block, pruned[name], *at)["out"]
        for at in zip(x, kept, strict=True)
      ]
  if method == "ticket":
    return paths.map_named(
      lambda name, w, first: first * (w != 0) if name in fractions else first,
      pruned,
      drawn,
    )
  return pruned


def _within(fractions: Mapping[str, float], block: str) -> dict[str, float]:
  start = f"{block}/"
  return {
    name.removeprefix(start): fraction
    for name, fraction in fractions.items()
    if name.startswith(start)
  }


def _layer(block, params, x, kept, solve, fractions) -> dict[str, Any]:
  """Returns the parameters of a block, pruned given what it reads."""
  names = tuple(sorted(set(_READS.values())))
  sums: dict[str, Any] = dict.fromkeys(names, 0.0)
  for at in zip(x, kept, strict=True):
    new = _sums(block, params, *at, names)
    sums = {n: sums[n] + np.asarray(new[n], np.float64) for n in names}
  count = sum(int(keep.sum()) for keep in kept)

  def prune(name, w):
    kernel = name.removesuffix("/kernel")
    if name not in fractions:
      return w
    moment = sums[_READS[kernel]] / count
    w_IO = np.asarray(w, np.float64).reshape(len(moment), -1)
    new = solve(w_IO, moment, fractions[name])
    return new.reshape(w.shape).astype(np.float32)

  return paths.map_named(prune, params)


@jax.jit(static_argnames=("block", "names"))
def _sums(block, params, x, keep, names) -> dict[str, jax.Array]:
  """Returns the sum of a a' over tokens, for the input a of each module."""
  seen = look(block, params, x, keep, names)

  def total(a):
    a = a.astype(jnp.float32).reshape(*keep.shape, -1) * keep[..., None]
    return jnp.einsum("BLD,BLE->DE", a, a, precision="highest")

  return {name: total(seen[name]) for name in names}
