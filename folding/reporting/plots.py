"""The figures of a run. Each function returns one; `save` writes it.

Figures are made without pyplot, so neither the backend nor the style of a
notebook that calls this is touched.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.patches
from matplotlib import ticker

from folding import files
from folding.reporting import runs, words

# Okabe and Ito, "Color universal design", 2008: told apart by nearly all eyes.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY, LIGHT = "#56B4E9", "#D55E00", "#666666", "#D5D8DC"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#000000", GREY)

_STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": GREY,
  "axes.grid": False,
  "axes.labelcolor": "#333333",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "figure.facecolor": "white",
  "font.size": 10,
  "grid.color": "#E6E6E6",
  "legend.frameon": False,
  "legend.fontsize": 9,
  "xtick.color": "#333333",
  "ytick.color": "#333333",
}


@contextlib.contextmanager
def figure() -> Iterator[matplotlib.figure.Figure]:
  """Yields an empty figure in the style of all of ours."""
  with matplotlib.rc_context(_STYLE):
    yield matplotlib.figure.Figure(
      figsize=(8, 4.5), dpi=120, layout="constrained"
    )


def save(drawing: matplotlib.figure.Figure, path: str) -> None:
  """Writes a figure as a PNG, whole or not at all."""
  buffer = io.BytesIO()
  # No version in the file: the same figures give the same bytes.
  drawing.savefig(buffer, format="png", metadata={"Software": None})
  files.write_file(path, buffer.getvalue())


def curves(run: runs.Run) -> matplotlib.figure.Figure:
  """Draws the loss of training and validation over steps."""
  with figure() as drawing:
    axes = drawing.subplots()
    axes.grid(axis="y")
    series = (
      ("train", run.train, {"color": SKY, "linewidth": 1.2}),
      (
        "valid",
        run.valid,
        {
          "color": BLUE,
          "linewidth": 2,
          "marker": "o",
          "markersize": 5,
          "clip_on": False,
        },
      ),
    )
    for label, records, style in series:
      if records:
        steps = [r["step"] for r in records]
        axes.plot(steps, [r["loss"] for r in records], label=label, **style)
    if not run.train and not run.valid:
      nothing(axes, "no loss was logged yet")
    else:
      axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_ylabel(f"loss ({loss_unit(run)})")
    _steps_axis(axes, run)
    _mark_fpp(axes, run, label=True)
  return drawing


def sparsity(run: runs.Run) -> matplotlib.figure.Figure:
  """Draws what FPP did over steps: fractions, and parameters that train."""
  with figure() as drawing:
    top, bottom = drawing.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    records = [r for r in run.train if "sparsity" in r]
    if records:
      steps = [r["step"] for r in records]
      zero = [100 * r["sparsity"] for r in records]
      frozen = [100 * r.get("frozen", 0.0) for r in records]
      free = [100 - z - f for z, f in zip(zero, frozen, strict=True)]
      top.stackplot(
        steps,
        [zero, frozen, free],
        labels=["zero", "frozen", "trainable"],
        colors=[BLUE, ORANGE, LIGHT],
        linewidth=0,
      )
      handles, labels = top.get_legend_handles_labels()
      # In the order of the areas, top to bottom, and beside them.
      top.legend(
        handles[::-1],
        labels[::-1],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
      )
    else:
      nothing(top, "FPP logged nothing yet")
    top.set_ylim(0, 100)
    top.yaxis.set_major_formatter(ticker.PercentFormatter())
    top.set_ylabel("prunable parameters")
    trained = [r for r in records if "trainable" in r]
    bottom.plot(
      [r["step"] for r in trained],
      [r["trainable"] for r in trained],
      color=GREEN,
      linewidth=2,
      drawstyle="steps-post",
    )
    bottom.set_ylim(bottom=0)
    bottom.grid(axis="y")
    bottom.yaxis.set_major_locator(ticker.MaxNLocator(3))
    bottom.yaxis.set_major_formatter(lambda v, _: words.short_count(v))
    bottom.set_ylabel("trainable\nparameters")
    _steps_axis(bottom, run)
    _mark_fpp(top, run, label=True)
    _mark_fpp(bottom, run, label=False)
    drawing.align_ylabels()
  return drawing


def parameters(run: runs.Run) -> matplotlib.figure.Figure:
  """Draws the parameters of the dense twin and those stored, by group."""
  counts = [(g, getattr(run.result.parameters, g)) for g in runs.GROUPS]
  counts = [(g, c) for g, c in counts if c.dense or c.stored]
  with figure() as drawing:
    axes = drawing.subplots()
    for row, (_, c) in enumerate(counts):
      # `row` falls: the first group is at the top, the whole at the bottom.
      axes.barh(-row + 0.19, c.dense, 0.36, color=LIGHT)
      axes.barh(-row - 0.19, c.stored, 0.36, color=BLUE)
      axes.annotate(
        words.count(c.dense),
        (c.dense, -row + 0.19),
        (4, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
        fontsize=9,
      )
      axes.annotate(
        f"{words.count(c.stored)}  (compression "
        f"{words.percent(c.compression)})",
        (c.stored, -row - 0.19),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
      )
    axes.set_yticks(
      [-row for row in range(len(counts))], [g for g, _ in counts]
    )
    axes.tick_params(axis="y", length=0)
    if len(counts) > 1:
      axes.axhline(1.5 - len(counts), color=GREY, linewidth=0.6)
    widest = max((max(c.dense, c.stored) for _, c in counts), default=1)
    axes.set_xlim(0, 1.14 * widest)
    axes.xaxis.set_major_formatter(lambda v, _: words.short_count(v))
    axes.set_xlabel("parameters")
    handles = [
      matplotlib.patches.Patch(color=LIGHT, label="dense twin"),
      matplotlib.patches.Patch(color=BLUE, label="stored"),
    ]
    drawing.legend(handles=handles, loc="outside upper right", ncols=2)
  return drawing


def loss_unit(run: runs.Run) -> str:
  """Returns the unit of the loss."""
  thing = "token" if run.config.task == "lm" else "example"
  return f"nats per {thing}"


def _steps_axis(axes: Any, run: runs.Run) -> None:
  axes.set_xlim(0, run.result.total_steps)
  axes.xaxis.set_major_formatter(lambda v, _: words.count(v))
  axes.set_xlabel("step")


def _mark_fpp(axes: Any, run: runs.Run, label: bool) -> None:
  """Marks where FPP begins and ends, with names above the axes."""
  if not run.prunes or run.prunes_at_once:
    return
  fpp, total = run.config.fpp, run.result.total_steps
  for share, name in (
    (fpp.begin, "FPP begins"),
    (fpp.end, "FPP ends, healing"),
  ):
    axes.axvline(share * total, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    if label:
      axes.annotate(
        name,
        (share, 1),
        (2, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color=GREY,
      )


def nothing(axes: Any, message: str) -> None:
  """Says in empty axes why they are empty."""
  axes.text(
    0.5, 0.5, message, transform=axes.transAxes, ha="center", color=GREY
  )
