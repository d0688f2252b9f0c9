"""The figures of a study; each has a panel for each data set."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.figure
import matplotlib.lines
from matplotlib import ticker

from folding.reporting import plots, words
from folding.studies import inference
from folding.studies.study import DENSE, OURS
from folding.studies.tables import METRICS, Group, Results, signed_change

_MARKERS = "osDv^P"
_LINES = ("-", "--", ":")
# Of this many points, what is so many times as far from the best as most are.
_MANY, _FAR, _MOST, _NAMED = 12, 2.5, 0.8, 4
_APART = 0.043  # of the height of an axis, between names
_SAME = 1.5  # percent; lines that end as far apart end at the same size
_OTHER = {
  "color": "#B0B0B0",
  "linewidth": 1,
  "marker": "o",
  "markersize": 3,
  "zorder": 2,
}


def quality(results: Results) -> matplotlib.figure.Figure:
  """Draws the test figure against compression, and dense as a band.

  The band is dense's 95% interval; where that is wider than what is drawn, as
  of two seeds, it is cut off.
  """

  def draw(axes, dataset, styles):
    scale, seen = _scale(results, dataset), []
    dense = results.group(dataset, DENSE)
    if dense:
      mean, half = inference.interval(dense.values("quality"))
      mean, half = scale * mean, scale * (half or 0.0)
      axes.axhspan(mean - half, mean + half, color=plots.LIGHT, zorder=0)
      axes.axhline(mean, color=plots.GREY, linewidth=1, zorder=1)
      seen.append((DENSE, 0.0, mean))
    for method in results.methods:
      if method == DENSE:
        continue
      groups = [
        results.group(dataset, method, level)
        for level in (*results.levels, None)
      ]
      points = [
        _point(g, "compression", scale)
        for g in groups
        if g and g.mean("compression") is not None
      ]
      if points:
        x, y = zip(*points, strict=True)
        axes.plot([100 * v for v in x], y, **styles[method])
        seen += [(method, 100 * x, y) for x, y in points]
    _limit(axes, seen, results.is_higher_better(dataset))
    _size_axis(axes, results.levels)

  return _panels(results, draw, [m for m in results.methods if m != DENSE])


def means(results: Results) -> matplotlib.figure.Figure:
  """Draws the change to dense against compression, mean over all data sets.

  A panel for classifiers and one for language models. A point is drawn where
  all data sets of its panel have the method at that level, or at its one size.
  """
  count = {
    metric: sum(
      bool(dense) and dense.first.metric == metric
      for dense in (results.group(d, DENSE) for d in results.datasets)
    )
    for metric in METRICS
  }
  metrics = [metric for metric in METRICS if count[metric]] or [METRICS[0]]
  with plots.figure() as drawing:
    drawing.set_size_inches(5.4 * len(metrics), 4.3)
    for axes, metric in zip(
      drawing.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
      lines = {}
      for method in results.methods:
        points = []
        for level in (*results.levels, None):
          groups = [
            group
            for group in results.everywhere(method, level)
            if group.first.metric == metric and group.first.level == level
          ]
          change = signed_change(results.mean_change(groups, metric), metric)
          sizes = [
            v for g in groups if (v := g.mean("compression")) is not None
          ]
          if change is not None and len(sizes) == count[metric]:
            points.append((100 * sum(sizes) / len(sizes), change))
        if method != DENSE and points:
          lines[method] = points
      _draw_means(axes, lines, metric == "accuracy", results.levels)
  return drawing


def _draw_means(
  axes: Any,
  lines: dict[str, list[tuple[float, float]]],
  higher: bool,
  levels: list[float],
) -> None:
  """Draws ours over all others in grey, with their names where they end."""
  if not lines:
    plots.nothing(axes, "nothing to compare with dense is finished yet")
    return
  axes.grid(True)
  axes.axhline(0, color="black", linewidth=1, zorder=1)
  for method, points in lines.items():
    style = _styles([OURS])[OURS] if method == OURS else _OTHER
    axes.plot(*zip(*points, strict=True), **style)
  seen = [(m, *point) for m, points in lines.items() for point in points]
  _limit(axes, [(DENSE, 0.0, 0.0), *seen], higher, "{:+.1f}")
  if not higher:
    axes.invert_yaxis()  # so that up is better in both
  _size_axis(axes, levels)
  what = "accuracy, points" if higher else "perplexity, %"
  axes.set_title(f"change of {what}")
  axes.yaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "dense")
  _name_ends(axes, {method: max(points) for method, points in lines.items()})


def _size_axis(axes: Any, levels: list[float]) -> None:
  if levels:
    axes.set_xticks([100 * level for level in levels])
  axes.set_xlabel("smaller than dense")
  axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}%")


def _name_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
  """Writes names beside the axes, apart from each other, and lines to them.

  Names of what ends before the others stand at the points themselves.
  """
  low, high = axes.get_ylim()
  last = max(x for x, _ in ends.values())
  places = {m: (y - low) / (high - low) for m, (_, y) in ends.items()}
  shown = sorted(
    (m for m, place in places.items() if 0 <= place <= 1),
    key=places.__getitem__,
  )
  beside = [m for m in shown if last - ends[m][0] < _SAME]
  rows: list[float] = []
  for method in beside:
    rows.append(max(places[method], rows[-1] + _APART if rows else 0.0))
  for n in reversed(range(len(rows))):
    rows[n] = min(rows[n], rows[n + 1] - _APART if n + 1 < len(rows) else 1.0)
  for method in shown:
    style = {
      "color": plots.BLUE if method == OURS else plots.GREY,
      "fontsize": 8,
      "va": "center",
      "annotation_clip": False,
    }
    if method in beside:
      axes.annotate(
        method,
        ends[method],
        xytext=(1.07, rows[beside.index(method)]),
        textcoords="axes fraction",
        arrowprops={
          "arrowstyle": "-",
          "color": plots.LIGHT,
          "linewidth": 0.8,
          "relpos": (0, 0.5),
          "shrinkA": 1,
          "shrinkB": 4,
        },
        **style,
      )
    else:
      offset = {"xytext": (4, 5), "textcoords": "offset points"}
      axes.annotate(method, ends[method], **offset, **style)


def front(results: Results, cost: str) -> matplotlib.figure.Figure:
  """Draws the test figure against "bytes" or "seconds", and the Pareto front.

  The points are means over seeds; the front is that of the points drawn.
  """

  def draw(axes, dataset, styles):
    scale, higher = _scale(results, dataset), results.is_higher_better(dataset)
    points = {
      key: _point(group, cost, scale)
      for key, group in results.all_of(dataset).items()
    }
    on_front = inference.front(points, higher)
    best = sorted(points[key] for key in on_front)
    axes.step(
      [p[0] for p in best],
      [p[1] for p in best],
      where="post",
      color=plots.GREY,
      linewidth=1,
      zorder=0,
    )
    for key, point in points.items():
      style = dict(styles[key[0]])
      if key not in on_front:
        style["markerfacecolor"] = "none"
      axes.plot(*point, **style)
    axes.set_xlim(0, 1.05 * max(x for x, _ in points.values()) or 1.0)
    _limit(axes, [(m, *point) for (m, _), point in points.items()], higher)
    axes.set_xlabel("stored bytes" if cost == "bytes" else "training, seconds")
    axes.xaxis.set_major_formatter(lambda v, _: words.short_count(v))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))

  return _panels(results, draw, list(results.methods), linestyle="none")


def _panels(
  results: Results,
  draw: Callable[..., None],
  methods: list[str],
  **common: Any,
) -> matplotlib.figure.Figure:
  styles = {m: style | common for m, style in _styles(results.methods).items()}
  columns = 2 if len(results.datasets) == 4 else min(3, len(results.datasets))
  rows = math.ceil(len(results.datasets) / columns)
  with plots.figure() as drawing:
    drawing.set_size_inches(4.2 * columns + 1.0, 3.3 * rows + 1.4)
    grid = drawing.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(results.datasets) :]:
      axes.set_axis_off()
    for axes, dataset in zip(grid.flat, results.datasets, strict=False):
      axes.grid(True)
      axes.set_title(dataset)
      if results.all_of(dataset):
        draw(axes, dataset, styles)
      else:
        plots.nothing(axes, "no run is finished yet")
      if results.is_higher_better(dataset):
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}%")
      else:
        axes.set_ylabel("test, bits per byte")
        axes.invert_yaxis()  # so that up is better everywhere
    drawing.legend(
      handles=[
        matplotlib.lines.Line2D([], [], label=method, **styles[method])
        for method in methods
      ],
      loc="outside lower center",
      ncols=min(3 * columns - 1, len(methods)),
    )
  return drawing


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Returns how each method looks, in all figures of a study.

  Ours stands out; past the last colour, dashes and markers tell others apart.
  """
  special = {DENSE: plots.GREY, OURS: plots.BLUE}
  colours = [c for c in plots.CYCLE if c not in special.values()]
  found, index, n = {}, 0, len(colours)
  for method in methods:
    style = {"linewidth": 1.3, "markersize": 5, "zorder": 2}
    if method in special:
      style |= {"color": special[method], "marker": "*", "linestyle": "-"}
      style |= {"linewidth": 2.4, "markersize": 10, "zorder": 3}
    else:
      style["color"] = colours[index % n]
      style["linestyle"] = _LINES[index // n % len(_LINES)]
      style["marker"] = _MARKERS[index // n % len(_MARKERS)]
      index += 1
    found[method] = style
  return found


def _limit(
  axes: Any,
  seen: list[tuple[str, float, float]],
  higher: bool,
  figure: str | None = None,
) -> None:
  """Lets what was measured fill the axis.

  Of many points those that are far worse than most are not drawn, as they would
  press the others together: their names and figures stand at the lower edge.
  """
  figure = figure or ("{:.1f}%" if higher else "{:.2f}")
  if not seen:  # no size is known before the dense run is finished
    return
  points = sorted(
    seen, key=lambda point: point[2], reverse=higher
  )  # best first
  best, usual = points[0][2], points[int(_MOST * (len(points) - 1))][2]
  far = _FAR * abs(usual - best) if len(points) >= _MANY else math.inf
  inside = [y for _, _, y in points if abs(y - best) <= (far or math.inf)]
  margin = 0.08 * (max(inside) - min(inside)) or 1.0
  axes.set_ylim(min(inside) - margin, max(inside) + margin)
  left, right = axes.get_xlim()
  outside = points[len(inside) :][::-1]  # the worst is the lowest
  for n, (name, x, y) in enumerate(outside[:_NAMED]):
    text = f"{name} {figure.format(y)}"
    more = len(outside) - _NAMED
    axes.annotate(
      f"{text}, {more} more" if n == _NAMED - 1 and more > 0 else text,
      (x, 0.02 + 0.06 * n),
      xycoords=("data", "axes fraction"),
      ha="right" if x > (left + right) / 2 else "left",
      fontsize=8,
      color=plots.GREY,
    )


def _scale(results: Results, dataset: str) -> float:
  return 100.0 if results.is_higher_better(dataset) else 1.0


def _point(group: Group, cost: str, scale: float) -> tuple[float, float]:
  x, y = group.mean(cost), group.mean("quality")
  assert x is not None and y is not None
  return x, scale * y
