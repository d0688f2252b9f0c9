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
      that is the same at every mask update. With "statistics" as evidence, the
      inputs are the leading axes of w, see `Rule.inputs`.
    evidence: What `update` gets at each step: "statistics", the mean square of
      each input of the layer; "gradients"; or None, without a moving average.
    init: (w) -> moving average at the start; w may be a shape and dtype.
    update: (average, w, evidence, weight) -> moving average after a step, where
      the new value has this weight, a float32[] in (0, 1].
    is_signed: Whether the score of a row or neuron is the sum over its
      elements. Otherwise it is the root of the sum of squares.
    for_units: Score that ranks rows and neurons; None: this score. Its moving
      average must be the same.
  """

  score: Callable[[jax.Array, Any, jax.Array], jax.Array]
  evidence: Literal["statistics", "gradients"] | None = None
  init: Callable[[Any], jax.Array] | None = None
  update: Callable[..., jax.Array] | None = None
  is_signed: bool = False
  for_units: "Score | None" = None

  def oriented(
    self, site: Any, leaves: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Returns {path: parameter} as this score takes them.

    A score by statistics takes the inputs as the leading axes.
    """
    if self.evidence != "statistics":
      return dict(leaves)
    return {name: site.inputs_first(w) for name, w in leaves.items()}

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
    by = self if site.is_by_weight else self.for_units or self
    own = by.oriented(site, site.pick(leaves))
    elements = {
      name: by.score(w, averages.get(name), key) for name, w in own.items()
    }
    if by.evidence == "statistics":
      elements = {n: site.inputs_placed(x) for n, x in elements.items()}
    if site.is_by_weight or by.is_signed:
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


def _update_statistics(average, w, statistic, weight):
  """Moves the mean square of each input; the first statistic replaces the -1.

  Args:
    average: [*inputs], the shape of the parameter without its last axis.
    w: Unused.
    statistic: Mean squares. Their axes are the leading axes of `average`.
    weight: float32[].

  Raises:
    ValueError: the statistic has another shape than the inputs.
  """
  del w
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


def _init_product(w: Any) -> jax.Array:
  return jnp.zeros(w.shape, jnp.float32)


def _product(w: jax.Array, g: jax.Array) -> jax.Array:
  return w.astype(jnp.float32) * g.astype(jnp.float32)


def _update_saliency(average, w, g, weight):
  return (1 - weight) * average + weight * jnp.abs(_product(w, g))


def _update_movement(average, w, g, weight):
  return (1 - weight) * average - weight * _product(w, g)


def _average(w, average, key):
  del w, key
  return average


_ACTIVATION = Score(
  score=_activation,
  evidence="statistics",
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
  "saliency": Score(
    score=_average,
    evidence="gradients",
    init=_init_product,
    update=_update_saliency,
  ),
  "movement": Score(
    score=_average,
    evidence="gradients",
    init=_init_product,
    update=_update_movement,
    is_signed=True,
  ),
  "random": Score(
    score=lambda w, average, key: jax.random.uniform(key, w.shape, jnp.float32)
  ),
}
