"""The training step: pure, jitted, with donated state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from folding.compression.fpp import FPPState, fpp_counts
from folding.compression.observe import observe
from folding.compression.rules import Rule
from folding.training import losses


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
  seed: int,
) -> TrainState:
  """Returns the state before the first step; a function of the seed alone."""
  tokens = jnp.zeros((1, length), jnp.int32)
  params = model.init(jax.random.key(seed), tokens)["params"]
  return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def train_step(
  state: TrainState,
  batch: Mapping[str, jax.Array],
  *,
  model: Any,
  tx: optax.GradientTransformationExtraArgs,
  rules: list[Rule],
  seed: int,
  label_smoothing: float,
  is_check: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and metrics.

  Args:
    state: Before the update.
    batch: Global arrays.
    model: The Linen model.
    tx: From `make_optimizer`.
    rules: What FPP prunes.
    seed: Of dropout.
    label_smoothing: See `losses.summed_loss`.
    is_check: Whether FPP looks at the parameters in this step; only then are
      forward statistics gathered.

  Returns:
    (state, {"loss", and after a check "selected", "frozen", "zero"}).
  """
  dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
  apply = observe(model.apply) if is_check else _plain(model.apply)

  def loss_fn(params, run):
    logits, stats = run(
      {"params": params},
      batch["tokens"],
      batch.get("mask"),
      False,
      rngs={"dropout": dropout_key},
    )
    sums = losses.summed_loss(logits, batch, label_smoothing)
    weight = jnp.maximum(sums["weight"], 1)
    return sums["loss"] / weight, (sums["nats"] / weight, stats)

  def value_fn(params):
    return loss_fn(params, _plain(model.apply))[0]

  def run(*args, **kwargs):
    keep = {"keep": batch.get("mask")} if is_check else {}
    return apply(*args, **kwargs, **keep)

  (loss, (nats, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params, run
  )
  updates, opt_state = tx.update(
    grads,
    state.opt_state,
    state.params,
    stats=stats,
    value=loss,
    value_fn=value_fn,
  )
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": nats}
  if is_check and rules:
    metrics |= fpp_counts(rules, cast(FPPState, opt_state), params)
  return TrainState(state.step + 1, params, opt_state), metrics


def _plain(apply: Callable[..., Any]) -> Callable[..., Any]:
  """Returns apply with no statistics, in the form of `observe`."""
  return lambda *args, **kwargs: (apply(*args, **kwargs), {})
