"""The figure of the layers: how small each projection of each block is."""

import math
import re
from typing import Any

import matplotlib.figure
from matplotlib import ticker

from folding.reporting import plots, runs


def layers(run: runs.Run) -> matplotlib.figure.Figure:
  """Draws the measured compression of each projection in each block.

  Arrays of the group "other" (norms, biases) are left out: they are never
  compressed.
  """
  blocks, outside = _cells(run.result.layers)
  rows = list(dict.fromkeys((group, name) for group, name, _ in blocks))
  depth = max((block for _, _, block in blocks), default=0) + 1
  with plots.figure() as drawing:
    left, right = drawing.subplots(
      1, 2, width_ratios=(max(depth, 8), max(depth, 8) / 8)
    )
    _heat(
      left,
      [[blocks.get((*row, b)) for b in range(depth)] for row in rows],
      fontsize=9 if depth <= 12 else 7,
    )
    _row_names(left, rows)
    every = 1 if depth <= 16 else 2
    left.set_xticks(range(0, depth, every))
    left.set_xlabel("block")
    image = _heat(right, [[c] for c in outside.values()], fontsize=9)
    right.set_yticks(range(len(outside)), [name for _, name in outside])
    right.yaxis.tick_right()
    right.set_xticks([])
    right.set_xlabel("outside")
    for axes in (left, right):
      # As tall a cell on the right as on the left.
      axes.set_ylim(max(len(rows), len(outside)) - 0.5, -0.5)
      axes.tick_params(length=0)
      axes.spines[:].set_visible(False)
    bar = drawing.colorbar(
      image, ax=[left, right], location="bottom", aspect=50, shrink=0.6
    )
    bar.ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    bar.set_label("compression, measured, in percent: 1 - stored / dense")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
  return drawing


def _cells(
  all_layers: list[runs.Layer],
) -> tuple[
  dict[tuple[str, str, int], runs.Count], dict[tuple[str, str], runs.Count]
]:
  """Returns counts by (group, module, block); (group, module) outside."""
  blocks, outside = {}, {}
  ranked = sorted(all_layers, key=lambda layer: runs.GROUPS.index(layer.group))
  for layer in ranked:
    if layer.group == "other":
      continue
    module = layer.path.rpartition("/")[0] or layer.path
    match = re.search(r"(?:^|/)blocks_(\d+)/(.+)", module)
    if match:
      counts, key = blocks, (layer.group, match[2], int(match[1]))
    else:
      counts, key = outside, (layer.group, module)
    so_far = counts.get(key, runs.Count(0, 0))
    counts[key] = runs.Count(
      so_far.dense + layer.dense, so_far.stored + layer.stored
    )
  return blocks, outside


def _heat(
  axes: Any, counts: list[list[runs.Count | None]], fontsize: int
) -> Any:
  """Draws cells of compression with their figures, and returns the image."""
  values = [[c.compression if c else None for c in row] for row in counts]
  shades = [[math.nan if v is None else v for v in row] for row in values]
  image = axes.imshow(
    shades or [[math.nan]], cmap="Blues", vmin=0, vmax=1, aspect="auto"
  )
  for y, row in enumerate(values):
    for x, value in enumerate(row):
      if value is not None:
        # Whole percents, at most 99 of what is not all: 99.6% is not "100".
        axes.text(
          x,
          y,
          _whole_percent(value),
          ha="center",
          va="center",
          fontsize=fontsize,
          color="white" if value > 0.7 else "#111111",
        )
    # White rules part the cells.
    axes.axhline(y + 0.5, color="white", linewidth=2)
    for x in range(len(row)):
      axes.axvline(x + 0.5, color="white", linewidth=2)
  return image


def _row_names(axes: Any, rows: list[tuple[str, str]]) -> None:
  """Names rows at the left, and their groups farther left."""
  names = [name for _, name in rows]
  axes.set_yticks(range(len(rows)), names)
  groups: dict[str, list[int]] = {}
  for y, (group, _) in enumerate(rows):
    groups.setdefault(group, []).append(y)
  outer = axes.secondary_yaxis("left")
  outer.spines.left.set_position(
    ("outward", 7 * max(map(len, names), default=0))
  )
  outer.spines.left.set_visible(False)
  outer.set_yticks(
    [sum(ys) / len(ys) for ys in groups.values()],
    list(groups),
    rotation=90,
    va="center",
    fontweight="bold",
  )
  outer.tick_params(length=0)
  for ys in list(groups.values())[1:]:
    axes.axhline(ys[0] - 0.5, color="white", linewidth=8)


def _whole_percent(value: float) -> str:
  """Returns a rounded percentage; 100 is only what is wholly gone."""
  return "100" if value == 1 else str(min(round(100 * value), 99))
