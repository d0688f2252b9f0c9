"""Checkpoints of a run: saved asynchronously; the last two and the best stay.

Schema 1: one Orbax item, the training state (step, params, opt_state), in
RUN/checkpoints/<step>. Renaming a parameter path bumps the schema. `model.json`
beside it is the section `model` of the config of this state, as arrays may become
smaller while training. Without it, that of config.json applies.

Neither Orbax nor OCDBT keeps checksums of the arrays, so `checksums.json` of a
checkpoint has one for each of its files. It is written before the temporary
folder of the save gets its name, and verified whenever the checkpoint is read.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from folding import files, typed
from folding.config import ModelConfig
from folding.errors import ConfigError, TrainingError, first_line
from folding.model import Model
from folding.models.shape import Shape, fold_of, make_shape, model_of
from folding.training import distributed, run_dir, sharding

# Disk space that a save needs in addition to the arrays: for metrics and reports,
# and for the index entries of each array.
_RESERVE_BYTES = 1 << 20
_ARRAY_BYTES = 1 << 13

_METRICS = "metrics/metrics"
_MODEL = "model.json"
# Orbax writes them after the checksums; the state and its loss are elsewhere.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")

_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run directory; use it as a context manager.

  Leaving the context waits for a save under way.

  Attributes:
    cleans: Whether it may move damaged checkpoints aside. False for readers:
      another process may be training there.
  """

  def __init__(self, workdir: str, cleans: bool = True):
    self._folder = _folder(workdir)
    self.cleans = cleans
    self._damaged: set[int] = set()
    self._losses: dict[int, float] = {}
    self._saving: int | None = None
    self._shape: Shape | None = None  # of the save under way
    # Made by the first save: it writes into the folder when it opens it.
    self._manager: ocp.CheckpointManager | None = None
    for name in ("absl", "asyncio"):  # some log when the process ends
      logging.getLogger(name).addFilter(_is_not_of_orbax)

  def _open(self) -> ocp.CheckpointManager:
    if distributed.is_main():
      self._remove_damaged_metrics()
    distributed.barrier("removed")
    kept = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(2),
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: -metrics["loss"],
          n=1,
        ),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=kept,
      # Without these two, Orbax does not write metrics at all.
      best_fn=lambda metrics: metrics["loss"],
      best_mode="min",
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    with _quiet():
      return ocp.CheckpointManager(self._folder, options=options)

  def _remove_damaged_metrics(self) -> None:
    """Removes damaged metrics, at which Orbax fails when it opens a folder.

    Orbax keeps a step without metrics.
    """
    for step in self.steps():
      self.loss(step)
      if math.isnan(self._losses[step]):
        path = pathlib.Path(self._folder, str(step), _METRICS)
        path.unlink(missing_ok=True)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    try:
      self.wait()
    except OSError:
      if kind is None:
        raise
      return  # the error that ends the run already reports it
    if self._manager is not None:
      self._manager.close()

  def save(
    self,
    step: int,
    state: Any,
    loss: float | None,
    shape: Shape | None = None,
  ) -> None:
    """Starts to save a state; waits only for the save before it.

    Args:
      step: Updates applied so far.
      state: The training state.
      loss: Ranks checkpoints, lower is better; None: no candidate for the best.
      shape: Shape of the model; None: the shape that its run began with.

    Raises:
      OSError: the disk is full, or this save or the one before failed. Earlier
        checkpoints are intact.
    """
    self._manager = self._manager or self._open()
    if step in self._manager.all_steps():
      return
    self.wait()  # a save under way has not taken its disk space yet
    # Checked first: a save that fails half-way leaves threads that log errors.
    arrays = jax.tree.leaves(state)
    needed = _RESERVE_BYTES + sum(x.nbytes + _ARRAY_BYTES for x in arrays)
    free = shutil.disk_usage(self._folder).free
    if distributed.any_process(free < needed):
      raise OSError(
        f"a checkpoint needs {needed / 1e6:,.1f} MB and the disk has "
        f"{free / 1e6:,.1f} MB left"
      )
    self._saving, self._shape = step, shape
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

  def _seal(self) -> None:
    """Writes model and checksums of a save; in its thread, the main process."""
    (part,) = pathlib.Path(self._folder).glob(f"{self._saving}.*")
    if self._shape is not None:
      model = dataclasses.asdict(model_of(self._shape))
      files.write_json(str(part / _MODEL), model)
    names = [
      name
      for name in files.all_files(str(part))
      if pathlib.Path(name).name not in _WRITTEN_LAST
    ]
    files.write_checksums(str(part), names)
    # TensorStore flushes the arrays itself; they lie in folders called d.
    files.sync_tree(
      str(part), skip=lambda path: pathlib.Path(path).parent.name == "d"
    )

  def wait(self) -> None:
    """Waits for a save under way.

    Raises:
      OSError: it failed.
    """
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
    except ValueError as error:
      raise OSError(str(error)) from error

  def steps(self) -> list[int]:
    """Returns the steps of finished saves not known to be damaged, ascending."""
    return sorted(set(saved_steps(self._folder)) - self._damaged)

  def best_step(self) -> int | None:
    """Returns the step of the lowest loss; None if no save had a loss."""
    steps = self._best_first()
    return steps[0] if steps and self.loss(steps[0]) is not None else None

  def loss(self, step: int) -> float | None:
    """Returns the loss given to `save`; None if it is damaged."""
    if step not in self._losses:  # warns of damage once
      self._losses[step] = _saved_loss(self._folder, step)
    loss = self._losses[step]
    return loss if math.isfinite(loss) else None

  def _best_first(self) -> list[int]:
    losses = {step: self.loss(step) for step in self.steps()}
    return _best_first(self._folder, losses)

  def shape(self, step: int, began: Shape) -> Shape:
    """Returns the shape given to `save`; without one, that of the run's start.

    Raises:
      ConfigError: it is damaged.
    """
    return _saved_shape(self._folder, step, began)

  def restore(self, step: int, like: Any) -> Any:
    """Returns the state saved at a step.

    Args:
      step: One of `steps()`.
      like: Tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      ConfigError: a file differs from its checksum.
    """
    with distributed.together("another process found damage"):
      if distributed.is_main():
        _require_intact(self._folder, step)
    path: Any = pathlib.Path(self._folder, str(step), "default")
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
      averages = _same_averages(handler.metadata(path), like)
      if averages is None:
        state = handler.restore(path, args=ocp.args.StandardRestore(like))
      else:
        state = _read_older(path, like, averages)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    return jax.block_until_ready(state)

  def restore_latest(self, like: Any) -> tuple[int, Any]:
    """Returns the newest (step, state) that can be read.

    Skips a damaged checkpoint with a warning. If `cleans`, moves it to
    "damaged-<step>", so that its step can be saved again.

    Args:
      like: As for `restore`, or a function that returns it for a step.

    Raises:
      ConfigError: there is no checkpoint yet.
      TrainingError: there are checkpoints, but none can be read.
    """
    found = self._restore_first(self.steps()[::-1], like)
    if self._damaged and self.cleans:
      for step in self._damaged if distributed.is_main() else ():
        folder = os.path.join(self._folder, str(step))
        aside = os.path.join(self._folder, f"damaged-{step}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
      distributed.barrier("moved aside")
      self._damaged.clear()
      self._losses.clear()
    return found

  def restore_best(self, like: Any) -> tuple[int, Any]:
    """Returns the (step, state) of the lowest loss.

    If no save had a loss, or the best is damaged, it takes the newest that can
    be read. Damaged checkpoints stay where they are. Arguments and errors are
    those of `restore_latest`.
    """
    return self._restore_first(self._best_first(), like)

  def _restore_first(self, steps: list[int], like: Any) -> tuple[int, Any]:
    """Returns the first of the steps that can be read, and its state."""

    def read(step):
      state = error = None
      try:
        with distributed.together("another process found damage"):
          here = like(step) if callable(like) else like
        state = self.restore(step, here)
      except Exception as found:  # Orbax and TensorStore raise many types
        error = found
      if not distributed.any_process(error is not None):
        return state
      self._damaged.add(step)
      raise error or OSError("another process cannot read it")

    return _first_readable(self._folder, steps, read, TrainingError)


def load_run(workdir: str, mesh: Mesh | None = None) -> Model:
  """Returns the model of a run directory, with its best parameters.

  The best checkpoint is that by `train.metric` on the validation split. If none
  has a loss, or the best is damaged, it takes the newest that can be read.
  Warns of a run that has not finished. Neither data nor optimizer state is read,
  and any number of devices will do.

  Args:
    workdir: The run directory.
    mesh: Splits the parameters, of which each process reads its own part; None:
      they are NumPy arrays.

  Raises:
    ConfigError: it is not a run, or no checkpoint can be read.
  """
  order = run_dir.load_order(workdir)
  began = run_dir.load_model(workdir, order)
  folder = _folder(workdir)
  jax.devices()  # raises without a backend, which below would look like damage

  def read(step):
    _require_intact(folder, step)
    shape = _saved_shape(folder, step, began.shape)
    params = _read_params(os.path.join(folder, str(step)), mesh)
    return dataclasses.replace(began, shape=shape, params=params)

  losses = {step: _saved_loss(folder, step) for step in saved_steps(folder)}
  steps = _best_first(folder, losses)
  _, found = _first_readable(folder, steps, read, ConfigError)
  if (last := max(steps)) < order.train.steps:
    _log.warning(
      "%s has not finished: step %d of %d", workdir, last, order.train.steps
    )
  return found


def _first_readable(
  folder: str,
  steps: list[int],
  read: Callable[[int], Any],
  failure: type[Exception],
) -> tuple[int, Any]:
  """Returns the first step that can be read, and the result of `read`.

  Warns of the steps before it.

  Raises:
    ConfigError: `steps` is empty.
    failure: none can be read.
  """
  if not steps:
    raise ConfigError(f"{folder} has no checkpoint yet")
  found, reasons = None, {}
  with _quiet():
    for step in steps:
      try:
        found = step, read(step)
        break
      except Exception as error:  # Orbax and TensorStore raise many types
        reasons[step] = first_line(error)[:200]
  if found is None:
    raise failure(
      f"none of the checkpoints in {folder} can be read; "
      f"{steps[0]}: {reasons[steps[0]]}"
    )
  for step, reason in reasons.items():
    _log.warning(
      "skipped damaged checkpoint %d of %s: %s", step, folder, reason
    )
  return found


def has_checkpoint(workdir: str) -> bool:
  """Returns whether a run directory has a checkpoint, damaged or not."""
  return bool(saved_steps(_folder(workdir)))


def saved_steps(folder: str) -> list[int]:
  """Returns the steps of finished saves in a folder, in any order."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return [int(name) for name in names if name.isdecimal()]


def _folder(workdir: str) -> str:
  return os.path.abspath(os.path.join(workdir, "checkpoints"))


def _best_first(folder: str, losses: Mapping[int, float | None]) -> list[int]:
  """Returns the step of the lowest loss, then the others, newest first.

  Of equal losses the oldest step is the best; without losses the newest is.
  Warns if the run was tested at another step than the best, which is then lost.
  """
  known = {
    step: loss
    for step, loss in sorted(losses.items())
    if loss is not None and math.isfinite(loss)
  }
  best = min(known, key=known.__getitem__, default=None)
  tested = _tested_step(os.path.dirname(folder))
  if losses and tested not in (None, best):
    _log.warning(
      "%s was tested at its best checkpoint, %s; that checkpoint or its loss is "
      "lost, so another one is the best now",
      os.path.dirname(folder),
      tested,
    )
  return sorted(losses, key=lambda step: (step != best, -step))


def _tested_step(workdir: str) -> int | None:
  """Returns the best step of a finished run; None if it had no best."""
  try:
    result = run_dir.finished_result(workdir) or {}
  except ConfigError as error:
    _log.warning("%s; its best checkpoint cannot be verified", error)
    return None
  test = result.get("test")
  return test.get("checkpoint_step") if isinstance(test, dict) else None


def _require_intact(folder: str, step: int) -> None:
  """Raises `ConfigError` if a file of a state differs from its checksum."""
  checkpoint = os.path.join(folder, str(step))
  if not files.require_intact(checkpoint, skip=[_METRICS]):
    _log.warning(
      "checkpoint %d of %s cannot be verified: it has no %s, like those of "
      "earlier versions",
      step,
      folder,
      files.CHECKSUMS,
    )


def _saved_loss(folder: str, step: int) -> float:
  """Returns the loss of a saved step; inf without one, NaN if it is damaged.

  A file that cannot be read now is not damaged: its step has no loss.
  """
  checkpoint = os.path.join(folder, str(step))
  path = os.path.join(checkpoint, _METRICS)
  try:
    expected = files.read_checksums(checkpoint)
    if expected and files.file_checksum(path) != expected.get(_METRICS):
      raise ValueError("it is missing or differs from its checksum")
    with open(path, encoding="utf-8") as file:
      return float(json.load(file)["loss"])
  except OSError as error:
    _log.warning("%s cannot be read: %s", path, error.strerror)
    return math.inf
  except (ValueError, TypeError, KeyError) as error:
    _log.warning("%s is damaged: %s", path, error)
    return math.nan


def _saved_shape(folder: str, step: int, began: Shape) -> Shape:
  """Returns the shape of a saved step; without one, that of the run's start."""
  path = os.path.join(folder, str(step), _MODEL)
  if not os.path.exists(path):
    return began
  model = typed.build(ModelConfig, files.read_json(path, dict), _MODEL)
  return make_shape(model, fold_of(began), began.output, began.max_length)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  """Returns False for errors that Orbax logs: it also raises them.

  Each thread and task of a failed write logs a traceback.
  """
  if record.levelno < logging.ERROR:
    return True
  text = record.pathname + record.getMessage()
  return not any(x in text for x in ("orbax/checkpoint/", ".orbax-checkpoint-"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what Orbax prints about a damaged checkpoint, apart from its exception.

  It logs an error per file. Reads that are pending when the first one fails each
  raise in a thread of TensorStore, where nothing can catch it, and asyncio logs
  their results.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL + 1)
  hook = sys.unraisablehook
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _same_averages(saved: Any, like: Any) -> dict[str, Any] | None:
  """Returns the moving averages of FPP that can be read as they are.

  Older checkpoints have an average per element of a unit ranked by gradients.

  Args:
    saved: Metadata of a checkpoint.
    like: As for `Checkpoints.restore`.

  Returns:
    {path: an entry of `like`}; None if all are the same.
  """
  if not hasattr(like, "opt_state"):
    return None
  expected = like.opt_state.averages
  found = saved["opt_state"].get("averages") or {}
  same = {
    name: x
    for name, x in expected.items()
    if name in found and found[name].shape == x.shape
  }
  return None if len(same) == len(found) == len(expected) else same


def _read_older(path: Any, like: Any, averages: Mapping[str, Any]) -> Any:
  """Returns a state in which other moving averages than these start at 0."""

  def with_averages(state, values):
    fpp_state = state.opt_state._replace(averages=values)
    return state._replace(opt_state=fpp_state)

  item = with_averages(like, averages or None)
  args = ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=True,
  )
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    state = handler.restore(path, args=args)
  zeros = {
    name: jnp.zeros(x.shape, x.dtype, device=x.sharding)
    for name, x in like.opt_state.averages.items()
    if name not in averages
  }
  return with_averages(state, (state.opt_state.averages or {}) | zeros)


def _read_params(checkpoint: str, mesh: Mesh | None) -> Any:
  """Returns the parameters of a checkpoint without reading the rest of it."""
  path: Any = pathlib.Path(checkpoint, "default")
  handler = ocp.PyTreeCheckpointHandler()
  try:
    saved: Any = handler.metadata(path)
    like = {
      "params": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved["params"]
      )
    }
    # Not as it was written: those devices may not be here.
    host = ocp.RestoreArgs(restore_type=np.ndarray)
    restore_args = jax.tree.map(lambda _: host, like)
    if mesh is not None:
      restore_args = jax.tree.map(
        lambda where: ocp.ArrayRestoreArgs(sharding=where),
        sharding.tree_shardings(mesh, like),
      )
    args = ocp.args.PyTreeRestore(
      item=like, restore_args=restore_args, partial_restore=True
    )
    return handler.restore(path, args=args)["params"]
  finally:
    handler.close()
