"""Trains a run: data, model, optimizer, evaluation, checkpoints, result."""

import functools
import itertools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from folding import config as config_lib
from folding.compression.accounting import account
from folding.config import Config
from folding.data.batches import Data, make_data
from folding.data.tokenizers import load_tokenizer
from folding.models.transformer import make_model
from folding.schema import ConfigError, TrainingError, differences
from folding.training import optimizer as optimizer_lib
from folding.training import sharding
from folding.training.checkpoint import Checkpoints
from folding.training.evaluate import evaluate, make_eval_step
from folding.training.metrics import MetricsWriter
from folding.training.progress import Clock, StepLog, stop_signal
from folding.training.result import is_finished, read_result, write_result
from folding.training.step import TrainState, init_state, train_step


class Run:
  """What a run directory stands for: its config, data, model and optimizer.

  Attributes:
    config: Resolved.
    data: Batches, tokenizer, labels.
    mesh: Where arrays lie.
    model: The Linen model.
    tx: The optimizer, FPP included.
    rules: What FPP prunes.
    like: Shapes and shardings of the training state.
    dense_params: Shapes of the dense twin's parameters.
  """

  def __init__(self, config: Config, data: Data):
    self.config, self.data = config, data
    self.mesh = sharding.make_mesh(config.mesh)
    vocab_size = data.tokenizer.vocab_size
    make = functools.partial(
      make_model, vocab_size=vocab_size, num_classes=data.num_classes
    )
    self.model = make(config)
    dense_config = config_lib.dense_twin(config)
    dense_model = make(dense_config)
    tokens = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)

    def shapes(model):
      return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    self.dense_params = shapes(dense_model)
    self.rules = optimizer_lib.make_rules(
      config, shapes(self.model), self.dense_params
    )
    self.tx = optimizer_lib.make_optimizer(config, self.rules)
    self._init = functools.partial(
      init_state, self.model, self.tx, config.data.length, config.seed
    )
    try:
      state = jax.eval_shape(self._init)
    except ValueError as error:  # a rule does not fit the parameters
      raise ConfigError(str(error)) from error
    self.like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      sharding.tree_shardings(self.mesh, state),
    )

  @property
  def num_parameters(self) -> int:
    """Number of parameters, zeros included."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(self.like.params))

  @property
  def state_shardings(self) -> TrainState:
    """Shardings of the training state."""
    return jax.tree.map(lambda x: x.sharding, self.like)

  def init(self) -> TrainState:
    """Returns the state before the first step, placed on the mesh."""
    return jax.jit(self._init, out_shardings=self.state_shardings)()

  def evaluate(
    self, params: Any, split: str, eval_step: Any, limit: int | None = None
  ) -> dict:
    """Returns the figures of a split ("valid" or "test").

    With a limit, those of its first batches, whose bytes are taken to be the
    same share of the split's.
    """
    data = self.data
    batches, share = data.eval_batches(split), 1.0
    if limit is not None:
      batches = itertools.islice(batches, limit)
      seen = limit * self.config.data.eval_batch_size
      share = min(1.0, seen / data.num_examples[split])
    num_bytes = None
    if self.config.task == "lm":
      num_bytes = share * data.num_bytes[split]
    return evaluate(eval_step, params, batches, self.mesh, num_bytes=num_bytes)

  def write_result(
    self,
    workdir: str,
    state: TrainState,
    seconds: float,
    speed: float,
    step: int,
    test: dict[str, Any] | None = None,
  ) -> None:
    """Measures the parameters and writes `result.json`."""
    params = jax.device_get(state.params)
    result = {
      "finished": test is not None,
      "steps": step,
      "total_steps": self.config.train.steps,
      "seconds": seconds,
      "tokens_per_second": speed,
      "test": test,
      **account(params, self.dense_params),
    }
    write_result(workdir, result)


def run(config: Config, workdir: str) -> dict[str, Any]:
  """Trains, or goes on training, in a run directory.

  Args:
    config: As a config file returns it; it is resolved here.
    workdir: New, empty, or with a run of the same config.

  Returns:
    What `result.json` holds.

  Raises:
    ConfigError: a mistake in the config or the data; nothing was written.
    TrainingError: the loss is not finite, or the disk is full.
  """
  config = config_lib.resolve(config)
  config_path = os.path.join(workdir, "config.json")
  tokenizer_path = os.path.join(workdir, "tokenizer.json")
  tokenizer = None
  if os.path.exists(config_path):
    found = differences(config_lib.load(config_path), config)
    if found:
      raise ConfigError(
        f"{workdir} holds a run of another config ({'; '.join(found)}); "
        "choose another --workdir"
      )
    tokenizer = load_tokenizer(tokenizer_path)
  data = make_data(config, tokenizer, jax.process_index(), jax.process_count())
  this = Run(config, data)
  os.makedirs(workdir, exist_ok=True)
  if tokenizer is None:
    data.tokenizer.save(tokenizer_path)
    config_lib.save(config, config_path)  # last: it marks the run as begun
  with Checkpoints(workdir) as checkpoints:
    try:
      return _train(this, workdir, checkpoints)
    except (OSError, TrainingError) as error:
      reason = str(error)
      if isinstance(error, OSError):
        reason = f"cannot write to {workdir}: {reason.splitlines()[0][:300]}"
      kept = ", ".join(map(str, checkpoints.steps())) or "none"
      raise TrainingError(f"{reason}; intact checkpoints: {kept}") from error


def evaluate_run(workdir: str, split: str = "test") -> dict[str, Any]:
  """Returns the figures of a run's best checkpoint, else of its newest.

  Raises:
    ConfigError: there is no run, or it has no checkpoint yet.
  """
  this, checkpoints = open_run(workdir)
  with checkpoints:
    step = checkpoints.best_step()
    if step is None:
      found = checkpoints.restore_latest(this.like)
      if found is None:
        raise ConfigError(f"{workdir} has no checkpoint yet")
      step, state = found
    else:
      state = checkpoints.restore(step, this.like)
  figures = this.evaluate(state.params, split, make_eval_step(this.model))
  return {"split": split, "checkpoint_step": step, **figures}


def open_run(workdir: str) -> tuple[Run, Checkpoints]:
  """Returns what a run directory stands for, and its checkpoints.

  Raises:
    ConfigError: it is no run directory.
  """
  config_path = os.path.join(workdir, "config.json")
  if not os.path.exists(config_path):
    raise ConfigError(f"{workdir} is no run: it has no config.json")
  config = config_lib.load(config_path)
  tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer.json"))
  return Run(config, make_data(config, tokenizer)), Checkpoints(workdir)


def _train(run: Run, workdir: str, checkpoints: Checkpoints) -> dict[str, Any]:
  config, t = run.config, run.config.train
  restored = checkpoints.restore_latest(run.like)
  first_step, state = restored if restored else (0, run.init())
  if first_step == t.steps and is_finished(workdir):
    return read_result(workdir)  # nothing to train, and it has been tested
  steps = {
    is_check: jax.jit(
      functools.partial(
        train_step,
        model=run.model,
        tx=run.tx,
        rules=run.rules,
        seed=config.seed,
        label_smoothing=t.label_smoothing,
        is_check=is_check,
      ),
      donate_argnums=0,
      out_shardings=(run.state_shardings, None),
    )
    for is_check in (False, True)
  }
  eval_step = make_eval_step(run.model)
  healed_at = optimizer_lib.check_steps(config)[1] + 1 if run.rules else 0

  with (
    MetricsWriter(workdir, config, first_step) as writer,
    stop_signal() as stopped,
  ):
    clock = Clock(workdir, first_step)
    log = StepLog(
      config, run.num_parameters, writer, clock, prunes=bool(run.rules)
    )
    if restored:
      writer.say(f"resumed at step {first_step} of {t.steps}")
    batches = run.data.train_batches(first_step)
    step = first_step
    for step in range(first_step, t.steps + 1):
      is_last = step == t.steps
      due = is_last or (step % t.eval_every == 0 and step > 0)
      if (due and step > first_step) or stopped():
        log.flush()
        loss = None
        if due:
          figures = run.evaluate(
            state.params, "valid", eval_step, t.eval_batches
          )
          writer.write({"split": "valid", "step": step, **figures})
          writer.say(_valid_line(step, figures))
          if not math.isfinite(figures["loss"]):
            raise TrainingError(f"the validation loss is not finite at {step}")
          loss = figures["loss"] if step >= healed_at else None
        checkpoints.save(step, state, loss)
        run.write_result(workdir, state, clock.seconds(), log.speed(), step)
        if stopped():
          checkpoints.wait()
          writer.say(f"stopped by a signal; saved at step {step} of {t.steps}")
          return read_result(workdir)
        log.restart()
      if is_last:
        break
      batch = sharding.put_batch(run.mesh, next(batches))
      is_check = bool(run.rules) and optimizer_lib.is_check(config, step)
      state, metrics = steps[is_check](state, batch)
      log.step(step + 1, metrics, batch)

    checkpoints.wait()
    best = checkpoints.best_step()
    if best is not None and best != step:
      state = checkpoints.restore(best, run.like)
    test = run.evaluate(state.params, "test", eval_step)
    test["checkpoint_step"] = best
    run.write_result(
      workdir, state, clock.seconds(), log.speed(), t.steps, test
    )
    writer.say(_valid_line(t.steps, test, "test "))
  return read_result(workdir)


def _valid_line(step: int, figures: dict[str, Any], name: str = "valid") -> str:
  text = f"step {step:>6,}  {name}  loss {figures['loss']:.4f}"
  if "accuracy" in figures:
    return text + f"  accuracy {figures['accuracy']:.2%}"
  return text + (
    f"  perplexity {figures['perplexity']:.2f}"
    f"  bits per byte {figures['bits_per_byte']:.4f}"
  )
