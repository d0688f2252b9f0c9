"""Intervals, tests and fronts, against scipy and their definitions."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from folding.studies import inference

RNG = np.random.default_rng(0)
SAMPLES = [
  pytest.param(
    RNG.normal(size=a).tolist(),
    RNG.normal(0.5, 2, size=b).tolist(),
    id=f"{a}-{b}",
  )
  for a, b in ((2, 2), (3, 3), (3, 7), (20, 4))
]


@pytest.mark.parametrize(("a", "b"), SAMPLES)
def test_the_interval_is_that_of_scipy(a, b):
  for values in (a, b):
    mean, half = inference.interval(values)
    low, high = scipy.stats.t.interval(
      0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values)
    )
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)


def test_one_value_has_no_interval():
  assert inference.interval([0.25]) == (0.25, None)


@pytest.mark.parametrize(
  ("a", "b"),
  # Of equal values scipy warns, and warnings are errors here.
  [*SAMPLES, pytest.param([0.5, 0.4, 0.7], [0.828] * 3, id="one-constant")],
)
def test_welch_is_the_formula(a, b):
  parts = [np.var(x, ddof=1) / len(x) for x in (a, b)]
  t = (np.mean(a) - np.mean(b)) / math.sqrt(sum(parts))
  freedom = sum(parts) ** 2 / sum(
    v**2 / (len(x) - 1) for v, x in zip(parts, (a, b), strict=True)
  )
  expected = 2 * scipy.stats.t.sf(abs(t), freedom)
  assert inference.welch(a, b) == pytest.approx(expected, rel=1e-10)
  assert inference.welch(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ([0.5], [0.1, 0.2, 0.3]),
    ([0.1 + 0.2] * 3, [0.3] * 3),  # equal but for rounding
    ([0.3] * 3, [0.4] * 3),  # three seeds, of whole examples
  ],
  ids=["one-value", "equal", "no-spread"],
)
def test_welch_without_spread(a, b):
  assert inference.welch(a, b) is None
  assert inference.best({"a": a, "b": b}, higher=True) is None


def test_holm_is_the_closure_of_bonferroni():
  for n in (1, 2, 5):
    values = RNG.uniform(0, 0.4, n).tolist()
    expected = [
      # Rejected is what is rejected in every intersection it is part of.
      max(
        min(1.0, len(chosen) * min(values[j] for j in chosen))
        for k in range(1, n + 1)
        for chosen in itertools.combinations(range(n), k)
        if i in chosen
      )
      for i in range(n)
    ]
    assert inference.holm(values) == pytest.approx(expected, rel=1e-12)


def test_best_is_named_only_where_it_beats_every_other():
  samples = {"a": [1.0, 1.01, 0.99], "b": [2.0, 2.01, 1.99]}
  assert inference.best(samples, higher=True) == "b"
  assert inference.best(samples, higher=False) == "a"
  close = {**samples, "c": [2.0, 2.02, 1.97]}
  assert inference.best(close, higher=True) is None
  assert inference.best(close, higher=False) == "a"
  assert inference.best({"a": samples["a"]}, higher=True) is None
  single = {name: values[:1] for name, values in samples.items()}
  assert inference.best(single, higher=True) is None


def test_many_others_ask_for_more_evidence():
  a, b = [0.0, 0.1, 0.2], [0.3, 0.42, 0.5]
  p = inference.welch(a, b)
  assert p is not None
  assert inference.ALPHA / 20 < p < inference.ALPHA
  assert inference.best({"a": a, "b": b}, higher=True) == "b"
  others = {str(i): a for i in range(20)}
  assert inference.best({**others, "b": b}, higher=True) is None


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_nothing_dominates(higher):
  points = {
    str(i): tuple(RNG.integers(0, 6, 2).astype(float).tolist())
    for i in range(25)
  }
  sign = 1 if higher else -1
  found = inference.front(points, higher)
  for name, (cost, quality) in points.items():
    beaten = [
      other
      for other, (c, q) in points.items()
      if (c < cost and sign * q >= sign * quality)
      or (c == cost and sign * q > sign * quality)
    ]
    assert sorted(inference.dominators(points, name, higher)) == sorted(beaten)
    assert (name in found) == (not beaten)
