"""The figure of a comparison: curves of every run, quality against size."""

from typing import Any

import matplotlib.figure
import matplotlib.lines
from matplotlib import ticker

from folding.reporting import grouping, plots, runs, words


def overlay(found: list[grouping.Column]) -> matplotlib.figure.Figure:
  """Draws validation over steps, and the test figure against what is stored.

  A column has one colour; each of its runs has a curve, and the point is the
  mean, with a bar of one standard deviation (or, for the accuracy of a single
  run, the 95% interval).
  """
  with plots.figure() as drawing:
    curves, sizes = drawing.subplots(1, 2)
    split, key, label = _curve(found)
    handles = []
    for i, column in enumerate(found):
      style: dict[str, Any] = {
        "color": plots.CYCLE[i % len(plots.CYCLE)],
        # Past the last colour, dashes tell columns apart.
        "linestyle": ("-", "--", ":")[i // len(plots.CYCLE) % 3],
      }
      for run in column.members:
        records = [r for r in getattr(run, split) if key in r]
        curves.plot(
          [r["step"] for r in records],
          [r[key] for r in records],
          linewidth=1.6 if len(column.members) == 1 else 1.1,
          **style,
        )
      _point(sizes, column, style["color"])
      handles.append(
        matplotlib.lines.Line2D(
          [], [], marker="o", markersize=6, label=_label(column), **style
        )
      )
    curves.grid(axis="y")
    curves.set_xlabel("step")
    curves.set_ylabel(label)
    curves.set_xlim(left=0)
    curves.xaxis.set_major_formatter(lambda v, _: words.count(v))
    curves.xaxis.set_major_locator(ticker.MaxNLocator(5))
    _finish_sizes(sizes, found)
    drawing.legend(
      handles=handles,
      loc="outside lower center",
      ncols=min(len(handles), 3),
    )
  return drawing


def _curve(found: list[grouping.Column]) -> tuple[str, str, str]:
  """Returns the split and the field to draw, and their label.

  Bits per byte where every run has it: the loss of a token says little where
  tokenizers differ.
  """
  everyone = [run for column in found for run in column.members]
  if found[0].first.config.task == "lm" and all(
    run.valid and "bits_per_byte" in run.valid[-1] for run in everyone
  ):
    return "valid", "bits_per_byte", "validation, bits per byte"
  unit = plots.loss_unit(found[0].first)
  if all(run.valid for run in everyone):
    return "valid", "loss", f"validation loss ({unit})"
  return "train", "loss", f"training loss ({unit})"


def _label(column: grouping.Column) -> str:
  n, name = len(column.members), column.name.replace("$", r"\$")  # no formula
  return name if n == 1 else f"{name} ({n} seeds)"


def _point(axes: Any, column: grouping.Column, color: str) -> None:
  test = column.spread(grouping.quality)
  size = column.spread(grouping.stored_parameters)
  if test.mean is None:
    return
  scale = 100 if column.first.config.task == "classify" else 1
  bars = None
  if test.sd is not None:
    bars = [[scale * test.sd], [scale * test.sd]]
  elif isinstance(column.first.test, runs.ClassifyTest):
    low, high = runs.wilson(
      column.first.test.accuracy, column.first.test.num_examples
    )
    bars = [[scale * (test.mean - low)], [scale * (high - test.mean)]]
  axes.errorbar(
    [size.mean],
    [scale * test.mean],
    yerr=bars,
    xerr=size.sd,
    color=color,
    marker="o",
    markersize=8,
    linewidth=1.4,
    capsize=3,
  )


def _finish_sizes(axes: Any, found: list[grouping.Column]) -> None:
  axes.grid(True)
  axes.set_xlabel("stored parameters")
  if found[0].first.config.task == "lm":
    axes.set_ylabel("test, bits per byte (less is better)")
  else:
    axes.set_ylabel("test accuracy (more is better)")
    axes.yaxis.set_major_formatter(ticker.PercentFormatter())
  axes.set_xlim(left=0)
  axes.margins(x=0.1, y=0.15)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
  axes.xaxis.set_major_formatter(lambda v, _: words.short_count(v))
  if all(grouping.quality(run) is None for c in found for run in c.members):
    plots.nothing(axes, "no run has a test figure yet")
