"""Figures of the pages are those of the saved results, to the digit."""

import collections
import json
import math
import pathlib
import re
import statistics

import pytest
import scipy.stats

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "recorded"
# Not of int8 or SST-2.
NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


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
  blocks = [
    x["training"]["seconds"]["dense, all logits"]
    / x["training"]["seconds"]["dense"]
    for x in (lengths[512], lengths[2048])
  ]
  before = "CPU time | forward and backward, 512 / 2,048 tokens |"
  yield "docs/measured.md", before, blocks
  seconds = {x["name"]: x["seconds"] for x in _saved("one_model")["rows"]}
  pytorch = seconds["dense"]["PyTorch"]["32 x 128"]
  yield (
    "docs/measured.md",
    "(`one_model.md`) | dense / 70% smaller |",
    [pytorch / seconds[x]["JAX"]["32 x 128"] for x in ("dense", "70% smaller")],
  )
  compact = _saved("compact")
  ratios = {compact["ratio"][x] for x in ("seconds", "watt_hours")}
  for ratio in ratios:
    yield "docs/measured.md", "| trains faster | `train.compact`: ", [ratio]
  accuracies = [
    100 * compact["runs"][x]["test_accuracy"] for x in ("compact", "dense")
  ]
  before = "1,000 steps, synthetic texts; "
  yield "docs/measured.md", before, accuracies
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
  per_token = math.log2(perplexity[1]) / bits[1]  # bytes
  long, _ = _told_numbers("long_lm", "long_lm.py` has")
  more = 100 * (2 ** (per_token * (bits[1] - long)) - 1)
  before = "on a quarter of the tokens, has "
  yield "docs/measured.md", before, [more, bits[1]]
  numbers = *percents, bits[1], bits[0], bits[2]
  yield "README.md", "its arrays are only 19% smaller, or", numbers
  small = row(embed.partition("the default plan, as above")[2], "the same")
  dense = row(embed, "dense | 22.5 | 89.9")
  yield "README.md", "has a Spearman correlation of", small[:1]
  numbers = dense[0], small[1], dense[1]
  yield "README.md", "on STS 2014 (dense", numbers


def _at(found, names):
  for name in names:
    found = found[name]
  return found


def _flat(values):
  for value in values:
    if isinstance(value, (list, tuple)):
      yield from value
    elif value is not None:
      yield value


class _Study:
  """A study that ran to its end."""

  accuracies = "trec", "subj", "mr", "sst2"
  perplexities = "tiny_shakespeare", "wikitext2"

  def __init__(self, name):
    self.rows = {
      (row["method"], row["saving"], row["dataset"]): row
      for row in _saved(name)["rows"]
    }

  def cell(self, method, saving, dataset):
    """Returns mean and deviation of the accuracy in %, or of bits per byte."""
    row = self.rows[method, saving, dataset]
    values = row.get("bits_per_byte") or [100 * x for x in row["accuracy"]]
    return [statistics.fmean(values), statistics.stdev(values)]

  def change(self, method, saving):
    """Returns points of accuracy, and percent of perplexity, over dense."""
    points, percents = [], []
    for dataset in self.accuracies:
      (ours, _), (dense, _) = (
        self.cell(*key, dataset) for key in ((method, saving), ("dense", None))
      )
      points.append(ours - dense)
    for dataset in self.perplexities:
      if (method, saving, dataset) in self.rows:
        ours, dense = (
          statistics.fmean(self.rows[*key, dataset]["perplexity"])
          for key in ((method, saving), ("dense", None))
        )
        percents.append(100 * (ours / dense - 1))
    return [statistics.fmean(x) for x in (points, percents) if x]


STUDY = _Study("from_scratch")


def _saved_tables():
  """Returns {(page, columns): rows} of the tables of long runs."""
  found = collections.defaultdict(list)
  for path in sorted(RECORDED.glob("*.json")):
    for each in _recorded(path.stem)["tables"]:
      page = each["page"].partition("#")[0]
      found[page, tuple(each["columns"])] += each["rows"]
  names = {
    "trec": "TREC",
    "subj": "Subj",
    "mr": "MR",
    "sst2": "SST-2",
    "tiny_shakespeare": "tiny Shakespeare",
    "wikitext2": "WikiText-2",
  }
  columns = ("", "dense", "ours, 30% smaller", "50%", "70%", "80%")
  sizes = [("dense", None)] + [("ours", x) for x in (0.3, 0.5, 0.7, 0.8)]
  found["docs/measured.md", columns] += [
    [name] + [STUDY.cell(*size, dataset) for size in sizes]
    for dataset, name in names.items()
  ]
  return dict(found)


def _recorded(name):
  return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def _rows(name, index=0):
  """Returns (label, cells) of the rows of a recorded table.

  A label has the texts at the start of a row. An empty one repeats that of the
  row before.
  """
  found, first = [], ""
  for one, *cells in _recorded(name)["tables"][index]["rows"]:
    first = one or first
    if isinstance(cells[0], str):
      found.append(((first, cells[0]), cells[1:]))
    else:
      found.append((first, cells))
  return found


def _told_numbers(name, words):
  """Returns the numbers that follow these words."""
  [found] = [x for _, before, x in _recorded(name)["told"] if words in before]
  return found


def _told():
  """Yields figures that are in a sentence."""
  for path in sorted(RECORDED.glob("*.json")):
    yield from _recorded(path.stem).get("told", ())


SAVED_TABLES = _saved_tables()


def _methods():
  """Yields figures of all methods from scratch."""
  labels = {
    "| ours | attention, feed-forward |": "ours",
    "| ours, neurons by the forward pass |": "ours-forward",
    "| ours, single weights by the forward pass |": "ours-weight",
    "| ours, W_Q and W_K pruned instead of folded |": "ours-v",
    "| FPP alone, single weights |": "fpp",
    "| gradual magnitude, single weights |": "magnitude",
    "| SparseGPT after training, single weights |": "sparsegpt",
    "| a narrower dense model |": "dense-small",
    "W_V dense, single weights by FPP |": "low-rank-qk",
    "| gradual, single weights by the score of RIA |": "relative",
    "| gradual, by the score of Wanda |": "activation",
    "| gradual, by saliency |": "saliency",
    "| gradual, by movement |": "movement",
    "| gradual, whole neurons |": "neuron",
    "| gradual, neurons and heads |": "heads",
    "| Wanda after training |": "wanda",
    "| a lottery ticket |": "ticket",
    "| at random |": "random",
  }
  for before, method in labels.items():
    numbers = [STUDY.change(method, x) for x in (0.3, 0.5, 0.7, 0.8)]
    yield "docs/measured.md", before, [*_flat(numbers)]
  for before, method in (
    ("| folding alone |", "fold"),
    ("| 2 of 4 neighboring weights |", "2-of-4"),
    ("in two stages like pruning after training |", "dense-again"),
  ):
    size = 100 * statistics.fmean(
      row["compression"]
      for (name, *_), row in STUDY.rows.items()
      if name == method
    )
    yield "docs/measured.md", before, [size, *STUDY.change(method, None)]


def _mean_change(pairs):
  """Returns the mean of the second minus the first numbers, and its p value."""
  changes = [after - before for before, after in pairs]
  return [
    statistics.fmean(changes),
    float(scipy.stats.ttest_1samp(changes, 0).pvalue),
  ]


def _scratch():
  """Yields summaries of models from scratch."""
  page = "docs/measured.md"
  eight = [
    [STUDY.cell(*size, dataset)[0] for size in (("dense", None), ("ours", 0.7))]
    for dataset in STUDY.accuracies
  ]
  eight += [
    [cells[0][0], cells[3][0]]
    for name, cells in _rows("scratch")
    if name != "Python's library"
  ]
  short = _mean_change(eight)
  (_, dense), (_, ours) = _rows("longer", 1)
  longer = _mean_change(zip(dense[:-1], ours[:-1], strict=True))
  yield page, "classifiers from scratch: [", short[:1]
  yield page, "eight classifiers, 70% costs ", [-short[0], short[1]]
  yield page, "(#from-scratch) (eight sets), and ", longer[:1]
  yield page, "*Classifiers.* The mean change is ", longer
  yield page, "from scratch at 30%: [", STUDY.change("ours", 0.3)
  sizes = [STUDY.change("ours", x) for x in (0.3, 0.5, 0.7, 0.8)]
  yield (
    "docs/choose.md",
    "(four sets, 200 steps) change by ",
    [x[0] for x in sizes],
  )
  short = sizes[2][1]
  after = [
    cells[-1]
    for (_, kind), cells in _rows("longer")
    if kind == "perplexity to dense"
  ]
  ends = min(after), max(after)
  before = "language models from scratch: perplexity ["
  yield page, before, [short]
  yield page, "two texts, three seeds), but ", ends
  (_, saved, _) = dict(_rows("quickstart"))["W_Q, W_K, W_V"]
  attention = [-saved, *_told_numbers("trained", "At 70%, the model loses ")]
  yield "README.md", "*Claims*: W_Q, W_K and W_V shrink by ", attention
  early = _taught_over("teachers", "dense")[0]
  yield "README.md", "perplexity ends ", [*ends, *early[:2]]
  folded = [_told_numbers("longer", x)[0] for x in ("its", "(tiny", "(Wiki")]
  yield page, "from scratch: 91%, with [", [min(folded), max(folded)]


def _taught_over(name, label):
  """Returns percents of perplexity of taught models over that of a row.

  Neurons pruned early, neurons, and single weights each have those in test, one
  per text, and then those in validation.
  """
  dense = dict(_rows(name, 1))[label]
  ours = dict(_rows("teachers", 1))
  return [
    [100 * (ours[kind][i][0] / dense[i][0] - 1) for i in (1, 3, 2, 4)]
    for kind in (
      "the same, pruned from 25 to 75% of the steps",
      "neurons, 70% smaller, with a teacher",
      "single weights, 70% smaller, with a teacher",
    )
  ]


def _taught():
  """Yields figures of long runs with a teacher at temperature 1."""
  early, neurons, weights = _taught_over("teachers", "dense")
  page = "docs/measured.md"
  yield page, "(three texts, one seed), or [", early[:2]
  yield page, "as teacher at temperature 1, ours is ", neurons[:2]
  yield page, "from 25 to 75% of the steps, it is ", early[:2]
  yield page, "single weights instead of neurons end at ", weights[:2]
  page = "docs/experiments.md"
  yield page, "level with dense after as many steps*: ", weights
  yield page, "which make the arrays smaller, end ", neurons[:2]
  yield page, "they end at ", early[:2]
  one_seed = dict(_rows("teachers", 2))
  pairs = zip(one_seed["neurons, no teacher"], one_seed["dense"], strict=True)
  alone = sorted(100 * (ours[0] / dense[0] - 1) for ours, dense in pairs)
  page = "docs/choose.md"
  yield page, "and `fpp.end=0.75` perplexity ends [", early[:2]
  yield page, "dense](experiments.md#at-temperature-1) instead of ", alone
  early, _, weights = _taught_over("equal_cost", "dense, 3,200 steps")
  page = "docs/experiments.md"
  yield page, "neurons that are pruned early end ", early[:2]
  yield page, "above it, single weights ", weights[:2]
  yield page, "[at 1](#at-temperature-1) and pruned early ", early[:2]
  yield "README.md", "a baseline trained for as long as both, it is ", early[:2]


def _trained():
  """Yields summaries of trained models."""
  page = "docs/measured.md"
  dense, *small = (
    [cell[0] for cell in cells[1:5]] for _, cells in _rows("trained")[:4]
  )
  pairs = collections.defaultdict(list)
  for name, (_, *cells) in _rows("trained", 1):
    if "SICK" not in str(name):
      pairs[name].append([float(NUMBER.findall(str(x))[0]) for x in cells[:2]])
  means = [
    [statistics.fmean(x) for x in zip(*seeds, strict=True)]
    for seeds in pairs.values()
  ]
  eight = _mean_change([*zip(dense, small[1], strict=True), *means])
  four = [_mean_change(zip(dense, x, strict=True))[0] for x in small]
  yield "README.md", "a 70% smaller model loses ", [-eight[0]]
  yield "README.md", "models that are 30, 70 and 80% smaller change by ", four
  yield page, "with means over seeds, 70% changes accuracy by ", eight
  yield page, "nearly the same quality | MiniLM: [", eight[:1]
  yield page, "(eight sets, one to three seeds), ", four[1:2]
  yield page, "MiniLM at 30%: [", four[:1]
  rows = dict(_rows("diagonal"))
  losses = [
    _mean_change(
      (x[0], y[0]) for x, y in zip(rows["dense"], rows[kind], strict=True)
    )[0]
    for kind in ("500 steps of recovery", "1,000 steps")
  ]
  yield page, "the same with a diagonal W_V: [", losses[:1]
  before = "parameters it lost "
  yield page, before, [-losses[0], 500, -losses[1], 1000]
  study = _Study("from_minilm")
  leads = {
    method: study.change("ours", 0.7)[0] - study.change(method, 0.7)[0]
    for method in ("fpp-all", "neuron", "magnitude")
  }
  before = "MiniLM with a diagonal W_V (not the plan): "
  yield page, before, [min(leads.values()), max(leads.values())]
  sparse = [
    study.change("sparsegpt", x)[0] - study.change("ours", x)[0]
    for x in (0.3, 0.5, 0.7)
  ]
  before = "SparseGPT in single weights was "
  yield page, before, [min(sparse), max(sparse)]


def _language_models():
  """Yields summaries of trained language models, in percent of perplexity."""
  dense, *small = (mean for mean, _ in dict(_rows("llama"))["500 steps"])
  percents = [100 * abs(x / dense - 1) for x in small]
  yield (
    "README.md",
    "a Llama of 0.26 million parameters has ",
    [percents[0], 30, small[0], dense, percents[1], 50, small[1]],
  )
  yield (
    "docs/measured.md",
    "a trained Llama of 0.26 million parameters: perplexity [",
    [small[2], dense],
  )
  yield (
    "docs/choose.md",
    "A Llama of 0.26 million parameters goes from perplexity ",
    [dense, small[0], 30, small[1], 50, small[2], 70],
  )
  first, mix, longest = (dict(_rows("smollm2", n)) for n in (0, 1, 3))

  def more(*rows):
    ratios = [cell[1] for row in rows for cell in row[1:]]
    return [100 * (x - 1) for x in (min(ratios), max(ratios))]

  small, name = "20% smaller, trained", "30% smaller, trained"
  best = [*more(longest[small]), 20], [*more(longest[name]), 30]
  twenty = more(first["20% smaller"], longest[small])
  thirty = more(first["30% smaller"], mix[name], longest[name])
  dropped = more(mix["the same, trained"])
  yield "README.md", "SmolLM2-135M has\n[", [*best[0], *best[1]]
  yield (
    "docs/measured.md",
    "SmolLM2-135M with smaller arrays: perplexity [",
    [*twenty, 20, *thirty, 30],
  )
  yield (
    "docs/measured.md",
    "after a million tokens: ",
    [*best[0], *best[1], *dropped],
  )


@pytest.mark.parametrize(
  ("page", "before", "numbers"),
  [
    *_one_model(),
    *_embeddings(),
    *_speed(),
    *_quickstart(),
    *_methods(),
    *_told(),
    *_scratch(),
    *_taught(),
    *_trained(),
    *_language_models(),
  ],
  ids=lambda x: str(x)[:40],
)
def test_figures_of_page_are_the_saved_ones(page, before, numbers):
  text = (ROOT / page).read_text(encoding="utf-8")
  assert text.count(before) == 1
  shown = NUMBER.findall(text.partition(before)[2])[: len(numbers)]
  assert shown == list(map(_as_shown, numbers, shown))


def _as_shown(number, shown):
  """Returns a number with the sign and decimals of `shown`."""
  sign = "+" if shown.startswith("+") else ""
  return f"{number:{sign}z,.{len(shown.partition('.')[2])}f}"


def _tables(page):
  """Returns {columns: rows} of the tables of a page, each cell a string.

  Rows of tables with the same columns are in one list.
  """
  found = collections.defaultdict(list)
  lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
  cells, columns = [], None
  for before, line in zip(["", *lines], lines, strict=False):
    cells, last = [x.strip() for x in line[1:-1].split("|")], cells
    if not line.startswith("|"):
      columns = None
    elif re.match(r"\| (---|:?-+:) \|", line):
      columns = tuple(last)
    elif columns is not None and before:
      found[columns].append([x.replace("**", "") for x in cells])
  return found


def _is_shown(cell, saved):
  """Returns whether a cell shows a text, a number, several, or None."""
  if saved is None:
    return cell in ("", "–")
  if isinstance(saved, str):
    return cell == saved
  shown, numbers = NUMBER.findall(cell), [*_flat([saved])]
  return len(shown) == len(numbers) and shown == [
    *map(_as_shown, numbers, shown)
  ]


@pytest.mark.parametrize(("page", "columns"), SAVED_TABLES, ids=str)
def test_rows_of_page_are_the_saved_ones(page, columns):
  rows, saved = _tables(page)[columns], SAVED_TABLES[page, columns]
  assert len(rows) == len(saved)
  for row in rows:
    assert any(all(map(_is_shown, row, cells)) for cells in saved), (
      f"no saved row is {row}"
    )
