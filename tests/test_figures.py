"""Figures of the pages are those of the saved benchmarks, to the digit."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _saved(name):
  path = ROOT / "benchmarks" / "results" / f"{name}.json"
  return json.loads(path.read_text(encoding="utf-8"))


def _one_model():
  """Yields (page, text before the figures, saved figures) of `one_model`."""
  rows = {row["name"]: row for row in _saved("one_model")["rows"]}
  kinds, shape = ("ONNX", "ONNX int8"), "8 x 64"

  def of(name):
    row = rows[name]
    return [
      *(100 * row["accuracy"][kind] for kind in kinds),
      row["allocated"] / 1e6,
      *(row["file_bytes"][kind] / 1e6 for kind in kinds),
      *(1e3 * row["seconds"][kind][shape] for kind in kinds),
    ]

  labels = {
    "dense": "| dense |",
    "30% smaller": "| 30% smaller |",
    "50% smaller": "| 50% smaller |",
    "70% smaller": "| **70% smaller** |",
    "80% smaller": "| 80% smaller |",
    "reading of the paper": "| reading of the paper, 70% zeros or folded |",
    "SparseGPT": "| SparseGPT, 70% zeros or removed tokens |",
  }
  for name, label in labels.items():
    yield "README.md", label, of(name)
  dense, small = of("dense"), of("70% smaller")
  times = [dense[5] / x for x in (small[5], small[6], dense[6])]
  yield (
    "README.md",
    "**MiniLM on SST-2",
    [dense[3], *small[3:5], *times, dense[0], *small[:2]],
  )
  yield (
    "docs/choose.md",
    "--format=onnx --dtype=int8` |",
    [small[4], dense[3], times[1]],
  )
  sizes = ["dense"] + [f"{n}% smaller" for n in (30, 50, 70, 80)]
  yield "docs/choose.md", "| test accuracy |", [of(x)[0] for x in sizes]
  yield (
    "docs/choose.md",
    "| ms for 8 x 64 tokens in ONNX Runtime |",
    [of(x)[5] for x in sizes],
  )
  for n in (30, 50, 70, 80):
    before = f"| the plan | {n}% |"
    yield "docs/measured.md", before, [of(f"{n}% smaller")[0]]


def _embeddings():
  rows = {(r["name"], r["runtime"]): r for r in _saved("embeddings")["rows"]}
  dense = rows["dense", "ONNX"]
  for name in ("dense", "50% smaller", "70% smaller"):
    for runtime, label in (("ONNX", name), ("ONNX int8", f"{name}, int8")):
      row = rows[name, runtime]
      size = row["parameters"] / 1e6
      numbers = [row["file_bytes"] / 1e6]
      for test, value in row["spearman"].items():
        numbers.append(value)
        if row is not dense:
          numbers.append(value / dense["spearman"][test])
      numbers.append(row["texts_per_second"][1])
      if runtime == "ONNX":
        numbers.append(rows[name, "JAX"]["texts_per_second"][1])
      yield (
        "docs/how-to/embed.md",
        f"| {label} | {size:.1f} |",
        numbers,
      )


def _speed():
  lengths = {x["length"]: x for x in _saved("attention")["lengths"]}
  some = [lengths[n] for n in (512, 4096, 16384)]
  for before, name in (
    ("| forward, 512 / 4,096 / 16,384 tokens |", "forward"),
    ("| forward and backward, 512 / 4,096 / 16,384 tokens |", "training"),
    ("| decoding a token after 512 / 4,096 / 16,384 |", "decode"),
  ):
    yield "docs/measured.md", before, [x[name]["ratio"] for x in some]
  shrink = _saved("shrink")
  shapes = shrink["by_shape"]
  for before, program, value in (
    ("| forward, 2 x 64 / 8 x 128 tokens |", "forward", ("speedup", "ratio")),
    ("| training step, 2 x 64 / 8 x 128 |", "step", ("speedup", "ratio")),
    (
      "| peak memory of forward, 2 x 64 / 8 x 128 |",
      "forward",
      ("peak_bytes", "ratio"),
    ),
    (
      "| peak memory of a step, 2 x 64 / 8 x 128 |",
      "step",
      ("peak_bytes", "ratio"),
    ),
  ):
    numbers = [_at(shape[program], value) for shape in shapes]
    yield "docs/measured.md", before, numbers
  yield (
    "docs/measured.md",
    "| parameters, file size |",
    [shrink["parameters"]["ratio"]],
  )
  decode = _saved("decode")["lengths"]
  kinds = "folded, G = 4", "folded, G = 1", "linear time, G = 1"
  for before, length, value in (
    (
      "constant state, over a dense KV cache | 4,096 tokens |",
      "4096",
      ("speed", "ratio"),
    ),
    ("| | 16,384 tokens |", "16384", ("speed", "ratio")),
    ("| bytes of the cache, 4,096 tokens |", "4096", ("cache_ratio",)),
  ):
    numbers = [_at(decode[length][kind], value) for kind in kinds]
    yield "docs/measured.md", before, numbers
  for before, name in (
    ("FPP over one without | between / at mask updates |", "fpp_step"),
    ("eight simulated devices | between / at mask updates |", "fpp_step_8"),
  ):
    found = _saved(name)
    numbers = [found[x]["ratio"] for x in ("held", "check")]
    yield "docs/measured.md", before, numbers


def _quickstart():
  """Yields figures that follow from the tables of two pages."""
  measured, embed = (
    (ROOT / "docs" / page).read_text(encoding="utf-8")
    for page in ("measured.md", "how-to/embed.md")
  )

  def row(text, name):
    cells = text.partition(f"| {name} |")[2].partition("\n")[0].split("|")
    return [float(x.split()[0].replace(",", "")) for x in cells[:-1]]

  def above(values, index):
    return 100 * (values[index] / values[0] - 1)

  bits = row(measured, "test bits per byte")
  name = "test perplexity of tokens, 2.72 bytes each"
  perplexity = row(measured, name)
  losses = above(perplexity, 1), above(bits, 1)
  dense, shrunk, _ = row(
    measured, "allocated parameters after `folding shrink --multiple=8`"
  )
  yield "docs/measured.md", "of four times the tokens) our\n", losses
  yield "docs/choose.md", "In the longer quickstart 70% costs", losses
  for label, values in (("test bits per byte", bits), (name, perplexity)):
    first, ours, small = values
    numbers = first, ours, above(values, 1), small, above(values, 2)
    yield "docs/measured.md", f"| {label} |", numbers
  percents = 100 * (1 - shrunk / dense), losses[0], above(perplexity, 2)
  numbers = *percents, bits[1], bits[0], bits[2]
  yield "README.md", "its arrays are only 19% smaller, or", numbers
  small = row(embed.partition("the default plan, as above")[2], "the same")
  dense = row(embed, "dense | 22.5 | 89.9")
  yield "README.md", "Spearman's correlation is then", small[:1]
  numbers = dense[0], small[1], dense[1]
  yield "README.md", "on STS 2014 (dense", numbers


def _at(found, names):
  for name in names:
    found = found[name]
  return found


@pytest.mark.parametrize(
  ("page", "before", "numbers"),
  [*_one_model(), *_embeddings(), *_speed(), *_quickstart()],
  ids=lambda x: str(x)[:40],
)
def test_figures_of_page_are_the_saved_ones(page, before, numbers):
  text = (ROOT / page).read_text(encoding="utf-8")
  assert text.count(before) == 1
  after = text.partition(before)[2]
  pattern = r"(?<![\w-])\d+(?:,\d{3})*(?:\.\d+)?"  # not of int8 or SST-2
  for shown, number in zip(re.finditer(pattern, after), numbers, strict=False):
    decimals = len(shown[0].partition(".")[2])
    assert f"{number:,.{decimals}f}" == shown[0]
