"""One check of FPP: which units are suspected, and which of them hold up."""

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


def batches(sites: Sequence[Site], scope: str) -> list[list[Site]]:
  """Returns the sites that share a threshold, in the order of the sites."""
  if scope == "parameter":
    return [[site] for site in sites]
  numbers = sorted({site.rule for site in sites})
  return [[s for s in sites if s.rule == number] for number in numbers]


def check_sites(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  scope: str,
  removed: Mapping[str, int],
) -> None:
  """Checks what `suspects` will be asked for.

  Raises:
    ValueError: too many units share a threshold, or what is said to be removed
      is no site.
  """
  for batch in batches(sites, scope):
    size = sum(removed.get(s.name, 0) for s in batch) + _num_units(batch)
    if size >= 2**31:
      by_rule = "scope='parameter' or more rules"
      raise ValueError(
        f"rule {rules[batch[0].rule].pattern!r} ranks {size:,} units together, "
        "which must be fewer than 2^31; use "
        f"{by_rule if scope == 'rule' else 'rows or neurons'}"
      )
  unknown = sorted(set(removed) - {site.name for site in sites})
  if unknown:
    raise ValueError(
      f"removed has {unknown[0]!r}, which is no site of the rules; there are "
      f"{', '.join(site.name for site in sites)}"
    )


def _num_units(batch: Sequence[Site]) -> int:
  return sum(int(np.prod(s.shape)) for s in batch)


def suspects(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  ranked: Mapping[str, select.Scores],
  scope: str,
  ramp: np.ndarray,
  index: jax.Array,
  removed: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
  """Returns {site: True at the lowest q of its units}, q from the ramp.

  Units that were removed are of the lowest, and not there to be chosen.
  """
  chosen_units = {}
  for batch in batches(sites, scope):
    rule = rules[batch[0].rule]
    gone = sum((removed or {}).get(s.name, 0) for s in batch)
    size = gone + _num_units(batch)
    # In float64 on the host: exact for any size, and never above the target.
    table = np.floor(ramp * rule.target * size + 1e-6).astype(np.int32)
    table = np.maximum(table - gone, 0)
    eligible = [_within_pattern(ranked[s.name], rule) for s in batch]
    chosen = select.lowest(eligible, jnp.asarray(table)[index])
    chosen_units.update({s.name: c for s, c in zip(batch, chosen, strict=True)})
  return chosen_units


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
  scope: str,
  ramp: np.ndarray,
  patience: int,
  removed: Mapping[str, int] | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns ({site: new planes}, {site: units that may be zeroed}), packed.

  Args:
    sites: Some or all of them, as `batches` groups them.
    rules: Of all sites, with their scores.
    suspected: As in `FPPState`; also `averages`.
    averages: Of scores.
    leaves: The parameters.
    index: int32[], of this check.
    first: Place of the first site among all.
    seed: Of random scores; as in `fpp`, like what follows.
    scope: Of thresholds.
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
  found = suspects(sites, rules, ranked, scope, ramp, index, removed)
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


def _within_pattern(scores: select.Scores, rule: Rule) -> select.Scores:
  """Moves to infinity the n highest of each m neighbours, for rule "n:m"."""
  if rule.pattern_nm is None:
    return scores
  score = select.value(scores)
  n, m = rule.pattern_nm
  *lead, rows, columns = score.shape
  groups = score.reshape(*lead, rows // m, m, columns)
  order = jnp.argsort(jnp.argsort(groups, axis=-2), axis=-2)
  return jnp.where(order < m - n, groups, jnp.inf).reshape(score.shape)
