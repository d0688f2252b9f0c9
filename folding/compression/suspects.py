"""One check of FPP: which units are suspected, and which of them hold up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression import scores as scores_lib
from folding.compression import select
from folding.compression.rules import Rule, Site, unpack

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


def unit_scores(
  sites: Sequence[Site],
  leaves: Mapping[str, jax.Array],
  averages: Mapping[str, jax.Array],
  score: str,
  seed: int,
) -> dict[str, jax.Array]:
  """Returns {site: float32 score a unit}.

  A unit of many elements scores the root of the sum of their squared scores
  (with sign, for "movement", which may be negative, their sum). "relative"
  ranks weights within their row and column, which says nothing of a whole row
  or neuron, so these take "activation".
  """
  ranked = {}
  for index, site in enumerate(sites):
    key = jax.random.fold_in(jax.random.key(seed), index)
    is_weights = None in site.members.values()
    kind = score if is_weights or score != "relative" else "activation"
    elements = {
      name: scores_lib.element_scores(
        kind, leaves[name], averages.get(name), key
      )
      for name in site.members
    }
    if is_weights:
      ranked[site.name] = elements[site.name]
    elif score == "movement":
      ranked[site.name] = site.reduce(elements)
    else:
      squares = {name: jnp.square(e) for name, e in elements.items()}
      ranked[site.name] = jnp.sqrt(site.reduce(squares))
  return ranked


def suspects(
  sites: Sequence[Site],
  rules: Sequence[Rule],
  ranked: Mapping[str, jax.Array],
  scope: str,
  ramp: np.ndarray,
  index: jax.Array,
) -> dict[str, jax.Array]:
  """Returns {site: True at the lowest q of its units}, q from the ramp."""
  batches = [[s] for s in sites]
  if scope == "rule":
    batches = [
      [s for s in sites if s.rule == r] for r in sorted({s.rule for s in sites})
    ]
  chosen_units = {}
  for batch in batches:
    rule = rules[batch[0].rule]
    size = sum(int(np.prod(s.shape)) for s in batch)
    # In float64 on the host: exact for any size, and never above the target.
    table = np.floor(ramp * rule.target * size + 1e-6).astype(np.int32)
    eligible = [_within_pattern(ranked[s.name], rule) for s in batch]
    chosen = select.lowest(eligible, jnp.asarray(table)[index])
    chosen_units.update({s.name: c for s, c in zip(batch, chosen, strict=True)})
  return chosen_units


def verified(
  sites: Sequence[Site],
  candidates: Mapping[str, jax.Array],
  ranked: Mapping[str, jax.Array],
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
      score = jnp.where(is_candidate, ranked[n], jnp.inf)
      chosen[n] = select.lowest([score], k)[0] & is_candidate
    return chosen

  def fails(trial):
    clear = {
      name: site.expand(units, name, leaves[name].ndim)
      for site in sites
      for units in [share(trial)[site.name]]
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


def _within_pattern(score: jax.Array, rule: Rule) -> jax.Array:
  """Moves to infinity the n highest of each m neighbours, for rule "n:m"."""
  if rule.pattern_nm is None:
    return score
  n, m = rule.pattern_nm
  *lead, rows, columns = score.shape
  groups = score.reshape(*lead, rows // m, m, columns)
  order = jnp.argsort(jnp.argsort(groups, axis=-2), axis=-2)
  return jnp.where(order < m - n, groups, jnp.inf).reshape(score.shape)
