"""How far a study is: what each run's files say, a table of it, and an ETA."""

import collections
import os
import statistics
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.live
import rich.table
import rich.text

from folding import files
from folding.reporting import words
from folding.studies.study import Trial
from folding.training.run_dir import is_finished, read_metrics, read_result

STATES = ("finished", "running", "failed", "waiting")


class Board:
  """What is finished and what has failed, by the files of a study.

  Attributes:
    trials: The runs of the study, in their order.
    seconds: {name: seconds of training} of what is finished.
    errors: {name: why it failed}.
  """

  def __init__(self, trials: Sequence[Trial]):
    self.trials = list(trials)
    self.seconds: dict[str, float] = {}
    self.errors: dict[str, str] = {}
    self.refresh()

  def refresh(self) -> None:
    """Looks at the files of what is not finished; a failure may be no more."""
    for trial in self.trials:
      if trial.name in self.seconds:
        continue
      self.errors.pop(trial.name, None)
      if is_finished(trial.run):
        self.seconds[trial.name] = read_result(trial.run)["seconds"]
      elif os.path.exists(path := failure_path(trial)):
        record = files.read_json(path, dict)
        self.errors[trial.name] = str(record.get("error"))

  def is_over(self, trial: Trial) -> bool:
    """Returns whether a run is finished or has failed."""
    return trial.name in self.seconds or trial.name in self.errors

  def open_trials(self) -> list[Trial]:
    """Returns the runs that are not over."""
    return [t for t in self.trials if not self.is_over(t)]

  def eta(self, workers: int) -> float | None:
    """Returns the seconds until all is over; None before a run is finished.

    A run takes as long as those of its data set did on average; else as all.
    """
    if not self.seconds:
      return None
    known = collections.defaultdict(list)
    for trial in self.trials:
      if trial.name in self.seconds:
        known[trial.dataset].append(self.seconds[trial.name])
    overall = statistics.fmean(self.seconds.values())
    total = sum(
      statistics.fmean(known[trial.dataset] or [overall])
      for trial in self.open_trials()
    )
    return total / max(workers, 1)

  def counts(self, held: set[str]) -> dict[str, dict[str, int]]:
    """Returns {data set: {state: number of runs}}."""
    found: dict[str, dict[str, int]] = {}
    for trial in self.trials:
      counts = found.setdefault(trial.dataset, {state: 0 for state in STATES})
      counts[self._state(trial, held)] += 1
    return found

  def _state(self, trial: Trial, held: set[str]) -> str:
    if trial.name in self.seconds:
      return "finished"
    if trial.name in self.errors:
      return "failed"
    return "running" if trial.name in held else "waiting"

  def table(self, held: set[str]) -> rich.table.Table:
    """Returns the counts, and the runs under way, for a terminal."""
    table = rich.table.Table("data set", *STATES)
    for column in table.columns[1:]:
      column.justify = "right"
    for dataset, counts in self.counts(held).items():
      table.add_row(dataset, *(str(counts[state] or "") for state in STATES))
    running = [t for t in self.open_trials() if t.name in held]
    lines = [f"{t.name}  {_progress(t)}" for t in running[:8]]
    lines.append(self.line(len(running)))
    table.caption = rich.text.Text("\n".join(lines), justify="left")
    return table

  def lines(self) -> list[str]:
    """Returns a line a run, with how far it is, and one of all."""
    found = []
    for trial in self.trials:
      state = self._state(trial, set())
      if state == "waiting" and os.path.exists(_metrics(trial)):
        state = "begun"
      text = f"{state:8}  {trial.name}"
      text += f"  {_progress(trial)}" if state == "begun" else ""
      text += f"  {self.errors[trial.name]}" if state == "failed" else ""
      found.append(text)
    return [*found, self.line(1)]

  def line(self, workers: int) -> str:
    """Returns one line: how many are over, and when all will be."""
    over = len(self.seconds) + len(self.errors)
    text = f"{over} of {len(self.trials)} runs are over"
    if self.errors:
      text += f", {len(self.errors)} failed"
    eta = self.eta(workers)
    if eta:
      text += f"; about {words.duration(eta)} to go"
    return text


class Show:
  """Shows a board: live on a terminal, else a line when a run is over."""

  def __init__(self, board: Board, console: rich.console.Console):
    self._board, self._console = board, console
    self._live = None
    if console.is_terminal:
      self._live = rich.live.Live(console=console, auto_refresh=False)

  def __enter__(self) -> "Show":
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._live:
      self._live.stop()

  def update(self, held: set[str]) -> None:
    """Draws the table anew; nothing where there is no terminal."""
    if self._live:
      self._live.update(self._board.table(held), refresh=True)

  def say(self, message: str) -> None:
    """Prints a line, above the table."""
    self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def failure_path(trial: Trial) -> str:
  """Returns where the failure of a run is recorded."""
  folder = os.path.dirname(os.path.dirname(trial.run))
  return os.path.join(folder, "failed", f"{trial.name}.json")


def _metrics(trial: Trial) -> str:
  return os.path.join(trial.run, "metrics.jsonl")


def _progress(trial: Trial) -> str:
  records = read_metrics(_metrics(trial))
  if not records:
    return "starting"
  path = os.path.join(trial.run, "config.json")
  steps = files.read_json(path, dict)["train"]["steps"]
  return f"step {records[-1]['step']:,} of {steps:,}"
