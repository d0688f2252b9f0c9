"""What a few seeds can tell: intervals, tests, and which points dominate."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import scipy.stats

K = TypeVar("K")
ALPHA = 0.05
TEST = (
  "Welch's t-test against every other one, two-sided, p below "
  f"{ALPHA:g} after Holm's correction"
)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
  """Returns the mean and the half width of its 95% t-interval.

  The half is t(0.975, n - 1) s / sqrt(n), s the sample standard deviation; None
  for a single value.

  Example:
    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> f"{mean:.1f} +- {half:.3f}"
    '2.0 +- 2.484'
  """
  mean, n = statistics.fmean(values), len(values)
  if n < 2:
    return mean, None
  t = float(scipy.stats.t.ppf(1 - ALPHA / 2, n - 1))
  return mean, t * statistics.stdev(values) / math.sqrt(n)


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Returns the two-sided p of equal means; variances may differ.

  None where a sample has fewer than two values, or neither has any spread (of a
  few seeds, whose accuracies are whole examples): nothing can be told.
  """
  if min(len(a), len(b)) < 2:
    return None
  spread = statistics.variance(a) + statistics.variance(b)
  # Rounding gives equal values a spread of about 1e-32 of their square.
  if spread <= 1e-24 * (statistics.fmean(a) ** 2 + statistics.fmean(b) ** 2):
    return None
  # From means and deviations, as scipy warns of a sample of equal values.
  samples = [(statistics.fmean(s), statistics.stdev(s), len(s)) for s in (a, b)]
  result: Any = scipy.stats.ttest_ind_from_stats(
    *samples[0], *samples[1], equal_var=False
  )
  return float(result.pvalue)


def holm(values: Sequence[float]) -> list[float]:
  """Returns p values corrected for how many there are (Holm 1979).

  Example:
    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
  """
  order = sorted(range(len(values)), key=values.__getitem__)
  adjusted, highest = [0.0] * len(values), 0.0
  for rank, i in enumerate(order):
    highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
    adjusted[i] = highest
  return adjusted


def best(samples: Mapping[str, Sequence[float]], higher: bool) -> str | None:
  """Returns the name whose mean is better than every other's, by `TEST`.

  Args:
    samples: {name: values over seeds}.
    higher: Whether more is better.
  """
  if len(samples) < 2:
    return None
  sign = 1 if higher else -1
  first = max(samples, key=lambda name: sign * statistics.fmean(samples[name]))
  rest = [samples[name] for name in samples if name != first]
  found = [welch(samples[first], other) for other in rest]
  adjusted = holm([1.0 if p is None else p for p in found])
  return first if max(adjusted) < ALPHA else None


def front(points: Mapping[K, tuple[float, float]], higher: bool) -> set[K]:
  """Returns the names that no other dominates.

  One dominates another if it costs no more and is no worse, and differs.

  Args:
    points: {name: (cost, quality)}; less cost is better.
    higher: Whether more quality is better.

  Example:
    >>> points = {"a": (1.0, 5.0), "b": (2.0, 6.0), "c": (3.0, 5.5)}
    >>> sorted(front(points, higher=True))
    ['a', 'b']
  """
  return {n for n in points if not dominators(points, n, higher)}


def dominators(
  points: Mapping[K, tuple[float, float]], name: K, higher: bool
) -> list[K]:
  """Returns the names that dominate one, as in `front`."""
  sign = 1 if higher else -1
  cost, quality = points[name]
  return [
    n
    for n, (c, q) in points.items()
    if c <= cost and sign * q >= sign * quality and (c, q) != (cost, quality)
  ]
