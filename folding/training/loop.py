"""Trains a run: start, steps, evaluation, checkpoints and result.

`run` trains what a config describes, `train` a model in memory. This file reads from
top to bottom: the parts of a run (`Run`), its start (`_start`), its steps
(`_take_steps`), and reading a run directory back (`evaluate_run`, `open_run`).
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import files, memory, paths
from folding.compression.accounting import account
from folding.compression.fpp import fpp_counts
from folding.config import (
  IN_MEMORY,
  CompressConfig,
  Config,
  FPPConfig,
  Order,
)
from folding.data import sources
from folding.data.batches import STS, Data, make_data
from folding.data.trim import token_usage
from folding.errors import ConfigError, TrainingError, first_line
from folding.model import Model, Targets
from folding.models.params import KINDS
from folding.models.shape import Shape, shape_of, with_shape
from folding.models.transformer import (
  Transformer,
  model_for,
  require_params,
)
from folding.tasks import METRICS, task_of
from folding.training import distributed, energy, run_dir, sharding
from folding.training.allocate import outer_fractions
from folding.training.checkpoint import Checkpoints, has_checkpoint
from folding.training.compact import Compactor, cut_state
from folding.training.compress_trained import (
  compress_trained,
  trim_vocabulary,
  write_fold,
)
from folding.training.evaluate import (
  evaluate,
  make_eval_step,
  spearman_of_pairs,
)
from folding.training.optimizer import embedding_fraction
from folding.training.progress import (
  Clock,
  MetricsWriter,
  StepLog,
  stop_signal,
)
from folding.training.step import Program, Steps, TrainState
from folding.training.trained import (
  read_source,
  teacher_in_memory,
  teacher_of,
  without_padding,
)


class Run(Program):
  """A `Program` with its data: all functions of model, order and data.

  Attributes:
    data: Batches, tokenizer, labels.
  """

  def __init__(
    self,
    shape: Shape,
    data: Data,
    order: Order,
    targets: Targets | None = None,
  ):
    mesh = sharding.make_mesh(order.mesh)
    for rows in (order.data.batch_size, order.data.eval_batch_size):
      sharding.require_divides(mesh, rows)
    super().__init__(
      shape,
      order,
      mesh,
      vocab_size=data.tokenizer.vocab_size,
      num_classes=data.num_classes,
      plain_size=data.tokenizer.plain_size,
      targets=targets,
    )
    self.data = data
    self._eval_step = make_eval_step(
      self.model, self.task, self.mesh, self.kernel_mesh
    )
    self._taught: dict[str, list[np.ndarray]] = {}
    self._compactor = Compactor(self)

  @property
  def seed(self) -> np.uint32:
    """The seed as the compiled programs take it."""
    return np.uint32(self.order.seed)

  def init(self, params: Any = None) -> TrainState:
    """Returns the first state; without parameters the seed draws them."""
    if not params:
      return jax.jit(self.draw, out_shardings=self.state_shardings)(self.seed)

    def init(params):
      return TrainState(jnp.zeros([], jnp.int32), params, self.tx.init(params))

    placed = jax.device_put(params, self.state_shardings.params)
    return jax.jit(init, out_shardings=self.state_shardings)(placed)

  def placed(self, teacher: Model | None) -> Model | None:
    """Returns a teacher with its parameters on the mesh, by their own shapes."""
    if teacher is None:
      return None
    shardings = sharding.tree_shardings(self.mesh, teacher.params)
    params = jax.device_put(teacher.params, shardings)
    return dataclasses.replace(teacher, params=params)

  def described(self) -> Model:
    """Returns the model that it trains, without parameters."""
    data = self.data
    return Model(
      self.model.shape,
      self.order.task,
      {},
      data.tokenizer,
      data.label_names,
      data.pair,
      targets=self.targets,
    )

  def reshaped(self, shape: Shape) -> "Run":
    """Returns the same run of a model with another shape."""
    return Run(shape, self.data, self.order, self.targets)

  def compacted(
    self, state: TrainState, step: int
  ) -> "tuple[Run, TrainState] | None":
    """Returns a smaller run and its state, which train on as these would.

    None if that does not pay yet, see `Compactor.find`.

    Args:
      state: After a mask update; this blocks until it is computed.
      step: Updates applied so far.
    """
    found = self._compactor.find(state, step)
    if found is None:
      return None
    shape, cut = found
    smaller = self.reshaped(shape)

    def take(state):
      return cut_state(cut, self.rules, state, cut(state.params))

    return smaller, jax.jit(take, out_shardings=smaller.state_shardings)(state)

  def usage(self) -> jax.Array | None:
    """Returns float32[V] of `token_usage`; None if no rule prunes by it."""
    if not self.prunes_tokens:
      return None
    size = self.like.params["embed"]["embedding"].shape[0]
    return jax.device_put(
      token_usage(self.data.token_counts(), size), sharding.whole(self.mesh)
    )

  def counts(self, state: TrainState) -> dict[str, float]:
    """Returns `fpp_counts` of a state as numbers; {} if nothing is pruned."""
    if not self.rules:
      return {}
    if not int(state.step):  # no mask update yet
      return {"selected": 1.0, "frozen": 0.0, "zero": 0.0, "done": 0.0}
    count = jax.jit(
      functools.partial(fpp_counts, self.rules, removed=self.removed),
      out_shardings=sharding.whole(self.mesh),
    )
    found = jax.device_get(count(state.opt_state, state.params))
    return {name: float(x) for name, x in found.items()}

  def evaluate(
    self,
    params: Any,
    split: str,
    limit: int | None = None,
    teacher: Model | None = None,
  ) -> dict[str, Any]:
    """Returns the metrics of a split.

    Args:
      params: Parameters of the model.
      split: "valid" or "test".
      limit: Number of first batches to evaluate; None: all. The bytes of their
        text are estimated by their share of the examples.
      teacher: Task "embed" is compared to it. None: it is read.

    Raises:
      TrainingError: the loss is not finite.
    """
    data = self.data
    batches, share = data.eval_batches(split), 1.0
    if limit is not None:
      batches = itertools.islice(batches, limit)
      seen = limit * self.order.data.eval_batch_size
      share = min(1.0, seen / data.num_examples[split])
    num_bytes = None
    if self.task.predicts_tokens:
      num_bytes = share * data.num_bytes[split]
    if self.task.makes_vectors:
      shape = self.model.shape
      teacher = teacher or self.placed(teacher_of(shape, data, self.order))
      batches = self._with_taught(batches, split, teacher)
    metrics = evaluate(
      self._eval_step,
      params,
      batches,
      self.mesh,
      task=self.task,
      num_bytes=num_bytes,
    )
    if data.scores is not None:
      parts = self._vectors(self.model, params, data.eval_batches(STS))
      vectors = np.concatenate([*parts])[: 2 * len(data.scores)]
      metrics["spearman"] = spearman_of_pairs(vectors, data.scores)
    return metrics

  def _vectors(
    self, model: Transformer, params: Any, batches: Iterable[Any]
  ) -> Iterator[np.ndarray]:
    """Yields the sentence vectors of each batch of all processes, float32[B, D].

    Process p of P reads the rows p, p + P, ... of a batch. A global array has
    the rows of one process after those of another.
    """
    for batch in batches:
      placed = sharding.put_batch(self.mesh, batch)
      found = _forward(model, params, placed["tokens"], placed["mask"])
      rows_BD = np.asarray(distributed.to_host(found), np.float32)
      parts = np.split(rows_BD, jax.process_count())
      yield np.stack(parts, axis=1).reshape(rows_BD.shape)

  def _with_taught(
    self,
    batches: Iterable[dict[str, Any]],
    split: str,
    teacher: Model | None,
  ) -> Iterator[dict[str, Any]]:
    """Yields batches with the teacher's vectors, computed once per split."""
    assert teacher is not None
    model = model_for(teacher.shape, teacher.params)
    known = self._taught.setdefault(split, [])
    own = slice(jax.process_index(), None, jax.process_count())  # rows
    for number, batch in enumerate(batches):
      if number == len(known):
        read = {
          name: batch.get(f"teacher_{name}", batch[name])
          for name in ("tokens", "mask")
        }
        vectors = self._vectors(model, teacher.params, [read])
        known += (rows[own].copy() for rows in vectors)
      yield {**batch, "taught": known[number]}

  def write_result(
    self,
    workdir: str,
    state: TrainState,
    *,
    step: int,
    seconds: float,
    speed: float | None,
    test: dict[str, Any] | None = None,
    is_at_target: bool | None = None,
  ) -> None:
    """Counts the parameters and writes `result.json`.

    Args:
      workdir: The run directory.
      state: Its parameters are counted.
      step: Updates applied so far.
      seconds: Training time so far.
      speed: Tokens per second.
      test: Metrics of the test split; None: the run is not finished.
      is_at_target: Whether a finished run is as sparse as FPP should make it.
    """
    # All processes read the parameters, one array after another.
    found = account(
      state.params, self.dense_params, KINDS, read=distributed.host_copy
    )
    result = {
      "finished": test is not None,
      "steps": step,
      "total_steps": self.order.train.steps,
      "seconds": seconds,
      "tokens_per_second": speed,
      "test": test,
      "is_at_target": is_at_target,
      **found,
    }
    with distributed.together("another process failed to write"):
      if distributed.is_main():
        run_dir.write_result(workdir, result)


# A run, the updates applied so far, and the state.
Saved: TypeAlias = tuple[Run, int, TrainState]
# Where training starts. None: the seed draws the state.
Start: TypeAlias = tuple[Run, int, TrainState | None]


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Transformer, params: Any, tokens: Any, mask: Any) -> Any:
  return model.apply({"params": params}, tokens, mask)


def run(config: Config, workdir: str) -> dict[str, Any]:
  """Trains a run, or continues it, in a run directory.

  Args:
    config: What a config file returns; it is resolved here.
    workdir: New, empty, or with a run of the same config.

  Returns:
    The content of `result.json`. If SIGTERM or Ctrl-C stopped the run, it was
    saved, "finished" is False and "test" None.

  Raises:
    ConfigError: a mistake in the config or the data, or another process trains
      in the directory; nothing was written.
    TrainingError: the loss is not finite, or a save failed.
  """
  config = config_lib.resolve(config)
  distributed.join(config.distributed)
  config = dataclasses.replace(config, distributed="none")  # not part of a run
  with contextlib.ExitStack() as stack:
    if result := _entered(stack, config, workdir):
      return result
    start, teacher = _start(config, workdir)
    return _train(start, teacher, config, workdir)


def train(
  model: Model,
  data: Data,
  order: Order,
  workdir: str,
  teacher: Model | None = None,
) -> dict[str, Any]:
  """Trains a model in memory, or continues that, in a run directory.

  Args:
    model: Its parameters are the first ones; {}: the seed draws them. They stay as
      they are, and `folding.load(workdir)` returns the trained model.
    data: From `make_data`, with the tokenizer of the model.
    order: How to train. `data`, `compress` and `pretrained` are not read, as the
      batches and the model are there.
    workdir: New, empty, or with a run of the same order and shape. `folding resume`
      continues it from its first checkpoint on.
    teacher: Dense model with the same outputs; None: the one that `distill` names,
      if it is used.

  Returns:
    As `run`.

  Raises:
    ConfigError: model, data and order do not fit; or see `run`.
    TrainingError: see `run`.
  """
  model, length = without_padding(model), data.config.length
  if not model.params or length > model.shape.max_length:
    model = model.reading(length)
  config = _config_of(model, data, order)
  with contextlib.ExitStack() as stack:
    if result := _entered(stack, config, workdir):
      return result
    _require_same(config, data)
    with distributed.together():
      run = Run(model.shape, data, config, model.targets)
      if given := paths.flatten(model.params):
        shapes = {name: np.shape(w) for name, w in given.items()}
        require_params(run.model, shapes, "the model")
      if teacher is None:
        teacher = teacher_of(model.shape, data, config)
      else:
        teacher = teacher_in_memory(teacher, model.shape, data, config)
    if not run.rules and distributed.is_main():
      _warn_of_zeros(model.params)
    start = _first(run, model.params, workdir)
    return _train(start, teacher, config, workdir)


def _warn_of_zeros(params: Any) -> None:
  """Prints a line if single weights are zero, as training would fill them."""
  weights = jax.tree.leaves(params)
  size = sum(w.size for w in weights)
  zeros = size - sum(int(jnp.count_nonzero(w)) for w in weights)
  if zeros > 0.01 * size:  # more than biases that are zero
    print(
      f"{zeros / size:.1%} of the weights are zero, and training without fpp fills "
      "them; folding.compress(..., structured=True) makes the arrays smaller instead",
      flush=True,
    )


def _config_of(model: Model, data: Data, order: Order) -> Config:
  """Returns the config of a run that starts from a model in memory."""
  pairs = {
    "task": (model.task, order.task),
    "labels": (model.labels, data.label_names),
    "tokenizer": (model.tokenizer.to_json(), data.tokenizer.to_json()),
  }
  for name, (ours, theirs) in pairs.items():
    if ours != theirs:
      raise ConfigError(
        f"the {name} of the model and of the data or the order differ: "
        f"{ours!r:.80} and {theirs!r:.80}"
      )
  given = {x.name: getattr(order, x.name) for x in dataclasses.fields(Order)}
  given |= {
    "data": data.config,
    "compress": CompressConfig(),
    "pretrained": IN_MEMORY if model.params else None,
    "distributed": "none",
  }
  return config_lib.resolve(with_shape(Config(**given), model.shape))


def _entered(
  stack: contextlib.ExitStack, config: Config, workdir: str
) -> dict[str, Any] | None:
  """Locks a run directory while a stack is open; returns a finished result."""
  files.require_workdir(workdir)
  if config.train.energy:
    energy.require_codecarbon(config.train.energy)
  with distributed.together():
    if distributed.is_main():
      stack.enter_context(run_dir.held(workdir))
    if run_dir.is_begun(workdir, config):
      return run_dir.finished_result(workdir)
    if has_checkpoint(workdir):
      raise ConfigError(
        f"{workdir} has checkpoints of another config; choose another folder"
      )


def _require_same(config: Config, data: Data) -> None:
  """Raises `ConfigError` if another process has other data or another config."""
  distributed.require_same(
    data.digest + data.tokenizer.to_json(), "another text or tokenizer"
  )
  distributed.require_same(
    json.dumps(config_lib.to_dict(config)), "another config"
  )


def _train(
  start: Start, teacher: Model | None, config: Config, workdir: str
) -> dict[str, Any]:
  """Trains in a run directory, and writes its first files if it is new."""
  with distributed.together():
    if distributed.is_main() and run_dir.is_new(workdir):
      run, *_ = start
      run_dir.save(workdir, config, run.described(), run.data.digest)
  with Checkpoints(workdir) as checkpoints:
    try:
      country = config.train.energy if distributed.is_main() else ""
      with energy.tracked(workdir, country):
        return _take_steps(start, teacher, workdir, checkpoints)
    except (OSError, TrainingError) as error:
      reason = str(error)
      if isinstance(error, OSError):
        # TensorStore names its files before the cause, as in `"a": "b": cause`.
        reason = first_line(error).rpartition('": ')[2][:300]
        reason = f"cannot write to {workdir}: {reason}"
      with contextlib.suppress(OSError):
        checkpoints.wait()
      kept = ", ".join(map(str, checkpoints.steps())) or "none"
      raise TrainingError(f"{reason}; intact checkpoints: {kept}") from error


def _read_data(shape: Shape, order: Order, began: Model | None) -> Data:
  """Returns the data of a run, with the tokenizer that it began with."""
  tokenizer = began and began.tokenizer
  data = make_data(order, tokenizer, jax.process_index(), jax.process_count())
  for split in ("valid", "test"):
    if not data.num_examples[split]:
      advice = f"raise data.{split}_fraction or give more text"
      form = task_of(order).labels
      if form and form.kind == "class":
        advice += (
          f" (train has {data.num_examples['train']} texts in {data.num_classes} "
          "classes, and each gives up its own share, rounded; perhaps "
          "data.label_field is not the column of the labels, or labels and texts "
          "are swapped)"
        )
      raise ConfigError(f"there is no text for the {split} split; {advice}")
  if not began and order.fpp.embedding_granularity == "trim":
    if order.compress.plan == "auto":
      _, fraction = outer_fractions(order.fpp)
    else:
      run = Run(shape, data, order)
      fraction = embedding_fraction(run.rules)
    return trim_vocabulary(fraction, data, order)
  return data


def _start(config: Config, workdir: str) -> tuple[Start, Model | None]:
  """Returns where the run of a config starts, and its teacher.

  Writes `fold.json` if it folds a model.

  1. At the newest checkpoint of this run that can be read.
  2. Otherwise, if `pretrained` is set: at that model, folded.
  3. Otherwise: at parameters drawn by the seed.

  Raises:
    ConfigError: config, data and model to start from do not fit.
    TrainingError: there are checkpoints, but none can be read.
  """
  with distributed.together():
    m, began = config.model, None
    shape, targets = shape_of(config), None
    if not run_dir.is_new(workdir):
      began = run_dir.load_model(workdir, config)
      shape, targets = began.shape, began.targets
    elif config.pretrained and (m.heads or m.dense_mlp_width is not None):
      raise ConfigError(
        "model.heads and model.dense_mlp_width describe a shrunk model, and "
        "training starts from a whole one; leave them out with pretrained"
      )
    data = _read_data(shape, config, began)
    if began:
      run_dir.require_same_text(workdir, data.digest)
  _require_same(config, data)
  source, path = None, config.pretrained
  with distributed.together():
    if path is not None and not has_checkpoint(workdir):
      segments = data.has_segments or shape.segments > 0
      mesh = sharding.make_mesh(config.mesh)
      source = read_source(
        path, data, task_of(config), segments=segments, mesh=mesh
      )
    if began is None and data.pair is not None:
      # As the tokenizer and the model to start from distinguish the two texts.
      segments = source.shape.segments if source else 2 * data.has_segments
      shape = dataclasses.replace(shape, segments=segments)
    teacher = teacher_of(shape, data, config, source)
  if source is None:
    run = Run(shape, data, config, targets)
    return _first(run, {}, workdir), teacher
  model, report = compress_trained(source, shape, data, config, targets)
  distributed.require_same(repr((model.shape, model.targets)), "another plan")
  with distributed.together():
    run = Run(model.shape, data, config, model.targets)
    if report and distributed.is_main():
      write_fold(workdir, model, report, config.fpp.linear_layers)
  return _first(run, model.params, workdir), teacher


def _first(run: Run, params: dict[str, Any], workdir: str) -> Start:
  """Returns the newest checkpoint of a run, or without one its start."""
  if has_checkpoint(workdir):
    with Checkpoints(workdir) as checkpoints:
      return restore(run, checkpoints)
  return run, 0, run.init(params) if params else None


def restore(run: Run, checkpoints: Checkpoints, *, best: bool = False) -> Saved:
  """Returns the newest or the best checkpoint of a run as a start.

  Raises:
    ConfigError: there is no checkpoint yet.
    TrainingError: there are checkpoints, but none can be read.
  """
  runs, shape = {}, run.model.shape

  def like(step):
    smaller = checkpoints.shape(step, shape)
    runs[step] = run if smaller == shape else run.reshaped(smaller)
    return runs[step].like

  read = checkpoints.restore_best if best else checkpoints.restore_latest
  step, state = read(like)
  return runs[step], step, state


def _take_steps(
  start: Start,
  teacher: Model | None,
  workdir: str,
  checkpoints: Checkpoints,
) -> dict[str, Any]:
  """Trains to the last step, tests the best checkpoint, returns the result."""
  run, first_step, state = start
  order, t = run.order, run.order.train
  teacher = run.placed(teacher)
  train_step = _steps(run, teacher, first_step)
  if state is None:
    state = run.init()

  with (
    # First: JAX's callback of the garbage collector swallows a KeyboardInterrupt
    # that arrives while the writer imports TensorBoard.
    stop_signal() as stopped,
    MetricsWriter(workdir, t, first_step, distributed.is_main()) as writer,
  ):
    clock = Clock(workdir, first_step)
    log = StepLog(t, run.whole_size, writer, clock, run.counts(state))
    for line in _notes(run, first_step):
      writer.say(line)
    # Before its first step it is evaluated, which shows what compression lost, and
    # saved, as compression took minutes.
    is_compressed = not checkpoints.steps() and (
      order.pretrained is not None and not order.dense
    )
    batches = run.data.train_batches(first_step)
    for step in range(first_step, t.steps + 1):
      is_updated = step > first_step and step - 1 in run.mask_updates
      if t.compact and is_updated and (found := run.compacted(state, step)):
        log.flush()
        run, state = found
        train_step = train_step.reshaped(run)
        writer.say(
          f"step {step:>6,}  compact  {run.num_parameters:,} of "
          f"{run.whole_size:,} parameters stay"
        )
        log.restart()
      is_last = step == t.steps
      is_new = step > first_step or is_compressed
      is_due = is_new and (is_last or step % t.eval_every == 0)
      is_stopped = stopped(step)
      if is_due or is_stopped:
        log.flush()
        loss = None
        if is_due:
          loss = _validate(run, step, state, teacher, writer)
        checkpoints.save(step, state, loss, run.model.shape)
        run.write_result(
          workdir,
          state,
          step=step,
          seconds=clock.seconds(),
          speed=log.speed(),
        )
        if is_stopped:
          checkpoints.wait()
          writer.say(
            f"stopped by a signal; saved at step {step} of {t.steps}; go on with: "
            f"folding resume {workdir}"
          )
          return run_dir.read_result(workdir)
        memory.return_freed()
        log.restart()
      if is_last:
        break
      batch = sharding.put_batch(run.mesh, next(batches))
      state, step_metrics = train_step(step, state, batch)
      log.step(step + 1, step_metrics, batch)

    checkpoints.wait()
    best = checkpoints.best_step()
    if best is not None and best != t.steps:
      del state  # two would take twice the memory
      run, best, state = restore(run, checkpoints, best=True)
    test = run.evaluate(state.params, "test", teacher=teacher)
    run.write_result(
      workdir,
      state,
      step=t.steps,
      seconds=clock.seconds(),
      speed=log.speed(),
      test={**test, "checkpoint_step": best},
      is_at_target=not run.rules or bool(log.counts["done"]),
    )
    if run.rules and not log.counts["done"]:
      writer.say(_missed(log.counts, order.fpp))
    writer.say(_line(t.steps, "test ", test))
  return run_dir.read_result(workdir)


def _steps(run: Run, teacher: Model | None, first_step: int) -> Steps:
  """Returns the training step, which compiles beside the rest of the start."""
  model = params = None
  if teacher is not None:
    model, params = model_for(teacher.shape, teacher.params), teacher.params
  arrays = {
    "seed": jax.device_put(run.seed, sharding.whole(run.mesh)),
    "usage": run.usage(),
    "teacher_params": params,
  }
  steps = Steps(run, model, arrays)
  if first_step < run.order.train.steps:
    batch = sharding.put_batch(run.mesh, run.data.train_batch(first_step))
    steps.compile_ahead(first_step, run.like, batch)
  return steps


def _validate(
  run: Run,
  step: int,
  state: TrainState,
  teacher: Model | None,
  writer: MetricsWriter,
) -> float | None:
  """Evaluates on the validation split, and records the metrics.

  Returns the rank of the state, see `_rank`. None: it cannot be the best, because
  FPP has masks to update.
  """
  t = run.order.train
  metrics = run.evaluate(state.params, "valid", t.eval_batches, teacher)
  writer.write({"split": "valid", "step": step, **metrics})
  writer.say(_line(step, "valid", metrics))
  if step < run.mask_updates.stop:
    return None
  return _rank(metrics, t.metric or run.task.metrics[0])


def _notes(run: Run, step: int) -> list[str]:
  """Returns the lines that a run prints before its first step."""
  order = run.order
  notes = [f"mesh: {line}" for line in run.unsplit]
  if not run.task.predicts_tokens:
    share = run.data.full_share(order.data.length)
    reads = run.model.shape.max_length
    more = f", though the model reads {reads}"
    if share >= 0.01:
      notes.append(
        f"text: {share:.0%} of the training texts fill data.length="
        f"{order.data.length} tokens; longer ones are cut"
        f"{more if reads > order.data.length else ''}"
      )
  granularities = {
    rule.granularity for rule in run.rules if rule.pattern.startswith("blocks_")
  }
  if order.train.compact and granularities == {"weight"}:
    notes.append(
      "compact: fpp prunes single weights here, so nothing leaves the arrays "
      "before its last mask update; fpp.granularity='neuron' and "
      "fpp.attention='heads' prune whole units"
    )
  if step:
    notes.append(f"resumed at step {step} of {order.train.steps}")
  return notes


def _missed(counts: Mapping[str, float], fpp: FPPConfig) -> str:
  """Returns a line about a run that is less sparse than FPP should make it."""
  zero, target = (counts[n] / counts["selected"] for n in ("zero", "target"))
  reason = "a layer had no finite statistics or no gradients"
  if fpp.tolerance is not None:
    reason = f"fpp.tolerance={fpp.tolerance} kept the others"
  return (
    f"fpp: {zero:.2%} of the selected parameters are zero and not {target:.2%}: "
    f"{reason}"
  )


def _rank(metrics: dict[str, Any], name: str) -> float:
  """Returns the rank of a checkpoint by a metric, lower is better."""
  loss = metrics["loss"]
  if name == "loss":
    return loss
  # The second term breaks ties. It is bounded, as a squared error is not.
  return 1 - metrics[name] + 1e-6 * loss / (1 + loss)


def _line(step: int, name: str, metrics: dict[str, Any]) -> str:
  shown = [
    METRICS[metric].line.format(value)
    for metric, value in metrics.items()
    if metric in METRICS
  ]
  return "  ".join([f"step {step:>6,}", name, *shown])


def resume_run(workdir: str) -> dict[str, Any]:
  """Continues a run with its own config, on the devices that are there.

  Raises:
    ConfigError: it is not a run.
    TrainingError: see `run`.
  """
  order = run_dir.load_order(workdir)
  return run(_here(order, workdir), workdir)


def evaluate_run(workdir: str, split: str = "test") -> dict[str, Any]:
  """Returns the metrics of the best checkpoint; without a best, of the newest.

  Raises:
    ConfigError: it is not a run, has no checkpoint yet, or its text changed.
    TrainingError: the loss is not finite, or no checkpoint can be read.
  """
  this, checkpoints = open_run(workdir)
  with checkpoints:
    this, step, state = restore(this, checkpoints, best=True)
  metrics = this.evaluate(state.params, split)
  return {"split": split, "checkpoint_step": step, **metrics}


def open_run(workdir: str) -> tuple[Run, Checkpoints]:
  """Returns the run in a directory and its checkpoints, for `restore`.

  Raises:
    ConfigError: it is not a run.
  """
  order = _here(run_dir.load_order(workdir), workdir)
  model = run_dir.load_model(workdir, order)
  # data.dir comes from the run, not from the user who reads it.
  data = make_data(order, model.tokenizer, keep_tokens=False)
  run_dir.require_same_text(workdir, data.digest)
  # Another process may be training there, with a save under way.
  run = Run(model.shape, data, order, model.targets)
  return run, Checkpoints(workdir, cleans=False)


def _here(config: Config, workdir: str) -> Config:
  """Returns the config of a run, with a mesh that fits the devices."""
  if sources.is_tfds(config.data):
    from folding.data import tfds_sets  # imports TFDS, which takes seconds

    # A config that came with a run must not fetch data, nor choose where to write.
    tfds_sets.require_prepared(config.data, workdir)
  mesh = sharding.fitting(config.mesh, jax.device_count())
  return dataclasses.replace(config, mesh=mesh)
