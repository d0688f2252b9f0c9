"""The training step: pure, jitted, with donated state."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from folding.compression.fpp import FPPState, fpp_counts
from folding.compression.observe import observe
from folding.compression.sites import Rule
from folding.config import DistillConfig, Order
from folding.errors import ConfigError
from folding.model import Targets
from folding.models.shape import Shape
from folding.models.transformer import (
  Block,
  Transformer,
  make_model,
  param_shapes,
)
from folding.tasks import Task, task_of
from folding.training import losses, sharding
from folding.training.optimizer import (
  embedding_fraction,
  make_optimizer,
  make_rules,
  mask_updates,
  removed_units,
)


class TrainState(NamedTuple):
  """All that training changes, and all that a checkpoint holds.

  Attributes:
    step: int32[], updates applied.
    params: Parameters.
    opt_state: State of the optimizer, FPP's masks included.
  """

  step: jax.Array
  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """The static part of a training step.

  Attributes:
    model: The Linen model.
    tx: From `make_optimizer`.
    task: What the model is trained for.
    rules: The rules of FPP.
    removed: From `removed_units`.
    accumulate: Number of micro-batches, computed one after another to save
      memory. Apart from dropout, the update equals that of the whole batch up
      to rounding.
    mesh: Pins activations to the sharding of the batch rows; None: no mesh.
    kernel_mesh: Devices that kernels are split over; None: no kernels.
    teacher: The teacher's Linen model; None: train on the labels only.
    distill: Weights of the teacher's losses.
  """

  model: Any
  tx: optax.GradientTransformationExtraArgs
  task: Task
  rules: Sequence[Rule] = ()
  removed: Mapping[str, int] = dataclasses.field(default_factory=dict)
  accumulate: int = 1
  mesh: Mesh | None = None
  kernel_mesh: Mesh | None = None
  teacher: Any = None
  distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)


class _Aux(NamedTuple):
  """One micro-batch's share of the metrics of the whole batch.

  Attributes:
    loss: float32[], share of the loss on the labels.
    label_loss: float32[], share of the `value` that FPP gets: the loss on the
      labels, or of the teacher if there are none.
    stats: {parameter path: forward statistics}; {} if there is no mask update.
  """

  loss: jax.Array
  label_loss: jax.Array
  stats: dict[str, jax.Array]


def init_state(
  model: Any,
  tx: optax.GradientTransformation,
  length: int,
  seed: ArrayLike,
) -> TrainState:
  """Returns the state before the first step, which only depends on the seed."""
  tokens = jnp.zeros((1, length), jnp.int32)
  params = model.init(jax.random.key(seed), tokens)["params"]
  return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


class Program:
  """Model, optimizer and state of a run, without its data.

  Attributes:
    order: Resolved.
    targets: Fractions that a plan chose to prune; None: those of `order.fpp`.
    task: The row of its task.
    mesh: The devices.
    kernel_mesh: The same; None: no kernels.
    model: The Linen model.
    tx: The optimizer, FPP included.
    rules: The rules of FPP.
    mask_updates: The steps, counted from 0, that update its masks.
    like: Shapes and shardings of the training state.
    unsplit: One line per parameter (and one for the batch) that the mesh does
      not divide.
    dense_params: Shapes of the parameters of the dense baseline.
    whole_size: Number of parameters before any shrink.
    removed: From `removed_units`: pruned units that have left the parameters.
  """

  def __init__(
    self,
    shape: Shape,
    order: Order,
    mesh: Mesh,
    *,
    vocab_size: int,
    num_classes: int,
    plain_size: int | None = None,
    targets: Targets | None = None,
  ):
    """Initializes the program.

    Args:
      shape: Shape of the model.
      order: Resolved.
      mesh: From `sharding.make_mesh`.
      vocab_size: V, tokens of the model.
      num_classes: Ignored by language models.
      plain_size: V before tokens left the tokenizer; None: none did.
      targets: Fractions that a plan chose to prune.

    Raises:
      ConfigError: a rule of FPP or of the mesh does not fit the parameters.
    """
    self.order, self.targets, self.mesh = order, targets, mesh
    self.kernel_mesh = mesh if order.mesh.attention_kernel else None
    self.task = task_of(order)
    plain_size = plain_size or vocab_size
    make = functools.partial(make_model, num_classes=num_classes)
    self.model = make(shape, vocab_size)
    self.dense_params = param_shapes(make(shape.dense(), plain_size))
    before = param_shapes(make(shape.whole(), plain_size))
    self.rules = make_rules(
      shape, order.fpp, before, self.dense_params, targets
    )
    self.mask_updates = mask_updates(order) if self.rules else range(0)
    after = param_shapes(self.model)
    self.removed = removed_units(self.rules, before, after)
    self.whole_size = _size(before)
    self.tx = make_optimizer(order, shape.layers, self.rules, self.removed)
    self.draw = functools.partial(
      init_state, self.model, self.tx, order.data.length
    )
    try:
      state = jax.eval_shape(self.draw, jax.ShapeDtypeStruct((), jnp.uint32))
    except ValueError as error:
      raise ConfigError(str(error)) from error
    rows = order.data.batch_size // order.train.accumulate
    self.unsplit = [
      *sharding.unsplit(mesh, state.params, order.mesh.rules),
      *sharding.undivided(mesh, rows),
    ]
    self.like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      sharding.tree_shardings(mesh, state, rules=order.mesh.rules),
    )

  @property
  def prunes_tokens(self) -> bool:
    """Whether rows of the embedding are pruned by how common their tokens are."""
    is_by_weight = self.order.fpp.embedding_granularity == "weight"
    return not is_by_weight and embedding_fraction(self.rules) > 0

  @property
  def num_parameters(self) -> int:
    """Number of parameters, zeros included."""
    return _size(self.like.params)

  @property
  def state_shardings(self) -> TrainState:
    """Shardings of the training state."""
    return jax.tree.map(lambda x: x.sharding, self.like)

  def options(self, teacher: Transformer | None = None) -> StepOptions:
    """Returns the options of `train_step`.

    Args:
      teacher: Model of the teacher; None: train on the labels only.
    """
    return StepOptions(
      model=self.model,
      tx=self.tx,
      task=self.task,
      rules=self.rules,
      removed=self.removed,
      accumulate=self.order.train.accumulate,
      mesh=self.mesh,
      kernel_mesh=self.kernel_mesh,
      teacher=teacher,
      distill=self.order.distill,
    )

  def step(
    self,
    *,
    is_mask_update: bool,
    teacher: Transformer | None = None,
    donates: bool = True,
  ) -> Any:
    """Returns the jitted `train_step`.

    Args:
      is_mask_update: See `train_step`.
      teacher: See `options`.
      donates: Whether the new state takes the memory of the old.
    """
    return jax.jit(
      functools.partial(
        train_step,
        options=self.options(teacher),
        is_mask_update=is_mask_update,
      ),
      donate_argnums=0 if donates else (),
      out_shardings=(self.state_shardings, sharding.whole(self.mesh)),
      compiler_options=_compiler_options(self.mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, Any]:
  """Returns options of the compiler for a step.

  The compiler for TPUs multiplies by a weight while it gathers it, a few columns
  at a time, which takes longer than one product. With `tensor` such a product
  hides the time of gathering activations, which cannot be gathered ahead.
  """
  is_tpu = mesh.devices.flat[0].platform == "tpu"
  if not is_tpu or mesh.shape["tensor"] > 1:
    return {}
  # The least size, in MiB, of a weight that is multiplied in this way.
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


class Steps:
  """Calls `train_step`, compiled once without and once with a mask update.

  The program with one compiles in a thread, beside the first steps without. The
  other one does so beside the start of a run, see `compile_ahead`.
  """

  def __init__(
    self,
    program: Program,
    teacher: Transformer | None = None,
    arrays: Mapping[str, Any] | None = None,
  ):
    """Initializes the steps.

    Args:
      program: Model, optimizer and state.
      teacher: See `Program.options`.
      arrays: Arguments of `train_step` that are the same at each step, such as
        "seed"; None: the defaults.
    """
    self._mask_updates = program.mask_updates
    self._teacher, self._arrays = teacher, dict(arrays or {})
    self._jitted = [
      program.step(is_mask_update=is_update, teacher=teacher)
      for is_update in (False, True)
    ]
    self._compiled: dict[bool, concurrent.futures.Future] = {}

  def reshaped(self, program: Program) -> "Steps":
    """Returns the steps of a smaller program, with the same teacher and arrays."""
    return Steps(program, self._teacher, self._arrays)

  def compile_ahead(self, step: int, state: Any, batch: Any) -> None:
    """Compiles the program of a step in a thread.

    Calls wait for it, and run it if their arrays have the same shapes.

    Args:
      step: Updates applied so far.
      state: The training state, or its shapes and shardings.
      batch: The same.
    """
    is_update = step in self._mask_updates
    arguments, arrays = jax.tree.map(_like, ((state, batch), self._arrays))
    lower = self._jitted[is_update].lower
    pool = concurrent.futures.ThreadPoolExecutor(1)
    self._compiled[is_update] = pool.submit(
      lambda: lower(*arguments, **arrays).compile()
    )
    pool.shutdown(wait=False)

  def __call__(
    self, step: int, state: TrainState, batch: losses.Batch
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the results of `train_step`.

    Args:
      step: Updates applied so far.
      state: The training state; its memory is given to the new one.
      batch: Batches of texts may differ in length.
    """
    updates = self._mask_updates
    is_update = step in updates
    if is_update in self._compiled:
      self._compiled[is_update].result()
    if is_update or True in self._compiled or step >= updates.stop:
      return self._jitted[is_update](state, batch, **self._arrays)
    like = jax.tree.map(_like, (state, batch))  # the state is donated
    results = self._jitted[False](state, batch, **self._arrays)
    self.compile_ahead(updates[0], *like)
    return results


def _like(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _size(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


def train_step(
  state: TrainState,
  batch: losses.Batch,
  *,
  options: StepOptions,
  is_mask_update: bool,
  seed: ArrayLike = 0,
  usage: jax.Array | None = None,
  teacher_params: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and metrics.

  Args:
    state: The state before the update.
    batch: Global arrays, see `folding.data.batches.Data`.
    options: Model, optimizer and losses.
    is_mask_update: Static flag: does this step update the masks of FPP? Only then
      does the compiled step gather forward statistics.
    seed: uint32[], seed of dropout. An array, so that runs that differ by their
      seed share one compiled program.
    usage: float32[V], how often the training set has each token. It replaces
      the batch's own statistics of the embedding.
    teacher_params: Parameters of `options.teacher`.

  Returns:
    (state, metrics). Metrics: "loss" on the labels; after a mask update also
    those of `fpp_counts`.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  totals = _Totals(
    weight=jnp.maximum(jnp.sum(batch["weights"]), 1),
    tokens=jnp.maximum(_num_tokens(batch), 1),
  )
  labels_only = options
  if not options.task.makes_vectors:
    labels_only = dataclasses.replace(options, teacher=None)

  loss_fn = functools.partial(
    _loss, totals=totals, teacher_params=teacher_params
  )

  def gradient(micro_batch, key):
    loss = functools.partial(loss_fn, options=options, has_stats=is_mask_update)
    return jax.grad(loss, has_aux=True)(state.params, micro_batch, key)

  def value_fn(params):
    """Returns the loss on the labels at other parameters."""

    def value(micro_batch, key):
      return loss_fn(params, micro_batch, key, options=labels_only)[0]

    return _sum_micro_batches(value, batch, key, options.accumulate)

  grads, aux = _sum_micro_batches(gradient, batch, key, options.accumulate)
  stats = aux.stats
  if is_mask_update and usage is not None:
    stats = stats | {"embed/embedding": usage}
  updates, opt_state = options.tx.update(
    grads,
    state.opt_state,
    state.params,
    stats=stats,
    value=aux.label_loss,
    value_fn=value_fn,
    is_due=is_mask_update,
  )
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": aux.loss}
  if is_mask_update and options.rules:
    fpp_state = cast(FPPState, opt_state)
    metrics |= fpp_counts(options.rules, fpp_state, params, options.removed)
  return TrainState(state.step + 1, params, opt_state), metrics


class _Totals(NamedTuple):
  """Sums over the whole batch: target weights and tokens."""

  weight: jax.Array
  tokens: jax.Array


def _num_tokens(batch: losses.Batch) -> ArrayLike:
  return jnp.sum(batch["mask"]) if "mask" in batch else batch["tokens"].size


def _loss(
  params: Any,
  batch: losses.Batch,
  key: jax.Array,
  *,
  totals: _Totals,
  options: StepOptions,
  teacher_params: Any,
  has_stats: bool = False,
) -> tuple[jax.Array, _Aux]:
  """Returns a micro-batch's share of the loss of the whole batch."""
  teacher, distill = options.teacher, options.distill
  x, hidden, stats = _encode(params, batch, key, options, has_stats)
  encodings, aims = {"x": x}, None
  weights = {"params": options.model.read_out_params(params)}
  if teacher is not None:
    encodings["taught"], aims = _encode_taught(options, teacher_params, batch)
    weights["teacher"] = teacher.read_out_params(teacher_params)
  sums = losses.sum_over_blocks(
    functools.partial(_summed, options),
    weights,
    {**batch, **encodings},
    count=losses.num_blocks(batch, options.model.vocab_size, options.mesh),
    mesh=options.mesh,
  )
  weight = jnp.maximum(sums["weight"], 1)
  loss = label_loss = sums["loss"] / weight
  if teacher is not None:
    if "pairs" in sums:
      # With a teacher of another width, pairs are all that `summed_loss` compares.
      is_alike = x.shape[-1] == encodings["taught"].shape[-1]
      loss = is_alike * loss + distill.pairs * sums["pairs"] / weight
    if "soft" in sums:
      soft = sums["soft"] / weight
      loss = (1 - distill.logits) * loss + distill.logits * soft
    if distill.hidden:
      distance = _hidden_loss(options, hidden, aims, batch)
      loss += distill.hidden * distance
  if options.task.makes_vectors:
    label_loss = loss
  share = sums["weight"] / totals.weight
  seen = _num_tokens(batch) / totals.tokens
  return share * loss, _Aux(
    loss=sums["loss"] / totals.weight,
    label_loss=share * label_loss,
    stats={name: seen * stat for name, stat in stats.items()},
  )


def _encode(
  params: Any,
  batch: losses.Batch,
  key: jax.Array,
  options: StepOptions,
  has_stats: bool,
) -> tuple[jax.Array, Any, dict[str, Any]]:
  """Returns the output of the last block, hidden states and statistics.

  Hidden states are {} if no loss needs them, statistics are {} without `has_stats`.
  """
  variables, apply = {"params": params}, options.model.apply
  mask, capture = batch.get("mask"), _capture(options)
  inputs = batch["tokens"], mask, False, batch.get("segments")
  how = {"method": "encode", "rngs": {"dropout": key}, **capture}
  stats = {}
  pin = nn.intercept_methods(_pin_blocks(options.mesh))
  with sharding.kernels_on(options.kernel_mesh), pin:
    if has_stats:
      out, stats = observe(apply)(variables, *inputs, keep=mask, **how)
    else:
      out = apply(variables, *inputs, **how)
  x, hidden = out if capture else (out, {})
  if has_stats:  # the compiler drops these logits
    read_out = functools.partial(apply, method="read_out")
    stats |= observe(read_out)(variables, x, mask, keep=mask)[1]
  return x, hidden, stats


def _encode_taught(
  options: StepOptions, teacher_params: Any, batch: losses.Batch
) -> tuple[jax.Array, Any]:
  """Returns the output of the teacher's last block, and its hidden states."""
  capture = _capture(options)
  with sharding.kernels_on(options.kernel_mesh):
    out = options.teacher.apply(
      {"params": teacher_params},
      batch.get("teacher_tokens", batch["tokens"]),
      batch.get("teacher_mask", batch.get("mask")),
      True,
      batch.get("segments"),
      method="encode",
      **capture,
    )
  return jax.lax.stop_gradient(out if capture else (out, {}))


def _capture(options: StepOptions) -> dict[str, Any]:
  """Returns the options of `apply` that capture hidden states, if needed."""
  if options.teacher is None or not options.distill.hidden:
    return {}
  return {"mutable": ["intermediates"], "capture_intermediates": _is_block}


def _read_out(options: StepOptions, weights, block) -> tuple[Any, Any]:
  """Returns the output of the model, and of its teacher if there is one."""
  mask, teacher = block.get("mask"), options.teacher
  out = options.model.apply(
    {"params": weights["params"]}, block["x"], mask, method="read_out"
  )
  out = sharding.pin_rows(options.mesh, out)
  if teacher is None:
    return out, None
  taught = teacher.apply(
    {"params": weights["teacher"]},
    block["taught"],
    block.get("teacher_mask", mask),
    method="read_out",
  )
  return out, jax.lax.stop_gradient(taught)


def _summed(options: StepOptions, weights, block) -> dict[str, Any]:
  """Returns `losses.summed_loss` of a block; perhaps with "soft" and "pairs"."""
  out, taught = _read_out(options, weights, block)
  task, distill = options.task, options.distill
  sums = losses.summed_loss(task, out, {**block, "taught": taught})
  # XLA removes the teacher's head if nothing reads its logits.
  if taught is not None and distill.logits:
    sums["soft"] = losses.summed_soft_loss(
      task, out, taught, block["weights"], distill.temperature
    )
  if taught is not None and distill.pairs:
    pairs = losses.pairs_loss(out, taught, block["weights"])
    sums["pairs"] = sums["weight"] * pairs
  return sums


def _hidden_loss(
  options: StepOptions, hidden: Any, taught: Any, batch: losses.Batch
) -> jax.Array:
  """Returns the distance of hidden states, per token or of means over tokens."""
  mask = batch.get("mask")
  if not options.task.makes_vectors:
    return losses.hidden_loss(hidden, taught, mask)
  # The teacher of vectors may have another tokenizer.
  hidden = _text_means(hidden, mask)
  taught = _text_means(taught, batch.get("teacher_mask", mask))
  return losses.hidden_loss(hidden, taught, None)


def _text_means(hidden: Any, mask: Any) -> Any:
  """Returns the means over tokens, [B, D], of trees of [B, L, D]."""
  weight_BL1 = mask[..., None].astype(jnp.float32)
  count_B1 = jnp.maximum(weight_BL1.sum(1), 1)
  return jax.tree.map(lambda x: (x * weight_BL1).sum(1) / count_B1, hidden)


def _pin_blocks(mesh: Mesh | None) -> Callable[..., Any]:
  """Returns an interceptor that shards the activations of blocks by rows."""

  def pin(call, args, kwargs, context):
    if not _is_block(context.module, context.method_name):
      return call(*args, **kwargs)
    x, *rest = args
    out = call(sharding.pin_rows(mesh, x), *rest, **kwargs)
    return sharding.pin_rows(mesh, out)

  return pin


def _is_block(module: Any, method: str) -> bool:
  return isinstance(module, Block) and method == "__call__"


def _sum_micro_batches(
  function: Callable[[losses.Batch, jax.Array], Any],
  batch: losses.Batch,
  key: jax.Array,
  count: int,
) -> Any:
  """Returns the sum of function(micro-batch, key) over `count` micro-batches.

  Each has its own key; a single one has `key` itself.
  """
  if count == 1:
    return function(batch, key)
  # Micro-batch i has every count-th row, so that each device has rows of each.
  micro_batches = {
    name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    for name, x in batch.items()
  }
  keys = jax.random.split(key, count)
  first = jax.tree.map(lambda x: x[0], (micro_batches, keys))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first)
  )

  def add(total, inputs):
    return jax.tree.map(jnp.add, total, function(*inputs)), None

  return jax.lax.scan(add, zeros, (micro_batches, keys))[0]
