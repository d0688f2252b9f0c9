"""What a run reports while it trains, and the signal that stops it."""

import contextlib
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import rich.console
import rich.progress
from jax.experimental import multihost_utils

from folding import files
from folding.config import TrainConfig
from folding.errors import ConfigError, TrainingError, reason
from folding.training import run_dir
from folding.training.optimizer import make_schedule

_Item = TypeVar("_Item")
_LOG_SECONDS = 10  # between lines of `track` in a log


def track(items: Sequence[_Item], doing: str) -> Iterator[_Item]:
  """Yields items, and shows on stderr how many are done and the time left.

  A terminal shows a bar, and a log a line at the start and then every ten seconds.
  Of several processes the main one shows them.

  Args:
    items: Units of about equal work.
    doing: Description, such as "folding layers".
  """
  if jax.process_index():
    yield from items
    return
  console = rich.console.Console(stderr=True, highlight=False)
  if console.is_terminal:
    yield from rich.progress.track(
      items, description=doing, console=console, transient=True
    )
    return
  start = last = time.monotonic()
  for count, item in enumerate(items):
    now = time.monotonic()
    if not count or now - last > _LOG_SECONDS:
      line = f"{doing}: {count} of {len(items)}"
      if count:  # more work may follow
        left = (now - start) / count * (len(items) - count)
        line += f", about {left:.0f} s left for this"
      console.print(line, soft_wrap=True)
      last = now
    yield item


class MetricsWriter:
  """Writes `metrics.jsonl`, TensorBoard events and a progress bar.

  Use it as a context manager. On resume, it drops the records after the restored
  step, so that the file reads like one run. Of several processes only the main
  one writes and prints.
  """

  def __init__(
    self,
    workdir: str,
    train: TrainConfig,
    first_step: int,
    is_main: bool = True,
  ):
    self._file = self._board = None
    self.speeds: list[float] = []  # tokens per second, of the records kept
    if is_main:
      path = os.path.join(workdir, "metrics.jsonl")
      records = run_dir.read_metrics(path)
      kept = [r for r in records if r["step"] <= first_step]
      trained = [r for r in kept if r["split"] == "train"]
      try:
        self.speeds = [float(r["tokens_per_second"]) for r in trained]
      except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {reason(error)}") from error
      files.write_file(path, "".join(json.dumps(r) + "\n" for r in kept))
      self._file = open(path, "a", encoding="utf-8")
    if is_main and train.tensorboard:
      import tensorboardX  # here, because it is slow to import

      self._board = tensorboardX.SummaryWriter(
        os.path.join(workdir, "tensorboard"), purge_step=first_step + 1
      )
    self._console = rich.console.Console(highlight=False, quiet=not is_main)
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.TextColumn("{task.fields[text]}"),
      rich.progress.TextColumn("ETA"),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      transient=True,
      disable=not self._console.is_terminal,
    )
    self._task = self._progress.add_task(
      "train",
      total=train.steps,
      completed=first_step,
      text="compiling first",
    )

  def __enter__(self) -> "MetricsWriter":
    self._progress.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._progress.stop()
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()

  def write(self, record: dict[str, Any]) -> None:
    """Writes a record with "split", "step" and numbers."""
    if self._file is None:
      return
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    split, step = record["split"], record["step"]
    if self._board is not None:
      for name, value in record.items():
        if name not in ("split", "step"):
          self._board.add_scalar(f"{split}/{name}", value, step)
    if split == "train":
      self._progress.update(self._task, completed=step, text=_brief(record))

  def say(self, message: str) -> None:
    """Prints a line above the progress bar."""
    self._console.print(message, markup=False, soft_wrap=True)


def _brief(record: dict[str, Any]) -> str:
  text = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
  if "sparsity" in record:
    text += f"  sparsity {record['sparsity']:.0%}"
  return text


def aligned(rows: Sequence[Sequence[str]], num_text: int = 0) -> list[str]:
  """Returns a line per row, with aligned columns.

  Args:
    rows: Cells.
    num_text: Number of first columns that are aligned left; others, right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i < num_text else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]


class Clock:
  """Training time in seconds, summed over all resumptions of a run."""

  def __init__(self, workdir: str, first_step: int):
    self._before = 0.0
    if first_step and os.path.exists(os.path.join(workdir, "result.json")):
      self._before = run_dir.read_result(workdir).get("seconds", 0.0)
    self._start = time.monotonic()

  def seconds(self) -> float:
    """Returns the seconds so far."""
    return self._before + time.monotonic() - self._start


class StepLog:
  """Records the metrics of training steps, one step late.

  The metrics of a step are fetched from the device after the next step has been
  dispatched, so that the device never waits for the log.
  """

  def __init__(
    self,
    train: TrainConfig,
    whole_size: int,
    writer: MetricsWriter,
    clock: Clock,
    counts: Mapping[str, float],
  ):
    """Initializes the log.

    Args:
      train: Its section of the config.
      whole_size: Parameters of the model before any shrink, zeros included.
      writer: Takes the records.
      clock: Training time of the run.
      counts: `fpp_counts` of the first state; {} if nothing is pruned.
    """
    self._train, self._writer, self._clock = train, writer, clock
    self._rate = jax.jit(make_schedule(train))  # one program, not ten
    self._size = whole_size
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._tokens = 0
    self._since = time.monotonic()
    self.counts = dict(counts)  # of the last mask update
    self._speeds = list(writer.speeds)

  def restart(self) -> None:
    """Excludes the time since the last record from the tokens per second."""
    self._tokens, self._since = 0, time.monotonic()

  def speed(self) -> float | None:
    """Returns the median of tokens per second over all records."""
    return statistics.median(self._speeds) if self._speeds else None

  def step(self, step: int, metrics: dict[str, jax.Array], batch: dict) -> None:
    """Takes the metrics of a step, and records those of the step before."""
    self.flush()
    self._tokens += batch["tokens"].size
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Checks the pending metrics, and writes a record if one is due.

    Raises:
      TrainingError: the loss is not finite.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
      raise TrainingError(f"the loss is {values['loss']} at step {step}")
    if "zero" in values:
      self.counts = values
    elif step % self._train.log_every and step > 1:
      return
    speed = self._tokens / max(time.monotonic() - self._since, 1e-9)
    self._speeds.append(speed)
    self.restart()
    record = {
      "split": "train",
      "step": step,
      "loss": values["loss"],
      "learning_rate": float(self._rate(step - 1)),
      "tokens_per_second": speed,
      "seconds": self._clock.seconds(),
    }
    if self.counts:
      selected = self.counts["selected"]
      idle = self.counts["frozen"] + self.counts["zero"]
      record["sparsity"] = self.counts["zero"] / selected
      record["frozen"] = self.counts["frozen"] / selected
      record["trainable"] = int(self._size - idle)
    self._writer.write(record)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step: has the run been asked to stop?

  SIGTERM and Ctrl-C ask; a second Ctrl-C interrupts. With several processes,
  SIGTERM to one of them stops all at the same step. Each process must call the
  function at each step.
  """
  # `process_count` starts a backend, which a study that forks must not have.
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  arrived = []

  def stop(number, _):
    arrived.append(number)
    signal.signal(signal.SIGINT, before[signal.SIGINT])

  signals = signal.SIGTERM, signal.SIGINT
  before = {number: signal.getsignal(number) for number in signals}
  try:
    for number in signals:
      signal.signal(number, stop)
  except ValueError:  # not the main thread, such as in a test or a notebook
    yield lambda step: False
    return
  try:
    yield lambda step: bool(arrived)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
