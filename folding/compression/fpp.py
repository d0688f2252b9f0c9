"""Forward Propagation Pruning as an optax transform: freeze, then zero."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from folding import paths
from folding.compression import scores as scores_lib
from folding.compression import suspects as suspects_lib
from folding.compression.rules import Rule, make_sites, pack, unpack


class FPPState(NamedTuple):
  """State of `fpp`.

  Attributes:
    step: int32[], updates applied.
    observed: int32[], updates that came with statistics.
    suspected: {site: uint8[max(patience, 1), ..., units / 8]}, packed bits.
      Plane a says which units were suspected at each of the last a + 1 checks;
      those of plane 0 are not trainable: zero if their value is, else frozen.
    averages: {parameter: float32}, running averages behind the score.
    inner: State of the wrapped optimizer.
  """

  step: jax.Array
  observed: jax.Array
  suspected: dict[str, jax.Array]
  averages: dict[str, jax.Array]
  inner: optax.OptState


def fpp(
  inner: optax.GradientTransformation,
  rules: Sequence[Rule],
  *,
  begin: int,
  end: int,
  every: int,
  patience: int = 1,
  score: str = "relative",
  decay: float = 0.9,
  tolerance: float | None = None,
  seed: int = 0,
  removed: Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that suspected parameters freeze, then become zero.

  At the steps begin, begin + every, ... up to end (counted from 0) the lowest
  q = target (1 - (1 - t)^3) of the units of each rule are suspected, t growing
  from 0 to 1. Suspects freeze, others thaw; what has stayed suspected for
  `patience` further checks becomes exactly 0.0 for good, and so do all
  suspects of the last check, after which nothing changes any more (healing).

  A frozen element keeps its value bit for bit whatever the inner optimizer
  does (momentum and weight decay included), and its gradient is 0 to the inner
  optimizer, so a clip by norm in there counts trainable elements alone.
  Nothing may follow this transform in a chain. Averages of the parameters that
  an optimizer keeps (schedule-free ones, say) are not zeroed.

  `update` takes, besides params, which it needs:
    stats: {parameter path: mean square of its input}, from
      `folding.observe`; for the scores "relative" and "activation", at
      least at every check.
    value, value_fn: loss and function from params to loss, as optax's line
      searches take them; `value_fn` is needed when `tolerance` is set, and then
      gets the params that this transform sees, so all unless it is in another
      that passes on a part.
    is_due: Whether this is a step with a check, where the caller knows that
      when the program is made, which makes it smaller; None: as `begin`, `end`
      and `every` say.

  Args:
    inner: The optimizer to wrap.
    rules: What to prune; parameters without a rule just train.
    begin: First step with a check; there q is 0 (unless it is the only check)
      and a full batch of statistics is seen.
    end: Last step at which a check may fall.
    every: Steps between checks.
    patience: Further checks a unit stays suspected before it is zeroed; 0
      zeroes at once, which is gradual pruning without the freezing stage.
    score: "relative", "activation", "magnitude", "saliency", "movement" or "random", for rules without one of their own; see
      `folding.compression.scores`.
    decay: Of the running averages, per observation.
    tolerance: If set, candidates for zero are verified by forward propagation:
      only as many are zeroed (all, a half, a quarter, ...) as keep the loss
      from rising by more than this share of it; the rest become trainable.
    seed: For score "random".
    removed: {parameter that a rule matches: zeroed units that were taken out
      of it, as by `folding.shrink`}; they count towards the target.

  Returns:
    A transform with state `FPPState`.

  Raises:
    ValueError: at once, for options out of range; from init, where a rule does
      not fit the parameters.

  Example:
    >>> params = {"w": jnp.array([[0.1, -2.0], [3.0, 0.2]])}
    >>> tx = fpp(optax.sgd(0.1), [Rule("w", 0.5)], begin=0, end=2, every=1,
    ...          score="magnitude")
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...   updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> [[round(x, 1) for x in row] for row in params["w"].tolist()]
    [[0.0, -2.3], [2.7, 0.0]]

  References: Belhaouari and Kraidia 2025, doi 10.1038/s41598-025-92586-5, of
    whose method this is our reading; the cubic ramp is of Zhu and Gupta 2017.
  """
  _check_options(
    *(begin, end, every, patience, decay, tolerance),
    [score, *(rule.score for rule in rules if rule.score is not None)],
  )
  rules = [dataclasses.replace(r, score=r.score or score) for r in rules]
  extra_inner = optax.with_extra_args_support(inner)
  num_checks = (end - begin) // every + 1
  last_check = begin + (num_checks - 1) * every
  ramp = 1 - (1 - np.arange(num_checks) / max(num_checks - 1, 1)) ** 3
  ramp[-1] = 1.0

  def init_fn(params):
    leaves = paths.flatten(params)
    suspected, averages = {}, {}
    sites = make_sites(rules, params)
    suspects_lib.check_sites(sites, removed or {})
    kinds = suspects_lib.kinds(sites, rules)
    for site in sites:
      *lead, units = site.shape
      planes = (max(patience, 1), *lead, -(-units // 8))
      suspected[site.name] = jnp.zeros(planes, jnp.uint8)
      for name in site.members:
        average = scores_lib.init_average(kinds[name], leaves[name])
        if average is not None:
          averages[name] = average
    return FPPState(
      step=jnp.zeros([], jnp.int32),
      observed=jnp.zeros([], jnp.int32),
      suspected=suspected,
      averages=averages,
      inner=extra_inner.init(params),
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    stats=None,
    value=None,
    value_fn=None,
    is_due=None,
    **kw,
  ):
    if params is None:
      raise ValueError("fpp needs `params`; pass them to update()")
    if tolerance is not None and value_fn is None:
      raise ValueError("fpp with a tolerance needs `value_fn` in update()")
    sites = make_sites(rules, params)
    leaves = paths.flatten(params)
    grads = paths.flatten(updates)
    if set(grads) != set(leaves):
      raise ValueError("updates and params are trees of different structure")
    for name, leaf in leaves.items():
      sharding = jax.typeof(leaf).sharding
      if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        raise ValueError(
          f"{name!r} is split over an explicit axis of a mesh; fpp leaves sharding "
          "to the compiler: make the mesh with axis_types=(AxisType.Auto, ...)"
        )
    kinds = suspects_lib.kinds(sites, rules)
    averages, observed = scores_lib.observe(
      *(state.averages, state.observed, kinds, decay),
      *(leaves, grads, stats or {}),
    )

    def check():
      index = (state.step - begin) // every
      return _check(
        *(state.suspected, averages, kinds, index),
        *(leaves, params, value, value_fn, sites),
      )

    def no_check():
      zero = {name: jnp.zeros_like(b[0]) for name, b in state.suspected.items()}
      return state.suspected, averages, zero

    if is_due is None:
      is_due = (
        (state.step >= begin)
        & (state.step <= last_check)
        & ((state.step - begin) % every == 0)
      )
      suspected, averages, zero = jax.lax.cond(is_due, check, no_check)
    else:
      suspected, averages, zero = check() if is_due else no_check()

    stop = suspects_lib.member_masks(
      sites, {n: b[0] for n, b in suspected.items()}, leaves
    )
    clear = suspects_lib.member_masks(sites, zero, leaves)

    def stopped(name, g):
      return jnp.where(stop[name], jnp.zeros_like(g), g) if name in stop else g

    def held(name, u, p):
      if name not in stop:
        return u
      pinned = jnp.where(clear[name], -p, jnp.zeros_like(p))
      return jnp.where(stop[name], pinned, u)

    updates = paths.map_named(stopped, updates)
    updates, inner_state = extra_inner.update(
      updates,
      state.inner,
      params,
      value=value,
      value_fn=value_fn,
      **({} if stats is None else {"stats": stats}),  # line searches refuse it
      **kw,
    )
    updates = paths.map_named(held, updates, params)
    step = jnp.asarray(optax.safe_increment(state.step))
    return updates, FPPState(step, observed, suspected, averages, inner_state)

  def _check(
    suspected, averages, kinds, index, leaves, params, value, value_fn, sites
  ):
    """Returns the new suspected planes, averages, and packed units to zero."""
    planes, candidates = {}, {}
    for first, site in enumerate(sites):
      bits = {site.name: suspected[site.name]}
      choose = functools.partial(
        suspects_lib.choose,
        *([site], rules, bits, averages, leaves, index),
        first=first,
        seed=seed,
        ramp=ramp,
        patience=patience,
        removed=removed,
      )
      # Always true; but what is stored for one choice is freed after it.
      found = jax.lax.cond(
        index >= 0,
        choose,
        lambda bits=bits: (bits, {n: b[0] for n, b in bits.items()}),
      )
      planes |= found[0]
      candidates |= found[1]
    zero = candidates
    if tolerance is not None:
      zero = suspects_lib.verified(
        sites,
        {s.name: unpack(candidates[s.name], s.shape[-1]) for s in sites},
        suspects_lib.unit_scores(sites, rules, leaves, averages, seed),
        leaves,
        params,
        value,
        value_fn,
        tolerance,
      )
      zero = {n: pack(z) for n, z in zero.items()}
      planes = {
        n: p & (zero[n] | ~candidates[n])[None] for n, p in planes.items()
      }
    return planes, averages, zero

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fpp_counts(
  rules: Sequence[Rule], state: FPPState, params: Any
) -> dict[str, jax.Array]:
  """Counts elements of the parameters that the rules select.

  Returns:
    {"selected", "frozen", "zero"}: float32[] each (a count above 2^24 is
    rounded); the rest of the selected are trainable.
  """
  leaves = paths.flatten(params)
  sites = make_sites(rules, params)
  stop = suspects_lib.member_masks(
    sites, {n: b[0] for n, b in state.suspected.items()}, leaves
  )
  selected = sum(leaves[n].size for n in stop)
  zero = jnp.float32(0)
  stopped = jnp.float32(0)
  for name, is_stopped in stop.items():
    w = leaves[name]
    is_stopped = jnp.broadcast_to(is_stopped, w.shape)
    stopped += jnp.sum(is_stopped, dtype=jnp.float32)
    zero += jnp.sum(is_stopped & (w == 0), dtype=jnp.float32)
  return {
    "selected": jnp.float32(selected),
    "frozen": stopped - zero,
    "zero": zero,
  }


def _check_options(
  begin, end, every, patience, decay, tolerance, scores
) -> None:
  def require(condition: bool, message: str) -> None:
    if not condition:
      raise ValueError(f"fpp: {message}")

  whole = {"begin": begin, "end": end, "every": every, "patience": patience}
  for name, number in whole.items():
    require(
      isinstance(number, int | np.integer),
      f"{name} is a whole number; it is {number!r}",
    )
  require(0 <= begin <= end, f"begin {begin} to end {end} is no range of steps")
  require(every >= 1, f"every must be at least 1; it is {every}")
  require(patience >= 0, f"patience must be at least 0; it is {patience}")
  for score in scores:
    require(
      score in scores_lib.SCORES,
      f"score must be one of {', '.join(scores_lib.SCORES)}; it is {score!r}",
    )
  require(0 <= decay < 1, f"decay must be in [0, 1); it is {decay}")
  require(
    tolerance is None or tolerance >= 0,
    f"tolerance must be at least 0; it is {tolerance}",
  )
