"""Shrinks a run: training continues with smaller arrays."""

import dataclasses
import os
import shutil

import jax
import numpy as np

from folding import files
from folding.compression.shrink import Cut
from folding.data.tokenizers import MappedTokenizer
from folding.errors import ConfigError
from folding.models.shape import Shape
from folding.training import energy, run_dir
from folding.training.checkpoint import Checkpoints
from folding.training.compact import held_zero, is_pruning_over, shrink_state
from folding.training.loop import Run, open_run, restore
from folding.training.step import TrainState


def shrink_run(workdir: str, output: str, multiple: int = 1) -> dict[str, int]:
  """Writes a run directory with the newest and best checkpoints, shrunk.

  An unfinished run can be resumed there. Of a finished run, zeros that FPP does
  not hold and the diagonals of W_V are removed too, and it is tested again.

  Args:
    workdir: A run with a checkpoint.
    output: A new or empty folder.
    multiple: See `folding.shrink`.

  Returns:
    {"step", "steps": of the newest checkpoint and of the whole run, "before",
    "after": allocated parameters}.

  Raises:
    ConfigError: there is no checkpoint, nothing to remove, or the output is
      not empty.
  """
  if multiple < 1:
    raise ConfigError(f"--multiple must be at least 1; it is {multiple}")
  files.require_workdir(output)
  files.require_empty(output)
  this, states, losses = _read(workdir)
  before = run_dir.read_result(workdir)
  step = max(states)
  steps = this.order.train.steps
  is_finished = step == steps
  shrunk = _shrink_alike(this, states, multiple, is_finished)
  shape, _, cut = shrunk[step]
  if cut.is_empty:
    raise ConfigError(
      f"{workdir} has nothing to remove at step {step}: no neuron, head or token "
      "of a classifier is zero as a whole; fpp.granularity='neuron' and "
      "fpp.embedding_granularity='row' prune whole units"
    )
  with files.becoming(output) as part:
    model = dataclasses.replace(this.described(), shape=shape)
    if "embed/embedding" in cut.kept:
      tokenizer = MappedTokenizer(model.tokenizer, cut.token_map)
      model = dataclasses.replace(model, tokenizer=tokenizer)
    order = run_dir.load_order(workdir)
    run_dir.save(part, order, model, this.data.digest)
    for name in ("metrics.jsonl", "fold.json", energy.FILE):
      if os.path.exists(os.path.join(workdir, name)):
        shutil.copy(os.path.join(workdir, name), part)
    that, _ = open_run(part)
    with Checkpoints(part) as checkpoints:
      for at in sorted(states):
        states[at] = jax.device_put(shrunk[at][1], that.state_shardings)
        checkpoints.save(at, states[at], losses[at], shape)
      checkpoints.wait()
      best = checkpoints.best_step()
    state, test = states[step], None
    if is_finished:
      state = states[step if best is None else best]
      test = that.evaluate(state.params, "test")
      test["checkpoint_step"] = best
    that.write_result(
      part,
      state,
      step=step,
      seconds=before.get("seconds", 0.0),
      speed=before.get("tokens_per_second"),
      test=test,
      is_at_target=before.get("is_at_target"),
    )
  return {
    "step": step,
    "steps": steps,
    "before": this.num_parameters,
    "after": that.num_parameters,
  }


def _shrink_alike(
  run: Run, states: dict[int, TrainState], multiple: int, is_finished: bool
) -> dict[int, tuple[Shape, TrainState, Cut]]:
  """Returns the states without the units that are zero in all of them."""
  zeros = [
    jax.tree.map(lambda w: np.asarray(w) == 0, state.params)
    if is_finished
    else held_zero(run.rules, state, is_pruning_over(run.mask_updates, step))
    for step, state in states.items()
  ]
  is_zero = jax.tree.map(lambda *z: np.logical_and.reduce(z), *zeros)
  if not is_finished and run.order.distill.is_used:
    is_zero["embed"]["embedding"][:] = False  # the teacher reads all tokens
  return {
    step: shrink_state(
      run.model.shape,
      run.rules,
      state,
      is_zero,
      multiple=multiple,
      absorb=is_finished,
    )
    for step, state in states.items()
  }


def _read(
  workdir: str,
) -> tuple[Run, dict[int, TrainState], dict[int, float | None]]:
  """Returns a run, its newest and best states by step, and their losses."""
  run, checkpoints = open_run(workdir)
  with checkpoints:
    run, step, state = restore(run, checkpoints)
    states = {step: state}
    best = checkpoints.best_step()
    if best is not None and best not in states:
      # Nothing leaves the arrays after the first that can be the best.
      _, best, state = restore(run, checkpoints, best=True)
      states[best] = state
    return run, states, {step: checkpoints.loss(step) for step in states}
