"""The training step: pure, jitted, with donated state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from folding.compression.fpp import FPPState, fpp_counts
from folding.compression.observe import observe
from folding.compression.rules import Rule
from folding.config import DistillConfig
from folding.models.transformer import Block
from folding.schema import ConfigError
from folding.training import losses, sharding


class TrainState(NamedTuple):
  """All that training changes, and all that a checkpoint holds.

  Attributes:
    step: int32[], updates applied.
    params: Parameters.
    opt_state: State of the optimizer; FPP's masks are in it.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def init_state(
  model: Any,
  tx: optax.GradientTransformation,
  length: int,
  seed: ArrayLike,
) -> TrainState:
  """Returns the state before the first step; a function of the seed alone."""
  tokens = jnp.zeros((1, length), jnp.int32)
  params = model.init(jax.random.key(seed), tokens)["params"]
  return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def state_shapes(init: Callable[..., TrainState]) -> TrainState:
  """Returns the shapes of what `init_state` gives of a seed.

  Raises:
    ConfigError: a rule does not fit the parameters.
  """
  try:
    return jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))
  except ValueError as error:
    raise ConfigError(str(error)) from error


def train_step(
  state: TrainState,
  batch: Mapping[str, jax.Array],
  *,
  model: Any,
  tx: optax.GradientTransformationExtraArgs,
  rules: list[Rule],
  label_smoothing: float,
  is_check: bool,
  accumulate: int = 1,
  mesh: Mesh | None = None,
  teacher: Any = None,
  distill: DistillConfig | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and metrics.

  Args:
    state: Before the update.
    batch: Global arrays; also "seed", uint32[], of dropout (0 without), and
      with rows of the embedding to prune "usage", float32[V], how often
      training uses each token, in place of how often this batch does.
    model: The Linen model.
    tx: From `make_optimizer`.
    rules: What FPP prunes.
    label_smoothing: See `losses.summed_loss`.
    is_check: Whether FPP looks at the parameters in this step; only then are
      forward statistics gathered, and is the check a part of the program.
    accumulate: Parts of the batch that are computed one after another, for
      memory; the update is that of the whole to rounding, dropout apart.
    mesh: Where arrays lie; what layers write stays with the rows of the batch.
    teacher: Of distillation: a model whose parameters are batch["teacher"].
    distill: How much the teacher counts; None: there is none.

  Returns:
    (state, {"loss" without the teacher's part, of what was read, and after a
    check "selected", "frozen", "zero"}).
  """
  batch = dict(batch)
  teacher_params, usage = batch.pop("teacher", None), batch.pop("usage", None)
  # An array, so that one program serves runs that differ by their seed.
  seed = batch.pop("seed", 0)
  total = jnp.maximum(jnp.sum(batch["weights"]), 1)
  keep = batch.get("mask")
  num_tokens = batch["tokens"].size if keep is None else jnp.sum(keep)
  watch: dict[str, Any] = {}
  if distill is not None and distill.hidden:
    watch = {"mutable": ["intermediates"], "capture_intermediates": _is_block}

  def pinned(call, args, kwargs, context):
    if not _is_block(context.module, context.method_name):
      return call(*args, **kwargs)
    x, *rest = args
    return sharding.pin_rows(
      mesh, call(sharding.pin_rows(mesh, x), *rest, **kwargs)
    )

  def loss_fn(params, batch, key, is_check, distill):
    """Returns a part's share of the loss of the whole batch, and of the rest."""
    inputs = {"params": params}, batch["tokens"], batch.get("mask"), False
    options = {"rngs": {"dropout": key}, **(watch if distill else {})}
    stats = {}
    with nn.intercept_methods(pinned):
      if is_check:
        apply = observe(model.apply)
        out, stats = apply(*inputs, keep=batch.get("mask"), **options)
      else:
        out = model.apply(*inputs, **options)
    logits, hidden = out if distill and watch else (out, {})
    logits = sharding.pin_rows(mesh, logits)
    sums = losses.summed_loss(logits, batch, label_smoothing)
    loss = untaught = sums["loss"] / jnp.maximum(sums["weight"], 1)
    if distill is not None:
      taught = teacher.apply(
        {"params": teacher_params}, batch["tokens"], batch.get("mask"), **watch
      )
      taught, aims = jax.lax.stop_gradient(taught if watch else (taught, {}))
      loss = (1 - distill.logits) * loss + distill.logits * losses.soft_loss(
        logits, taught, batch["weights"], distill.temperature
      )
      if distill.hidden:
        loss += distill.hidden * losses.hidden_loss(hidden, aims, batch)
    share = sums["weight"] / total
    seen = batch["tokens"].size if keep is None else jnp.sum(batch["mask"])
    seen = seen / jnp.maximum(num_tokens, 1)
    stats = {name: seen * stat for name, stat in stats.items()}
    return share * loss, (sums["nats"] / total, share * untaught, stats)

  dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
  read, read_key = batch, dropout_key
  if distill is not None and distill.noise:
    # Of the whole batch: a part of one row has no text before it.
    read_key, noise_key = jax.random.split(dropout_key)
    read = {**batch, "tokens": mix_texts(noise_key, batch, distill.noise)}

  def value_fn(params):
    return _sum_parts(
      batch,
      dropout_key,
      accumulate,
      lambda part, key: loss_fn(params, part, key, False, None),
    )[0]

  grads, (nats, untaught, stats) = _sum_parts(
    read,
    read_key,
    accumulate,
    lambda part, key: jax.grad(loss_fn, has_aux=True)(
      state.params, part, key, is_check, distill
    ),
  )
  if is_check and usage is not None:
    stats = stats | {"embed/embedding": usage}
  updates, opt_state = tx.update(
    grads,
    state.opt_state,
    state.params,
    stats=stats,
    # Not of mixed texts, as `value_fn` is not.
    value=None if distill is not None and distill.noise else untaught,
    value_fn=value_fn,
    is_due=is_check,
  )
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": nats}
  if is_check and rules:
    metrics |= fpp_counts(rules, cast(FPPState, opt_state), params)
  return TrainState(state.step + 1, params, opt_state), metrics


def mix_texts(
  key: jax.Array, batch: Mapping[str, jax.Array], share: float
) -> jax.Array:
  """Returns int32[B, L] tokens, a share of them those of the text before.

  Of the texts that it was tuned on a teacher is sure, which teaches little; of
  mixed ones it is not. Padding stays where it is.

  Args:
    key: Of the draw, by token.
    batch: "tokens" int32[B, L]; "mask" bool[B, L], if any, True at tokens.
    share: Of the tokens, in [0, 1).
  """
  tokens, mask = batch["tokens"], batch.get("mask")
  is_other = jax.random.bernoulli(key, share, tokens.shape)
  if mask is not None:
    is_other &= mask & jnp.roll(mask, 1, axis=0)
  return jnp.where(is_other, jnp.roll(tokens, 1, axis=0), tokens)


def _is_block(module: Any, method: str) -> bool:
  return isinstance(module, Block) and method == "__call__"


def _sum_parts(
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  count: int,
  function: Callable[[Mapping[str, jax.Array], jax.Array], Any],
) -> Any:
  """Returns the sum of function(part, key) over parts of a batch, in turn."""
  if count == 1:
    return function(batch, key)
  # Part i has every count-th row, so that each device has rows of each part.
  parts = {
    name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    for name, x in batch.items()
  }
  keys = jax.random.split(key, count)
  first = jax.tree.map(lambda x: x[0], (parts, keys))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first)
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(*part)), None

  return jax.lax.scan(add, zeros, (parts, keys))[0]
