"""Draws the diagrams of the docs: `python docs/diagrams.py [DENSE SMALL]`.

Each is one SVG file in docs/diagrams/, which follows the light or dark theme of
its reader. Text, rectangles and lines only, so that a diff can be read. Given a
dense model and a smaller one, `block.svg` shows these two from then on. Charts
show saved benchmarks or tables of docs/measured.md.
"""

import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

import folding
from folding import paths

WIDTH, HEIGHT = 410, 236
CELL = 11  # pixels, with a gap of 1
# Marks of charts, around a point.
CIRCLE = "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"
SQUARE = "m-3.5-3.5h7v7h-7z"
TRIANGLE = "m0-4.5l4.5 8h-9z"
DOWN = "m0 4.5l-4.5-8h9z"
DIAMOND = "m0-5l4.5 5l-4.5 5l-4.5-5z"
FOLDER = pathlib.Path(__file__).parent / "diagrams"
RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
SHAPES = FOLDER / "block.json"  # of the arrays that `block` shows
MEASURED = FOLDER.parent / "measured.md"

_STYLE = """
svg { --page: #fff; --line: #d0d7de; --text: #1d2328; --soft: #5c6770;
  --grey: #6b7680; --blue: #0072b2; --orange: #d55e00; --green: #00785a;
  --pink: #b0578f }
@media (prefers-color-scheme: dark) { svg { --page: #15191d; --line: #3a424a;
  --text: #e6eaed; --soft: #a3adb6; --grey: #9aa5ae; --blue: #56b4e9;
  --orange: #ffa64d; --green: #35c79c; --pink: #e39cc8 } }
text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif;
  fill: var(--text) }
.title { font-size: 15px; font-weight: 600 }
.soft { fill: var(--soft); font-size: 12px }
.mid { text-anchor: middle } .end { text-anchor: end }
.page { fill: var(--page); stroke: var(--line) }
.grey { fill: var(--grey) } .blue { fill: var(--blue) }
.orange { fill: var(--orange) } .green { fill: var(--green) }
.pink { fill: var(--pink) }
.none { fill: none; stroke: var(--line) }
.rule { stroke: var(--soft); fill: none } .dash { stroke-dasharray: 4 3 }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.curve.blue { stroke: var(--blue); fill: none }
.curve.grey { stroke: var(--grey); fill: none }
.curve.orange { stroke: var(--orange); fill: none }
.curve.green { stroke: var(--green); fill: none }
.curve.pink { stroke: var(--pink); fill: none }
.thin { stroke-width: 1.2; opacity: .55 }
.band { opacity: .13 }
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
  """Returns a text; `_` in front of a letter lowers it."""
  parts = content.split("_")
  spans = parts[0] + "".join(
    f'<tspan dy="3" font-size="75%">{part[0]}</tspan>'
    f'<tspan dy="-3">{part[1:]}</tspan>'
    for part in parts[1:]
  )
  return f'<text x="{x:g}" y="{y:g}" class="{kind}">{spans}</text>'


def cells(x: float, y: float, tones: np.ndarray, kinds: str | list[str]) -> str:
  """Returns a matrix of squares.

  Args:
    x: Left edge in pixels.
    y: Upper edge in pixels.
    tones: Opacity of each square, [rows, columns]; 0 is an empty square.
    kinds: Color of all squares, or of each row.
  """
  rows, columns = tones.shape
  kinds = [kinds] * rows if isinstance(kinds, str) else kinds
  found = []
  for i in range(rows):
    for j in range(columns):
      at = f'x="{x + CELL * j:g}" y="{y + CELL * i:g}"'
      size = f'width="{CELL - 1}" height="{CELL - 1}" rx="1.5"'
      tone = tones[i, j]
      look = (
        f'class="{kinds[i]}" opacity="{tone:.2f}"' if tone else 'class="none"'
      )
      found.append(f"<rect {at} {size} {look}/>")
  return "".join(found)


def arrow(x: float, y: float, length: float = 30) -> str:
  """Returns an arrow to the right."""
  end = x + length
  return (
    f'<path class="rule" d="M{x:g} {y:g}H{end:g}m-6-5 6 5-6 5" '
    'stroke-width="1.5"/>'
  )


def brace(x: float, top: float, bottom: float, name: str) -> str:
  """Returns a bracket on the left of rows, with its name."""
  middle = (top + bottom) / 2
  return f'<path class="rule" d="M{x:g} {top:g}h-5V{bottom:g}h5"/>' + text(
    x - 9, middle + 4, name, "end"
  )


def diagram(
  title: str,
  about: list[str],
  parts: list[str],
  size: tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
  """Returns an SVG file with a title above and lines of text below."""
  width, height = size
  lines = [
    text(16, height - 14 - 17 * (len(about) - 1 - i), line, "soft")
    for i, line in enumerate(about)
  ]
  plain = title.replace("_", "")
  return "\n".join(
    [
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
      f'width="{width}" height="{height}" role="img" aria-label="{plain}">',
      f"<style>{_STYLE}</style>",
      f'<rect class="page" x=".5" y=".5" width="{width - 1}" '
      f'height="{height - 1}" rx="8"/>',
      text(16, 27, title, "title"),
      *parts,
      *lines,
      "</svg>\n",
    ]
  )


class Axis(NamedTuple):
  """Where values are on one axis of a chart.

  Attributes:
    start: Pixel of the value `low`.
    end: Pixel of the value `high`.
    low: Value at one end.
    high: Value at the other end.
    scale: Such as `math.log2`.
  """

  start: float
  end: float
  low: float
  high: float
  scale: Callable[[float], float] = float

  def __call__(self, value: float) -> float:
    low, high, at = map(self.scale, (self.low, self.high, value))
    return self.start + (at - low) / (high - low) * (self.end - self.start)


def chart(
  x: Axis, y: Axis, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str]
) -> list[str]:
  """Returns horizontal lines, and the labels of both axes."""
  parts = []
  for value, name in y_ticks.items():
    at = y(value)
    parts.append(f'<path class="none" d="M{x.start} {at:.1f}H{x.end}"/>')
    parts.append(text(x.start - 8, round(at) + 4, name, "end soft"))
  for value, name in x_ticks.items():
    parts.append(text(round(x(value)), y.start + 18, name, "mid soft"))
  return parts


def curve(
  points: Sequence[tuple[float, float]], kind: str, mark: str = ""
) -> str:
  """Returns a line through points in pixels, with a mark at each."""
  line = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
  color = kind.split()[0]
  marks = [
    f'<path class="{color}" d="M{x:.1f} {y:.1f}{mark}"/>' for x, y in points
  ]
  return f'<path class="curve {kind}" d="M{line}"/>' + "".join(
    marks * bool(mark)
  )


def level(x: Axis, y: float) -> str:
  """Returns the line of the dense model."""
  return f'<path class="rule" d="M{x.start} {y:.1f}H{x.end}"/>'


def bar(x: float, y: float, width: float, color: str) -> str:
  """Returns a horizontal bar beside the text at its height."""
  return (
    f'<rect class="{color}" x="{x:g}" y="{y - 10:g}" width="{round(width)}" '
    'height="12" rx="1.5"/>'
  )


def measured(header: str) -> list[list[str]]:
  """Returns the cells of the table of docs/measured.md with this header."""
  page = MEASURED.read_text(encoding="utf-8")
  body = page.split(f"{header} |\n", 1)[1].split("\n\n", 1)[0]
  return [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in body.splitlines()[1:]
  ]


def signed(number: int) -> str:
  """Returns a number with its sign."""
  return f"{number:+d}".replace("-", "−")


def numbers(cell: str) -> list[float]:
  """Returns the numbers of a cell, with their signs."""
  return [float(x) for x in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]


def irc() -> str:
  """Returns the diagram of Identical Row Compression."""
  rng = np.random.default_rng(3)
  top, rows, groups = 66, 8, 2
  dense = rng.uniform(0.2, 1, (rows, 7))
  means = rng.uniform(0.25, 1, (groups, 7))
  folded = np.repeat(means, rows // groups, axis=0)
  colors = ["blue"] * 4 + ["orange"] * 4
  bottom = top + rows * CELL - 1
  return diagram(
    "IRC: one row per group in W_Q and W_K",
    [
      "A query or key of a head is G numbers, not K, and attention",
      "multiplies only those. G = 1 attends in linear time.",
    ],
    [
      text(78, 54, "dense head", "mid"),
      brace(38, top, bottom, "K"),
      cells(40, top, dense, "grey"),
      text(78, bottom + 16, "D", "mid"),
      arrow(131, top + 44),
      text(211, 54, "identical rows", "mid"),
      cells(173, top, folded, colors),
      arrow(262, top + 44),
      text(356, 54, "stored", "mid"),
      brace(316, top + 33, top + 33 + 2 * CELL - 1, "G"),
      cells(318, top + 33, means, ["blue", "orange"]),
    ],
  )


def dwc() -> str:
  """Returns the diagram of Diagonal Weight Compression."""
  rng = np.random.default_rng(1)
  top, size = 66, 8
  dense = rng.uniform(0.2, 1, (size, size))
  values = rng.uniform(0.4, 1, size)
  bottom = top + size * CELL - 1
  return diagram(
    "DWC: the diagonal of W_V",
    [
      "Each channel of the input is scaled by one number, and",
      "W_O mixes the channels: D numbers instead of D × D.",
    ],
    [
      text(84, 54, "dense W_V", "mid"),
      brace(38, top, bottom, "D"),
      cells(40, top, dense, "grey"),
      text(84, bottom + 16, "D", "mid"),
      arrow(144, top + 44),
      text(234, 54, "diagonal", "mid"),
      cells(190, top, np.diag(values), "blue"),
      arrow(294, top + 44),
      text(366, 54, "stored", "mid"),
      brace(359, top, bottom, "D"),
      cells(361, top, values[:, None], "blue"),
    ],
  )


def low_rank() -> str:
  """Returns the diagram of low-rank values."""
  rng = np.random.default_rng(2)
  top, d, k, r = 66, 8, 5, 2

  def pair(x, rank, color):
    left, right = rng.uniform(0.3, 1, (d, rank)), rng.uniform(0.3, 1, (rank, d))
    y = top + (d - rank) * CELL / 2
    x_out = x + rank * CELL + 16
    return [
      cells(x, top, left, color),
      text(x + rank * CELL + 8, top + d * CELL / 2 + 4, "·", "mid"),
      cells(x_out, y, right, color),
      text(x + rank * CELL / 2, 54, "W_V", "mid"),
      text(x_out + d * CELL / 2, 54, "W_O", "mid"),
    ]

  return diagram(
    "Low-rank values: r of K directions per head",
    [
      "For trained models: the r directions that a head writes most,",
      "measured on your text. W_V is [D, H, r], W_O is [H, r, D].",
    ],
    [
      brace(38, top, top + d * CELL - 1, "D"),
      *pair(40, k, "grey"),
      text(40 + k * CELL / 2, top + d * CELL + 15, "K", "mid"),
      arrow(216, top + d * CELL / 2),
      *pair(262, r, "green"),
      text(262 + r * CELL / 2, top + d * CELL + 15, "r", "mid"),
    ],
  )


def fpp() -> str:
  """Returns the diagram of the life of a weight under FPP."""
  rng = np.random.default_rng(5)
  left, top, right, bottom, zero = 34, 64, 394, 164, 150
  first, second = 140, 252  # mask updates
  bands = [(left, first, "grey", "trains"), (first, second, "orange", "frozen")]

  def wander(x_from, x_to, y_from, y_to):
    xs = np.linspace(x_from, x_to, 24)
    noise = np.cumsum(rng.normal(0, 3.2, 24))
    noise -= np.linspace(noise[0], noise[-1], 24)  # a bridge between both ends
    ys = np.linspace(y_from, y_to, 24) + noise
    return list(zip(xs, ys, strict=True))

  held, spared = 126, 104
  pruned = [
    *wander(left, first, 88, held),
    (second, held),
    (second, zero),
    (right, zero),
  ]
  kept = [
    *wander(left, first, 124, spared),
    (second, spared),
    *wander(second, right, spared, 84),
  ]
  return diagram(
    "FPP: freeze what looks unused, then zero it",
    [
      "Weights that activations or gradients rank lowest are frozen",
      "(suspected). If the next update ranks them low too: zero.",
    ],
    [
      *(
        f'<rect class="band {color}" x="{a}" y="{top - 20}" width="{b - a}" '
        f'height="{bottom - top + 20}"/>'
        + text((a + b) / 2, top - 5, name, "mid")
        for a, b, color, name in bands
      ),
      f'<path class="rule" d="M{left} {zero}H{right}"/>',
      text(left - 7, zero + 4, "0", "end"),
      f'<g transform="rotate(-90 24 {zero - 18})">'
      + text(24, zero - 18, "value", "soft")
      + "</g>",
      *(
        f'<path class="rule dash" d="M{x} {top - 20}V{bottom}"/>'
        for x in (first, second)
      ),
      text(first, bottom + 15, "mask update", "mid soft"),
      text(second, bottom + 15, "mask update", "mid soft"),
      text(right, bottom + 15, "steps", "end soft"),
      curve(kept, "grey"),
      curve(pruned, "blue"),
      text(right, top + 6, "trains again", "end"),
      text(right, zero - 8, "exactly zero", "end"),
    ],
  )


def sizes() -> str:
  """Returns bars of the exported files of `benchmarks.one_model`."""
  found = json.loads((RESULTS / "one_model.json").read_text(encoding="utf-8"))
  rows = {row["name"]: row for row in found["rows"]}
  names = ("dense", *(f"{n}% smaller" for n in (30, 50, 70, 80)))
  shown = [(name, rows[name], "ONNX") for name in names]
  shown.append(("70%, int8", rows["70% smaller"], "ONNX int8"))
  columns = [  # left end, title, format, values
    (112, "MB", ".0f", [r["file_bytes"][k] / 1e6 for _, r, k in shown]),
    (226, "ms", ".1f", [1e3 * r["seconds"][k]["8 x 64"] for _, r, k in shown]),
  ]
  top, step, longest = 76, 19, 72
  parts = [text(394, 54, "accuracy", "end soft")]
  for x, title, style, values in columns:
    parts.append(text(x, 54, title, "soft"))
    for i, value in enumerate(values):
      width = round(longest * value / values[0])
      color, y = "blue" if i else "grey", top + step * i
      parts += [
        bar(x, y, width, color),
        text(x + width + 5, y, format(value, style)),
      ]
  for i, (name, row, kind) in enumerate(shown):
    parts.append(text(104, top + step * i, name, "end"))
    accuracy = f"{100 * row['accuracy'][kind]:.1f}%"
    parts.append(text(394, top + step * i, accuracy, "end"))
  return diagram(
    "MiniLM on SST-2: one ONNX file per row",
    [
      "File size, time of 8 texts of 64 tokens on two CPU cores, and",
      "test accuracy. One seed.",
    ],
    parts,
  )


def lengths() -> str:
  """Returns lines of the training times of `benchmarks.attention`."""
  found = json.loads((RESULTS / "attention.json").read_text(encoding="utf-8"))
  names = {  # of the benchmark: kind of line, mark and label
    "dense, all logits": ("grey dash", CIRCLE, "all logits"),
    "dense": ("grey", SQUARE, "in blocks"),
    "linear time, G = 1": ("blue", DIAMOND, "linear time"),
  }
  rows = found["lengths"]
  tokens = [row["length"] for row in rows]
  x = Axis(60, 296, tokens[0], tokens[-1], math.log2)
  y = Axis(170, 44, 1e-3, 25, math.log10)
  seconds = {1e-3: "1 ms", 1e-2: "10 ms", 0.1: "0.1 s", 1: "1 s", 10: "10 s"}
  parts = chart(x, y, {n: f"{n:,}" for n in tokens}, seconds)
  parts.append(text(394, 188, "tokens", "end soft"))
  for name, (kind, mark, label) in names.items():
    points = [
      (x(row["length"]), y(row["training"]["seconds"][name]))
      for row in rows
      if name in row["training"]["seconds"]
    ]
    end = [round(at) for at in points[-1]]
    parts += [curve(points, kind, mark), text(end[0] + 9, end[1] + 4, label)]
  return diagram(
    "Training: time against sequence length",
    [
      "CPU time of one layer of causal attention, forward and",
      "backward. Grey: exact attention. Linear time needs G = 1.",
    ],
    parts,
  )


def ranks() -> str:
  """Returns what a rank keeps of each layer, from `docs/ranks.py`."""
  found = json.loads((FOLDER / "ranks.json").read_text(encoding="utf-8"))
  parts = []
  for left, name, title, x_title, color in (
    (64, "logits", "logits: W_Q and W_K", "groups G per head", "blue"),
    (474, "values", "output: W_V and W_O", "rank r per head", "green"),
  ):
    layers = found[name]
    x = Axis(left, left + 320, 1, len(layers[0]), math.log2)
    y = Axis(226, 76, 0, 1)
    powers = [2**n for n in range(len(layers[0]).bit_length())]
    shares = {n / 4: f"{n / 4:.0%}" for n in range(5)}
    parts += chart(x, y, {n: str(n) for n in powers}, shares)
    parts += [
      text(left, 56, title),
      text(left + 160, 262, x_title, "mid soft"),
    ]
    for n, kept in reversed(list(enumerate(layers))):
      points = [(x(1 + i), y(share)) for i, share in enumerate(kept)]
      first, last = n == 0, n == len(layers) - 1
      kind = "dash" if first else "" if last else "thin"
      parts.append(curve(points, f"{color} {kind}".strip()))
    for i, (kind, label) in enumerate(
      (("dash", "first layer"), ("", "last layer"), ("thin", "layers between"))
    ):
      at = 172 + 19 * i
      line = [(left + 192, at - 4), (left + 216, at - 4)]
      parts.append(curve(line, f"{color} {kind}".strip()))
      parts.append(text(left + 224, at, label))
  return diagram(
    "What a rank keeps of each layer of MiniLM",
    [
      "Share of the variance of the logits (left) and of the output of attention "
      "on held-out text (right), before any fit.",
    ],
    parts,
    (820, 300),
  )


def shares() -> str:
  """Returns the shares that kinds of parameters lose, beside the claims."""
  rows = measured("| | dense baseline | quickstart | small dense model")
  found = {row[0]: numbers(row[2])[-1:] for row in rows}
  page = MEASURED.read_text(encoding="utf-8")
  [sentence] = re.findall(r"^At (\d.*?) of the embedding", page, re.S | re.M)
  all_of, *ranges = (numbers(part) for part in sentence.split("%"))
  groups = (  # name, claimed, percent from scratch, percent of MiniLM
    ("W_Q, W_K, W_V", 99, found["W_Q, W_K, W_V"], ranges[0]),
    (
      "linear layers",
      70,
      found["linear layers (W_O, feed-forward)"],
      ranges[1],
    ),
    ("embedding", None, found["embedding"], ranges[2]),
    ("all", 70, found["stored parameters"], all_of),
  )
  x, y, parts = Axis(150, 450, 0, 100), 74, []
  for name, claim, *kinds in groups:
    parts.append(text(16, y + 10, name))
    for label, percent in zip(("from scratch", "MiniLM"), kinds, strict=True):
      low, high = abs(percent[0]), abs(percent[-1])
      shown = f"{low:.0f} to {high:.0f}%" if low < high else f"{low:.0f}%"
      parts += [
        bar(x(0), y, x(low) - x(0), "blue"),
        f'<g opacity=".5">{bar(x(low), y, x(high) - x(low), "blue")}</g>',
        text(464, y, f"{shown} {label}"),
      ]
      y += 19
    if claim:
      at = round(x(claim))
      parts += [
        f'<path class="rule dash" d="M{at} {y - 54}V{y - 12}"/>',
        text(at, y - 58, f"claimed: {claim}%", "mid soft"),
      ]
    y += 24
  return diagram(
    "Parameters that leave, and what the abstract claims",
    [
      "From scratch: the quickstart, whose pruned weights are zeros. MiniLM: "
      "classifiers after",
      "fine-tuning, 70% smaller by the plan. The light part is the range over tasks.",
    ],
    parts,
    (620, y + 24),
  )


def scratch() -> str:
  """Returns the change to dense by method and size, of models from scratch."""
  names = {  # first cell: color, mark and label
    "ours": ("blue", CIRCLE, "ours"),
    "FPP alone, single weights": ("orange", TRIANGLE, "FPP alone"),
    "gradual magnitude, single weights": (
      "green",
      DIAMOND,
      "gradual magnitude",
    ),
    "SparseGPT after training, single weights": ("pink", DOWN, "SparseGPT"),
    "a narrower dense model": ("grey", SQUARE, "a narrower dense model"),
  }
  rows = measured("| | smaller arrays | 30% | 50% | 70% | 80%")
  found = {row[0]: [numbers(cell) for cell in row[2:]] for row in rows}
  sizes, parts = (30, 50, 70, 80), []
  for panel, (left, title, unit, worst, best, step) in enumerate(
    (
      (64, "classifiers: points of accuracy", "", -3, 1, 1),
      (474, "language models: perplexity", "%", 20, -5, -5),
    )
  ):
    x, y = Axis(left, left + 320, 25, 85), Axis(256, 76, worst, best)
    ticks = range(worst, best + step, step)
    parts += chart(
      x,
      y,
      {n: f"−{n}%" for n in sizes},
      {n: signed(n) + unit if n else "dense" for n in ticks},
    )
    parts += [text(left, 56, title), level(x, y(0))]
    for name, (color, mark, _) in reversed(names.items()):
      points = [
        (x(n), y(cell[panel]))
        for n, cell in zip(sizes, found[name], strict=True)
        if len(cell) > panel
      ]
      parts.append(curve(points, color, mark))
  at = 64
  for color, mark, label in names.values():
    parts += [curve([(at, 300)], color, mark), text(at + 10, 304, label)]
    at += 42 + 7 * len(label)
  return diagram(
    "From scratch, 200 steps: change to dense by parameters removed",
    [
      "Means of four classifiers and of two language models, three seeds each. "
      "Up is better in both.",
    ],
    parts,
    (820, 344),
  )


def longer() -> str:
  """Returns the change to dense after more steps, of models from scratch."""
  header = "| | | 200 steps | 400 | 800 | 1,600"
  x, y = Axis(64, 264, 200, 1600, math.log2), Axis(256, 76, 15, -10)
  steps = (200, 400, 800, 1600)
  parts = chart(
    x,
    y,
    {n: f"{n:,}" for n in steps},
    {n: f"{signed(n)}%" if n else "dense" for n in range(15, -15, -5)},
  )
  parts += [
    text(64, 56, "language models: perplexity"),
    text(164, 294, "steps", "mid soft"),
    level(x, y(0)),
  ]
  name = ""
  for row in measured(header):
    name = row[0] or name
    if row[1] == "perplexity to dense":
      change = [numbers(cell)[0] for cell in row[2:]]
      points = [(x(n), y(at)) for n, at in zip(steps, change, strict=True)]
      parts.append(curve(points, "blue", CIRCLE))
      parts.append(text(274, round(points[-1][1]) + 4, name))
  header = "| | TREC | Subj | MR | SST-2 | CR | MPQA | AG News | SST-5 | mean"
  sets = [cell.strip() for cell in header.split("|")[2:]]
  dense, small = ([numbers(c)[0] for c in row[1:]] for row in measured(header))
  x, top, bottom = Axis(500, 790, -3, 3), 76, 256
  parts.append(text(500, 56, "classifiers after 800 steps: points of accuracy"))
  for n in range(-3, 4):
    at = round(x(n))
    kind = "none" if n else "rule"
    parts += [
      f'<path class="{kind}" d="M{at} {top}V{bottom}"/>',
      text(at, 274, signed(n) if n else "dense", "mid soft"),
    ]
  for i, (name, before, after) in enumerate(
    zip(sets, dense, small, strict=True)
  ):
    at = top + 10 + 20 * i
    parts += [
      text(490, at + 4, name, "end"),
      curve([(x(0), at), (x(after - before), at)], "blue"),
      curve([(x(after - before), at)], "blue", CIRCLE),
    ]
  return diagram(
    "From scratch, more steps: change to dense of a 70% smaller model",
    ["One seed. Up (left) and to the right (right) is better."],
    parts,
    (820, 330),
  )


def trained() -> str:
  """Returns the accuracy of MiniLM on four tasks as it gets smaller."""
  header = "| | allocated parameters | TREC | Subj | MR | SST-2 | change"
  tasks = [cell.strip() for cell in header.split("|")[3:-1]]
  dense, *small = measured(header)[:4]
  rows = [row[2:-1] for row in (dense, *small)]
  saved = [0] + [numbers(row[0])[0] for row in small]
  x, y = Axis(64, 440, -6, 84), Axis(286, 54, 82, 98)
  parts = chart(
    x,
    y,
    {n: f"−{n:.0f}%" if n else "dense" for n in saved},
    {n: f"{n}%" for n in range(82, 100, 4)},
  )
  for i, task in enumerate(tasks):
    cells = [numbers(row[i]) for row in rows]
    points = [
      (x(n), y(mean)) for n, (mean, _) in zip(saved, cells, strict=True)
    ]
    for (at, _), (mean, error) in zip(points, cells, strict=True):
      ends = f"M{at:.1f} {y(mean - error):.1f}V{y(mean + error):.1f}"
      parts.append(f'<path class="rule" d="{ends}"/>')
    parts += [
      curve(points, "blue"),
      curve(points[1:], "blue", CIRCLE),
      curve(points[:1], "grey", SQUARE),
      text(452, round(points[-1][1]) + 4, task),
    ]
  return diagram(
    "Fine-tuned MiniLM: test accuracy by parameters removed",
    ["Three seeds. Bars: one standard deviation on either side."],
    parts,
    (520, 340),
  )


def compact() -> str:
  """Returns bars of the training costs of `benchmarks.compact`."""
  found = json.loads((RESULTS / "compact.json").read_text(encoding="utf-8"))
  runs, parts, y = found["runs"], [], 66
  for name, unit, label in (
    ("seconds", "s", "wall-clock"),
    ("cpu_seconds", "s", "CPU time"),
    ("watt_hours", "Wh", "energy"),
  ):
    parts.append(text(16, y + 9, label))
    for run, color in (("dense", "grey"), ("compact", "blue")):
      value = runs[run][name]
      width = 220 * value / runs["dense"][name]
      parts += [
        bar(104, y, width, color),
        text(round(110 + width), y, f"{value:.3g} {unit}"),
      ]
      y += 19
    y += 10
  accuracies = [f"{100 * runs[run]['test_accuracy']:.1f}%" for run in runs]
  return diagram(
    "Training with train.compact",
    [
      f"{found['steps']:,} steps, 70% smaller. Grey: dense, test accuracy "
      f"{accuracies[0]}.",
      f"Blue: compact, {accuracies[1]}. Energy is CodeCarbon's estimate.",
    ],
    parts,
    (WIDTH, y + 38),
  )


def block() -> str:
  """Returns the matrices of a block before and after compression."""
  shapes = json.loads(SHAPES.read_text(encoding="utf-8"))

  def found(name: str, path: str) -> list[list[int]]:
    return [w for key, w in shapes[name].items() if re.search(path, key)]

  def count(name: str, path: str) -> int:
    return sum(map(math.prod, found(name, path)))

  def span(name: str, path: str, axis: int) -> str:
    lengths = [shape[axis] for shape in found(name, path)]
    low, high = f"{min(lengths):,}", f"{max(lengths):,}"
    return low if low == high else f"{low} to {high}"

  side, top = 44, 112  # of a matrix [D, D]; the upper edge of all
  bottom = top + 4 * side
  matrices = [  # path, left end, height, color, name
    ("^embed", 36, 4 * side, "green", ""),
    ("attn/q", 118, side, "blue", "W_Q"),
    ("attn/k", 170, side, "blue", "W_K"),
    ("attn/v", 222, side, "green", "W_V"),
    ("attn/o", 274, side, "green", "W_O"),
    ("mlp/up", 348, 4 * side, "orange", "up"),
    ("mlp/down", 400, 4 * side, "orange", "down"),
  ]
  labels = [  # path, middle, upper edge, path and axis of a length, unit, method
    ("^embed", 58, bottom, "^embed/", 1, "rank {}", "low rank"),
    ("attn/[qk]", 166, top + side, "attn/q", 2, "{} rows", "IRC"),
    ("attn/[vo]", 270, top + side, "attn/v", 2, "rank {}", "low rank"),
    ("mlp", 396, bottom, "mlp/up", 1, "{} neurons", "pruning"),
  ]
  parts = []
  for name, shift in (("dense", 0), ("small", 448)):
    heads = f"attention: {span(name, 'attn/q', 1)} heads"
    drawn = [
      text(36, 56, "after" if shift else "before", "title"),
      text(58, top - 26, "embedding", "mid"),
      text(218, top - 26, heads, "mid"),
      text(396, top - 26, "MLP", "mid"),
      arrow(88, top + side / 2, 22),
      arrow(326, top + side / 2, 14),
    ]
    for path, x, height, color, title in matrices:
      kept = count(name, path) / count("dense", path)
      # The embedding loses columns, the others rows.
      width, high = (kept, 1) if path == "^embed" else (1, kept)
      drawn += [
        text(x + side / 2, top - 8, title, "mid soft"),
        f'<rect class="rule dash" x="{x}" y="{top}" width="{side}" '
        f'height="{height}"/>',
        f'<rect class="{color if shift else "grey"}" x="{x}" y="{top}" '
        f'width="{side * width:.1f}" height="{height * high:.1f}"/>',
      ]
    for path, x, y, one, axis, unit, method in labels:
      after, before = count(name, path), count("dense", path)
      length = unit.format(span(name, one, axis))
      lines = [(length, ""), (f"{before / 1e6:.1f} million", "soft")]
      if shift:
        share = f"−{1 - after / before:.0%}"
        lines = [(method, ""), (length, "soft"), (share, "title")]
      drawn += [
        text(x, y + 19 + 18 * i, line, f"mid {kind}")
        for i, (line, kind) in enumerate(lines)
      ]
    parts.append(f'<g transform="translate({shift})">{"".join(drawn)}</g>')
  before, after = (count(name, "") for name in ("dense", "small"))
  layers = len(found("dense", "attn/q"))
  line = f'<path class="rule" d="M454 48V{bottom + 60}" opacity=".4"/>'
  return diagram(
    f"MiniLM from {before / 1e6:.1f} to {after / 1e6:.1f} million parameters",
    [
      f"Shares are of all {layers} layers, removed heads included. Areas are to "
      "scale, but the embedding is cut off below. A plan chose the sizes per layer.",
      "From scratch: IRC keeps one row per head, DWC the diagonal of W_V, and FPP "
      "removes neurons during training.",
    ],
    [*parts, line],
    (924, 406),
  )


def save_shapes(dense: str, small: str) -> None:
  """Writes the shapes that `block` shows, of what `folding.load` reads."""
  shapes = {}
  for name, source in (("dense", dense), ("small", small)):
    left = paths.flatten(folding.load(source).params)
    drawn = [path for path in left if re.search("^embed|kernel", path)]
    shapes[name] = {path: left.pop(path).shape for path in drawn}
    shapes[name]["others"] = [sum(w.size for w in left.values())]
  SHAPES.write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")


def main() -> None:
  """Writes the files."""
  if sys.argv[1:]:
    save_shapes(*sys.argv[1:])
  for function in DIAGRAMS:
    path = FOLDER / f"{function.__name__}.svg"
    path.write_text(function(), encoding="utf-8")


DIAGRAMS = (
  block, irc, dwc, low_rank, fpp, sizes, lengths, ranks, shares, scratch,
  longer, trained, compact,
)  # fmt: skip

if __name__ == "__main__":
  main()
