"""Results of the finished runs of a study: a CSV file, tables and plots."""

import csv
import dataclasses
import io
import os
import statistics
from collections.abc import Sequence
from typing import Any

import scipy.stats

from folding import config as config_lib
from folding import files
from folding.reporting import plots
from folding.reporting.report import duration, percent, table
from folding.studies.grid import DENSE, OURS, Study, Trial
from folding.tasks import METRICS


@dataclasses.dataclass(frozen=True)
class Row:
  """A finished run.

  Attributes:
    dataset: Name of the data set.
    method: Name of the method.
    saving: Fraction to save; None if the method has one size.
    seed: Seed of the run.
    metric: Name of the metric, from `config.quality`: "accuracy", ...
    quality: The metric on the test split.
    change: Change to the dense run of this seed, negative if worse: in points
      (hundredths), or in percent of perplexity. None without a dense run.
    compression: 1 - stored / dense parameters; `dense-small` is compared with
      the dense run.
    parameters: Stored (nonzero) parameters.
    bytes: Stored bytes, masks included.
    steps: Training steps, those of the dense start included.
    seconds: Training time, that of the dense start included.
    device: Device of the run.
    commit: Commit of the source.
  """

  dataset: str
  method: str
  saving: float | None
  seed: int
  metric: str
  quality: float
  change: float | None
  compression: float
  parameters: int
  bytes: int
  steps: int
  seconds: float
  device: str
  commit: str | None


def collect(study: Study, workdir: str) -> list[Row]:
  """Returns one row per finished run of a study, in the order of its trials."""
  trials = study.trials(workdir)
  results = {t.name: found for t in trials if (found := t.result) is not None}
  return [
    _row(trial, results)
    for trial in trials
    if trial.method is not None and trial.name in results
  ]


def _row(trial: Trial, results: dict[str, dict[str, Any]]) -> Row:
  result = results[trial.name]
  parts = [result]
  if trial.start is not None and trial.start.name in results:
    parts.append(results[trial.start.name])
  baseline = dataclasses.replace(trial, method=DENSE, saving=None)
  dense = results.get(baseline.name)
  metric = config_lib.quality(trial.config())
  quality = result["test"][metric]
  stored = result["parameters"]["overall"]["stored"]
  change = None
  # A narrower model is its own dense baseline in `result.json`.
  full = result["parameters"]["overall"]["dense"]
  if dense is not None:
    if metric != "bits_per_byte":
      change = 100 * (quality - dense["test"][metric])
    else:
      ratio = result["test"]["perplexity"] / dense["test"]["perplexity"]
      change = 100 * (1 - ratio)
    full = max(full, dense["parameters"]["overall"]["dense"])
  size = result["bytes"]["overall"]
  return Row(
    dataset=trial.dataset,
    method=trial.method or "",
    saving=trial.saving,
    seed=trial.seed,
    metric=metric,
    quality=quality,
    change=change,
    compression=1 - stored / full,
    parameters=stored,
    bytes=size["stored"] + size["masks"],
    steps=sum(part["steps"] for part in parts),
    seconds=sum(part["seconds"] for part in parts),
    device=result["device"],
    commit=result["commit"],
  )


def to_csv(rows: Sequence[Row]) -> str:
  """Returns the rows as CSV; None is an empty cell."""
  text = io.StringIO()
  names = [field.name for field in dataclasses.fields(Row)]
  writer = csv.DictWriter(text, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows(dataclasses.asdict(row) for row in rows)
  return text.getvalue()


def dataset_table(rows: Sequence[Row]) -> str:
  """Returns the Markdown table of one data set, a row per method and saving.

  All values are means over seeds.
  """
  metric = rows[0].metric
  is_accuracy = metric == "accuracy"
  lines = []
  for (method, saving), group in _grouped(rows).items():
    quality = _mean(group, "quality")
    lines.append(
      [
        method,
        _saving(saving),
        f"{100 * quality:.1f}%" if is_accuracy else f"{quality:.3f}",
        _signed(_change(group)),
        percent(_mean(group, "compression")),
        f"{_mean(group, 'bytes'):,.0f}",
        duration(_mean(group, "seconds")),
        str(len(group)),
      ]
    )
  header = ["", "saving", METRICS[metric].words]
  header += [f"to dense, {_unit(metric)}", "smaller"]
  return table(header + ["bytes", "time", "seeds"], lines)


def summary_table(rows: Sequence[Row]) -> str:
  """Returns a table of one metric: means over data sets and seeds, with a test.

  Each method is compared with dense, and with `ours` at the same saving. The table
  shows the mean difference of changes to dense, and the p value of `paired`,
  corrected for the number of methods of that saving (false discovery rate,
  Benjamini and Hochberg 1995).
  """
  lines = []
  grouped = _grouped(rows)
  dense = grouped.get((DENSE, None), [])
  for saving in sorted({row.saving for row in rows}, key=lambda x: x or 0.0):
    groups = {
      method: group
      for (method, at), group in grouped.items()
      if at == saving and method != DENSE
    }
    ours = groups.get(OURS, [])
    to_dense = _corrected({m: paired(g, dense) for m, g in groups.items()})
    to_ours = _corrected(
      {m: paired(g, ours) for m, g in groups.items() if m != OURS}
    )
    for method, group in groups.items():
      test = to_ours.get(method, Paired(None, None, 0))
      lines.append(
        [
          method,
          _saving(saving),
          percent(_mean(group, "compression")),
          _signed(_change(group)),
          _p(to_dense[method].p),
          _signed(test.difference),
          _p(test.p),
          str(len(group)),
        ]
      )
  header = ["", "saving", "smaller", "to dense", "p", f"to {OURS}", "p", "runs"]
  return table(header, lines)


@dataclasses.dataclass(frozen=True)
class Paired:
  """A paired comparison of two methods.

  Attributes:
    difference: Mean difference of changes to dense; None without pairs.
    p: p value of the two-sided paired t-test; None if differences have no
      spread or there are fewer than two.
    pairs: Number of pairs.
  """

  difference: float | None
  p: float | None
  pairs: int


def paired(a: Sequence[Row], b: Sequence[Row]) -> Paired:
  """Compares two methods over the runs (data set, seed) that both have.

  Runs of one data set share its texts, so a pair is a data set, with means over
  seeds (Demšar 2006). If there is only one data set, a pair is a seed.
  """
  here, there = (
    {(r.dataset, r.seed): r.change for r in rows if r.change is not None}
    for rows in (a, b)
  )
  found: dict[str, list[float]] = {}
  for key, change in here.items():
    if key in there:
      found.setdefault(key[0], []).append(change - there[key])
  differences = [statistics.fmean(values) for values in found.values()]
  if len(found) == 1:
    (differences,) = found.values()
  if not differences:
    return Paired(None, None, 0)
  mean, count = statistics.fmean(differences), len(differences)
  # Rounding alone gives a spread of about 1e-14; scipy warns of that.
  if count < 2 or statistics.stdev(differences) < 1e-9:
    return Paired(mean, None, count)
  test: Any = scipy.stats.ttest_1samp(differences, 0.0)
  return Paired(mean, float(test.pvalue), count)


def _corrected(tests: dict[str, Paired]) -> dict[str, Paired]:
  """Returns tests whose p values are corrected for their number."""
  known = {name: test.p for name, test in tests.items() if test.p is not None}
  values = scipy.stats.false_discovery_control([*known.values()])
  corrected = dict(zip(known, values, strict=True))
  return {
    name: dataclasses.replace(test, p=corrected.get(name))
    for name, test in tests.items()
  }


def write(study: Study, workdir: str) -> str:
  """Writes `study.csv`, `results.md` and its plots into a study directory.

  Returns:
    The path of `results.md`.
  """
  rows = collect(study, workdir)
  files.write_file(os.path.join(workdir, "study.csv"), to_csv(rows))
  total = sum(t.method is not None for t in study.trials(workdir))
  parts = ["# Results", f"{len(rows)} of {total} runs are finished."]
  legend = [f"- `{name}`: {m.about}" for name, m in study.methods.items()]
  parts += ["\n".join(legend)]
  # Accuracy first, the others in the order of the data sets.
  found = dict.fromkeys(row.metric for row in rows)
  for metric in sorted(found, key=lambda x: x != "accuracy"):
    chosen = [row for row in rows if row.metric == metric]
    name, unit = METRICS[metric].words, _unit(metric)
    title = "Text" if metric == "bits_per_byte" else name[0].upper() + name[1:]
    _draw(chosen, unit, os.path.join(workdir, f"{metric}.png"))
    parts += [
      f"## {title}: means over data sets",
      f"Changes in {unit}; negative is worse. p: paired t-test over data sets "
      "(over seeds, if there is only one), corrected for the false discovery "
      "rate.",
      f"![Change to dense against size]({metric}.png)",
      summary_table(chosen),
    ]
    for dataset in dict.fromkeys(row.dataset for row in chosen):
      own = [row for row in chosen if row.dataset == dataset]
      parts += [f"## {dataset}", dataset_table(own)]
  path = os.path.join(workdir, "results.md")
  files.write_file(path, "\n\n".join(part.strip() for part in parts) + "\n")
  return path


def _unit(metric: str) -> str:
  """Returns the unit of a change to dense."""
  return "% of perplexity" if metric == "bits_per_byte" else "points"


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
  """Returns {method: points} with `ours` first, then the best at its last saving.

  A point is (percent saved, change to dense), both means.
  """
  found: dict[str, list[tuple[float, float]]] = {}
  for (method, _), group in _grouped(rows).items():
    change = _change(group)
    if method != DENSE and change is not None:
      size = 100 * _mean(group, "compression")
      found.setdefault(method, []).append((size, change))
  order = sorted(found, key=lambda m: (m != OURS, -max(found[m])[1]))
  return {method: sorted(found[method]) for method in order}


def _draw(rows: Sequence[Row], unit: str, path: str) -> None:
  with plots.saved(path) as axes:
    plots.draw_lines(
      axes,
      curves(rows),
      x_label="smaller than dense (%)",
      y_label=f"change to dense ({unit})",
    )
    for line in axes.lines:  # methods of one size have one point
      line.set_marker("o")


def _grouped(
  rows: Sequence[Row],
) -> dict[tuple[str, float | None], list[Row]]:
  """Returns {(method, saving): rows}, in the order of the rows."""
  groups: dict[tuple[str, float | None], list[Row]] = {}
  for row in rows:
    groups.setdefault((row.method, row.saving), []).append(row)
  return groups


def _saving(saving: float | None) -> str:
  return "" if saving is None else f"{100 * saving:g}%"


def _p(value: float | None) -> str:
  return "–" if value is None else f"{value:.2g}"


def _mean(rows: Sequence[Row], name: str) -> float:
  return statistics.fmean(getattr(row, name) for row in rows)


def _change(rows: Sequence[Row]) -> float | None:
  """Returns the mean change to dense; None if any row has no dense run."""
  found = [row.change for row in rows if row.change is not None]
  return statistics.fmean(found) if len(found) == len(rows) else None


def _signed(value: float | None) -> str:
  return "–" if value is None else f"{value:+.1f}"
