"""Trains a run: data, model, optimizer, evaluation, checkpoints, result."""

import contextlib
import dataclasses
import functools
import json
import math
import os
from typing import Any

import jax

from folding import checks, files
from folding import config as config_lib
from folding.config import Config
from folding.data.batches import Data, make_data
from folding.data.tokenizers import load_tokenizer
from folding.schema import ConfigError, TrainingError, differences, require
from folding.training import distributed, energy, restore, sharding
from folding.training import optimizer as optimizer_lib
from folding.training.checkpoint import Checkpoints, has_checkpoint
from folding.training.metrics import MetricsWriter
from folding.training.progress import Clock, StepLog, stop_signal
from folding.training.result import is_finished, read_result
from folding.training.run import Run
from folding.training.start import folded_start, teacher_of, write_fold
from folding.training.step import Distillation, StepOptions, train_step
from folding.training.trim import trim_vocabulary

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_ASKED = "asked.json"  # the config before a plan


def run(config: Config, workdir: str, text: str = "") -> dict[str, Any]:
  """Trains, or goes on training, in a run directory.

  Args:
    config: As a config file returns it; it is resolved here.
    workdir: New, empty, or with a run of the same config.
    text: SHA-256 that text and labels are to have (`Data.digest`); "": any.

  Returns:
    What `result.json` holds. Where SIGTERM or Ctrl-C has stopped it, which saves,
    "finished" is False and "test" None.

  Raises:
    ConfigError: a mistake in the config or the data, or another process trains
      there; nothing was written.
    TrainingError: the loss is not finite, or the disk is full.
  """
  given, config = config, config_lib.resolve(config)
  files.require_workdir(workdir)
  energy.require_tracker(config.train.energy)
  distributed.join(config.distributed)
  config = dataclasses.replace(config, distributed="none")  # of this time only
  with distributed.together():
    planned, data = _read(config, workdir, given)
  require(
    text in ("", data.digest),
    "the text is not that of the other runs; give that again, or begin anew in "
    "another --workdir",
  )
  distributed.require_same(
    data.digest + data.tokenizer.to_json(), "another text or tokenizer"
  )
  distributed.require_same(
    json.dumps(config_lib.to_dict(config)), "another config"
  )
  if planned is None and config.fpp.embedding_granularity == "trim":
    data = trim_vocabulary(config, data)
  is_over = planned is not None and is_finished(workdir)
  if is_over and not has_checkpoint(workdir):  # they may be gone
    return read_result(workdir)
  asked, start, report = config, None, []
  with distributed.together():  # before anything is written
    if planned is not None and has_checkpoint(workdir):
      config = planned
    elif config.pretrained is not None:
      config, start, report = folded_start(planned or config, data)
    this = Run(config, data, start)
    if not is_over:
      this.teacher = teacher_of(config, data)
  with contextlib.ExitStack() as stack:
    with distributed.together():
      if distributed.is_main():
        stack.enter_context(files.held(workdir))
        if report:
          write_fold(workdir, report, config)
        if planned is None:
          _require_new(workdir)  # another process may have been faster
          asked_path = os.path.join(workdir, _ASKED)
          data.tokenizer.save(os.path.join(workdir, _TOKENIZER))
          restore.save_data(data.label_names, data.digest, workdir)
          if config != asked:
            config_lib.save(asked, asked_path)
          elif os.path.exists(asked_path):  # of a run that never began
            os.remove(asked_path)
          # Last: it marks the run as begun.
          config_lib.save(config, os.path.join(workdir, _CONFIG))
    return _train_in(workdir, this)


def _read(
  config: Config, workdir: str, given: Config
) -> tuple[Config | None, Data]:
  """Returns the config of a run that has begun, else None, and the data."""
  config_path = os.path.join(workdir, _CONFIG)
  asked_path = os.path.join(workdir, _ASKED)
  tokenizer = planned = None
  if os.path.exists(config_path):
    planned = _on(config_lib.load(config_path), config)
    found = differences(planned, config)
    if found and os.path.exists(asked_path):  # what was planned, or that it be
      found = differences(_on(config_lib.load(asked_path), config), config)
    if found:
      raise ConfigError(
        f"{workdir} holds a run of another config ({'; '.join(found)}); "
        "choose another --workdir"
      )
    tokenizer = load_tokenizer(os.path.join(workdir, _TOKENIZER))
  else:
    checks.check_used(config, given)
    _require_new(workdir)
  data = make_data(config, tokenizer, jax.process_index(), jax.process_count())
  if planned is not None:
    restore.require_data(workdir, data.label_names, data.digest)
  for split in ("valid", "test"):
    require(
      data.num_examples[split] > 0,
      f"there is no text for the {split} split; raise data.{split}_fraction, or "
      "give more text (each class gives up its own share, rounded)",
    )
  return planned, data


def _require_new(workdir: str) -> None:
  """Refuses a directory that has something of a run, but no config of it."""
  require(
    not has_checkpoint(workdir) and not is_finished(workdir),
    f"{workdir} has what a run of another config left; choose another --workdir",
  )


def resume_run(workdir: str) -> dict[str, Any]:
  """Goes on training a run directory, as its own config says.

  Raises:
    ConfigError: there is no run.
    TrainingError: see `run`.
  """
  config = restore.load_config(workdir)
  config.mesh = sharding.fitting(config.mesh, jax.device_count())
  return run(config, workdir)


def evaluate_run(workdir: str, split: str = "test") -> dict[str, Any]:
  """Returns the figures of a run's best checkpoint, else of its newest.

  Raises:
    ConfigError: there is no run, or it has no checkpoint yet.
  """
  this, checkpoints = open_run(workdir)
  with checkpoints:
    found = checkpoints.restore_best(this.like)
    if found is None:
      raise ConfigError(f"{workdir} has no checkpoint yet")
    step, state = found
  figures = this.evaluate(state.params, split)
  return {"split": split, "checkpoint_step": step, **figures}


def open_run(workdir: str) -> tuple[Run, Checkpoints]:
  """Returns what a run directory stands for, and its checkpoints.

  Raises:
    ConfigError: it is no run directory.
  """
  config = restore.load_config(workdir)
  config.mesh = sharding.fitting(config.mesh, jax.device_count())
  tokenizer = load_tokenizer(os.path.join(workdir, _TOKENIZER))
  # Another process may be at work there, with a save under way.
  checkpoints = Checkpoints(workdir, cleans=False)
  data = make_data(config, tokenizer)
  restore.require_data(workdir, data.label_names, data.digest)
  return Run(config, data), checkpoints


def _on(config: Config, other: Config) -> Config:
  """Returns a config to be computed as another is, with the same outcome."""
  train = dataclasses.replace(
    config.train,
    accumulate=other.train.accumulate,
    energy=other.train.energy,
  )
  return dataclasses.replace(config, mesh=other.mesh, train=train)


def _train_in(workdir: str, run: Run) -> dict[str, Any]:
  """Trains; where that fails, the error says what is left."""
  with Checkpoints(workdir) as checkpoints:
    try:
      country = run.config.train.energy if distributed.is_main() else ""
      with energy.tracked(workdir, country):
        return _train(run, workdir, checkpoints)
    except (OSError, TrainingError) as error:
      reason = str(error)
      if isinstance(error, OSError):
        reason = f"cannot write to {workdir}: {reason.splitlines()[0][:300]}"
      kept = ", ".join(map(str, checkpoints.intact())) or "none"
      raise TrainingError(f"{reason}; intact checkpoints: {kept}") from error


def _train(run: Run, workdir: str, checkpoints: Checkpoints) -> dict[str, Any]:
  config, t = run.config, run.config.train
  restored = checkpoints.restore_latest(run.like)
  first_step, state = restored if restored else (0, run.init())
  if is_finished(workdir) and (not restored or first_step == t.steps):
    return read_result(workdir)  # it has been tested; checkpoints may be gone
  if run.teacher is None:  # of a finished run whose last checkpoint is damaged
    run.teacher = teacher_of(config, run.data)
  distillation = None
  if run.teacher is not None:
    d = config.distill
    distillation = Distillation(
      run.teacher[0], d.logits, d.hidden, d.temperature
    )
  options = StepOptions(
    model=run.model,
    tx=run.tx,
    rules=run.rules,
    label_smoothing=t.label_smoothing,
    accumulate=t.accumulate,
    mesh=run.mesh,
    distillation=distillation,
  )
  steps = {
    is_check: jax.jit(
      functools.partial(train_step, options=options, is_check=is_check),
      donate_argnums=0,
      out_shardings=(run.state_shardings, sharding.whole(run.mesh)),
    )
    for is_check in (False, True)
  }
  constants = run.constants()
  healed_at = optimizer_lib.check_steps(config)[1] + 1 if run.rules else 0

  with (
    MetricsWriter(workdir, config, first_step, distributed.is_main()) as writer,
    stop_signal() as stopped,
  ):
    clock = Clock(workdir, first_step)
    counts = run.counts(state if restored else None)
    log = StepLog(config, run.num_parameters, writer, clock, counts)
    for line in run.unsplit:
      writer.say(f"mesh: {line}")
    if config.model.attention == "linear":
      writer.say(
        "attention: linear; an output depends on later tokens by up to 1e-4 "
        "of the range of the values"
      )
    if config.task == "classify":
      share = run.data.full_share(config.data.length)
      if share >= 0.01:
        writer.say(
          f"text: {share:.0%} of the training texts fill data.length="
          f"{config.data.length} tokens, where longer ones are cut"
        )
    if restored:
      writer.say(f"resumed at step {first_step} of {t.steps}")
    batches = run.data.train_batches(first_step)
    step = first_step
    for step in range(first_step, t.steps + 1):
      is_last = step == t.steps
      due = step > first_step and (is_last or step % t.eval_every == 0)
      is_stopped = stopped(step)
      if due or is_stopped:
        log.flush()
        loss = None
        if due:
          figures = run.evaluate(state.params, "valid", t.eval_batches)
          writer.write({"split": "valid", "step": step, **figures})
          writer.say(_valid_line(step, figures))
          _require_finite(figures, f"validation at step {step}")
          loss = _to_beat(figures) if step >= healed_at else None
        checkpoints.save(step, state, loss)
        run.write_result(workdir, state, clock.seconds(), log.speed(), step)
        if is_stopped:
          checkpoints.wait()
          writer.say(f"stopped by a signal; saved at step {step} of {t.steps}")
          return read_result(workdir)
        log.restart()
      if is_last:
        break
      batch = sharding.put_batch(run.mesh, next(batches))
      is_check = bool(run.rules) and optimizer_lib.is_check(config, step)
      state, metrics = steps[is_check](state, batch, **constants)
      log.step(step + 1, metrics, batch)

    checkpoints.wait()
    best = checkpoints.best_step()
    if best is not None and best != step:
      best, state = checkpoints.restore_best(run.like) or (step, state)
    test = run.evaluate(state.params, "test")
    _require_finite(test, "the test")
    test["checkpoint_step"] = best
    run.write_result(
      workdir, state, clock.seconds(), log.speed(), t.steps, test
    )
    writer.say(_valid_line(t.steps, test, "test "))
  return read_result(workdir)


def _to_beat(figures: dict[str, Any]) -> float:
  """Returns what the best checkpoint has least of: errors, or else loss."""
  if "accuracy" not in figures:
    return figures["loss"]
  return 1 - figures["accuracy"] + 1e-6 * figures["loss"]  # for equal ones


def _require_finite(figures: dict[str, Any], what: str) -> None:
  for name, value in figures.items():
    if not math.isfinite(value):
      raise TrainingError(f"the {name} of {what} is not finite: {value}")


def _valid_line(step: int, figures: dict[str, Any], name: str = "valid") -> str:
  text = f"step {step:>6,}  {name}  loss {figures['loss']:.4f}"
  if "accuracy" in figures:
    return text + f"  accuracy {figures['accuracy']:.2%}"
  return text + (
    f"  perplexity {figures['perplexity']:.2f}"
    f"  bits per byte {figures['bits_per_byte']:.4f}"
  )
