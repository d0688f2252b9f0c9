"""Forward Propagation Pruning as an optax transform: freeze, then zero.

One mask update does this for every site:

  1. Score the units; `threshold.lowest` chooses the lowest share of them.
  2. Freeze the chosen units and release all others.
  3. Zero the units that have stayed frozen for `patience` further updates,
     at the last update all of them.
  4. With a tolerance, try the zeros in a forward pass first, and zero only as
     many as keep the loss.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from folding import paths
from folding.compression import checks, threshold
from folding.compression.scores import Score, get_score
from folding.compression.sites import (
  Rule,
  Site,
  as_rules,
  axes_like,
  make_sites,
  pack,
  stacking_axis,
  unpack,
)

_lowest = jax.jit(threshold.lowest)  # traced once for sites of the same shape
_TRIALS = 5  # of verification: all candidates, a half, ... a sixteenth
_UNDONE = (
  "fpp: pruned units are not zero any more. Nothing may follow fpp in a chain, "
  "or change the parameters after it: write fpp(optax.chain(...)), not "
  "optax.chain(fpp(...), ...)"
)
_NO_STATE = "fpp: the state must be an FPPState; it is a {}"
_UNRANKED = (
  "fpp: nothing is pruned in {}, where no score could be computed so far: "
  "statistics were negative or not finite, or gradients were 0 or not finite"
)


class FPPState(NamedTuple):
  """State of `fpp`.

  Attributes:
    step: int32[], updates so far.
    observed: int32[], updates so far that came with statistics.
    suspected: {site: uint8[max(patience, 1), ..., units / 8]}, packed mask bits.
      Plane a has the units that each of the last a + 1 mask updates has chosen.
      The units of plane 0 are not trainable: pruned if their value is zero,
      otherwise frozen.
    zeroed: int32[], units that were zero after the last mask update.
    averages: {parameter: float32}, moving averages of the scores: per input by
      statistics; per unit by gradients, under the path that the rule matches.
    inner: State of the wrapped optimizer.
  """

  step: jax.Array
  observed: jax.Array
  suspected: dict[str, jax.Array]
  zeroed: jax.Array
  averages: dict[str, jax.Array]
  inner: optax.OptState

  @property
  def mask_bits(self) -> dict[str, jax.Array]:
    """{site: uint8[..., units / 8]}, bits of units that are not trainable."""
    return {name: planes[0] for name, planes in self.suspected.items()}


def fpp(
  inner: optax.GradientTransformation,
  rules: Rule | Iterable[Rule],
  *,
  begin: int,
  end: int,
  every: int,
  patience: int = 1,
  score: str | Score = "relative",
  decay: float = 0.9,
  tolerance: float | None = None,
  seed: int = 0,
  removed: Mapping[str, int] | None = None,
  warn: bool = True,
  debug: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it freezes, then zeroes parameters.

  Nothing may follow this transform in a chain: `optax.chain(fpp(...), clip)`
  undoes the zeros. Clip, scale and decay inside `inner`. The first mask update
  that finds undone zeros warns, and `fpp_counts` counts them.

  The masks are updated at the steps begin, begin + every, ... up to end, counted
  from 0. Update t of T chooses the lowest share target (1 - (1 - t/T)^3) of the
  units of each parameter. Chosen units freeze; all others train. A unit that has
  stayed frozen for `patience` further updates becomes exactly 0.0 for good, and
  so do all chosen units of the last update. After that the masks are fixed.
  Counts are rounded down: 0.1 of 3 neurons is none. A loop that ends before the
  last update misses the target.

  A frozen element keeps its value bit for bit, whatever the inner optimizer does
  (momentum, weight decay). Its gradient is 0 to the inner optimizer, so clipping
  by the global norm counts trainable elements only. Averages of the parameters
  that an optimizer keeps, such as schedule-free ones, are not zeroed.

  Gradients that are not finite, and statistics that are negative or not finite,
  change no score. A site without any valid evidence so far, or whose averaged
  gradients are all 0, has no ranking: its masks stay as they are, and the first
  mask update that should choose some of its units warns.

  `update` needs `params`. It also takes:

  - `stats`: {parameter path: mean square of its input}, from `folding.observe`.
    The scores "relative" and "activation" need it for all parameters that they
    rank, except biases and other vectors, whose input is 1. Only a step with
    `is_due=False` may leave it out. Statistics of stacked layers
    (`Rule.layers`) have the layer as their first axis.
  - `value`, `value_fn`: The loss, and a function from params to the loss, as
    for the line searches of optax. A `tolerance` needs `value_fn`. It gets the
    params that this transform sees.
  - `is_due`: Static bool: does this step update the masks? It removes a
    `lax.cond` from the compiled step. None: derived from the step counter.

  Args:
    inner: The optimizer to wrap.
    rules: What to prune, one rule or several. Parameters without a rule train
      as usual.
    begin: First step with a mask update. Its share is 0, unless it is the only
      one.
    end: Last step that may update the masks.
    every: Steps between mask updates.
    patience: Further mask updates that a unit stays frozen before it is zeroed.
      0 zeroes immediately: gradual pruning without freezing.
    score: Score of rules without one of their own: a name in
      `folding.compression.scores.SCORES`, such as "saliency", or a `Score`.
    decay: Decay of the moving averages per update, in [0, 1).
    tolerance: If set, zeros are verified by forward propagation: of the
      candidates, only as many are zeroed (all, a half, a quarter, ...) as raise
      the loss by at most this fraction. The others train again.
    seed: Seed of the score "random".
    removed: {parameter that a rule matches: pruned units that are no longer in
      it, as after `folding.shrink`}. They count towards the target. Of stacked
      layers (`Rule.layers`) it is their number in each layer.
    warn: Whether a mask update warns, once, if zeros were undone or if a site
      has no ranking. It does so by a callback to the host, which only runs in
      these cases. JAX keeps no program with callbacks in its compilation cache
      on disk, and exports none: then set False, and look at `fpp_counts`.
    debug: If set, a mask update fails a `checkify.check` if a site has no ranking
      or zeros were undone. The step must then be inside `checkify.checkify` or
      `chex.chexify`.

  Returns:
    A transform with the state `FPPState`.

  Raises:
    ValueError: an option is out of range or of another type; from `init`: a
      rule does not fit the parameters; from `update`: an argument is missing or
      does not fit.

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

  References: Belhaouari and Kraidia 2025, doi 10.1038/s41598-025-92586-5; this
    is our reading of their method. The ramp is that of Zhu and Gupta 2017.
  """
  try:
    rules = as_rules(rules)
    score = get_score(score)
    scores = [
      get_score(score if rule.score is None else rule.score) for rule in rules
    ]
  except ValueError as error:
    raise ValueError(f"fpp: {error}") from None
  made = _FPP(
    inner=inner,
    rules=rules,
    scores=scores,
    begin=begin,
    end=end,
    every=every,
    patience=patience,
    decay=decay,
    tolerance=tolerance,
    seed=seed,
    removed={} if removed is None else removed,
    warn=warn,
    debug=debug,
  )
  return optax.GradientTransformationExtraArgs(made.init, made.update)


@dataclasses.dataclass(frozen=True)
class _FPP:
  """The arguments of `fpp`, checked, and the functions of the transform.

  `scores` has the score of each rule.
  """

  inner: optax.GradientTransformation
  rules: Sequence[Rule]
  scores: Sequence[Score]
  begin: int
  end: int
  every: int
  patience: int
  decay: float
  tolerance: float | None
  seed: int
  removed: Mapping[str, int]
  warn: bool
  debug: bool
  told: set[str] = dataclasses.field(default_factory=set)

  def __post_init__(self):
    is_whole = checks.is_whole
    is_optimizer = all(
      callable(getattr(self.inner, name, None)) for name in ("init", "update")
    )
    is_range = is_whole(self.begin, 0) and is_whole(self.end, self.begin)
    is_every = is_whole(self.every, 1)
    # fmt: off
    checks.check("fpp", (
      ("inner", self.inner, is_optimizer,
       "an optimizer, such as optax.adamw(1e-3)"),
      ("begin", self.begin, is_whole(self.begin, 0),
       "a whole number of steps, such as int(0.1 * steps)"),
      ("end", self.end, is_range,
       f"a whole number of steps from begin {self.begin} on, below 2^31"),
      ("every", self.every, is_every, "a whole number of at least 1"),
      ("every", self.every, is_range and is_every and self.last < 10**6,
       "larger: there are more than 10^6 mask updates"),
      ("patience", self.patience, is_whole(self.patience, 0),
       "a whole number of at least 0"),
      ("decay", self.decay, checks.is_between(self.decay, 0, 1), "in [0, 1)"),
      ("tolerance", self.tolerance,
       self.tolerance is None or checks.is_between(self.tolerance, 0, math.inf),
       "None or at least 0"),
      ("seed", self.seed, is_whole(self.seed, 0, 2**32),
       "a whole number in [0, 2^32)"),
      ("removed", self.removed, _are_counts(self.removed), _COUNTS),
    ))
    # fmt: on

  @property
  def last(self) -> int:
    """Index of the last mask update."""
    return (self.end - self.begin) // self.every

  def is_due(self, step: jax.Array) -> jax.Array:
    """Returns whether a step updates the masks."""
    since = step - self.begin
    return (since >= 0) & (since % self.every == 0) & (step <= self.end)

  def count(self, site: Site, index: jax.Array) -> jax.Array:
    """Returns int32[], how many units of a site a mask update chooses.

    Removed units count as chosen. The cubic ramp ends at the target.
    """
    ramp = 1 - (1 - np.arange(self.last + 1) / max(self.last, 1)) ** 3
    ramp[-1] = 1.0
    return jnp.asarray(_counts(site, self.rules, self.removed, ramp))[index]

  def init(self, params: Any) -> FPPState:
    """Returns the first state."""
    leaves = paths.flatten(params)
    sites = make_sites(self.rules, params)
    _check_sites(sites, self.removed)
    if self.warn:
      _warn_of_stacks(sites, leaves)
    suspected, averages = _placed_like(
      functools.partial(self.init_sites, sites), leaves
    )
    return FPPState(
      step=jnp.zeros([], jnp.int32),
      observed=jnp.zeros([], jnp.int32),
      suspected=suspected,
      zeroed=jnp.zeros([], jnp.int32),
      averages=averages,
      inner=self.inner.init(params),
    )

  def init_sites(
    self, sites: Sequence[Site], leaves: Mapping[str, Any]
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns `suspected` and `averages` of the first state."""
    suspected, averages = {}, {}
    for site in sites:
      score = self.scores[site.rule]

      def start(own, site=site, score=score):
        bits = pack(jnp.zeros(site.shape, bool))
        return bits, score.first_averages(site, own)

      bits, first = site.per_layer(start, site.pick(leaves))
      suspected[site.name] = jnp.stack([bits] * max(self.patience, 1))
      averages |= first
    return suspected, averages

  def update(
    self, updates, state, params=None, *, stats=None, value=None, **options
  ):
    """Returns updates and the new state; see `fpp` for the arguments."""
    if params is None:
      raise ValueError("fpp needs `params`; pass them to update()")
    if not isinstance(state, FPPState):
      raise ValueError(_NO_STATE.format(type(state).__name__))
    return _on_auto_axes(
      functools.partial(self._update, **options),
      (updates, state, params, stats, value),
      out=(updates, state),
    )

  def _update(
    self,
    updates,
    state,
    params,
    stats,
    value,
    *,
    value_fn=None,
    is_due=None,
    **kw,
  ):
    """Returns updates and the new state; mesh axes are in automatic mode."""
    if self.tolerance is not None and value_fn is None:
      raise ValueError("fpp with a tolerance needs `value_fn` in update()")
    sites = make_sites(self.rules, params)
    leaves, grads = paths.flatten(params), paths.flatten(updates)
    if set(grads) != set(leaves):
      raise ValueError("updates and params are trees of different structure")
    like = jax.eval_shape(functools.partial(self.init_sites, sites), leaves)
    _check_state(state, *like)
    scored = [(site, self.scores[site.rule]) for site in sites]
    if stats or is_due is None or is_due:
      _check_statistics(scored, leaves, stats or {})
    evidence = {"gradients": grads, "statistics": stats or {}}
    state = _observe(scored, state, leaves, evidence, decay=self.decay)
    suspected, zero, zeroed = self._next_masks(
      sites, state, params, value, value_fn, is_due
    )
    state = state._replace(suspected=suspected, zeroed=zeroed)
    is_held = member_masks(sites, state.mask_bits, leaves)
    is_cleared = member_masks(sites, zero, leaves)

    def stop(name, g):
      if name not in is_held:
        return g
      return jnp.where(is_held[name], jnp.zeros_like(g), g)

    def hold(name, u, p):
      if name not in is_held:
        return u
      pinned = jnp.where(is_cleared[name], -p, jnp.zeros_like(p))
      return jnp.where(is_held[name], pinned, u)

    if _states(state.inner):  # line searches refuse unknown arguments
      kw["stats"] = stats
    inner = optax.with_extra_args_support(self.inner)
    updates, inner_state = inner.update(
      paths.map_named(stop, updates),
      state.inner,
      params,
      value=value,
      value_fn=value_fn,
      **kw,
    )
    updates = paths.map_named(hold, updates, params)
    step = jnp.asarray(optax.safe_increment(state.step))
    return updates, state._replace(step=step, inner=inner_state)

  def _next_masks(self, sites, state, params, value, value_fn, is_due):
    """Returns `_update_masks` if an update is due, otherwise the present masks."""

    def update_masks():
      return self._update_masks(sites, state, params, value, value_fn)

    def keep_masks():
      zero = jax.tree.map(jnp.zeros_like, state.mask_bits)
      return state.suspected, zero, state.zeroed

    if is_due is not None:
      return update_masks() if is_due else keep_masks()
    masks = jax.lax.cond(self.is_due(state.step), update_masks, keep_masks)
    if self.warn:  # no later mask update would find these zeros
      after_last = self.begin + self.last * self.every + 1
      leaves = paths.flatten(params)
      pruned = functools.partial(_num_pruned, sites, state.mask_bits, leaves)
      jax.lax.cond(
        state.step == after_last,
        lambda: self.tell(pruned() < state.zeroed),
        lambda: None,
      )
    return masks

  def _update_masks(self, sites, state, params, value, value_fn):
    """Returns new masks, units to zero, and how many units are zero then."""
    leaves = paths.flatten(params)
    index = (state.step - self.begin) // self.every
    planes, zero, pruned, is_ranked = {}, {}, jnp.int32(0), {}
    for n, site in enumerate(sites):
      # Computing all layers at once would take five times the scratch memory.
      new, zero[site.name], count, each = site.per_layer(
        functools.partial(self._choose_layer, site, index),
        list(jnp.unstack(state.suspected[site.name])),
        *self._evidence(n, site, state, leaves),
        in_turn=True,
      )
      is_ranked[site.name] = each.all()
      if self.debug:
        checkify.check(
          is_ranked[site.name],
          f"fpp: nothing finite but 0 was observed for {site.name!r}",
        )
      planes[site.name] = jnp.stack(new)
      pruned += count.sum(dtype=jnp.int32)
    if self.warn:
      missing = {
        site.name: (self.count(site, index) > 0) & ~is_ranked[site.name]
        for site in sites
      }
      self.tell(pruned < state.zeroed, missing)
    if self.debug:
      checkify.check(
        pruned >= state.zeroed,
        "fpp: {n} pruned units are not zero any more; nothing may follow fpp "
        "in a chain",
        n=state.zeroed - pruned,
      )
    if self.tolerance is not None:
      scores = {
        site.name: site.per_layer(
          functools.partial(self.scores[site.rule].score_site, site),
          *self._evidence(n, site, state, leaves),
        )
        for n, site in enumerate(sites)
      }
      loss = value_fn(params) if value is None else value
      trial = _Trial(sites, zero, scores, params, value_fn)
      kept = trial.most_within(loss + self.tolerance * jnp.abs(loss))
      for name in planes:  # the other candidates train again
        planes[name] &= (kept[name] | ~zero[name])[None]
      zero = kept
    return planes, zero, pruned + _count_bits(zero)

  def _evidence(self, n, site, state, leaves):
    """Returns the arguments of the scores of site n, for `per_layer`."""
    key = jax.random.fold_in(jax.random.key(self.seed), n)
    if site.layers is not None:
      key = jax.random.split(key, leaves[site.name].shape[site.layers])
    return site.pick(leaves), site.pick(state.averages), key

  def _choose_layer(self, site, index, old, *evidence):
    """Returns `_choose` of one layer of a site, and whether it has a ranking.

    Without a ranking its masks stay as they are.

    Args:
      site: The site.
      index: int32[], index of the mask update.
      old: Packed planes, see `FPPState.suspected`.
      *evidence: From `_evidence`.
    """
    own, averages, _ = evidence
    score = self.scores[site.rule]
    is_ranked = _has_ranking(site, score, own, averages)
    # This `cond`, whose condition XLA does not know, frees the temporaries of a
    # site before the next one: four matrices of 16 MiB take 51 MiB of scratch
    # memory on XLA:CPU, and 113 MiB without it.
    new = jax.lax.cond(
      is_ranked & (index >= 0),
      lambda: _choose(
        score.score_site(site, *evidence),
        unpack(jnp.stack(old), site.shape[-1]),
        site.is_zero(own),
        self.count(site, index),
        is_last=index == self.last,
        patience=self.patience,
      ),
      lambda: (old, jnp.zeros_like(old[0]), _pruned(site, old[0], own)),
    )
    return *new, is_ranked

  def tell(
    self, is_undone: jax.Array, missing: Mapping[str, jax.Array] | None = None
  ) -> None:
    """Warns, once each, of undone zeros and of sites without a ranking.

    Args:
      is_undone: bool[].
      missing: {site: bool[], whether it has no ranking but should}.
    """
    flags = is_undone, missing or {}

    def warn(is_undone, missing):
      names = [name for name, is_missing in missing.items() if is_missing]
      for holds, kind, message in (
        (is_undone, "undone", _UNDONE),
        (names, "unranked", _UNRANKED.format(", ".join(names))),
      ):
        if holds and kind not in self.told:  # `vmap` runs both sides of `cond`
          self.told.add(kind)
          warnings.warn(message, stacklevel=2)

    jax.lax.cond(
      jnp.stack(jax.tree.leaves(flags)).any(),
      lambda: jax.debug.callback(warn, *flags),
      lambda: None,
    )


def fpp_counts(
  rules: Rule | Sequence[Rule],
  state: optax.OptState,
  params: Any,
  removed: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
  """Counts elements of the parameters that the rules select.

  Args:
    rules: The rules that `fpp` was given.
    state: Its state, or that of transforms around one `fpp`, such as a chain.
    params: The parameters.
    removed: As given to `fpp`. Removed units count as selected and zero.

  Returns:
    {"selected", "frozen", "zero", "undone", "target", "done"}, float32[] each;
    counts above 2^24 are rounded.

    - "zero" counts pruned elements only, "frozen" those that are held at another
      value. The rest of the selected elements are trainable.
    - "undone" counts pruned units that are not zero any more, because something
      follows `fpp` in a chain or changes the parameters after it. It should be 0.
    - "target" is "zero" after the last mask update, if nothing goes wrong.
    - "done" is 1 if each parameter has reached its target, otherwise 0. A loop
      that ends before the last mask update does not reach it; nor may a run with
      a tolerance.

  Raises:
    ValueError: the state has no `fpp` or several, or is of other rules or parameters.
  """
  found = _states(state)
  if len(found) != 1:
    raise ValueError(
      f"fpp_counts: the state must have one FPPState; {type(state).__name__} has "
      f"{len(found)}"
    )
  [state] = found
  rules, removed = as_rules(rules), {} if removed is None else removed
  checks.check(
    "fpp_counts", [("removed", removed, _are_counts(removed), _COUNTS)]
  )

  def count(state, params):
    leaves = paths.flatten(params)
    sites = make_sites(rules, params)
    _check_sites(sites, removed)
    _check_masks(state, sites, leaves)
    is_held = member_masks(sites, state.mask_bits, leaves)
    zero = held = jnp.float32(0)
    for name, bits in is_held.items():
      bits = jnp.broadcast_to(bits, leaves[name].shape)
      held += jnp.sum(bits, dtype=jnp.float32)
      zero += jnp.sum(bits & (leaves[name] == 0), dtype=jnp.float32)
    selected = sum(leaves[name].size for name in is_held)
    gone = target = pruned = 0
    is_done = jnp.array(True)
    for site in sites:
      own = site.pick(leaves)
      units = site.per_layer(
        functools.partial(_pruned, site), state.mask_bits[site.name], own
      )
      wanted = int(_counts(site, rules, removed, 1.0))
      # Elements of a unit; of stacked layers, in all of them.
      size = sum(w.size for w in own.values()) // math.prod(site.shape)
      gone += removed.get(site.name, 0) * size
      target += wanted * size
      is_done &= jnp.all(units >= wanted)
      pruned += units.sum()
    return {
      "selected": jnp.float32(selected + gone),
      "frozen": held - zero,
      "zero": zero + gone,
      "undone": jnp.maximum(state.zeroed - pruned, 0).astype(jnp.float32),
      "target": jnp.float32(target + gone),
      "done": is_done.astype(jnp.float32),
    }

  names = ("selected", "frozen", "zero", "undone", "target", "done")
  # Indexed, as an `nnx.Optimizer` holds variables.
  scalars = dict.fromkeys(names, state.step[...])
  return _on_auto_axes(count, (state, params), out=scalars)


def member_masks(
  sites: Sequence[Site],
  packed: Mapping[str, jax.Array],
  leaves: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Returns {parameter: bools that broadcast against it}.

  Args:
    sites: From `make_sites`.
    packed: {site: packed bits, one per unit}; there may be more sites.
    leaves: {path: parameter}.
  """
  masks = {}
  for site in sites:

    def expand(packed, own, site=site):
      units = unpack(packed, site.shape[-1])
      return {name: site.expand(units, name, w.ndim) for name, w in own.items()}

    masks |= site.per_layer(expand, packed[site.name], site.pick(leaves))
  return masks


def _counts(
  site: Site, rules: Sequence[Rule], removed: Mapping[str, int], ramp: Any
) -> np.ndarray | np.int32:
  """Returns int32, how many units of a site are chosen at shares of its target.

  They are computed in float64 on the host, so they are exact and never above the
  target; the 1e-6 is for products such as 0.29 * 100 = 28.999999999999996.
  """
  gone = removed.get(site.name, 0)
  units = ramp * rules[site.rule].target * (gone + math.prod(site.shape))
  return np.maximum(np.floor(units + 1e-6) - gone, 0).astype(np.int32)


def _pruned(
  site: Site, packed: jax.Array, own: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns int32[], how many units of one layer are frozen at zero."""
  is_pruned = unpack(packed, site.shape[-1]) & site.is_zero(own)
  return jnp.sum(is_pruned, dtype=jnp.int32)


def _num_pruned(
  sites: Sequence[Site],
  packed: Mapping[str, jax.Array],
  leaves: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns int32[], how many units of all sites are frozen at zero."""
  counts = (
    site.per_layer(
      functools.partial(_pruned, site), packed[site.name], site.pick(leaves)
    )
    for site in sites
  )
  return sum((jnp.sum(count) for count in counts), jnp.int32(0))


def _count_bits(packed: Mapping[str, jax.Array]) -> jax.Array:
  """Returns int32[], how many bits are set, modulo 2^32."""
  return sum(
    (jnp.sum(jnp.bitwise_count(x), dtype=jnp.int32) for x in packed.values()),
    jnp.int32(0),
  )


def _needs_evidence(score: Score, name: str, ndim: int) -> bool:
  """Returns whether a score ranks a parameter by what `update` gets.

  The input of a bias, or of another vector, is 1, so it needs no statistics.

  Args:
    score: The score.
    name: Path of the parameter.
    ndim: Number of its axes, without that of stacked layers.
  """
  if score.evidence != "statistics":
    return score.evidence is not None
  return ndim > 1 and name.rpartition("/")[2] != "bias"


def _states(state: Any) -> list[FPPState]:
  """Returns the outermost states of `fpp` in a state of optimizers."""

  def is_state(x):
    return isinstance(x, FPPState)

  return list(filter(is_state, jax.tree.leaves(state, is_leaf=is_state)))


def _has_ranking(
  site: Site,
  score: Score,
  own: Mapping[str, jax.Array],
  averages: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns bool[], whether there is evidence if a score needs it.

  Args:
    site: The site.
    score: Its score.
    own: {path: parameter}, the members of one layer.
    averages: {path: moving average}.
  """
  moved = [
    jnp.any(averages[name] != first)
    for name, first in score.first_averages(site, own).items()
    if _needs_evidence(score, name, own[name].ndim)
  ]
  return jnp.stack(moved).any() if moved else jnp.array(True)


def _check_statistics(
  scored: Sequence[tuple[Site, Score]],
  leaves: Mapping[str, jax.Array],
  stats: Mapping[str, jax.Array],
) -> None:
  """Raises ValueError if a parameter lacks the statistics of its score."""
  for site, score in scored:
    if score.evidence != "statistics":
      continue
    for name in site.members:
      ndim = leaves[name].ndim - (site.layers is not None)
      if name not in stats and _needs_evidence(score, name, ndim):
        raise ValueError(
          f"fpp: nothing observed for {name!r} (of {len(stats)} statistics). "
          "Either give its statistics: by folding.observe, with the class of the "
          f"layer {name.rpartition('/')[0]!r} in `dense` if it is your own and "
          "'observed': 0 in the variable_axes of nn.scan, or by "
          "folding.statistics; or choose score='magnitude' for its rule. A step "
          "without statistics has is_due=False"
        )


_COUNTS = "a dict of {parameter: units, at least 0}"


def _are_counts(removed: Any) -> bool:
  """Returns whether an argument is `_COUNTS`."""
  return isinstance(removed, Mapping) and all(
    checks.is_whole(count, 0) for count in removed.values()
  )


def _check_sites(sites: Sequence[Site], removed: Mapping[str, int]) -> None:
  """Raises ValueError for too many units, or `removed` of unknown sites."""
  names = [site.name for site in sites]
  for name in sorted(set(removed) - set(names)):
    raise ValueError(
      f"removed has {name!r}, which is not a site of the rules; there are "
      f"{', '.join(names)}"
    )
  for site in sites:
    size = removed.get(site.name, 0) + math.prod(site.shape)
    if size >= 2**31:
      raise ValueError(
        f"{site.name!r} has {size:,} units; fewer than 2^31 can be ranked: use "
        "rows or neurons"
      )


def _warn_of_stacks(sites: Sequence[Site], leaves: Mapping[str, Any]) -> None:
  """Warns of rules that rank the weights of several layers together."""
  for site in sites:
    shape = tuple(leaves[site.name].shape)
    if site.layers is None and site.is_by_weight and len(shape) > 2:
      axis = stacking_axis(site.name, leaves)
      if axis is not None:
        warnings.warn(
          f"fpp: axis {axis} of {site.name!r} {shape} seems to stack "
          f"{shape[axis]} layers, as nn.scan does. Its rule ranks all of them "
          "together, so that one layer may lose all of its weights; "
          f"Rule(..., layers={axis}) prunes each layer to the target",
          stacklevel=3,
        )


def _check_masks(
  state: FPPState, sites: Sequence[Site], leaves: Mapping[str, Any]
) -> None:
  """Raises ValueError if the mask bits of a state are not those of the sites."""
  found = {name: jnp.shape(x) for name, x in state.mask_bits.items()}
  for site in sites:

    def start(own, site=site):
      return pack(jnp.zeros(site.shape, bool))

    own = site.pick(leaves)
    like = jax.eval_shape(functools.partial(site.per_layer, start), own)
    if found.get(site.name) != like.shape:
      raise ValueError(
        f"fpp_counts: the state was made for other parameters or rules: "
        f"its mask of {site.name!r} has the shape {found.get(site.name)} "
        f"instead of {like.shape}"
      )


def _check_state(
  state: FPPState, suspected: Mapping[str, Any], averages: Mapping[str, Any]
) -> None:
  """Raises ValueError if arrays of a state have other shapes than `init` makes."""
  for kind, like in (("suspected", suspected), ("averages", averages)):
    found = {n: jnp.shape(x) for n, x in getattr(state, kind).items()}
    for name in sorted(set(found) | set(like)):
      expected = like[name].shape if name in like else None
      if found.get(name) != expected:
        raise ValueError(
          f"fpp: the state was made for other parameters, rules or options: its "
          f"{kind}[{name!r}] has the shape {found.get(name)} instead of "
          f"{expected}; call init() again, or restore the state that fits"
        )


def _on_auto_axes(
  function: Callable[..., Any], args: Sequence[Any], out: Any
) -> Any:
  """Returns function(*args), with all axes of the mesh in automatic mode.

  Args:
    function: Function of trees of arrays.
    args: Trees of arrays, perhaps on a mesh with explicit axes.
    out: Tree of arrays, or of shardings, with the structure and the shardings of
      the result.
  """

  def sharding_of(x):
    return x if isinstance(x, NamedSharding) else jax.typeof(x).sharding

  meshes = [sharding_of(x).mesh for x in jax.tree.leaves(args)]
  mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
  if mesh is None:
    return function(*args)
  placed = jax.tree.map(lambda x: NamedSharding(mesh, sharding_of(x).spec), out)
  return jax.sharding.auto_axes(function, out_sharding=placed)(*args)


def _placed_like(
  make: Callable[[Mapping[str, Any]], Any], leaves: Mapping[str, Any]
) -> Any:
  """Returns make(leaves), each array with the sharding of its parameter.

  Args:
    make: Function of `leaves`; the result is a tree of dicts with their names.
    leaves: {path: parameter}. On a mesh with automatic axes, a parameter that is
      traced does not show its sharding; then the compiler decides.
  """

  def sharding_of(x):
    if not isinstance(x, Tracer):
      return getattr(x, "sharding", None)
    explicit = jax.typeof(x).sharding
    is_explicit = AxisType.Explicit in explicit.mesh.axis_types
    return explicit if is_explicit else None

  def place(path, x):
    w = leaves[path[-1].key]
    sharding = sharding_of(w)
    if not isinstance(sharding, NamedSharding):
      return None
    spec, mesh = tuple(sharding.spec), sharding.mesh
    axes = axes_like(x.shape, w.shape, spec, mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*axes))

  like = jax.eval_shape(make, leaves)
  placed = jax.tree_util.tree_map_with_path(place, like)
  if None in jax.tree.leaves(placed, is_leaf=lambda x: x is None):
    return make(leaves)
  make = jax.jit(make, out_shardings=placed)
  return _on_auto_axes(make, (leaves,), out=placed)


def _observe(
  scored: Sequence[tuple[Site, Score]],
  state: FPPState,
  leaves: Mapping[str, jax.Array],
  evidence: Mapping[str, Mapping[str, jax.Array]],
  *,
  decay: float,
) -> FPPState:
  """Returns the state with the moving averages after a step.

  A step with a gradient or statistic that is not finite, or with a negative
  statistic, changes nothing: the optimizer may skip such a step. An average that
  would overflow stays as it is.

  Args:
    scored: The sites and their scores.
    state: The state before.
    leaves: {path: parameter}.
    evidence: {kind: {path: array}}, see `Score.evidence`.
    decay: See `fpp`.

  Raises:
    ValueError: a statistic does not fit its parameter.
  """
  averages, observed = dict(state.averages), state.observed
  if not averages:
    return state
  stats = evidence["statistics"]
  seen = [x for arrays in evidence.values() for x in arrays.values()]
  valid = [jnp.isfinite(x).all() for x in seen]
  valid += [(x >= 0).all() for x in stats.values()]
  is_valid = jnp.stack(valid).all()
  if stats and any(s.evidence == "statistics" for _, s in scored):
    observed = observed + is_valid.astype(observed.dtype)
  # Statistics: the plain mean first, then a decayed one, so it is unbiased.
  mean = 1 / jnp.maximum(observed, 1).astype(jnp.float32)
  weights = {
    "statistics": jnp.maximum(1 - decay, mean),
    "gradients": jnp.float32(1 - decay),
  }
  for site, score in scored:
    if score.evidence is None:
      continue
    seen = site.pick(evidence[score.evidence])
    move = functools.partial(
      score.next_averages, site, weight=weights[score.evidence]
    )
    try:
      if score.evidence == "statistics":
        seen = jax.tree.map(site.layers_placed, seen)
      new = site.per_layer(move, site.pick(averages), site.pick(leaves), seen)
    except ValueError as error:
      raise ValueError(f"fpp: {error}") from error
    for name, x in new.items():
      is_kept = is_valid & jnp.isfinite(x)
      averages[name] = jnp.where(is_kept, x, averages[name])
  return state._replace(averages=averages, observed=observed)


def _choose(
  scores: jax.Array,
  old: jax.Array,
  is_zero: jax.Array,
  count: jax.Array,
  *,
  is_last: jax.Array,
  patience: int,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Returns new masks of a site, or of one of its layers.

  Args:
    scores: float[*units].
    old: bool[planes, *units], see `FPPState.suspected`.
    is_zero: bool[*units], whether all elements of a unit are zero.
    count: int32[], units to choose.
    is_last: bool[], whether this is the last mask update.
    patience: See `fpp`.

  Returns:
    (list of new planes, units that may be zeroed, all packed; int32[], how many
    units were pruned before).
  """
  was_pruned = old[0] & is_zero
  # Pruned units stay chosen, whatever their score.
  chosen = _lowest(jnp.where(was_pruned, -jnp.inf, scores), count)
  has_waited = old[patience - 1] if patience else True
  candidates = chosen & ~was_pruned & (is_last | has_waited)
  planes = jnp.concatenate([chosen[None], old[:-1] & chosen[None]])
  return (
    list(pack(planes)),
    pack(candidates),
    jnp.sum(was_pruned, dtype=jnp.int32),
  )


class _Trial(NamedTuple):
  """A search for how many candidates can be zeroed.

  Attributes:
    sites: All sites.
    candidates: {site: packed bits, True at units that may be zeroed}.
    scores: {site: float scores of the units}.
    params: The parameters.
    value_fn: Function from params to the loss.
  """

  sites: Sequence[Site]
  candidates: Mapping[str, jax.Array]
  scores: Mapping[str, jax.Array]
  params: Any
  value_fn: Callable[[Any], jax.Array]

  def most_within(self, bound: jax.Array) -> dict[str, jax.Array]:
    """Returns as many candidates as can be zeroed with the loss within a bound.

    It tries all of them, then the half, the quarter, ... with the lowest scores of
    each site, and finally none. A loss that is NaN is above any bound.
    """
    trial = jax.lax.while_loop(
      lambda n: (n < _TRIALS) & ~(self._loss(n) <= bound),
      lambda n: n + 1,
      jnp.int32(0),
    )
    return self._share(trial)

  def _share(self, trial: jax.Array) -> dict[str, jax.Array]:
    fraction = jnp.where(trial < _TRIALS, 0.5**trial, 0.0)

    def lowest(packed, scores):
      bits = unpack(packed, scores.shape[-1])
      count = jnp.sum(bits, dtype=jnp.int32)
      k = jnp.floor(fraction * count).astype(jnp.int32)
      return pack(_lowest(jnp.where(bits, scores, jnp.inf), k) & bits)

    return {
      site.name: site.per_layer(
        lowest, self.candidates[site.name], self.scores[site.name]
      )
      for site in self.sites
    }

  def _loss(self, trial: jax.Array) -> jax.Array:
    leaves = paths.flatten(self.params)
    is_cleared = member_masks(self.sites, self._share(trial), leaves)

    def clear(name, w):
      return jnp.where(is_cleared[name], 0, w) if name in is_cleared else w

    return self.value_fn(paths.map_named(clear, self.params))
