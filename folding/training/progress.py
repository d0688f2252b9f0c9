"""Around the loop: its clock, its log of steps, and the signal to stop."""

import contextlib
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from folding.config import Config
from folding.schema import TrainingError
from folding.training.metrics import MetricsWriter
from folding.training.optimizer import current_rate
from folding.training.result import read_result


class Clock:
  """Seconds of training, over all the times a run was resumed."""

  def __init__(self, workdir: str, first_step: int):
    self._before = 0.0
    if first_step and os.path.exists(os.path.join(workdir, "result.json")):
      self._before = read_result(workdir)["seconds"]
    self._start = time.monotonic()

  def seconds(self) -> float:
    """Returns the seconds so far."""
    return self._before + time.monotonic() - self._start


class StepLog:
  """Fetches the metrics of a step after the next one is under way."""

  def __init__(
    self,
    config: Config,
    num_parameters: int,
    writer: MetricsWriter,
    clock: Clock,
    counts: Mapping[str, float] | None = None,
  ):
    self._config, self._writer, self._clock = config, writer, clock
    self._size = num_parameters
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._tokens = 0
    self._since = time.monotonic()
    # They change at checks alone; without rules nothing is told.
    self._counts = dict(counts or {})
    self._speeds = list(writer.speeds)

  def restart(self) -> None:
    """Leaves the time since the last record out of the tokens per second."""
    self._tokens, self._since = 0, time.monotonic()

  def speed(self) -> float | None:
    """Returns the median of tokens per second of all records, None without."""
    return statistics.median(self._speeds) if self._speeds else None

  def step(self, step: int, metrics: dict[str, jax.Array], batch: dict) -> None:
    """Takes the metrics of a step; reports the ones taken before."""
    self.flush()
    self._tokens += batch["tokens"].size
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Checks what was taken last, and writes it where a record is due."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
      raise TrainingError(f"the loss is {values['loss']} at step {step}")
    if "zero" in values:
      self._counts = values
    elif step % self._config.train.log_every and step > 1:
      return
    speed = self._tokens / max(time.monotonic() - self._since, 1e-9)
    self._speeds.append(speed)
    self.restart()
    record = {
      "split": "train",
      "step": step,
      "loss": values["loss"],
      "learning_rate": current_rate(self._config, step - 1),
      "tokens_per_second": speed,
      "seconds": self._clock.seconds(),
    }
    if self._counts:
      selected = self._counts["selected"]
      idle = self._counts["frozen"] + self._counts["zero"]
      record["sparsity"] = self._counts["zero"] / selected
      record["frozen"] = self._counts["frozen"] / selected
      record["trainable"] = int(self._size - idle)
    self._writer.write(record)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step that says whether a run is to stop.

  SIGTERM and SIGINT (Ctrl-C, of which a second one ends the run at once) ask
  for it. With several processes, SIGTERM to one is told to all, and all of them
  are told to stop at the same step; each must ask at each step.
  """
  if jax.process_count() > 1:
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
  except ValueError:  # not the main thread (a notebook's worker, a test)
    yield lambda step: False
    return
  try:
    yield lambda step: bool(arrived)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
