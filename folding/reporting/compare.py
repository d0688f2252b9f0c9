"""Runs side by side: what each stores, and what it costs in quality."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from folding import files
from folding.reporting import grouping, runs, words

# What is tested follows from these, where the text itself is not known.
_DATA = tuple(
  f"data.{name}:"
  for name in (
    *("name", "path", "text_field", "label_field", "max_bytes"),
    *("valid_fraction", "test_fraction"),
  )
)
_GROUPS = ("overall", "qkv", "linear", "embedding")


def compare(workdirs: Sequence[str], output: str | None = None) -> str:
  """Writes `compare.md`, `compare.json` and `compare.png`.

  Runs that differ only in their seed become one column: mean ± sample
  standard deviation. The first column is the reference of the others.

  Args:
    workdirs: Run directories, the reference first.
    output: The folder to write into, made if need be; None: `comparison` in
      the current one.

  Returns:
    The text of `compare.md`.

  Raises:
    schema.ConfigError: a folder is not a run or is given twice, the tasks are
      not the same, or the output is no folder of this machine.
  """
  # Drawing is slow to import, and the tables alone do not need it.
  from folding.reporting import overlay, plots

  output = "comparison" if output is None else output
  files.require_local(output)
  found = grouping.columns(workdirs)
  text = markdown(found)
  os.makedirs(output, exist_ok=True)
  plots.save(overlay.overlay(found), os.path.join(output, "compare.png"))
  values = json.dumps(summarize(found), indent=2) + "\n"
  files.write_file(os.path.join(output, "compare.json"), values)
  files.write_file(os.path.join(output, "compare.md"), text)
  return text


def rows(found: list[grouping.Column]) -> list[list[str]]:
  """Returns the table, a figure a row: its name, then a cell a column."""

  def row(name: str, figure: grouping.Figure, form: Callable) -> list[str]:
    return [name, *(_cell(c.spread(figure), form) for c in found)]

  table = [
    ["seeds", *(_seeds(c) for c in found)],
    ["preset", *(_preset(c) for c in found)],
    *(
      row(f"compression, {g}", grouping.compression(g), words.percent)
      for g in _GROUPS
    ),
    row("stored parameters", grouping.stored_parameters, words.count),
    row("stored bytes, with masks", grouping.stored_bytes, words.count),
  ]
  if found[0].first.config.task == "lm":
    table.append(row("test bits per byte", grouping.quality, "{:.3f}".format))
    table.append(row("test perplexity", grouping.perplexity, "{:,.2f}".format))
  else:
    table.append(["test accuracy", *(_accuracy(c) for c in found)])
  changes = grouping.relative(found)[1:]
  return [
    *table,
    [
      "difference to the first",
      "reference",
      *(words.signed_percent(change) for change in changes),
    ],
    ["steps", *(_steps(c) for c in found)],
    row("time", _seconds, words.duration),
    row("tokens per second", _speed, words.count),
    ["device", *(_devices(c) for c in found)],
  ]


def markdown(found: list[grouping.Column]) -> str:
  """Returns the text of `compare.md`."""
  header = ["", *(c.name for c in found)]
  reference = found[0]
  lines = ["# Comparison of runs", "", words.table(header, rows(found))]
  lines.append(
    f"Compression is 1 - stored / dense, measured. The difference is that of "
    f"the test figure, relative to {reference.name}; "
    + (
      "for bits per byte, less is better."
      if reference.first.config.task == "lm"
      else "for accuracy, more is better."
    )
  )
  if any(len(c.members) > 1 for c in found):
    lines.append("± is the sample standard deviation over seeds.")
  lines += [f"\n**Note:** {note}" for note in notes(found)]
  lines.append("\n![Validation over steps; test against size](compare.png)\n")
  lines.append(f"## What differs from {reference.name}\n")
  for column in found[1:]:
    changes = grouping.differences(reference, column)
    lines.append(f"- **{column.name}**")
    lines += [f"  - `{change}`" for change in changes]
    if not changes:
      lines.append("  - nothing but the seed or how far the run went")
  if len(found) == 1:
    lines.append("All runs have one configuration.")
  return "\n".join(lines) + "\n"


def show(found: list[grouping.Column], file: Any = None) -> None:
  """Prints the table, drawn for a terminal, on a stream (None: stdout)."""
  import rich.console
  import rich.markup
  import rich.table

  table = rich.table.Table("", *(rich.markup.escape(c.name) for c in found))
  for column in table.columns[1:]:
    column.justify = "right"
    column.overflow = "fold"
  for row in rows(found):
    # Escaped: a name like "run[1]" is no markup.
    table.add_row(*map(rich.markup.escape, row))
  rich.console.Console(file=file).print(table)


def notes(found: list[grouping.Column]) -> list[str]:
  """Returns why some of the figures may not be compared, if so."""
  texts = []
  changed = [
    line for c in found[1:] for line in grouping.differences(found[0], c)
  ]
  members = [run for c in found for run in c.members]
  digests = {run.digest for run in members}
  is_other_text = len(digests) > 1
  if None in digests:
    is_other_text = any(line.startswith(_DATA) for line in changed)
  if is_other_text:
    texts.append(
      "these runs had different data; their test figures do not tell which is "
      "better."
    )
  elif len({_tokenizer(c.first) for c in found}) > 1:
    texts.append(
      "these runs have different tokenizers: compare bits per byte, not "
      "perplexity or loss."
    )
  if len({run.result.device for run in members}) > 1:
    texts.append("these runs were not timed on the same device.")
  if not all(run.result.finished for run in members):
    texts.append("unfinished runs have no test figure.")
  return texts


def _tokenizer(run: runs.Run) -> str | None:
  """Returns what cuts a language model's text; None of a classifier."""
  path = pathlib.Path(run.workdir, "tokenizer.json")
  if run.config.task != "lm" or not path.is_file():
    return None
  return path.read_text(encoding="utf-8")


def summarize(found: list[grouping.Column]) -> dict[str, Any]:
  """Returns the comparison as `compare.json` holds it."""
  task = found[0].first.config.task
  figures = {
    "stored_parameters": grouping.stored_parameters,
    "stored_bytes_with_masks": grouping.stored_bytes,
    "accuracy" if task == "classify" else "bits_per_byte": grouping.quality,
    "perplexity": grouping.perplexity,
    "seconds": _seconds,
    "tokens_per_second": _speed,
  }
  if task == "classify":
    del figures["perplexity"]
  entries = []
  for column, change in zip(found, grouping.relative(found), strict=True):
    config = column.first.config
    entry = {
      "name": column.name,
      "runs": [run.name for run in column.members],
      "seeds": [run.config.seed for run in column.members],
      "preset": config.preset,
      "dense": config.dense,
      "finished": column.first.result.finished,
      "steps": [run.result.steps for run in column.members],
      "compression": {
        g: dataclasses.asdict(column.spread(grouping.compression(g)))
        for g in runs.GROUPS
      },
      **{
        name: dataclasses.asdict(column.spread(figure))
        for name, figure in figures.items()
      },
      "relative_difference": change,
    }
    test = column.first.test
    if isinstance(test, runs.ClassifyTest) and len(column.members) == 1:
      low, high = runs.wilson(test.accuracy, test.num_examples)
      entry |= {"accuracy_low": low, "accuracy_high": high}
    entries.append(entry)
  return {
    "schema": runs.SCHEMA,
    "task": task,
    "columns": entries,
    "notes": notes(found),
  }


def _seconds(run: runs.Run) -> float | None:
  return run.result.seconds


def _speed(run: runs.Run) -> float | None:
  return run.result.tokens_per_second


def _cell(spread: grouping.Spread, form: Callable) -> str:
  if spread.mean is None:
    return words.NOTHING
  text = form(spread.mean)
  # A figure that every seed shares needs no "± 0".
  return f"{text} ± {form(spread.sd)}" if spread.sd else text


def _accuracy(column: grouping.Column) -> str:
  text = _cell(column.spread(grouping.quality), words.percent)
  test = column.first.test
  if isinstance(test, runs.ClassifyTest) and len(column.members) == 1:
    low, high = runs.wilson(test.accuracy, test.num_examples)
    text += f" ({words.percent(low)} to {words.percent(high)})"
  return text


def _seeds(column: grouping.Column) -> str:
  seeds = ", ".join(str(run.config.seed) for run in column.members)
  n = len(column.members)
  return seeds if n == 1 else f"{seeds} (n = {n})"


def _preset(column: grouping.Column) -> str:
  config = column.first.config
  return "dense twin" if config.dense else config.preset


def _steps(column: grouping.Column) -> str:
  if column.first.result.finished:
    return words.count(column.first.result.steps)
  return words.listing(
    [
      f"{words.count(run.result.steps)} of "
      f"{words.count(run.result.total_steps)}"
      for run in column.members
    ]
  )


def _devices(column: grouping.Column) -> str:
  return words.listing(
    list(dict.fromkeys(run.result.device for run in column.members))
  )
