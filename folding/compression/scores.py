"""Scores: the elements with the lowest are frozen first, then pruned.

A score is one object. To add one, make a `Score` and pass it to `folding.fpp` or
`folding.Rule`, or give it a name in `SCORES`.

With rms the root mean square of the input that a weight is multiplied by, and g
the gradient:

  magnitude   |w|
  activation  |w| rms (Sun et al. 2024, "Wanda")
  relative    (|w| / mean of its row + |w| / mean of its column) rms^(1/2)
  saliency    moving average of |w g|
  movement    moving average of -w g (Sanh et al. 2020)
  random      uniform, the same numbers at every mask update

`relative` is after RIA (Zhang et al. 2024, "Plug-and-Play"), which is for
trained models. RIA divides by sums, so that the longer axis counts less. A row
is the last axis, a column all other axes: in a kernel [D, H, K] each input has
one row per head, and a column is one channel over all heads and inputs.

A row or neuron has the root of the sum of its elements' squared scores; by
`movement`, which has signs, the sum. `saliency` and `movement` reduce first, then
average, so they keep one moving average per unit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

_TINY = 1e-12  # keeps the means of rows and columns of zeros above 0


@dataclasses.dataclass(frozen=True)
class Score:
  """How elements are ranked, as pure functions.

  Attributes:
    score: (w, average, key) -> float32 scores of the shape of w. `average` is
      the parameter's moving average, None if there is none; `key` is a PRNG key
      that is the same at every mask update. With `init`, the inputs are the
      leading axes of w, see `Rule.inputs`. Unused with `term`.
    term: (w, gradient) -> float32 of the shape of w. The score of a unit is the
      moving average of its terms, reduced over the unit at each step.
    init: (w) -> moving average of statistics at the start; w may be a shape and
      dtype. Statistics are the mean square of each input of the layer.
    update: (average, statistic, weight) -> moving average after a step, where
      the new value has this weight, a float32[] in (0, 1].
    is_signed: Whether a row or neuron has the sum over its elements. Otherwise
      it has the root of the sum of squares.
    for_units: Score that ranks rows and neurons; None: this score. Its moving
      average must be the same.
  """

  score: Callable[[jax.Array, Any, jax.Array], jax.Array] | None = None
  term: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  init: Callable[[Any], jax.Array] | None = None
  update: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
  is_signed: bool = False
  for_units: "Score | None" = None

  def __post_init__(self):
    if self.score is None and self.term is None:
      raise ValueError("a Score needs `score` or `term`; both are None")

  @property
  def evidence(self) -> Literal["statistics", "gradients"] | None:
    """What the moving averages get at each step; None: there are none."""
    if self.term is not None:
      return "gradients"
    return None if self.init is None else "statistics"

  def oriented(
    self, site: Any, leaves: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Returns {path: parameter} as this score takes them.

    A score by statistics takes the inputs as the leading axes.
    """
    if self.init is None:
      return dict(leaves)
    return {name: site.inputs_first(w) for name, w in leaves.items()}

  def first_averages(
    self, site: Any, leaves: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    """Returns {path: moving average at the start} of one layer of a site.

    Those of gradients have an entry per unit, under the path of the site. They
    have the axes of its parameter, of size 1 where a unit has several elements.
    """
    if self.term is not None:
      zeros = jnp.zeros(site.shape, jnp.float32)
      return {site.name: site.expand(zeros, site.name, leaves[site.name].ndim)}
    if self.init is None:
      return {}
    own = self.oriented(site, leaves)
    return {name: self.init(w) for name, w in own.items()}

  def next_averages(
    self,
    site: Any,
    averages: Mapping[str, jax.Array],
    leaves: Mapping[str, jax.Array],
    evidence: Mapping[str, jax.Array],
    weight: jax.Array,
  ) -> dict[str, jax.Array]:
    """Returns the moving averages of one layer of a site after a step.

    Args:
      site: `folding.compression.sites.Site`.
      averages: {path: moving average}.
      leaves: {path: parameter}.
      evidence: {path: gradient or statistic}; statistics may lack members.
      weight: float32[] in (0, 1], of the new value.

    Raises:
      ValueError: a statistic does not fit its parameter.
    """
    new = dict(averages)
    if self.term is not None:
      units = self._reduced(
        site, {name: self.term(w, evidence[name]) for name, w in leaves.items()}
      )
      old = averages[site.name]
      term = site.expand(units, site.name, old.ndim)
      new[site.name] = (1 - weight) * old + weight * term
    elif self.update is not None:
      for name, statistic in evidence.items():
        try:
          new[name] = self.update(averages[name], statistic, weight)
        except ValueError as error:
          raise ValueError(f"{name!r}: {error}") from error
    return new

  def score_site(
    self,
    site: Any,
    leaves: Mapping[str, jax.Array],
    averages: Mapping[str, jax.Array],
    key: jax.Array,
  ) -> jax.Array:
    """Returns float32 scores of the units of a site.

    Args:
      site: `folding.compression.sites.Site`.
      leaves: {path: parameter}.
      averages: {path: moving average}.
      key: PRNG key of this site.
    """
    if self.term is not None:
      return averages[site.name].reshape(site.shape)
    by = self if site.is_by_weight else self.for_units or self
    assert by.score is not None
    own = by.oriented(site, site.pick(leaves))
    elements = {
      name: by.score(w, averages.get(name), key) for name, w in own.items()
    }
    if by.init is not None:
      elements = {n: site.inputs_placed(x) for n, x in elements.items()}
    return by._reduced(site, elements)

  def _reduced(self, site: Any, elements: Mapping[str, jax.Array]) -> jax.Array:
    """Returns one value per unit from {path: one per element}."""
    if site.is_by_weight or self.is_signed:
      return site.reduce(elements)
    squares = {name: jnp.square(x) for name, x in elements.items()}
    return jnp.sqrt(site.reduce(squares))


def get_score(score: str | Score) -> Score:
  """Returns the score of a name; a `Score` is returned as it is.

  Raises:
    ValueError: there is no score of that name.
  """
  if isinstance(score, Score):
    return score
  if not isinstance(score, str) or score not in SCORES:
    raise ValueError(
      f"score must be one of {', '.join(SCORES)}; it is {score!r}"
    )
  return SCORES[score]


def _magnitude(w: jax.Array) -> jax.Array:
  return jnp.abs(w.astype(jnp.float32))


def _init_statistics(w: Any) -> jax.Array:
  """Returns -1 for each input: without statistics all inputs count alike."""
  return jnp.full(w.shape[:-1], -1, jnp.float32)


def _update_statistics(average, statistic, weight):
  """Moves the mean square of each input; the first statistic replaces the -1.

  Args:
    average: [*inputs], the shape of the parameter without its last axis.
    statistic: Mean squares. Their axes are the leading axes of `average`.
    weight: float32[].

  Raises:
    ValueError: the statistic has another shape than the inputs.
  """
  shape = statistic.shape
  is_prefix = shape == average.shape[: len(shape)]
  if not is_prefix or (average.ndim and not shape):
    raise ValueError(
      f"a statistic of shape {shape} does not fit the inputs of a parameter, "
      f"{average.shape}: it is the mean square of each input. For a kernel [out, "
      "in] set Rule(..., inputs=1)"
    )
  statistic = statistic.reshape(shape + (1,) * (average.ndim - len(shape)))
  statistic = jnp.broadcast_to(statistic, average.shape).astype(jnp.float32)
  moved = average + weight * (statistic - average)
  return jnp.where(average < 0, statistic, moved)


def _mean_square(average: jax.Array) -> jax.Array:
  """Returns [*inputs, 1]; 1 without statistics."""
  return jnp.where(average < 0, 1.0, average)[..., None]


def _activation(w, average, key):
  del key
  return _magnitude(w) * jnp.sqrt(_mean_square(average))


def _relative(w, average, key):
  del key
  size = _magnitude(w)
  row = jnp.mean(size, axis=-1, keepdims=True)
  axes = tuple(range(w.ndim - 1))  # a vector is its own row
  column = jnp.mean(size, axis=axes, keepdims=True)
  share = size / (row + _TINY) + size / (column + _TINY)
  return share * _mean_square(average) ** 0.25


def _movement(w: jax.Array, g: jax.Array) -> jax.Array:
  return -w.astype(jnp.float32) * g.astype(jnp.float32)


_ACTIVATION = Score(
  score=_activation,
  init=_init_statistics,
  update=_update_statistics,
)

SCORES: dict[str, Score] = {
  # It compares weights of one row and column, so it cannot rank whole rows.
  "relative": dataclasses.replace(
    _ACTIVATION, score=_relative, for_units=_ACTIVATION
  ),
  "activation": _ACTIVATION,
  "magnitude": Score(score=lambda w, average, key: _magnitude(w)),
  "saliency": Score(term=lambda w, g: jnp.abs(_movement(w, g))),
  "movement": Score(term=_movement, is_signed=True),
  "random": Score(
    score=lambda w, average, key: jax.random.uniform(key, w.shape, jnp.float32)
  ),
}
