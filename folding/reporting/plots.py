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
# Visible on white and, with light and dark exchanged, on black.
GREY, LIGHT = "#666666", "#A5AEB6"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
MAX_NAMED = len(CYCLE)  # further lines are grey and share one name

_STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": GREY,
  "axes.formatter.useoffset": False,
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
    y_error: Lengths of the vertical bar below and above.
  """

  x: Number
  y: Number
  x_error: Number = 0
  y_error: tuple[Number, Number] = (0, 0)


@contextlib.contextmanager
def figure(height: float = 4.5) -> Iterator[matplotlib.figure.Figure]:
  """Yields an empty figure; what is drawn inside has the shared style."""
  with matplotlib.rc_context(_STYLE):
    yield matplotlib.figure.Figure(
      figsize=(8, height), dpi=120, layout="constrained"
    )


@contextlib.contextmanager
def saved(path: str, num_axes: int = 1, height: float = 4.5) -> Iterator[Any]:
  """Yields the axes of a new figure, which is written with a legend.

  Args:
    path: The PNG file.
    num_axes: Number of axes, side by side; an array of them if above 1.
    height: Height in inches; the width is 8.
  """
  with figure(height) as drawing:
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

  `marks` are dashed vertical lines.
  """
  for index, (name, points) in enumerate(series.items()):
    axes.plot(
      [x for x, _ in points],
      [y for _, y in points],
      marker="o" if len(points) == 1 else None,
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
  """Draws named points with error bars, in the colors of `draw_lines`.

  A point that is None keeps its color unused.
  """
  texts, marks = [], []
  for index, (name, point) in enumerate(points.items()):
    if point is not None:
      style = _style(index, name)
      axes.errorbar(
        [point.x],
        [point.y],
        xerr=point.x_error,
        yerr=[[error] for error in point.y_error],
        marker="o",
        capsize=3,
        **style,
      )
      marks.append((point.x, point.y))
      if index < MAX_NAMED:
        text = axes.annotate(
          style["label"], marks[-1], (0, 0), textcoords="offset points",
          fontsize=9,
        )  # fmt: skip
        texts.append(text)
  if not marks:
    _say_empty(axes)
  _finish(axes, x_label, y_label)
  axes.margins(x=0.2, y=0.2)
  axes.set_xlim(left=0)
  if texts:
    axes.figure.draw_without_rendering()
    place_names(texts, axes.transData.transform(marks))


def place_names(texts: Sequence[Any], marks: Any) -> None:
  """Moves each text beside its mark, off marks, texts and edges if it can.

  Args:
    texts: Annotations of marks.
    marks: Positions of all marks in pixels, [marks, 2]; the figure has been laid
      out.
  """
  sides = [  # in points, and how the text is aligned with that
    ((9, 0), "left", "center"),  # first: error bars are above and below
    ((-9, 0), "right", "center"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((6, 6), "left", "bottom"),
    ((-6, 6), "right", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, -6), "right", "top"),
  ]
  taken: list[Any] = []

  def move(text: Any, side: Any) -> int:
    """Moves a text to a side of its mark; returns how much it hides there."""
    offset, horizontal, vertical = side
    text.set(position=offset, ha=horizontal, va=vertical)
    box = text.get_window_extent().padded(3)
    on_marks = sum(box.padded(4).contains(*mark) for mark in marks)
    inside = map(text.axes.bbox.containsx, (box.x0, box.x1))
    on_texts = sum(box.overlaps(other) for other in taken)
    return on_marks + 2 * (on_texts + (not all(inside)))

  for text in texts:
    move(text, min(sides, key=lambda side: move(text, side)))
    taken.append(text.get_window_extent())


def draw_bars(
  axes: Any,
  bars: Mapping[str, Mapping[str, Number]],
  *,
  x_label: str,
  notes: Sequence[str] = (),
) -> None:
  """Draws horizontal bars, for each row one in front of the other.

  The longest bar of a row comes first, and all rows have bars of the same
  names. `notes` are written at the left end of the rows.
  """
  for index, name in enumerate(next(iter(bars.values()), {})):
    axes.barh(
      range(len(bars)),
      [lengths[name] for lengths in bars.values()],
      0.8 - 0.4 * index,
      color=(LIGHT, *CYCLE)[index],
      label=name,
    )
  for row, note in enumerate(notes):
    axes.annotate(
      note, (0, row), (4, 0), textcoords="offset points", va="center",
      fontsize=9, bbox={"boxstyle": "round,pad=0.15", "fc": "w", "ec": "none"},
    )  # fmt: skip
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
