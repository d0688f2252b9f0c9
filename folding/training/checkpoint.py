"""Checkpoints of a run: asynchronous, the last two and the best are kept.

Schema 1: one Orbax item, the training state (step, params, opt_state), under
RUN/checkpoints/<step>. Renaming a parameter path bumps the schema.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from folding.schema import TrainingError, first_line
from folding.training import distributed

# What is to be free beside the state itself when a checkpoint is written: for
# metrics and reports, and for each array, whose place in the file takes a few kB
# more or less, as the threads that write happen to run.
_RESERVE_BYTES = 1 << 20
_ARRAY_BYTES = 1 << 13

_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run directory; use it as a context manager.

  Leaving the context waits for a save under way.
  """

  def __init__(self, workdir: str, cleans: bool = True):
    self._folder = os.path.abspath(os.path.join(workdir, "checkpoints"))
    self._cleans = cleans
    self._damaged: set[int] = set()
    if distributed.is_main():
      _mend_metrics(self._folder)
    distributed.barrier("mended")
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    kept = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(2),
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: -metrics["loss"],
          n=1,
        ),
      ]
    )
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        # Without these two, Orbax does not write metrics at all.
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        cleanup_tmp_directories=self._cleans,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    try:
      self.wait()
    except OSError:
      if kind is None:
        raise
      return  # what ends the run already says that it cannot be written
    self._manager.close()

  def save(self, step: int, state: Any, loss: float | None) -> None:
    """Starts to save a state; waits only for the save before it.

    Args:
      step: Updates applied so far.
      state: The training state.
      loss: What the best has least of; None: no candidate for the best.

    Raises:
      OSError: the disk is full, or this save or the one before failed; earlier
        checkpoints are intact.
    """
    if step in self._manager.all_steps():
      return
    self.wait()  # or what is still being written would count as free
    # Asked first: a save that fails half-way leaves threads that complain.
    arrays = jax.tree.leaves(state)
    needed = _RESERVE_BYTES + sum(x.nbytes + _ARRAY_BYTES for x in arrays)
    free = shutil.disk_usage(self._folder).free
    if distributed.any_process(free < needed):
      raise OSError(
        f"a checkpoint needs {needed / 1e6:,.1f} MB and the disk has "
        f"{free / 1e6:,.1f} MB left"
      )
    try:
      self._manager.save(
        step,
        args=ocp.args.StandardSave(state),
        metrics={"loss": math.inf if loss is None else loss},
        force=True,
      )
    except ValueError as error:
      # TensorStore reports a failed write (no space left) as ValueError.
      raise OSError(str(error)) from error

  def wait(self) -> None:
    """Waits for a save under way.

    Raises:
      OSError: it failed.
    """
    try:
      self._manager.wait_until_finished()
    except ValueError as error:
      raise OSError(str(error)) from error

  def steps(self) -> list[int]:
    """Returns the steps not known to be damaged, oldest first."""
    return sorted(set(self._manager.all_steps()) - self._damaged)

  def intact(self) -> list[int]:
    """Returns the steps that are on disk and not known to be damaged.

    It waits for a save under way, which does not count where it fails.
    """
    with contextlib.suppress(OSError):
      self.wait()
    return sorted(set(saved_steps(self._folder)) - self._damaged)

  def best_step(self) -> int | None:
    """Returns the step of the lowest `loss` given to `save`, None without any."""
    losses = {step: self.loss(step) for step in self.steps()}
    found = {step: loss for step, loss in losses.items() if loss is not None}
    return min(found, key=found.__getitem__) if found else None

  def loss(self, step: int) -> float | None:
    """Returns the validation loss that a step was saved with, None without."""
    metrics = self._manager.metrics(step)
    if metrics and math.isfinite(metrics["loss"]):
      return metrics["loss"]
    return None

  def restore(self, step: int, like: Any) -> Any:
    """Returns the state saved at a step.

    Args:
      step: One of `steps()`.
      like: Tree of `jax.ShapeDtypeStruct` with shardings.
    """
    return self._manager.restore(step, args=ocp.args.StandardRestore(like))

  def restore_latest(self, like: Any) -> tuple[int, Any] | None:
    """Returns the newest (step, state) that is intact, None if there is none.

    A checkpoint that cannot be read is passed over with a warning and, if this
    is the process that trains, moved to "damaged-<step>", so that its step can
    be written again.

    Raises:
      TrainingError: there are checkpoints, and none of them can be read.
    """
    found = self._restore_first(self.steps()[::-1], like)
    if found and self._damaged and self._cleans:
      for step in self._damaged if distributed.is_main() else ():
        folder = os.path.join(self._folder, str(step))
        aside = os.path.join(self._folder, f"damaged-{step}")
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        os.replace(folder, aside)
      distributed.barrier("moved aside")
      self._damaged.clear()
      self._manager.reload()
    return found

  def restore_best(self, like: Any) -> tuple[int, Any] | None:
    """Returns the (step, state) of the lowest loss, else the newest.

    What cannot be read is passed over with a warning, and stays where it is.

    Raises:
      TrainingError: there are checkpoints, and none of them can be read.
    """
    steps, best = self.steps()[::-1], self.best_step()
    return self._restore_first(sorted(steps, key=lambda s: s != best), like)

  def _restore_first(
    self, steps: list[int], like: Any
  ) -> tuple[int, Any] | None:
    damaged = []
    for step in steps:
      state, reason = None, "another process cannot read it"
      try:
        state = jax.block_until_ready(self.restore(step, like))
      except Exception as error:  # Orbax and TensorStore raise many kinds.
        reason = first_line(error)[:200]
      if not distributed.any_process(state is None):
        for bad, why in damaged:
          _log.warning(
            "checkpoint %d is damaged (%s); going back to %d", bad, why, step
          )
        return step, state
      damaged.append((step, reason))
      self._damaged.add(step)
      # What there is in a step Orbax concludes from the first that it reads.
      self._manager.close()
      self._manager = self._open()
    if damaged:
      raise TrainingError(
        f"none of the checkpoints in {self._folder} can be read; "
        f"{damaged[0][0]}: {damaged[0][1]}"
      )
    return None


def has_checkpoint(workdir: str) -> bool:
  """Returns whether a run directory has a checkpoint, intact or not."""
  return bool(saved_steps(os.path.join(workdir, "checkpoints")))


def saved_steps(folder: str) -> list[int]:
  """Returns the steps whose save is complete, in any order."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return [int(name) for name in names if name.isdecimal()]


def saved_loss(folder: str, step: int) -> float:
  """Returns the loss that a step was saved with; infinity without one."""
  try:
    with open(_metrics_path(folder, step), encoding="utf-8") as file:
      loss = float(json.load(file)["loss"])
  except (OSError, ValueError, TypeError, KeyError):
    return math.inf
  return loss if math.isfinite(loss) else math.inf


def _metrics_path(folder: str, step: int) -> str:
  return os.path.join(folder, str(step), "metrics", "metrics")


def _mend_metrics(folder: str) -> None:
  """Takes checkpoints with unreadable metrics out of the choice of the best.

  Orbax reads all metrics at the start and gives up at the first such file,
  though the states may be intact.
  """
  for step in saved_steps(folder):  # and not one that is being saved
    path = _metrics_path(folder, step)
    if not os.path.exists(path):
      continue
    try:
      with open(path, encoding="utf-8") as file:
        float(json.load(file)["loss"])
    except (ValueError, TypeError, KeyError) as error:
      _log.warning("%s is damaged (%s)", path, error)
      with open(path, "w", encoding="utf-8") as file:
        json.dump({"loss": math.inf}, file)
