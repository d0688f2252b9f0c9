"""Groups of seeds, and the tables of a study."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from folding.reporting import words
from folding.studies import inference
from folding.studies.gather import Row
from folding.studies.study import DENSE, OURS

METRICS = ("accuracy", "bits_per_byte")
_NEAR = 0.02  # of dense's parameters, that a size may be off its level


@dataclasses.dataclass(frozen=True)
class Group:
  """The finished runs of one method at one level: one a seed."""

  rows: tuple[Row, ...]

  @property
  def first(self) -> Row:
    """The row that stands for what all share."""
    return self.rows[0]

  def values(self, name: str) -> list[float]:
    """Returns a figure of those that have it."""
    found = [getattr(row, name) for row in self.rows]
    return [float(value) for value in found if value is not None]

  def mean(self, name: str) -> float | None:
    """Returns the mean of a figure, None where a row lacks it.

    What some seeds did not reach has no mean: that of the others is better.
    """
    values = self.values(name)
    return statistics.fmean(values) if len(values) == len(self.rows) else None


class Results:
  """The rows of a study by data set, method and level.

  Attributes:
    rows: All of them.
    datasets: Names, in order.
    methods: {name: what it is}, in order.
    levels: Fractions to save, rising.
  """

  def __init__(self, rows: Sequence[Row]):
    self.rows = list(rows)
    self.datasets = list(dict.fromkeys(row.dataset for row in rows))
    self.methods = {row.method: row.about for row in rows}
    self.levels = sorted({r.level for r in rows if r.level is not None})
    grouped: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
      if row.status == "finished" and row.quality is not None:
        key = (row.dataset, row.method, row.level)
        grouped.setdefault(key, []).append(row)
    self._groups = {key: Group(tuple(g)) for key, g in grouped.items()}

  def group(
    self, dataset: str, method: str, level: float | None = None
  ) -> Group | None:
    """Returns the runs of a method, None where none is finished."""
    return self._groups.get((dataset, method, level))

  def at(self, dataset: str, level: float | None) -> dict[str, Group]:
    """Returns {method: group} of a data set at a level; None: of fixed size."""
    found = {m: self.group(dataset, m, level) for m in self.methods}
    return {method: group for method, group in found.items() if group}

  def samples(self, dataset: str, level: float) -> dict[str, list[float]]:
    """Returns {method: figures} of those that are as small as a level says."""
    return {
      method: group.values("quality")
      for method, group in self.at(dataset, level).items()
      if not is_off(group, level)
    }

  def all_of(self, dataset: str) -> dict[tuple[str, float | None], Group]:
    """Returns {(method, level): group} of a data set."""
    return {
      (method, level): group
      for (name, method, level), group in self._groups.items()
      if name == dataset
    }

  def is_higher_better(self, dataset: str) -> bool:
    """Returns whether the data set's figure is an accuracy."""
    return any(
      row.metric == "accuracy" for row in self.rows if row.dataset == dataset
    )

  def beside_dense(self, group: Group) -> tuple[Group, Group] | None:
    """Returns the runs of a group and of dense that have the same seeds.

    All of both where they have no seed in common, None without the dense model.
    """
    dense = self.group(group.first.dataset, DENSE)
    if dense is None:
      return None
    seeds = {r.seed for r in group.rows} & {r.seed for r in dense.rows}
    if not seeds:
      return group, dense
    here, there = (
      Group(tuple(r for r in g.rows if r.seed in seeds)) for g in (group, dense)
    )
    return here, there

  def everywhere(self, method: str, level: float | None) -> list[Group]:
    """Returns a method's runs at a level, else of its one size.

    A group a data set, of those that have dense runs too.
    """
    found = [
      self.group(d, method, level) or self.group(d, method)
      for d in self.datasets
      if self.group(d, DENSE)
    ]
    return [group for group in found if group]

  def mean_change(self, groups: Sequence[Group], metric: str) -> float | None:
    """Returns the mean `change` of the groups that have a metric, if any."""
    found = [self.change(g) for g in groups if g.first.metric == metric]
    known = [change for change in found if change is not None]
    return statistics.fmean(known) if known else None

  def change(self, group: Group) -> float | None:
    """Returns the change from dense: in points, or of perplexity as a fraction.

    Negative is always worse. None without the dense model.
    """
    pair = self.beside_dense(group)
    if pair is None:
      return None
    is_accuracy = group.first.metric == "accuracy"
    name = "quality" if is_accuracy else "perplexity"
    here, there = (g.mean(name) for g in pair)
    assert here is not None and there is not None
    return 100 * (here - there) if is_accuracy else 1 - here / there

  def ratio(self, group: Group, name: str) -> float | None:
    """Returns a figure as a multiple of dense's, None where one is missing."""
    pair = self.beside_dense(group)
    here, there = (g.mean(name) for g in pair) if pair else (None, None)
    return here / there if here is not None and there else None


def is_off(group: Group, level: float | None) -> bool:
  """Returns whether runs have another size than a level says, or a fixed one.

  As of a narrow dense model, whose width is found before the vocabulary is.
  """
  size = group.mean("compression")
  return level is None or size is not None and abs(size - level) > _NEAR


def quality_table(results: Results, dataset: str) -> str:
  """Returns test figures of a data set: a method a row, a level a column."""
  higher = results.is_higher_better(dataset)
  levels: list[float | None] = [*results.levels, None]
  winners = {}
  for level in results.levels:
    winners[level] = inference.best(results.samples(dataset, level), higher)
  rows = []
  for method in results.methods:
    cells = []
    for level in levels:
      group = results.group(dataset, method, level)
      text = _figure(group, higher) if group else ""
      if group and method != DENSE and is_off(group, level):
        text += f" ({words.percent(group.mean('compression'))})"
      is_best = level is not None and winners[level] == method
      cells.append(f"**{text}**" if is_best else text)
    if any(cells):
      rows.append([method, *cells])
  names = [words.level(level) for level in results.levels]
  return words.table(["", *names, "one size"], rows)


def summary_table(results: Results, level: float) -> str:
  """Returns means over data sets at one level or size; the best comes first."""
  found = []
  for method in results.methods:
    groups = results.everywhere(method, level)
    if method == DENSE or not groups:
      continue
    changes = {m: results.mean_change(groups, m) for m in METRICS}
    cells = [method, _mean(groups, "compression"), _mean(groups, "qkv")]
    cells += [change_text(c, metric) for metric, c in changes.items()]
    for name in ("bytes", "seconds"):
      ratios = [r for g in groups if (r := results.ratio(g, name)) is not None]
      cells.append(f"{statistics.fmean(ratios):.2f}" if ratios else "")
    cells.append(str(len(groups)))
    order = [-math.inf if c is None else c for c in changes.values()]
    found.append((order, cells))
  found.sort(key=lambda pair: pair[0], reverse=True)
  header = ["", "smaller", "W_Q, W_K, W_V", "accuracy", "perplexity", "bytes"]
  header += ["time", "data sets"]
  return words.table(header, [cells for _, cells in found])


def cost_table(results: Results, dataset: str, level: float) -> str:
  """Returns what each method stores and needs, at one level or its own size."""
  rows = []
  for method in results.methods:
    group = results.group(dataset, method, level)
    group = group or results.group(dataset, method)
    if group is None:
      continue
    rows.append(
      [
        method,
        words.percent(group.mean("compression")),
        words.percent(group.mean("qkv")),
        words.count(group.mean("bytes") or 0),
        words.duration(group.mean("seconds") or 0),
        _multiple(results, group, "halfway"),
        words.percent(group.mean("trainable"), 0),
        _change(results, group),
      ]
    )
  header = ["", "smaller", "W_Q, W_K, W_V", "bytes", "time"]
  header += ["steps to halfway", "trainable", "to dense"]
  return words.table(header, rows)


def dominators(results: Results, dataset: str, level: float) -> list[str]:
  """Returns what stores no more than ours at a level and is no worse.

  The best comes first. Other levels of ours are no other method.
  """
  points = {}
  for (method, at), group in results.all_of(dataset).items():
    if method == OURS and at != level:
      continue
    cost, figure = group.mean("bytes"), group.mean("quality")
    assert cost is not None and figure is not None
    points[method, at] = (cost, figure)
  higher = results.is_higher_better(dataset)
  found = inference.dominators(points, (OURS, level), higher)
  found.sort(key=lambda key: points[key][1], reverse=higher)
  return [
    method if at is None else f"{method} at {words.level(at)}"
    for method, at in found
  ]


def change_text(change: float | None, metric: str | None) -> str:
  """Returns "-1.2 points" of accuracy, or "+3.1%" of perplexity."""
  signed = signed_change(change, metric)
  if signed is None:
    return words.NOTHING
  return f"{signed:+.1f}{' points' if metric == 'accuracy' else '%'}"


def signed_change(change: float | None, metric: str | None) -> float | None:
  """Returns a change as it is written: in points, or of perplexity in %.

  So more perplexity is above 0.
  """
  if change is None or metric == "accuracy":
    return change
  return -100 * change


def _mean(groups: Sequence[Group], name: str) -> str:
  found = [value for g in groups if (value := g.mean(name)) is not None]
  return words.percent(statistics.fmean(found)) if found else words.NOTHING


def _change(results: Results, group: Group) -> str:
  if group.first.method == DENSE:
    return words.NOTHING
  return change_text(results.change(group), group.first.metric)


def _figure(group: Group, is_accuracy: bool) -> str:
  mean, half = inference.interval(group.values("quality"))
  if is_accuracy:
    text = f"{100 * mean:.1f}"
    return text if half is None else f"{text} ± {100 * half:.1f}"
  return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _multiple(results: Results, group: Group, name: str) -> str:
  here, ratio = group.mean(name), results.ratio(group, name)
  if here is None:
    return words.NOTHING
  text = words.count(here)
  return text if ratio is None else f"{text} ({ratio:.2f}x)"
