"""What a benchmark leaves: tables, one JSON object, files in `results/`."""

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.table
from matplotlib import ticker

from folding.reporting import plots
from folding.reporting.report import table
from folding.training.run_dir import source_commit

RESULTS = pathlib.Path(__file__).parent / "results"
MARKS = "os^Dv"
# Methods and runtimes have the same color and mark in all pictures.
METHODS = {
  "dense, all logits": (plots.LIGHT, "o"),
  "dense": (plots.GREY, "s"),
  "folded, G = 4": (plots.GREEN, "v"),
  "folded, G = 1": (plots.RED, "^"),
  "linear time, G = 1": (plots.BLUE, "D"),
}
RUNTIMES = (
  "ONNX Runtime, float32", "ONNX Runtime, int8", "PyTorch", "JAX", "NumPy",
)  # fmt: skip


class Table(NamedTuple):
  """A table; the first column is text, the others are numbers."""

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]


class Plot(NamedTuple):
  """Ratios on a logarithmic axis, with a line at 1.

  Attributes:
    title: Name of the comparison.
    x_label: What the ratios are, and what the bars are.
    series: {name: {label: {"ratio"} or {"ratio", "ratio_low", "ratio_high"}}}.
  """

  title: str
  x_label: str
  series: Mapping[str, Mapping[str, Mapping[str, float]]]


class Scatter(NamedTuple):
  """Named points on a logarithmic x axis, one plot per quantity.

  Attributes:
    title: Title, which names the good corner.
    x_label: Name and unit of the horizontal axes.
    series: {name and unit of a quantity: {name of `RUNTIMES`: {name of a point:
      point}}}.
  """

  title: str
  x_label: str
  series: Mapping[str, Mapping[str, Mapping[str, plots.Point]]]


class Lines(NamedTuple):
  """Lines on logarithmic axes, one plot per quantity.

  Attributes:
    title: What is shown.
    x_label: Name and unit of the horizontal axes.
    series: {name and unit of a quantity: {series: {x: y}}}.
  """

  title: str
  x_label: str
  series: Mapping[str, Mapping[str, Mapping[float, float]]]


def make_parser(description: str | None, rounds: int | None = None):
  """Returns a parser with the flags that all benchmarks have.

  Args:
    description: The docstring of a benchmark; its first line is shown.
    rounds: Default of --rounds; None: it has no rounds.
  """
  first = (description or "").split("\n")[0]
  parser = argparse.ArgumentParser(description=first)
  if rounds is not None:
    parser.add_argument("--rounds", type=int, default=rounds)
  parser.add_argument(
    "--json", action="store_true", help="print one object as the last line"
  )
  parser.add_argument(
    "--save",
    action="store_true",
    help="write tables, figures and a plot into benchmarks/results/",
  )
  return parser


def show(
  name: str,
  args: argparse.Namespace,
  result: dict[str, Any],
  tables: Sequence[Table],
  plot: Plot | Scatter | Lines,
) -> None:
  """Prints the tables and does what --json and --save ask for."""
  for each in tables:
    shown = rich.table.Table(title=each.title)
    for index, head in enumerate(each.header):
      shown.add_column(head, justify="left" if index == 0 else "right")
    for row in each.rows:
      shown.add_row(*row)
    rich.console.Console().print(shown)
  result = {
    "device": jax.devices()[0].device_kind,
    "commit": source_commit(),
    **result,
  }
  if args.save:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    page = _page(name, result, tables, plot.title)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    plots.save(_DRAW[type(plot)](plot), str(RESULTS / f"{name}.png"))
  if args.json:
    print(json.dumps(result))


def _page(
  name: str, result: Mapping[str, Any], tables: Sequence[Table], title: str
) -> str:
  parts = [
    f"# benchmarks.{name}",
    f"Device: {result['device']}; commit: {result['commit']}. All figures: "
    f"[{name}.json]({name}.json).",
  ]
  for each in tables:
    parts += [each.title, table(each.header, each.rows).strip()]
  return "\n\n".join([*parts, f"![{title}]({name}.png)"]) + "\n"


def _look(name: str, index: int) -> tuple[str, str]:
  """Returns the color and the mark of a series."""
  return METHODS.get(name, (plots.CYCLE[index], MARKS[index]))


def _label_plainly(axis: Any, digits: str) -> None:
  """Labels a logarithmic axis with 900 instead of 9 x 10^2.

  Args:
    axis: Horizontal or vertical.
    digits: First digits of the labels between two powers of ten.
  """
  axis.set_major_formatter(lambda x, _: f"{x:g}")
  axis.set_minor_formatter(
    lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else ""
  )


def _label_values(axis: Any, values: Sequence[float]) -> None:
  """Labels a logarithmic axis at 1, 2 and 5; evenly if values differ little."""
  _label_plainly(axis, "25")
  if max(values) / min(values) < 4:
    axis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(ticker.NullLocator())


def _draw(plot: Plot) -> Any:
  """Returns a figure: a row per label, a mark per series, bars of quartiles."""
  labels = list(dict.fromkeys(x for s in plot.series.values() for x in s))
  num_marks = sum(map(len, plot.series.values()))
  with plots.figure() as drawing:
    drawing.set_size_inches(8, 1.6 + 0.32 * num_marks)
    axes = drawing.subplots()
    axes.set_xscale("log")
    axes.axvline(1, color=plots.GREY, linewidth=1)
    axes.grid(axis="x")
    ends = []
    for index, (name, points) in enumerate(plot.series.items()):
      for label, point in points.items():
        there = [n for n, s in plot.series.items() if label in s]
        shift = 0.6 * ((there.index(name) + 0.5) / len(there) - 0.5)
        y, x = labels.index(label) + shift, point["ratio"]
        low, high = point.get("ratio_low", x), point.get("ratio_high", x)
        color, mark = _look(name, index)
        axes.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.4)
        axes.plot(x, y, mark, color=color, markersize=7)
        axes.annotate(
          f"{x:#.3g}",
          (high, y),
          (7, 0),
          textcoords="offset points",
          va="center",
          fontsize=9,
          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        ends += [low, high]
      color, mark = _look(name, index)
      axes.plot([], [], mark, color=color, label=name)
    ends.append(1)
    lowest, highest = min(ends), max(ends)
    room = 10 ** (0.12 * max(0.3, math.log10(highest / lowest)))
    axes.set_xlim(lowest / room, highest * room**1.6)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    _label_values(axes.xaxis, ends)
    axes.set_xlabel(plot.x_label)
    axes.set_title(plot.title)
    if len(plot.series) > 1:
      drawing.legend(loc="outside lower center", ncols=4)
  return drawing


def _draw_points(plot: Scatter) -> Any:
  """Returns a figure; a line joins the points of one name, which has it once."""
  with plots.figure() as drawing:
    all_axes = drawing.subplots(1, len(plot.series), squeeze=False)[0]
    shown, texts = {}, []
    for axes, (y_label, series) in zip(
      all_axes, plot.series.items(), strict=True
    ):
      axes.set_xscale("log")
      for runtime, points in series.items():
        index = RUNTIMES.index(runtime)
        for point in points.values():
          shown[runtime] = axes.errorbar(
            point.x,
            point.y,
            yerr=[[error] for error in point.y_error],
            color=plots.CYCLE[index],
            fmt=MARKS[index],
            elinewidth=0.8,
            ms=8,
          )
      for name in dict.fromkeys(
        n for points in series.values() for n in points
      ):
        places = [p[name][:2] for p in series.values() if name in p]
        [shown["one model"]] = axes.plot(
          [x for x, _ in places],
          [y for _, y in places],
          color=plots.LIGHT,
          zorder=0,
        )
        texts.append(
          axes.annotate(name, places[0], (0, 0), textcoords="offset points")
        )
      axes.grid(True, which="both")
      _label_plainly(axes.xaxis, "235" if len(all_axes) == 1 else "")
      axes.set_xlabel(plot.x_label)
      axes.set_ylabel(y_label)
      axes.margins(x=0.15, y=0.15)
    drawing.suptitle(plot.title)
    drawing.legend(
      shown.values(), shown.keys(), loc="outside lower center", ncols=4
    )
    drawing.draw_without_rendering()
    for axes, series in zip(all_axes, plot.series.values(), strict=True):
      marks = [p[:2] for points in series.values() for p in points.values()]
      own = [text for text in texts if text.axes is axes]
      plots.place_names(own, axes.transData.transform(marks))
  return drawing


def _draw_lines(plot: Lines) -> Any:
  """Returns a figure; each quantity has axes of its own, side by side."""
  with plots.figure() as drawing:
    all_axes = drawing.subplots(1, len(plot.series), squeeze=False)[0]
    names = list(dict.fromkeys(n for s in plot.series.values() for n in s))
    shown = {}
    for axes, (y_label, series) in zip(
      all_axes, plot.series.items(), strict=True
    ):
      for name, points in series.items():
        xs, ys = zip(*points.items(), strict=True)
        color, mark = _look(name, names.index(name))
        [shown[name]] = axes.plot(xs, ys, color=color, marker=mark)
      axes.set_xscale("log", base=2)
      axes.set_yscale("log")
      axes.grid(True)
      axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
      ys = [y for points in series.values() for y in points.values()]
      _label_values(axes.yaxis, ys)
      axes.set_xlabel(plot.x_label)
      axes.set_ylabel(y_label)
    drawing.suptitle(plot.title)
    drawing.legend(
      shown.values(), shown.keys(), loc="outside lower center", ncols=4
    )
  return drawing


_DRAW: Mapping[type, Callable[[Any], Any]] = {
  Plot: _draw,
  Scatter: _draw_points,
  Lines: _draw_lines,
}
