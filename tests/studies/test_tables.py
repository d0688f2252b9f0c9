"""Tables of a study, from a CSV that was written by hand."""

import dataclasses
import statistics

import pytest
import scipy.stats

from folding.reporting import words
from folding.studies import page, tables
from tests.studies.pages import cells_of


def test_a_figure_is_the_mean_with_its_interval(results):
  cells = cells_of(tables.quality_table(results, "trec"))
  assert cells[""] == ["30%", "70%", "one size"]
  half = scipy.stats.t.ppf(0.975, 1) * scipy.stats.sem([90.0, 90.2])
  assert cells["dense"] == ["", "", f"90.1 ± {half:.1f}"]
  assert cells["2-of-4"] == ["", "", "87.0 (45.0%)"]


def test_only_what_is_significant_is_bold(results):
  cells = cells_of(tables.quality_table(results, "trec"))
  # Welch: at 30% p is near 1; at 70% it is below 0.05 with two of two seeds.
  values = ([0.904, 0.906], [0.88, 0.93])
  assert scipy.stats.ttest_ind(*values, equal_var=False).pvalue > 0.05
  values = ([0.896, 0.898], [0.85, 0.851])
  assert scipy.stats.ttest_ind(*values, equal_var=False).pvalue < 0.05
  assert "**" not in cells["ours"][0] + cells["magnitude"][0]
  assert cells["ours"][1].startswith("**89.7 ±")
  assert "**" not in cells["magnitude"][1]


def test_one_seed_makes_nothing_bold(results):
  table = tables.quality_table(results, "text")
  assert "**" not in table
  assert "±" not in table
  assert cells_of(table)["ours"] == ["2.010", "2.100", ""]
  assert cells_of(table)["magnitude"] == ["", "2.080", ""]  # one failed


def test_costs_are_beside_dense(results):
  cells = cells_of(tables.cost_table(results, "trec", 0.7))
  assert cells["ours"] == [
    *("70.0%", "99.0%", "300", "1 min 24 s", "20 (0.50x)", "60%"),
    "-0.4 points",
  ]
  assert cells["dense"][-1] == "–"
  assert (
    cells_of(tables.cost_table(results, "text", 0.7))["ours"][-1] == "+8.0%"
  )


def test_all_data_sets_together_are_means_of_changes(results):
  cells = cells_of(tables.summary_table(results, 0.7))

  def mean(dataset, method, name, level):
    values = [
      getattr(row, name)
      for row in results.rows
      if (row.dataset, row.method, row.level) == (dataset, method, level)
      and row.status == "finished"
      and row.seed in seeds
    ]
    return statistics.fmean(values) if values else None

  assert "dense" not in cells
  for method, found in list(cells.items())[2:]:
    level, seeds = (None, {0}) if method == "2-of-4" else (0.7, {0, 1})
    points = 100 * (
      mean("trec", method, "quality", level)
      - mean("trec", "dense", "quality", None)
    )
    assert found[2] == f"{points:+.1f} points"
    here = mean("text", method, "perplexity", level)
    there = mean("text", "dense", "perplexity", None)
    more = f"{100 * (here / there - 1):+.1f}%" if here else words.NOTHING
    assert found[3] == more
    sizes = [
      mean(d, method, "bytes", level) / mean(d, "dense", "bytes", None)
      for d in ("trec", "text")
      if mean(d, method, "bytes", level)
    ]
    assert found[4] == f"{statistics.fmean(sizes):.2f}"
    assert found[6] == str(len(sizes))
  best = [float(found[2].split()[0]) for found in list(cells.values())[2:]]
  assert best == sorted(best, reverse=True)


def of_quality(row, quality, seed=None, **fields):
  seed = row.seed if seed is None else seed
  return dataclasses.replace(row, quality=quality, seed=seed, **fields)


def test_what_is_compared_with_dense_has_its_seeds(results):
  dense = results.group("trec", "dense").first
  ours = results.group("trec", "ours", 0.7).first
  # The seeds in common are 1 and 2; those that one has alone are easy.
  rows = [
    of_quality(dense, 0.99, seed=0, seconds=1.0),
    of_quality(dense, 0.80, seed=1, seconds=10.0),
    of_quality(dense, 0.82, seed=2, seconds=30.0),
    of_quality(ours, 0.79, seed=1, seconds=10.0),
    of_quality(ours, 0.81, seed=2, seconds=20.0),
    of_quality(ours, 0.99, seed=3, seconds=90.0),
  ]
  found = tables.Results(rows)
  group = found.group("trec", "ours", 0.7)
  assert found.change(group) == pytest.approx(-1.0)
  assert found.ratio(group, "seconds") == pytest.approx(15 / 20)
  assert page.did_not_hold(found) == []  # it is within the limit
  # No seed in common: all of both.
  found = tables.Results([rows[0], *rows[3:5]])
  group = found.group("trec", "ours", 0.7)
  assert found.change(group) == pytest.approx(100 * (0.80 - 0.99))


def test_what_one_seed_never_reached_has_no_mean(results):
  dense = results.group("trec", "dense").first
  ours = results.group("trec", "ours", 0.7).first
  rows = [dataclasses.replace(dense, seed=s, halfway=100.0) for s in (0, 1)]
  rows += [dataclasses.replace(ours, seed=0, halfway=50.0)]
  found = tables.Results(
    [*rows, dataclasses.replace(ours, seed=1, halfway=40.0)]
  )
  group = found.group("trec", "ours", 0.7)
  assert found.ratio(group, "halfway") == pytest.approx(0.45)
  rows.append(dataclasses.replace(ours, seed=1, halfway=None))
  found = tables.Results(rows)
  group = found.group("trec", "ours", 0.7)
  assert found.ratio(group, "halfway") is None
  cells = cells_of(tables.cost_table(found, "trec", 0.7))
  column = cells[""].index("steps to halfway")
  assert cells["ours"][column] == "–"
  assert cells["dense"][column] == "100 (1.00x)"


def test_what_missed_its_level_says_so_and_is_not_tested(results):
  dense = results.group("trec", "dense").first
  ours = results.group("trec", "ours", 0.7).first
  rows = [of_quality(dense, 0.9 + s / 1000, s) for s in range(3)]
  for method, quality, size in (
    ("ours", 0.8, 0.7),
    ("small", 0.85, 0.68),
    ("large", 0.9, 0.6),
  ):
    rows += [
      of_quality(ours, quality + s / 1000, s, method=method, compression=size)
      for s in range(3)
    ]
  cells = cells_of(tables.quality_table(tables.Results(rows), "trec"))
  assert cells["ours"][0] == "80.1 ± 0.2"
  assert cells["small"][0] == "**85.1 ± 0.2**"
  assert cells["large"][0] == "90.1 ± 0.2 (60.0%)"


def test_equal_means_differ_by_rounding_alone(results):
  dense = results.group("trec", "dense").first
  ours = results.group("trec", "ours", 0.3).first
  here, there = (955 / 1066, 953 / 1066), (954 / 1066, 954 / 1066)
  assert statistics.fmean(here) < statistics.fmean(there)
  rows = [of_quality(dense, q, i) for i, q in enumerate(there)]
  rows += [of_quality(ours, q, i) for i, q in enumerate(here)]
  assert page.did_not_hold(tables.Results(rows)) == []


def test_what_trains_and_is_stored_can_fail_to_hold_too(results):
  dense = results.group("trec", "dense").first
  ours = of_quality(results.group("trec", "ours", 0.7).first, 0.95, linear=0.6)
  every = [dense, dataclasses.replace(ours, qkv=0.99, trainable=1.0)]
  assert page.did_not_hold(tables.Results(every)) == [
    "trec, 70%: no fewer parameters train",
    "linear layers are 60.0% smaller, not 70%",
  ]
  fewer = dataclasses.replace(ours, qkv=0.99, trainable=0.9, linear=0.7)
  assert page.did_not_hold(tables.Results([dense, fewer])) == []
