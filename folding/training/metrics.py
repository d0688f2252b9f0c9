"""What a run tells while it trains: a file, TensorBoard and a progress bar."""

import json
import os
from types import TracebackType
from typing import Any

import rich.console
import rich.progress

from folding import files
from folding.config import Config


class MetricsWriter:
  """Writes metrics of a run; use it as a context manager.

  `metrics.jsonl` has a line per record. On resume, records after the step that
  was restored are dropped, so that the file reads like one run. Of several
  processes only the main one writes and prints.
  """

  def __init__(
    self, workdir: str, config: Config, first_step: int, is_main: bool = True
  ):
    self._file = self._board = None
    self.speeds: list[float] = []  # tokens per second, of the records kept
    if is_main:
      path = os.path.join(workdir, "metrics.jsonl")
      kept = [r for r in read_metrics(path) if r["step"] <= first_step]
      files.write_file(path, "".join(json.dumps(r) + "\n" for r in kept))
      trained = [r for r in kept if r["split"] == "train"]
      self.speeds = [r["tokens_per_second"] for r in trained]
      self._file = open(path, "a", encoding="utf-8")
    if is_main and config.train.tensorboard:
      # Imported here: it takes time and is only needed where it is used.
      import tensorboardX

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
      "train", total=config.train.steps, completed=first_step, text=""
    )

  def __enter__(self) -> "MetricsWriter":
    self._progress.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
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


def read_metrics(path: str) -> list[dict[str, Any]]:
  """Returns the records of a file; a line torn by a kill ends the reading."""
  records = []
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      for line in file:
        try:
          records.append(json.loads(line))
        except ValueError:
          break
  return records
