"""Runs side by side: quality, size and time, in a table and a figure.

Runs that differ only in their seed are one variant. The first variant is the
reference of the others.
"""

import json
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from folding import files, typed
from folding.errors import ConfigError
from folding.reporting import report
from folding.reporting.report import Run


class Variant(NamedTuple):
  """One configuration: a run, or several that differ only in the seed."""

  name: str
  runs: list[Run]


def compare(workdirs: Sequence[str], output: str = "comparison") -> str:
  """Writes `compare.md`, `compare.json` and `compare.png`.

  Args:
    workdirs: Run directories, the reference first.
    output: The folder to write into; it is made if needed.

  Returns:
    The text of `compare.md`.

  Raises:
    ConfigError: a folder is not a run or is given twice, the tasks differ, or
      the output is not a local folder.
  """
  files.require_local(output)
  variants = group(workdirs)
  metrics = summarize(variants)
  text = _page(metrics)
  os.makedirs(output, exist_ok=True)
  _draw(variants, metrics, os.path.join(output, "compare.png"))
  values = json.dumps(metrics, indent=2) + "\n"
  files.write_file(os.path.join(output, "compare.json"), values)
  files.write_file(os.path.join(output, "compare.md"), text)
  return text


def group(workdirs: Sequence[str]) -> list[Variant]:
  """Returns the runs grouped by their configuration, in the order given.

  A seed that occurs twice begins a new variant: equal runs are not independent
  samples.

  Raises:
    ConfigError: there is no run, a folder is not a run or is given twice, or
      the tasks differ.
  """
  if not workdirs:
    raise ConfigError("there is no run to compare")
  paths = [os.path.realpath(workdir) for workdir in workdirs]
  for i, path in enumerate(paths):
    if path in paths[:i]:
      raise ConfigError(f"the run {workdirs[i]!r} is given twice")
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
  names = [_name(members) for members in grouped]
  if len(set(names)) < len(names):
    names = [os.path.normpath(members[0].workdir) for members in grouped]
  return [Variant(n, m) for n, m in zip(names, grouped, strict=True)]


def summarize(variants: Sequence[Variant]) -> dict[str, Any]:
  """Returns the comparison, the content of `compare.json`.

  A metric is `{"mean", "sd", "n"}` over the runs that have it. The standard
  deviation is that of a sample; it is None for fewer than two runs.
  """
  reference = variants[0]
  task = reference.runs[0].config.task
  base = _spread(run.quality for run in reference.runs)["mean"]
  entries = []
  for variant in variants:
    runs = variant.runs
    config = runs[0].config
    test = _spread(run.quality for run in runs)
    is_relative = base and test["mean"] is not None
    whole = [run.bytes["overall"] for run in runs]
    entries.append(
      {
        "name": variant.name,
        "runs": [run.name for run in runs],
        "seeds": [run.config.seed for run in runs],
        "preset": config.preset,
        "dense": config.dense,
        "finished": runs[0].result["finished"],
        "steps": [run.result["steps"] for run in runs],
        "bits_per_byte" if task == "lm" else "accuracy": test,
        "relative_difference": test["mean"] / base - 1 if is_relative else None,
        "compression": {
          name: _spread(run.parameters[name]["compression"] for run in runs)
          for name in report.GROUPS
        },
        "stored_parameters": _spread(
          run.parameters["overall"]["stored"] for run in runs
        ),
        "allocated_parameters": _spread(run.allocated for run in runs),
        "stored_bytes_with_masks": _spread(
          size["stored"] + size["masks"] for size in whole
        ),
        "seconds": _spread(run.result["seconds"] for run in runs),
        "tokens_per_second": _spread(
          run.result["tokens_per_second"] for run in runs
        ),
        "differences": _differences(reference.runs[0], runs[0]),
      }
    )
  return {
    "schema": report.SCHEMA,
    "task": task,
    "variants": entries,
    "notes": _notes(variants),
  }


def _spread(metric: Iterable[int | float | None]) -> dict[str, Any]:
  """Returns the mean and the standard deviation of a metric over seeds."""
  values = [value for value in metric if value is not None]
  return {
    "mean": statistics.fmean(values) if values else None,
    "sd": statistics.stdev(values) if len(values) > 1 else None,
    "n": len(values),
  }


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
  # "lm-seed1" and "lm-seed2" are "lm".
  return re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", common) or members[0].name


def _notes(variants: Sequence[Variant]) -> list[str]:
  """Returns the reasons why some of the metrics cannot be compared."""
  notes = []
  runs = [run for variant in variants for run in variant.runs]
  if len({run.digest for run in runs}) > 1:
    notes.append(
      "these runs had different data, so their test metrics do not tell which "
      "is better."
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
  if run.config.task != "lm" or not path.is_file():
    return None
  return path.read_text(encoding="utf-8")


def _page(metrics: Mapping[str, Any]) -> str:
  """Returns the text of `compare.md`."""
  is_lm = metrics["task"] == "lm"
  header = (
    *("Run", "Seeds", "Test bits per byte" if is_lm else "Test accuracy"),
    *("Difference", "Compression", "Parameters, stored", "allocated"),
    *("Bytes, with masks", "Steps", "Time", "Tokens per second"),
  )
  reference = metrics["variants"][0]["name"]
  lines = [
    "# Comparison of runs\n",
    report.table(header, [_row(v, is_lm) for v in metrics["variants"]], 2),
    f"Difference: of the test metric, relative to {reference} "
    f"({'less' if is_lm else 'more'} is better). Compression: 1 - stored / "
    "dense of all parameters. Allocated: parameters in arrays, zeros included. "
    "±: sample standard deviation over seeds.",
    *(f"\n**Note:** {note}" for note in metrics["notes"]),
    "\n![Validation over steps; test metric against size](compare.png)",
  ]
  for variant in metrics["variants"][1:]:
    lines.append(f"\nFields of {variant['name']} that differ:\n")
    lines += [f"- `{change}`" for change in variant["differences"] or ["none"]]
  return "\n".join(lines) + "\n"


def _row(variant: Mapping[str, Any], is_lm: bool) -> list[str]:
  """Returns the cells of a variant in the table of `compare.md`."""

  def cell(spread: Mapping[str, Any], form: Callable[..., str]) -> str:
    if spread["mean"] is None:
      return "–"
    text = form(spread["mean"])
    # A size that all seeds share needs no "± 0".
    return f"{text} ± {form(spread['sd'])}" if spread["sd"] else text

  change, whole = variant["relative_difference"], "{:,.0f}".format
  return [
    variant["name"],
    ", ".join(map(str, variant["seeds"])),
    cell(variant["bits_per_byte"], "{:.3f}".format)
    if is_lm
    else cell(variant["accuracy"], report.percent),
    "–" if change is None else f"{change:+.1%}",
    cell(variant["compression"]["overall"], report.percent),
    cell(variant["stored_parameters"], whole),
    cell(variant["allocated_parameters"], whole),
    cell(variant["stored_bytes_with_masks"], whole),
    ", ".join(f"{steps:,}" for steps in sorted(set(variant["steps"]))),
    cell(variant["seconds"], report.duration),
    cell(variant["tokens_per_second"], whole),
  ]


def _draw(
  variants: Sequence[Variant], metrics: Mapping[str, Any], path: str
) -> None:
  # Importing matplotlib is slow, and the table does not need it.
  from folding.reporting import plots

  is_lm = metrics["task"] == "lm"
  # Tokenizers may differ, and with them the loss of a token.
  key = "bits_per_byte" if is_lm else "loss"
  label = "bits per byte" if is_lm else f"loss, {variants[0].runs[0].loss_unit}"
  points = {}
  for entry in metrics["variants"]:
    test = entry["bits_per_byte" if is_lm else "accuracy"]
    size, error = entry["stored_parameters"], test["sd"] or 0
    points[entry["name"]] = None
    if test["mean"] is not None:
      points[entry["name"]] = plots.Point(
        size["mean"], test["mean"], size["sd"] or 0, error
      )
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
      y_label="test (bits per byte)" if is_lm else "test accuracy",
    )


def _curve(variant: Variant, key: str) -> list[tuple[int, int | float]]:
  """Returns (step, mean over seeds) of a validation metric."""
  found: dict[int, list[float]] = {}
  for run in variant.runs:
    for record in run.valid:
      if key in record:
        found.setdefault(record["step"], []).append(record[key])
  return [(step, statistics.fmean(ys)) for step, ys in sorted(found.items())]
