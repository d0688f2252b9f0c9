"""Runs side by side: quality, size and time, in a table and a figure.

Runs that differ only in their seed are one variant. The first variant is the
reference of the others.
"""

import os
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from folding import config as config_lib
from folding import errors, files, typed
from folding.errors import ConfigError
from folding.reporting import page, report
from folding.reporting.report import Run
from folding.tasks import METRICS, task_of


class Spread(NamedTuple):
  """A metric over seeds.

  Attributes:
    mean: None if no run has the metric.
    sd: Sample standard deviation; 0 for fewer than two runs.
  """

  mean: float | None
  sd: float

  def text(self, form: Callable[..., str]) -> str:
    """Returns "mean ± sd", or the mean alone if there is no spread."""
    if self.mean is None:
      return "–"
    return form(self.mean) + (f" ± {form(self.sd)}" if self.sd else "")


class Variant(NamedTuple):
  """One configuration: a run, or several that differ only in the seed."""

  name: str
  runs: list[Run]

  def spread(self, metric: Callable[[Run], int | float | None]) -> Spread:
    """Returns the mean and the standard deviation of a metric."""
    found = [metric(run) for run in self.runs]
    values = [value for value in found if value is not None]
    return Spread(
      mean=statistics.fmean(values) if values else None,
      sd=statistics.stdev(values) if len(values) > 1 else 0.0,
    )


def compare(workdirs: Sequence[str], output: str = "comparison") -> str:
  """Writes `compare.md`, `compare.html` and `compare.png`.

  Args:
    workdirs: One or more run directories, the reference first.
    output: The folder to write into; it is made if needed.

  Returns:
    The text of `compare.md`.

  Raises:
    ConfigError: a folder is not a run or is given twice, the tasks differ, or
      the output is not a local folder.
  """
  files.require_local(output)
  variants = group(workdirs)
  text = _page(variants)
  os.makedirs(output, exist_ok=True)
  _draw(variants, os.path.join(output, "compare.png"))
  page.write(output, "compare", text, ["compare.png"])
  return text


def group(workdirs: Sequence[str]) -> list[Variant]:
  """Returns the runs grouped by their configuration, in the order given.

  A seed that occurs twice begins a new variant: equal runs are not independent
  samples.

  Raises:
    ConfigError: a folder is not a run or is given twice, or the tasks differ.
  """
  if len({os.path.realpath(workdir) for workdir in workdirs}) < len(workdirs):
    raise ConfigError(f"a run is given twice: {', '.join(workdirs)}")
  grouped: list[list[Run]] = []
  for run in map(report.load_run, workdirs):
    first = grouped[0][0] if grouped else run
    if run.config.task != first.config.task:
      raise ConfigError(
        f"{first.workdir!r} has task {first.config.task!r} and {run.workdir!r} "
        f"has task {run.config.task!r}; their metrics cannot be compared"
      )
    for members in grouped:
      if all(_only_seed_differs(run, member) for member in members):
        members.append(run)
        break
    else:
      grouped.append([run])
  names = [errors.printable(_name(members)) for members in grouped]
  if len(set(names)) < len(names):
    names = [os.path.normpath(members[0].workdir) for members in grouped]
  return [Variant(n, m) for n, m in zip(names, grouped, strict=True)]


def _differences(a: Run, b: Run) -> list[str]:
  """Returns "field: value in a -> value in b", without the seed."""
  found = typed.differences(a.config, b.config)
  return [line for line in found if not line.startswith("seed: ")]


def _only_seed_differs(a: Run, b: Run) -> bool:
  return (
    a.config.seed != b.config.seed
    and not _differences(a, b)
    and a.result["finished"] == b.result["finished"]
    and a.digest == b.digest
  )


def _name(members: Sequence[Run]) -> str:
  """Returns the name of a run, or the common start of several names."""
  if len(members) == 1:
    return members[0].name
  common = os.path.commonprefix([run.name for run in members])
  # "lm-seed1" and "lm-seed2" are "lm", but "class1" and "class2" are "class".
  seed = r"[-_. ]*(seed|(?<![a-z])s)?[-_. ]*\d*$"
  return re.sub(seed, "", common) or members[0].name


def notes(variants: Sequence[Variant]) -> list[str]:
  """Returns the reasons why some of the metrics cannot be compared."""
  notes = []
  runs = [run for variant in variants for run in variant.runs]
  if len({run.digest for run in runs}) > 1:
    notes.append(
      "these runs had different data, so their test metrics cannot be compared."
    )
  elif len({_tokenizer(run) for run in runs}) > 1:
    notes.append("these runs have different tokenizers, so the loss differs.")
  if len({run.result["device"] for run in runs}) > 1:
    notes.append("these runs were not timed on the same device.")
  if not all(run.result["finished"] for run in runs):
    notes.append("unfinished runs have no test metric.")
  return notes


def _tokenizer(run: Run) -> str | None:
  """Returns the tokenizer of a language model; None for a classifier."""
  path = pathlib.Path(run.workdir, "tokenizer.json")
  if not task_of(run.config).predicts_tokens or not path.is_file():
    return None
  return path.read_text(encoding="utf-8")


def _page(variants: Sequence[Variant]) -> str:
  """Returns the text of `compare.md`."""
  reference = variants[0]
  config = reference.runs[0].config
  metric = config_lib.quality(config)
  header = (
    "Run", "Seeds", f"Test {METRICS[metric].words}", "Difference",
    "Compression", "Parameters, stored", "allocated", "Bytes, with masks",
    "Steps", "Time", "Tokens per second",
  )  # fmt: skip
  lines = [
    "# Comparison of runs\n",
    report.table(header, [_row(v, reference) for v in variants], 2),
    f"Difference: of the test metric, from {page.escaped(reference.name)} "
    f"({'less' if metric == 'bits_per_byte' else 'more'} is better), if both had "
    "the same data. Compression: 1 - stored / dense of all parameters. Allocated: "
    "parameters in arrays, zeros included. ±: sample standard deviation over "
    "seeds. An accuracy of one run has its 95% interval, from its number of "
    "examples.",
    *(f"\n**Note:** {note}" for note in notes(variants)),
    f"\n![{_about(variants)}]"
    '(compare.png "Validation over steps; test metric against size")',
  ]
  for variant in variants[1:]:
    lines.append(f"\nFields of {page.escaped(variant.name)} that differ:\n")
    changes = _differences(reference.runs[0], variant.runs[0])
    lines += [f"- {page.code(change)}" for change in changes or ["none"]]
  return "\n".join(lines) + "\n"


def _about(variants: Sequence[Variant]) -> str:
  """Returns the picture in words, for those who cannot see it."""
  metric = config_lib.quality(variants[0].runs[0].config)
  points = []
  for variant in variants:
    quality = _quality(variant, metric).text("{:.3f}".format)
    size = variant.spread(_stored).text("{:,.0f}".format)
    points.append(f"{page.escaped(variant.name)} has {quality} at {size}")
  return (
    f"Test {METRICS[metric].words} and stored parameters: {'; '.join(points)}."
  )


def _row(variant: Variant, reference: Variant) -> list[str]:
  """Returns the cells of a variant in the table of `compare.md`."""
  metric = config_lib.quality(reference.runs[0].config)
  whole = "{:,.0f}".format
  quality = _quality(variant, metric)
  steps = sorted({run.result["steps"] for run in variant.runs})

  def cell(metric: Callable[[Run], Any], form: Callable[..., str]) -> str:
    return variant.spread(metric).text(form)

  return [
    page.escaped(variant.name),
    ", ".join(str(run.config.seed) for run in variant.runs),
    _with_interval(variant, metric, quality),
    _change(variant, reference, metric),
    cell(lambda run: run.parameters["overall"]["compression"], report.percent),
    cell(_stored, whole),
    cell(lambda run: run.allocated, whole),
    cell(_stored_bytes, whole),
    ", ".join(f"{step:,}" for step in steps),
    cell(lambda run: run.result["seconds"], report.duration),
    cell(lambda run: run.result["tokens_per_second"], whole),
  ]


def _change(variant: Variant, reference: Variant, metric: str) -> str:
  """Returns the change of a test metric: points of accuracy, or percent."""
  old, new = (_quality(v, metric).mean for v in (reference, variant))
  a, b = reference.runs[0], variant.runs[0]
  if old is None or new is None or a.digest != b.digest:
    return "–"
  if metric == "accuracy":
    return f"{100 * (new - old):+.1f} points"
  # The change of a negative correlation would have the wrong sign.
  change = f"{new / old - 1:+.1%}" if old > 0 else "–"
  if metric == "bits_per_byte" and _tokenizer(a) == _tokenizer(b):
    change += f" (perplexity {_change(variant, reference, 'perplexity')})"
  return change


def _quality(variant: Variant, metric: str) -> Spread:
  """Returns a test metric of a variant."""
  return variant.spread(lambda run: (run.test or {}).get(metric))


def _interval(variant: Variant, metric: str) -> tuple[float, float] | None:
  """Returns the 95% interval of the accuracy of a single run."""
  [test, *more] = [run.test or {} for run in variant.runs]
  if metric != "accuracy" or more or "accuracy_low" not in test:
    return None
  return test["accuracy_low"], test["accuracy_high"]


def _with_interval(variant: Variant, metric: str, quality: Spread) -> str:
  """Returns a test metric with its spread over seeds or its interval."""
  form = report.percent if metric == "accuracy" else "{:.3f}".format
  interval = _interval(variant, metric)
  if interval is None:
    return quality.text(form)
  low, high = interval
  return f"{quality.text(form)} ({100 * low:.1f} to {high:.1%})"


def _stored(run: Run) -> int:
  return run.parameters["overall"]["stored"]


def _stored_bytes(run: Run) -> int:
  size = run.bytes["overall"]
  return size["stored"] + size["masks"]


def _draw(variants: Sequence[Variant], path: str) -> None:
  # Importing matplotlib is slow, and the table does not need it.
  from folding.reporting import plots

  run = variants[0].runs[0]
  metric = config_lib.quality(run.config)
  is_bits = metric == "bits_per_byte"
  # Tokenizers may differ, and with them the loss of a token.
  key = metric if is_bits else "loss"
  label = "bits per byte" if is_bits else f"loss, {run.loss_unit}"
  points = {}
  for variant in variants:
    size, test = variant.spread(_stored), _quality(variant, metric)
    points[variant.name] = None
    if size.mean is not None and test.mean is not None:
      low, high = test.mean - test.sd, test.mean + test.sd
      low, high = _interval(variant, metric) or (low, high)
      error = test.mean - low, high - test.mean
      points[variant.name] = plots.Point(size.mean, test.mean, size.sd, error)
  with plots.saved(path, num_axes=2) as (left, right):
    plots.draw_lines(
      left,
      {variant.name: _curve(variant, key) for variant in variants},
      x_label="step",
      y_label=f"validation ({label})",
    )
    plots.draw_points(
      right,
      points,
      x_label="stored parameters",
      y_label=f"test {METRICS[metric].words}",
    )


def _curve(variant: Variant, key: str) -> list[tuple[int, int | float]]:
  """Returns (step, mean over seeds) of a validation metric."""
  found: dict[int, list[float]] = {}
  for run in variant.runs:
    for record in run.valid:
      if key in record:
        found.setdefault(record["step"], []).append(record[key])
  return [(step, statistics.fmean(ys)) for step, ys in sorted(found.items())]
