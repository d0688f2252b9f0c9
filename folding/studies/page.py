"""The page of a study: what the paper claims, what was measured, what failed.

Made from the CSV alone, so that anyone can make it again from that.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence

from folding import files
from folding.reporting import plots, runs, words
from folding.studies import drawings, inference, tables
from folding.studies.gather import Row, read_csv, to_csv
from folding.studies.study import DENSE, OURS
from folding.studies.tables import Group, Results

_AT_70 = (0.65, 0.75)  # levels that the claim "about 70%" is about
_AT_30 = (0.2, 0.4)
_POINTS, _PERPLEXITY = 1.0, 0.03  # what "nearly the same" allows
_SPEEDS = (("seconds", "time"), ("halfway", "steps to half the loss"))
_SIZES = (("qkv", "W_Q, W_K and W_V", 0.99), ("linear", "linear layers", 0.7))

_CLAIMS = (
  "The whole model is about 70% smaller at nearly the same quality",
  "At 20 to 40% smaller, quality is stable or better",
  '"Transformer layers" are 99% smaller (here W_Q, W_K and W_V)',
  "Linear layers are 70% smaller",
  "It is better than various pruning methods",
  "Fewer parameters train, and training is faster",
)


def publish(rows: Sequence[Row], path: str, command: str) -> None:
  """Writes a page, and beside it a folder of its name with data and figures.

  Args:
    rows: Of a study.
    path: Of the page, a Markdown file.
    command: That made the rows, to be told on the page.
  """
  folder = os.path.splitext(path)[0]
  os.makedirs(folder, exist_ok=True)
  table = os.path.join(folder, "study.csv")
  files.write_file(table, to_csv(rows))
  values = [dataclasses.asdict(row) for row in rows]
  target = os.path.join(folder, "study.json")
  files.write_file(target, json.dumps(values, indent=1) + "\n")
  results = Results(read_csv(table))
  figures = {
    "means": drawings.means(results),
    "quality": drawings.quality(results),
    "bytes": drawings.front(results, "bytes"),
    "time": drawings.front(results, "seconds"),
  }
  for name, figure in figures.items():
    plots.save(figure, os.path.join(folder, f"{name}.png"))
  files.write_file(path, page(results, os.path.basename(folder), command))


def page(results: Results, folder: str, command: str) -> str:
  """Returns the text of the page; links go to a folder beside it."""
  lines = ["# Results", "", *_provenance(results, folder, command), ""]
  lines += ["## What the paper claims, and what was measured", ""]
  lines.append(
    "The claims are those of the abstract of Belhaouari and Kraidia, Scientific "
    "Reports 15, 10171 (2025), which names neither its data sets nor its models. "
    f"Measured is `{OURS}` at 65 to 75% and at 20 to 40%; a range in brackets is "
    "over data sets (and levels, where there are several). More than 1 point of "
    "accuracy or 3% of perplexity is not nearly the same here.\n"
  )
  measured = zip(_CLAIMS, _measured(results), strict=True)
  header = ["claim", "measured, dense twin = reference"]
  lines.append(words.table(header, [list(row) for row in measured], 2))
  lines += ["## What did not hold", ""]
  failed = did_not_hold(results)
  nothing = "No quality, size or time, on these data sets."
  measured_ours = _all_ours(results, _AT_30) + _all_ours(results, _AT_70)
  if all(results.change(group) is None for group in measured_ours):
    nothing = "Nothing was compared with dense at 20 to 40% or at about 70%."
  lines += [f"- {line}" for line in failed] or [nothing]
  level = _nearest(results.levels, 0.7)
  if level is not None:
    lines += ["", "## All data sets together", ""]
    lines.append(
      "Means over data sets of the change to dense (accuracy in points, less "
      "perplexity is better), and of bytes and time as multiples of dense's, each "
      "with the dense runs of the same seeds; by accuracy.\n"
    )
    lines += [f"![Means over data sets]({folder}/means.png)", ""]
    for at in results.levels:
      lines += [f"At {words.level(at)}, or at its one size:", ""]
      lines.append(tables.summary_table(results, at))
  lines += [
    "",
    "## Quality against size",
    "",
    f"![Quality]({folder}/quality.png)",
  ]
  lines += ["", f"![Quality against bytes]({folder}/bytes.png)", ""]
  lines += [f"![Quality against time]({folder}/time.png)", ""]
  lines.append(
    "Filled points are on the Pareto front. Levels are fractions of the dense "
    "twin's parameters that are saved, of the whole model. In the tables ± is "
    "the half width of the 95% t-interval over seeds, of which there is one where "
    "no ± is; bold is best at that level "
    f"by {inference.TEST}; what missed its level has its size in brackets, and is "
    "not tested. In the figure of each data set the line is dense and grey its "
    "95% interval. The loss is halfway when it is in the middle between "
    "the dense run's first and its lowest; a dash is where a seed's never came "
    "so far, or in the dense part of a method after training. Trainable is the "
    "mean over all steps, as a share of the dense twin's parameters. Time is that of the clock "
    "on the wall, whatever else ran on the machine included, and compilation "
    "too, which runs share: the first of a program's seeds pays for it. Tokens a "
    "second are the median of the run. What is tested is the checkpoint with the "
    "fewest errors in validation (of language models the least loss) of those "
    "that are as small as the run is to be: of a run that prunes while it "
    "trains only the last ones, of others any. Methods "
    "after training have the same steps in all: first a dense part, then the "
    "rest, each with a warm-up and a schedule of its own.\n"
  )
  for dataset in results.datasets:
    if not results.all_of(dataset):
      continue
    lines += [f"### {dataset}", "", _caption(results, dataset), ""]
    lines.append(tables.quality_table(results, dataset))
    if level is not None:
      lines += [f"At {words.level(level)}, or at its one size:", ""]
      lines.append(tables.cost_table(results, dataset, level))
  lines += ["## Methods", ""]
  lines += [f"- `{name}`: {about}" for name, about in results.methods.items()]
  errors = [row for row in results.rows if row.status == "failed"]
  if errors:
    lines += ["", "## Runs that failed", ""]
    lines += [f"- `{row.run}`: {words.code(row.error or '')}" for row in errors]
  return "\n".join(lines) + "\n"


def did_not_hold(results: Results) -> list[str]:
  """Returns, by rule, what each data set contradicts: a line a level.

  The rules: at about 70% the mean is beyond 1 point or 3% of dense, or another
  method is no larger and no worse; the time or the steps to half the loss are
  more than dense's, or as many parameters train; at 20 to 40% the mean is worse
  than dense. Of all data sets: what is to be 99 or 70% smaller is not, on average.
  """
  found = []
  for dataset in results.datasets:
    limit = _POINTS if results.is_higher_better(dataset) else _PERPLEXITY
    for level, group in _ours(results, dataset, _AT_70):
      reasons = _worse(results, group, limit)
      if better := tables.dominators(results, dataset, level):
        reasons.append(
          "not on the Pareto front of quality against bytes, behind "
          f"{_some(better)}"
        )
      for name, what in _SPEEDS:
        ratio = results.ratio(group, name)
        if ratio is not None and ratio >= 1.005:  # as it is printed
          reasons.append(f"{ratio:.2f} times dense's {what}")
      if (group.mean("trainable") or 0.0) >= 0.9995:
        reasons.append("no fewer parameters train")
      if reasons:
        found.append(f"{dataset}, {words.level(level)}: {'; '.join(reasons)}")
    for level, group in _ours(results, dataset, _AT_30):
      if reasons := _worse(results, group, 0.0):
        found.append(f"{dataset}, {words.level(level)}: {reasons[0]}")
  all_ours = _all_ours(results, _AT_70)
  for name, what, claimed in _SIZES:
    values = [v for g in all_ours if (v := g.mean(name)) is not None]
    if values and statistics.fmean(values) < claimed - 5e-4:
      saved = _range(values, words.percent)
      found.append(f"{what} are {saved} smaller, not {claimed:.0%}")
  return found


def _worse(results: Results, group: Group, limit: float) -> list[str]:
  """Returns that a group is worse than dense by more than a limit, or []."""
  change = results.change(group)
  if change is None or change >= -limit - 1e-9:  # equal, but for rounding
    return []
  text = tables.change_text(change, group.first.metric)
  return [f"{text} to dense ({_p(results, group)})"]


def _some(names: list[str]) -> str:
  shown = names[:3]
  if rest := len(names) - len(shown):
    shown.append(f"{rest} more")
  return words.listing(shown)


def _measured(results: Results) -> list[str]:
  """Returns a text for each of the claims."""
  at_70 = _all_ours(results, _AT_70)
  nothing = "not measured"
  return [
    _quality(results, at_70) or nothing,
    _quality(results, _all_ours(results, _AT_30)) or nothing,
    _range([g.mean("qkv") for g in at_70], words.percent) or nothing,
    _range([g.mean("linear") for g in at_70], words.percent) or nothing,
    _standing(results) or nothing,
    _speed(results, at_70) or nothing,
  ]


def _quality(results: Results, groups: list[Group]) -> str:
  parts = [_range([g.mean("compression") for g in groups], words.percent)]
  for metric, name, unit in (
    ("accuracy", "accuracy", " points"),
    ("bits_per_byte", "perplexity", "%"),
  ):
    found = [
      tables.signed_change(results.change(g), metric)
      for g in groups
      if g.first.metric == metric
    ]
    text = _range(found, "{:+.1f}".format, unit)
    parts.append(f"{name} {text}" if text else "")
  return "; ".join(filter(None, parts))


def _standing(results: Results) -> str:
  on_front = best = total = tested = 0
  for dataset in results.datasets:
    for level, _ in _ours(results, dataset, _AT_70):
      total += 1
      on_front += not tables.dominators(results, dataset, level)
      samples = results.samples(dataset, level)
      higher = results.is_higher_better(dataset)
      tested += min(map(len, samples.values()), default=0) > 1
      best += inference.best(samples, higher) == OURS
  if not total:
    return ""
  return (
    f"on the Pareto front of quality against bytes in {on_front} of {total} "
    "cases (data set and level); "
    + (
      f"significantly best of its level in {best} of the {tested} where all "
      "methods have several seeds"
      if tested
      else "whether it is best is not tested where a method has one seed"
    )
  )


def _speed(results: Results, groups: list[Group]) -> str:
  text = _range([g.mean("trainable") for g in groups], words.percent)
  parts = [f"{text} of dense's parameters train, on average" if text else ""]
  for name, what in (*_SPEEDS, ("tokens_per_second", "tokens a second")):
    ratios = [results.ratio(group, name) for group in groups]
    text = _range(ratios, "{:.2f}".format)
    parts.append(f"{text} times the {what}" if text else "")
  return "; ".join(filter(None, parts))


def _ours(
  results: Results, dataset: str, bounds: tuple[float, float]
) -> list[tuple[float, Group]]:
  low, high = bounds
  found = [
    (level, results.group(dataset, OURS, level)) for level in results.levels
  ]
  return [(at, group) for at, group in found if group and low <= at <= high]


def _all_ours(results: Results, bounds: tuple[float, float]) -> list[Group]:
  return [g for d in results.datasets for _, g in _ours(results, d, bounds)]


def _p(results: Results, group: Group) -> str:
  pair = results.beside_dense(group)
  assert pair is not None
  here, there = (g.values("quality") for g in pair)
  if min(len(here), len(there)) < 2:
    return "one seed, so no test"
  p = inference.welch(here, there)
  if p is None:
    return "no spread over seeds, so no test"
  return f"p = {p:.2g} by Welch's t-test"


def _range(
  values: Iterable[float | None], form: Callable[[float], str], unit: str = ""
) -> str:
  """Returns the mean, and from where to where if there are several."""
  found = [value for value in values if value is not None]
  if not found:
    return ""
  text = form(statistics.fmean(found))
  if len(found) > 1:
    text += f" [{form(min(found))} to {form(max(found))}]"
  return text + unit


def _nearest(levels: Sequence[float], aim: float) -> float | None:
  return min(levels, key=lambda level: abs(level - aim), default=None)


def _caption(results: Results, dataset: str) -> str:
  dense = results.group(dataset, DENSE)
  group = dense or next(iter(results.all_of(dataset).values()))
  row, mean = group.first, group.mean("quality")
  assert row.steps is not None
  text = "bits per byte, less is better"
  if results.is_higher_better(dataset):
    text = "accuracy in %, more is better"
    if row.examples and mean is not None:
      low, high = runs.wilson(mean, row.examples)
      text += (
        f"; {row.examples:,} examples, whose choice alone makes ± "
        f"{50 * (high - low):.1f} points"
      )
  return f"Test, {text}; {row.model}, {words.counted(row.steps, 'step')}."


def _provenance(results: Results, folder: str, command: str) -> list[str]:
  done = [row for row in results.rows if row.status == "finished"]
  counts = f"{len(done)} of {len(results.rows)} runs are finished"

  def each(name: str) -> str:
    found = {str(getattr(row, name)) for row in done} - {"None"}
    return ", ".join(sorted(found)) or "unknown"

  seconds = sum(row.seconds or 0.0 for row in done)
  lines = [
    f"Written by `{command}` from [study.csv]({folder}/study.csv); {counts}. "
    f"Version {each('version')}, commit {each('commit')}, on {each('device')}; "
    f"seeds {each('seed')}; {words.duration(seconds)} of training, in which what "
    "several runs start from counts for each of them."
  ]
  used = [row for row in done if row.kwh is not None]
  if used:
    kwh = sum(row.kwh or 0.0 for row in used)
    kg = sum(row.kg_co2e or 0.0 for row in used)
    lines.append(
      f"They used about {kwh:.3g} kWh, {kg:.3g} kg CO2e: an estimate of "
      f"CodeCarbon, of {len(used)} runs, each with what it starts from and of the "
      "whole machine, so runs at a time count it once each."
    )
  return lines
