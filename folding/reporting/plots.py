"""Figures of reports and comparisons: lines, points and bars.

Nothing here imports pyplot, so a notebook keeps its backend and its style.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from folding import files
from folding.errors import ConfigError

try:
  import matplotlib
  import matplotlib.figure
  from matplotlib import ticker
except ValueError as error:  # MPLBACKEND names no backend
  raise ConfigError(
    f"matplotlib cannot start, see MPLBACKEND: {error}"
  ) from None

# Okabe and Ito, "Color universal design", 2008: safe for color blindness.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
GREY, LIGHT = "#666666", "#D5D8DC"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
MAX_NAMED = len(CYCLE)  # further lines are grey and share one name

_STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": GREY,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "figure.facecolor": "white",
  "grid.color": "#E6E6E6",
  "legend.fontsize": 9,
  "legend.frameon": False,
}


Number = int | float


class Point(NamedTuple):
  """A point with error bars, in the units of its axes.

  Attributes:
    x: Position.
    y: Position.
    x_error: Half the length of the horizontal bar.
    y_error: Half the length of the vertical bar.
  """

  x: Number
  y: Number
  x_error: Number = 0
  y_error: Number = 0


@contextlib.contextmanager
def figure() -> Iterator[matplotlib.figure.Figure]:
  """Yields an empty figure; what is drawn inside has the shared style."""
  with matplotlib.rc_context(_STYLE):
    yield matplotlib.figure.Figure(
      figsize=(8, 4.5), dpi=120, layout="constrained"
    )


@contextlib.contextmanager
def saved(path: str, num_axes: int = 1) -> Iterator[Any]:
  """Yields the axes of a new figure, which is written with a legend.

  Args:
    path: The PNG file.
    num_axes: Number of axes, side by side; an array of them if above 1.
  """
  with figure() as drawing:
    yield drawing.subplots(1, num_axes)
    handles, labels = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    save(drawing, path)


def save(drawing: matplotlib.figure.Figure, path: str) -> None:
  """Writes a figure as a PNG, whole or not at all."""
  buffer = io.BytesIO()
  # Without matplotlib's version, equal figures are equal files.
  drawing.savefig(buffer, format="png", metadata={"Software": None})
  files.write_file(path, buffer.getvalue())


def draw_lines(
  axes: Any,
  series: Mapping[str, Sequence[tuple[Number, Number]]],
  *,
  x_label: str,
  y_label: str,
  marks: Mapping[str, Number] | None = None,
) -> None:
  """Draws lines; the first `MAX_NAMED` have a name and a color.

  Args:
    axes: The matplotlib axes.
    series: Points (x, y) by name.
    x_label: Name and unit of the horizontal axis.
    y_label: Name and unit of the vertical axis.
    marks: Positions of dashed vertical lines by name.
  """
  for index, (name, points) in enumerate(series.items()):
    axes.plot(
      [x for x, _ in points],
      [y for _, y in points],
      zorder=3 if index < MAX_NAMED else 2,
      **_style(index, name),
    )
  for name, x in (marks or {}).items():
    axes.axvline(x, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
      name,
      (x, 1),
      (2, 4),
      xycoords=("data", "axes fraction"),
      textcoords="offset points",
      fontsize=9,
      color=GREY,
    )
  if not any(series.values()):
    _say_empty(axes)
  _finish(axes, x_label, y_label)


def draw_points(
  axes: Any, points: Mapping[str, Point | None], *, x_label: str, y_label: str
) -> None:
  """Draws points with error bars, in the colors of `draw_lines`.

  Args:
    axes: The matplotlib axes.
    points: A point by name; None keeps the color of a missing point unused.
    x_label: Name and unit of the horizontal axis.
    y_label: Name and unit of the vertical axis.
  """
  for index, (name, point) in enumerate(points.items()):
    if point is not None:
      axes.errorbar(
        [point.x],
        [point.y],
        xerr=point.x_error,
        yerr=point.y_error,
        marker="o",
        capsize=3,
        **_style(index, name),
      )
  if not any(points.values()):
    _say_empty(axes)
  _finish(axes, x_label, y_label)
  axes.set_xlim(left=0)


def draw_bars(
  axes: Any, bars: Mapping[str, Mapping[str, Number]], *, x_label: str
) -> None:
  """Draws horizontal bars, several for each row.

  Args:
    axes: The matplotlib axes.
    bars: Length by row and by name of bar; all rows have the same names.
    x_label: Name and unit of the horizontal axis.
  """
  names = list(next(iter(bars.values()), {}))
  height = 0.8 / max(1, len(names))
  for index, name in enumerate(names):
    axes.barh(
      [row + (index + 0.5) * height - 0.4 for row in range(len(bars))],
      [lengths[name] for lengths in bars.values()],
      height,
      color=(LIGHT, *CYCLE)[index],
      label=name,
    )
  axes.set_yticks(range(len(bars)), list(bars))
  axes.invert_yaxis()
  _finish(axes, x_label, "")


def _say_empty(axes: Any) -> None:
  axes.text(
    0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=GREY
  )


def _style(index: int, name: str) -> dict[str, Any]:
  """Returns the color and the label of a series."""
  if index < MAX_NAMED:
    # A legend leaves out labels that begin with "_".
    label = name.lstrip("_").replace("$", r"\$")
    return {"color": CYCLE[index], "label": label}
  return {"color": LIGHT, "label": "_" if index > MAX_NAMED else "others"}


def _finish(axes: Any, x_label: str, y_label: str) -> None:
  axes.grid(True)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.12g}"))
