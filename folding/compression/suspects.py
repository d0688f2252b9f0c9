"""One check of FPP: which units are suspected, and which of them hold up."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from folding import paths
from folding.compression import scores as scores_lib
from folding.compression import select
from folding.compression.rules import Rule, Site, pack, unpack

_TRIALS = 5  # of verification: all candidates, a half, ... a sixteenth


def member_masks(
  sites: Sequence[Site],
  packed: Mapping[str, jax.Array],
  leaves: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Returns {parameter: bools that broadcast against it} from packed units."""
  return {
    name: site.expand(units, name, leaves[name].ndim)
    for site in sites
    for units in [unpack(packed[site.name], site.shape[-1])]
    for name in site.members
  }


def kinds(sites: Sequence[Site], rules: Sequence[Rule]) -> dict[str, str]:
  """Returns {parameter: its score}, of rules that name one."""
  found = {}
  for site in sites:
    found |= dict.fromkeys(site.members, rules[site.rule].score)
  return found


def unit_scores(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  leaves: Mapping[str, jax.Array],
  averages: Mapping[str, jax.Array],
  seed: int,
  first: int = 0,
) -> dict[str, select.Scores]:
  """Returns {site: float32 score a unit}, of weights possibly unstored.

  Of a part of all sites `first` is the place of its first one. The rules, of
  all sites, name their scores.

  A unit of many elements scores the root of the sum of their squared scores
  (with sign, for "movement", which may be negative, their sum). "relative"
  ranks weights within their row and column, which says nothing of a whole row
  or neuron, so these take "activation".
  """
  ranked = {}
  for index, site in enumerate(sites, first):
    is_weights = None in site.members.values()
    kind = rules[site.rule].score
    assert kind is not None
    if kind == "relative" and not is_weights:
      kind = "activation"
    key = None
    if kind == "random":  # else no program depends on the seed
      key = jax.random.fold_in(jax.random.key(seed), index)
    lazy = {
      name: scores_lib.lazy_scores(kind, leaves[name], averages.get(name), key)
      for name in site.members
    }
    if is_weights:
      ranked[site.name] = lazy[site.name]
      continue
    elements = {name: select.value(s) for name, s in lazy.items()}
    if kind == "movement":
      ranked[site.name] = site.reduce(elements)
    else:
      squares = {name: jnp.square(e) for name, e in elements.items()}
      ranked[site.name] = jnp.sqrt(site.reduce(squares))
  return ranked


def check_sites(sites: Sequence[Site], removed: Mapping[str, int]) -> None:
  """Checks what `suspects` will be asked for.

  Raises:
    ValueError: a site has too many units to rank, or what is said to be removed
      is no site.
  """
  for site in sites:
    size = removed.get(site.name, 0) + math.prod(site.shape)
    if size >= 2**31:
      raise ValueError(
        f"{site.name!r} has {size:,} units to rank, which must be fewer than "
        "2^31; use rows or neurons"
      )
  unknown = sorted(set(removed) - {site.name for site in sites})
  if unknown:
    raise ValueError(
      f"removed has {unknown[0]!r}, which is no site of the rules; there are "
      f"{', '.join(site.name for site in sites)}"
    )


def suspects(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  ranked: Mapping[str, select.Scores],
  ramp: np.ndarray,
  index: jax.Array,
  removed: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
  """Returns {site: True at the lowest q of its units}, q from the ramp.

  Units that were removed are of the lowest, and not there to be chosen.
  """
  chosen = {}
  for site in sites:
    gone = (removed or {}).get(site.name, 0)
    size = gone + math.prod(site.shape)
    # In float64 on the host: exact for any size, and never above the target.
    target = rules[site.rule].target
    table = np.floor(ramp * target * size + 1e-6).astype(np.int32)
    k = jnp.asarray(np.maximum(table - gone, 0))[index]
    chosen[site.name] = select.lowest([ranked[site.name]], k)[0]
  return chosen


def choose(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  suspected: Mapping[str, jax.Array],
  averages: Mapping[str, jax.Array],
  leaves: Mapping[str, jax.Array],
  index: jax.Array,
  *,
  first: int,
  seed: int,
  ramp: np.ndarray,
  patience: int,
  removed: Mapping[str, int] | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns ({site: new planes}, {site: units that may be zeroed}), packed.

  Args:
    sites: Some or all of them, as `fpp` asks for them.
    rules: Of all sites, with their scores.
    suspected: As in `FPPState`; also `averages`.
    averages: Of scores.
    leaves: The parameters.
    index: int32[], of this check.
    first: Place of the first site among all.
    seed: Of random scores; as in `fpp`, like what follows.
    ramp: Share of the target at each check.
    patience: In checks.
    removed: Units that are gone.
  """
  ranked = unit_scores(sites, rules, leaves, averages, seed, first)
  old, was_zero = {}, {}
  for s in sites:
    old[s.name] = unpack(suspected[s.name], s.shape[-1])  # [planes, units]
    is_zero = s.reduce({n: leaves[n] == 0 for n in s.members}, jnp.all)
    was_zero[s.name] = old[s.name][0] & is_zero
    # What is zero stays suspected, whatever its score.
    ranked[s.name] = Partial(_lowered, was_zero[s.name], ranked[s.name])
  planes, candidates = {}, {}
  found = suspects(sites, rules, ranked, ramp, index, removed)
  for n, now in found.items():
    is_last = index == len(ramp) - 1
    is_ripe = is_last | (old[n][patience - 1] if patience else True)
    candidates[n] = pack(now & ~was_zero[n] & is_ripe)
    before = old[n][:-1] & now[None]
    planes[n] = pack(jnp.concatenate([now[None], before]))
  return planes, candidates


def _lowered(is_lowest: jax.Array, scores: select.Scores) -> jax.Array:
  return jnp.where(is_lowest, -jnp.inf, select.value(scores))


def verified(
  sites: Sequence[Site],
  candidates: Mapping[str, jax.Array],
  ranked: Mapping[str, select.Scores],
  leaves: Mapping[str, jax.Array],
  params: Any,
  value: jax.Array | None,
  value_fn: Callable[[Any], jax.Array],
  tolerance: float,
) -> dict[str, jax.Array]:
  """Returns as many candidates as hold the loss, lowest scores first."""
  present = value_fn(params) if value is None else value
  bound = present + tolerance * jnp.abs(present)  # a loss may be negative

  def share(trial):
    # After the last trial nothing is zeroed at all.
    fraction = jnp.where(trial < _TRIALS, 0.5**trial, 0.0)
    chosen = {}
    for n, is_candidate in candidates.items():
      count = jnp.sum(is_candidate, dtype=jnp.int32)
      k = jnp.floor(fraction * count).astype(jnp.int32)
      score = jnp.where(is_candidate, select.value(ranked[n]), jnp.inf)
      chosen[n] = select.lowest([score], k)[0] & is_candidate
    return chosen

  def fails(trial):
    chosen = share(trial)
    clear = {
      name: site.expand(chosen[site.name], name, leaves[name].ndim)
      for site in sites
      for name in site.members
    }
    trial_params = paths.map_named(
      lambda name, p: jnp.where(clear[name], 0, p) if name in clear else p,
      params,
    )
    return ~(value_fn(trial_params) <= bound)

  trial = jax.lax.while_loop(
    lambda t: (t < _TRIALS) & fails(t), lambda t: t + 1, jnp.int32(0)
  )
  return share(trial)
