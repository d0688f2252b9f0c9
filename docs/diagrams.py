"""Draws the diagrams of the docs: `python docs/diagrams.py [DENSE SMALL]`.

Each is one SVG file in docs/diagrams/, which follows the light or dark theme of
its reader. Text, rectangles and lines only, so that a diff can be read. Given a
dense model and a smaller one, `block.svg` shows these two from then on.
"""

import json
import math
import pathlib
import re
import sys

import numpy as np

import folding
from folding import paths

WIDTH, HEIGHT = 410, 236
CELL = 11  # pixels, with a gap of 1
FOLDER = pathlib.Path(__file__).parent / "diagrams"
RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
SHAPES = FOLDER / "block.json"  # of the arrays that `block` shows

_STYLE = """
svg { --page: #fff; --line: #d0d7de; --text: #1d2328; --soft: #5c6770;
  --grey: #6b7680; --blue: #0072b2; --orange: #d55e00; --green: #00785a }
@media (prefers-color-scheme: dark) { svg { --page: #15191d; --line: #3a424a;
  --text: #e6eaed; --soft: #a3adb6; --grey: #9aa5ae; --blue: #56b4e9;
  --orange: #ffa64d; --green: #35c79c } }
text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif;
  fill: var(--text) }
.title { font-size: 15px; font-weight: 600 }
.soft { fill: var(--soft); font-size: 12px }
.mid { text-anchor: middle } .end { text-anchor: end }
.page { fill: var(--page); stroke: var(--line) }
.grey { fill: var(--grey) } .blue { fill: var(--blue) }
.orange { fill: var(--orange) } .green { fill: var(--green) }
.none { fill: none; stroke: var(--line) }
.rule { stroke: var(--soft); fill: none } .dash { stroke-dasharray: 4 3 }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.curve.blue { stroke: var(--blue); fill: none }
.curve.grey { stroke: var(--grey); fill: none }
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
    return [f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True)]

  def curve(points, color):
    return f'<path class="curve {color}" d="M{" L".join(points)}"/>'

  held, spared = 126, 104
  pruned = [
    *wander(left, first, 88, held),
    f"{second} {held}",
    f"{second} {zero}",
    f"{right} {zero}",
  ]
  kept = [
    *wander(left, first, 124, spared),
    f"{second} {spared}",
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
        f'<rect class="{color}" x="{x}" y="{y - 10}" width="{width}" '
        'height="12" rx="1.5"/>',
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
  names = {  # of the benchmark: color and label
    "dense, all logits": ("grey dash", "all logits"),
    "dense": ("grey", "in blocks"),
    "linear time, G = 1": ("blue", "linear time"),
  }
  left, right, top, bottom = 60, 296, 44, 170
  rows = found["lengths"]
  shortest, longest = (np.log2(rows[n]["length"]) for n in (0, -1))
  low, high = -3, 1.4  # powers of 10, in seconds

  def at(length: float, seconds: float) -> tuple[float, float]:
    x = (np.log2(length) - shortest) / (longest - shortest)
    y = (np.log10(seconds) - low) / (high - low)
    return left + x * (right - left), bottom - y * (bottom - top)

  parts = []
  for power, name in (
    (-3, "1 ms"),
    (-2, "10 ms"),
    (-1, "0.1 s"),
    (0, "1 s"),
    (1, "10 s"),
  ):
    y = at(rows[0]["length"], 10**power)[1]
    parts.append(f'<path class="none" d="M{left} {y:.1f}H{right}"/>')
    parts.append(text(left - 8, round(y) + 4, name, "end soft"))
  for row in rows:
    x = at(row["length"], 1)[0]
    parts.append(text(round(x), bottom + 17, f"{row['length']:,}", "mid soft"))
  parts.append(text(394, bottom + 17, "tokens", "end soft"))
  for name, (color, label) in names.items():
    points = [
      at(row["length"], row["training"]["seconds"][name])
      for row in rows
      if name in row["training"]["seconds"]
    ]
    line = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts.append(f'<path class="curve {color}" d="M{line}"/>')
    x, y = points[-1]
    parts.append(text(round(x) + 7, round(y) + 4, label))
  return diagram(
    "Training: time against sequence length",
    [
      "CPU time of one layer of causal attention, forward and",
      "backward, 8 heads of 32 channels. Linear time needs G = 1.",
    ],
    parts,
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


DIAGRAMS = (block, irc, dwc, low_rank, fpp, sizes, lengths)

if __name__ == "__main__":
  main()
