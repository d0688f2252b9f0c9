"""Rows, tables and tests of a study, from results that were written by hand."""

import csv
import dataclasses
import io
import json
import os
import pathlib

import numpy as np
import pytest
import scipy.stats

from folding import config as c
from folding.studies import grid, methods, tables

ROW = tables.Row(
  dataset="a",
  method="ours",
  saving=0.5,
  seed=0,
  metric="accuracy",
  quality=0.8,
  change=-1.0,
  compression=0.5,
  parameters=50,
  bytes=200,
  steps=10,
  seconds=3.0,
  device="cpu",
  commit=None,
)


def make_rows(changes, method="ours"):
  """Returns rows of {(dataset, seed): change}."""
  return [
    dataclasses.replace(
      ROW, method=method, dataset=dataset, seed=seed, change=change
    )
    for (dataset, seed), change in changes.items()
  ]


def cells(table):
  """Returns the rows of a Markdown table, each as a list of cells."""
  lines = [line.strip("|").split("|") for line in table.strip().splitlines()]
  return [[cell.strip() for cell in line] for line in lines]


@pytest.fixture
def study(tmp_path):
  """Returns a study with results of a classifier and a language model."""
  made = grid.Study(
    {"topics": c.Config(task="classify"), "words": c.Config()},
    methods.pick("dense", "dense-small", "ours", "wanda"),
    (0.5,),
    (0, 1),
  )
  for trial in made.trials(str(tmp_path)):
    if trial.name == "words--ours--50--s1":
      continue  # not finished
    is_small = trial.method == "dense-small"
    dense, stored = (400, 400) if is_small else (1000, 1000)
    if trial.method in ("ours", "wanda"):
      stored = 500
    better = {"ours": 0.02, "dense": -0.01}.get(trial.method, 0) * trial.seed
    accuracy = {"test": {"accuracy": 0.8 + better}}
    text = {"test": {"bits_per_byte": 2.0, "perplexity": 8.0 * (1 - better)}}
    values = accuracy if trial.dataset == "topics" else text
    result = {
      "finished": True,
      "steps": 60 if trial.method is None else 40,
      "seconds": 2.0,
      "device": "cpu",
      "commit": "c6086e3",
      "parameters": {"overall": {"dense": dense, "stored": stored}},
      "bytes": {"overall": {"dense": 4000, "stored": 2000, "masks": 30}},
      **values,
    }
    os.makedirs(trial.run)
    path = pathlib.Path(trial.run, "result.json")
    path.write_text(json.dumps(result), encoding="utf-8")
  return made


def test_collect_compares_runs_with_dense_of_their_seed(study, tmp_path):
  rows = tables.collect(study, str(tmp_path))
  found = {(r.dataset, r.method, r.seed): r for r in rows}
  assert len(found) == len(rows) == 15
  assert ("words", "ours", 1) not in found
  ours = found["topics", "ours", 1]
  assert ours.change == pytest.approx(3.0)  # points, from 79% to 82%
  assert (ours.compression, ours.parameters, ours.bytes) == (0.5, 500, 2030)
  assert found["topics", "dense-small", 0].compression == pytest.approx(0.6)
  assert found["words", "ours", 0].change == pytest.approx(0.0)
  assert found["words", "wanda", 0].steps == 100  # with its start
  assert found["words", "wanda", 0].seconds == 4.0


def test_collect_measures_perplexity_in_percent(study, tmp_path):
  path = tmp_path / "runs" / "words--ours--50--s0" / "result.json"
  result = json.loads(path.read_text())
  result["test"]["perplexity"] = 9.0  # dense has 8
  path.write_text(json.dumps(result))
  rows = tables.collect(study, str(tmp_path))
  (row,) = (r for r in rows if (r.dataset, r.method) == ("words", "ours"))
  assert row.change == pytest.approx(-12.5)


def test_write_leaves_a_csv_a_page_and_a_plot_per_metric(study, tmp_path):
  page = pathlib.Path(tables.write(study, str(tmp_path))).read_text()
  assert "15 of 16 runs" in page
  for name in ("topics", "words"):
    assert f"\n## {name}\n" in page
  for name in ("accuracy.png", "bits_per_byte.png"):
    assert f"({name})" in page
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
  text = (tmp_path / "study.csv").read_text()
  records = list(csv.DictReader(io.StringIO(text)))
  rows = tables.collect(study, str(tmp_path))
  assert [r["method"] for r in records] == [r.method for r in rows]
  assert records[0]["saving"] == ""
  assert float(records[0]["quality"]) == rows[0].quality


def test_dataset_table_has_means_over_seeds():
  rows = make_rows({("a", 0): 1.0, ("a", 1): 2.0})
  rows[1] = dataclasses.replace(rows[1], quality=0.9, bytes=400)
  header, _, line = cells(tables.dataset_table(rows))
  assert header[3] == "to dense, points"
  assert line == [
    "ours",
    "50%",
    "85.0%",
    "+1.5",
    "50.0%",
    "300",
    "0:00:03",
    "2",
  ]
  rows = [dataclasses.replace(row, metric="bits_per_byte") for row in rows]
  header, *_ = cells(tables.dataset_table(rows))
  assert header[3] == "to dense, % of perplexity"


def test_mean_change_needs_a_dense_run_of_each_seed():
  rows = make_rows({("a", 0): 1.0, ("a", 1): None})
  *_, line = cells(tables.dataset_table(rows))
  assert line[3] == "–"
  assert tables.curves(rows) == {}


@pytest.mark.parametrize("names", ["a", "abc"])
def test_paired_is_the_t_test_over_data_sets_or_seeds_of_one(names):
  rng = np.random.default_rng(0)
  keys = [(dataset, seed) for dataset in names for seed in (0, 1, 2)]
  a = dict(zip(keys, rng.normal(size=len(keys)).tolist(), strict=True))
  b = dict(zip(keys, rng.normal(size=len(keys)).tolist(), strict=True))
  rows_b = make_rows(dict(reversed([*b.items(), (("d", 0), 50.0)])))
  found = tables.paired(make_rows(a), rows_b)
  differences = np.array([a[key] - b[key] for key in keys])
  if len(names) > 1:
    differences = differences.reshape(len(names), 3).mean(axis=1)
  t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
  assert found.pairs == 3
  assert found.difference == pytest.approx(differences.mean())
  assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 2))


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ({("a", 0): 1.0}, {("b", 0): 1.0}, (None, None, 0)),
    ({("a", 0): 1.0}, {("a", 0): 3.0}, (-2.0, None, 1)),
    ({("a", 0): 0.3, ("a", 1): 0.1 + 0.2}, {("a", 0): 0, ("a", 1): 0}, None),
  ],
)
def test_paired_without_spread_has_no_p(a, b, expected):
  found = tables.paired(
    make_rows(a), make_rows({k: float(v) for k, v in b.items()})
  )
  assert found.p is None
  if expected is not None:
    assert dataclasses.astuple(found) == expected


def test_summary_table_tests_each_level_against_dense_and_ours():
  a = {("a", 0): -1.0, ("a", 1): -1.1, ("b", 0): -0.9}
  worse = {key: value - 2.0 - 0.1 * key[1] for key, value in a.items()}
  other = {key: value - 1.0 - 0.1 * key[1] for key, value in a.items()}
  dense = make_rows({key: 0.0 for key in a}, "dense")
  dense = [dataclasses.replace(row, saving=None) for row in dense]
  rows = [*make_rows(a), *make_rows(worse, "random"), *make_rows(other, "fpp")]
  table = cells(tables.summary_table([*rows, *dense]))
  found = {line[0]: line[1:] for line in table[2:]}
  assert set(found) == {"ours", "random", "fpp"}
  assert found["ours"][:3] == ["50%", "50.0%", "-1.0"]
  assert found["ours"][4:] == ["–", "–", "3"]
  assert found["random"][4] == "-2.0"

  def corrected(groups, other):
    """Returns p values after Benjamini and Hochberg, from the definition."""
    p = np.array([tables.paired(group, other).p for group in groups])
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    least = np.minimum.accumulate(scaled[::-1])[::-1]
    return least[np.argsort(order)]

  rows_a, *others = (make_rows(x) for x in (a, worse, other))
  names = ("ours", "random", "fpp")
  p_dense = corrected([rows_a, *others], dense)
  p_ours = corrected(others, rows_a)
  for name, p in zip(names, p_dense, strict=True):
    assert float(found[name][3]) == pytest.approx(p, rel=0.05)
  for name, p in zip(names[1:], p_ours, strict=True):
    assert float(found[name][5]) == pytest.approx(p, rel=0.05)


def test_curves_are_means_with_ours_first_then_the_best():
  rows = make_rows({("a", 0): -9.0, ("b", 0): -7.0})
  for name, change in (("fpp", -3.0), ("heads", -2.0)):
    rows += make_rows({("a", 0): change}, name)
    small = make_rows({("a", 0): -10 * change}, name)
    rows += [
      dataclasses.replace(row, saving=0.3, compression=0.3) for row in small
    ]
  rows += make_rows({("a", 0): 0.0}, "dense")
  found = tables.curves(rows)
  assert list(found.items()) == [
    ("ours", [(50.0, -8.0)]),
    ("heads", [(30.0, 20.0), (50.0, -2.0)]),
    ("fpp", [(30.0, 30.0), (50.0, -3.0)]),
  ]
