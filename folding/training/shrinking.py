"""Shrinks a run: training continues with smaller arrays."""

import os
import shutil
from typing import Any

import jax
import numpy as np

from folding import files, paths
from folding.compression.fpp import member_masks
from folding.compression.shrink import Cut
from folding.compression.sites import Rule, make_sites
from folding.config import Config
from folding.data.tokenizers import MappedTokenizer
from folding.errors import ConfigError
from folding.models.shrink import shrink
from folding.training import energy, run_dir
from folding.training import optimizer as optimizer_lib
from folding.training.loop import Run, open_run
from folding.training.step import TrainState


def held_zero(config: Config, rules: list[Rule], state: TrainState) -> Any:
  """Returns which parameters FPP holds at 0, as bools shaped like params.

  Before the last mask update these are units only. Single weights stay, as the
  next update ranks them among all weights of their array.
  """
  leaves = paths.flatten(state.params)
  is_over = int(state.step) >= optimizer_lib.mask_updates(config).stop
  sites = [
    site
    for site in make_sites(rules, state.params)
    if is_over or None not in site.members.values()
  ]
  packed = {
    site.name: state.opt_state.suspected[site.name][0] for site in sites
  }
  is_held = member_masks(sites, packed, leaves)
  return paths.map_named(
    lambda name, w: np.asarray(is_held.get(name, False)) & (np.asarray(w) == 0),
    state.params,
  )


def shrink_state(
  config: Config,
  rules: list[Rule],
  state: TrainState,
  *,
  multiple: int = 1,
  absorb: bool = False,
  is_zero: Any = None,
) -> tuple[Config, TrainState, Cut]:
  """Returns the config and state of a smaller model that trains the same.

  Losses and updates are equal up to rounding: only units that FPP holds at 0
  leave, and moments, averages and mask bits are cut alike. (The score "random"
  draws other numbers at later mask updates.)

  Args:
    config: Resolved.
    rules: From `make_rules`.
    state: The state before; its arrays do not change.
    multiple: See `folding.shrink`.
    absorb: See `folding.shrink`; only after the last step.
    is_zero: Parameters that may be removed; None: `held_zero`.

  Raises:
    ValueError: see `folding.shrink`.
  """
  small = shrink(
    config,
    state.params,
    multiple=multiple,
    absorb=absorb,
    is_zero=held_zero(config, rules, state) if is_zero is None else is_zero,
  )
  sites = make_sites(rules, state.params)
  opt_state = small.cut.fpp_state(state.opt_state, sites)
  new = TrainState(state.step, small.params, opt_state)
  return small.config, new, small.cut


def shrink_run(workdir: str, output: str, multiple: int = 1) -> dict[str, int]:
  """Writes a run directory with the newest and best checkpoints, shrunk.

  An unfinished run can be resumed there. A finished run also loses zeros that
  FPP does not hold and the diagonals of W_V, and is tested again.

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
  files.require_empty(output)
  this, states, losses = _read(workdir)
  before = run_dir.read_result(workdir)
  step = max(states)
  is_over = step == this.config.train.steps
  shrunk = _shrink_alike(this, states, multiple, is_over)
  config, _, cut = shrunk[step]
  if cut.is_empty:
    raise ConfigError(
      f"{workdir} has nothing to remove at step {step}: no neuron, head or token "
      "of a classifier is zero as a whole; fpp.granularity='neuron' and "
      "fpp.embedding_granularity='row' prune whole units"
    )
  with files.becoming(output) as part:
    tokenizer = this.data.tokenizer
    if "embed/embedding" in cut.kept:
      tokenizer = MappedTokenizer(tokenizer, cut.token_map)
    run_dir.save(
      part,
      config,
      tokenizer,
      labels=this.data.label_names,
      digest=this.data.digest,
    )
    for name in ("metrics.jsonl", "fold.json", energy.FILE):
      if os.path.exists(os.path.join(workdir, name)):
        shutil.copy(os.path.join(workdir, name), part)
    that, checkpoints = open_run(part)
    with checkpoints:
      for at in sorted(states):
        states[at] = jax.device_put(shrunk[at][1], that.state_shardings)
        checkpoints.save(at, states[at], losses[at])
      checkpoints.wait()
      best = checkpoints.best_step()
    state, test = states[step], None
    if is_over:
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
    )
  return {
    "step": step,
    "steps": config.train.steps,
    "before": this.num_parameters,
    "after": that.num_parameters,
  }


def _shrink_alike(
  run: Run, states: dict[int, TrainState], multiple: int, is_over: bool
) -> dict[int, tuple[Config, TrainState, Cut]]:
  """Returns the states without the units that are zero in all of them."""
  zeros = [
    jax.tree.map(lambda w: np.asarray(w) == 0, state.params)
    if is_over
    else held_zero(run.config, run.rules, state)
    for state in states.values()
  ]
  is_zero = jax.tree.map(lambda *z: np.logical_and.reduce(z), *zeros)
  if not is_over and run.config.distill.is_used:
    is_zero["embed"]["embedding"][:] = False  # the teacher reads all tokens
  return {
    step: shrink_state(
      run.config,
      run.rules,
      state,
      multiple=multiple,
      absorb=is_over,
      is_zero=is_zero,
    )
    for step, state in states.items()
  }


def _read(
  workdir: str,
) -> tuple[Run, dict[int, TrainState], dict[int, float | None]]:
  """Returns a run, its newest and best states by step, and their losses."""
  run, checkpoints = open_run(workdir)
  with checkpoints:
    step, state = checkpoints.restore_latest(run.like)
    states = {step: state}
    best = checkpoints.best_step()
    if best is not None and best not in states:
      best, state = checkpoints.restore_best(run.like)
      states[best] = state
    return run, states, {step: checkpoints.loss(step) for step in states}
