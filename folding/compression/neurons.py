"""Removing pruned neurons from a model that `folding` did not define."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.compression.sites import Rule, make_sites


def remove_neurons(
  rules: Sequence[Rule], params: Any
) -> tuple[Any, dict[str, np.ndarray]]:
  """Returns smaller parameters, without the neurons that are zero.

  A neuron is all that a rule of granularity "neuron" ties together: its columns
  and biases, and the rows that read it. If all of it is 0 the rest of the model
  never sees it, so the function stays the same to float rounding (sums have
  fewer terms), unless it norms the neurons. The caller builds the smaller model,
  whose widths are those of the arrays. For a `folding.Transformer`,
  `folding.shrink` does more.

  Args:
    rules: As given to `folding.fpp`; other granularities are passed over.
    params: Any tree of concrete arrays.

  Returns:
    (tree of the same structure, {parameter that a rule matches: neurons that
    stay, rising}). One neuron always stays.

  Raises:
    ValueError: a rule does not fit the parameters, or does not tie the rows
      that read its neurons.

  Example:
    >>> rule = Rule("up", 0.5, "neuron", {"down": 0})
    >>> params = {"up": np.array([[1.0, 0.0, 2.0]]), "down": np.array([5.0, 0, 6])}
    >>> small, kept = remove_neurons([rule], params)
    >>> small["up"].tolist(), small["down"].tolist(), kept["up"].tolist()
    ([[1.0, 2.0]], [5.0, 6.0], [0, 2])
  """
  leaves = paths.flatten(params)
  cuts, kept = {}, {}
  for site in make_sites(rules, params):
    rule = rules[site.rule]
    if rule.granularity != "neuron":
      continue
    if not any(
      _reads(n, axis, leaves[n].ndim)
      for n, axis in site.members.items()
      if n != site.name
    ):
      raise ValueError(
        f"the rule for {site.name!r} ties no array that reads its neurons; one "
        "cannot leave without those rows: name them in `tied`"
      )
    zeros = {name: jnp.asarray(leaves[name]) == 0 for name in site.members}
    stays = np.flatnonzero(~np.asarray(site.reduce(zeros, jnp.all)))
    kept[site.name] = stays if stays.size else np.array([0])
    cuts |= {n: (axis, kept[site.name]) for n, axis in site.members.items()}

  def cut(name, w):
    if name not in cuts:
      return w
    axis, indices = cuts[name]
    return w.take(indices, axis=axis)

  return paths.map_named(cut, params), kept


def _reads(name: str, axis: int | None, ndim: int) -> bool:
  """Returns whether a tied array reads neurons, which it then has as rows.

  A gate writes them, as its last axis; a vector is all rows, but for a bias and
  a scale.
  """
  if ndim == 1:
    return not name.endswith(("bias", "scale"))
  return axis not in (ndim - 1, -1)
