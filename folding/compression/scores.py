"""Scores of parameters: the lower, the more suspect of being unused.

A score may keep a running average: from the forward pass ("activation") or from
gradients ("saliency", "movement").
"""

from collections.abc import Mapping
from typing import get_args

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from folding.compression import select
from folding.config import Score

SCORES: tuple[str, ...] = get_args(Score)
FORWARD_SCORES = ("relative", "activation")  # these need forward statistics
GRADIENT_SCORES = ("saliency", "movement")
# Of an embedding, these tell how often a token occurs.
USAGE_SCORES = FORWARD_SCORES + GRADIENT_SCORES

_TINY = 1e-12  # for means of rows and columns that are all zero


def init_average(score: str, w: jax.Array) -> jax.Array | None:
  """Returns the running average a score needs at the start, or None.

  For "activation" and "relative" it is the mean square of each input, of the
  shape of all axes but the last (an input axis that is not there is
  broadcast); it starts at -1, which stands for none: inputs count alike.
  """
  if score in FORWARD_SCORES:
    return jnp.full(w.shape[:-1], -1, jnp.float32)
  if score in GRADIENT_SCORES:
    return jnp.zeros(w.shape, jnp.float32)
  return None


def observe_stat(
  average: jax.Array, stat: jax.Array, weight: jax.Array
) -> jax.Array:
  """Moves the average of "activation" towards what a forward pass saw.

  Args:
    average: float32, shape of the parameter without its last axis.
    stat: Mean square of the parameter's input; its axes are leading axes.
    weight: float32[], of the new value; the first has all of it.
  """
  if stat.shape != average.shape[: stat.ndim]:
    raise ValueError(
      f"a statistic of shape {stat.shape} does not fit the inputs of a parameter, "
      f"{average.shape}: it is the mean square of each"
    )
  stat = stat.reshape(stat.shape + (1,) * (average.ndim - stat.ndim))
  stat = jnp.broadcast_to(stat, average.shape).astype(jnp.float32)
  moved = average + weight * (stat - average)
  return _finite(jnp.where(average < 0, stat, moved), average)


def observe_gradient(
  score: str, average: jax.Array, w: jax.Array, g: jax.Array, decay: float
) -> jax.Array:
  """Moves the average of "saliency" (|w g|) or "movement" (-w g)."""
  wg = w.astype(jnp.float32) * g.astype(jnp.float32)
  new = jnp.abs(wg) if score == "saliency" else -wg
  return _finite(decay * average + (1 - decay) * new, average)


def _finite(new: jax.Array, average: jax.Array) -> jax.Array:
  """Leaves out what is not finite: an optimizer may skip such a step."""
  return jnp.where(jnp.isfinite(new), new, average)


def observe(
  averages: Mapping[str, jax.Array],
  observed: jax.Array,
  kinds: Mapping[str, str],
  decay: float,
  leaves: Mapping[str, jax.Array],
  grads: Mapping[str, jax.Array],
  stats: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns the running averages after a step, and how many were seen.

  Args:
    averages: {parameter: average}, of those whose score has one.
    observed: int32[], steps that came with statistics so far.
    kinds: {parameter: score}.
    decay: Of the averages.
    leaves: {path: parameter}.
    grads: {path: gradient}.
    stats: {path: mean square of the input}, or empty.

  Raises:
    ValueError: statistics came, and all of them are of other parameters.
  """
  if not averages:
    return {}, observed
  averages = dict(averages)
  forward = [n for n in averages if kinds[n] in FORWARD_SCORES]
  # What else a step has that an optimizer skips may be finite, and huge.
  seen = [*grads.values(), *stats.values()]
  is_finite = jnp.stack([jnp.isfinite(x).all() for x in seen]).all()
  if forward and stats:
    if not stats.keys() & set(forward):
      raise ValueError(
        f"none of the statistics ({', '.join(list(stats)[:4])}, ...) belongs to "
        f"a parameter that is pruned ({', '.join(forward[:4])}, ...): the paths "
        "must be the same, and layers inside nn.scan, nn.vmap and nn.WeightNorm "
        "have none; for those take score='magnitude' or 'saliency'"
      )
    observed = observed + is_finite.astype(observed.dtype)
    # The plain mean first, then a decayed one, so that the start is unbiased.
    count = jnp.maximum(observed, 1).astype(jnp.float32)
    weight = jnp.maximum(1 - decay, 1 / count)
    for name in forward:
      if name in stats:
        new = observe_stat(averages[name], stats[name], weight)
        averages[name] = jnp.where(is_finite, new, averages[name])
  for name in averages:
    if kinds[name] in GRADIENT_SCORES:
      new = observe_gradient(
        kinds[name], averages[name], leaves[name], grads[name], decay
      )
      averages[name] = jnp.where(is_finite, new, averages[name])
  return averages, observed


def element_scores(
  score: str, w: jax.Array, average: jax.Array | None, key: jax.Array
) -> jax.Array:
  """Returns float32 scores of the shape of w.

  With rms the root mean square of a weight's input:
    relative: (|w| / mean of its row + |w| / mean of its column) rms^(1/2),
      as Zhang et al. 2024 ("Plug-and-Play", RIA) for trained models, who divide
      by sums, so that the longer of both counts less. A row is the last axis, a
      column all the others; so in a kernel into heads, [D, H, K], each input has
      a row a head, and a column is a place in all heads.
    activation: |w| rms, as Sun et al. 2024 (Wanda).
    magnitude: |w|.
    saliency: decayed average of |w g|, g the gradient.
    movement: decayed average of -w g (Sanh et al. 2020).
    random: uniform, the same at every check.

  Args:
    score: One of `SCORES`.
    w: A parameter.
    average: Its running average, from the functions above.
    key: Of this parameter, for "random", which draws the same numbers at every
      check.
  """
  return select.value(lazy_scores(score, w, average, key))


def lazy_scores(
  score: str, w: jax.Array, average: jax.Array | None, key: jax.Array | None
) -> select.Scores:
  """Returns what `element_scores` does, unstored where it is cheap."""
  if score == "random":
    assert key is not None
    return jax.random.uniform(key, w.shape, jnp.float32)
  if score == "magnitude":
    return Partial(_magnitude, w)
  assert average is not None
  if score in FORWARD_SCORES:
    average = jnp.where(average < 0, 1.0, average)
  if score == "activation":
    return Partial(_weighed, w, jnp.sqrt(average)[..., None])
  if score == "relative":
    # Each behind a barrier of its own, or XLA for CPUs stores an |w| for both.
    held = jax.lax.optimization_barrier(w)
    row = jnp.mean(_magnitude(held), axis=-1, keepdims=True)
    held, row = jax.lax.optimization_barrier((held, row))
    axes = tuple(range(w.ndim - 1))  # none: a vector is its own row
    column = jnp.mean(_magnitude(held), axis=axes, keepdims=True)
    return Partial(_relative, w, row, column, average[..., None] ** 0.25)
  return average


def _magnitude(w: jax.Array) -> jax.Array:
  return jnp.abs(w.astype(jnp.float32))


def _weighed(w: jax.Array, rms: jax.Array) -> jax.Array:
  return _magnitude(w) * rms


def _relative(
  w: jax.Array, row: jax.Array, column: jax.Array, weight: jax.Array
) -> jax.Array:
  """Returns weighed |w| over the mean of its row plus over its column's.

  A row or column that is small as a whole, or has lost much already, is not
  emptied first.
  """
  magnitude = _magnitude(w)
  return (magnitude / (row + _TINY) + magnitude / (column + _TINY)) * weight
