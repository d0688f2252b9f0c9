"""Fits folded queries and keys to the attention weights of a dense layer.

The nearest logits, which moments give (`lowrank`), are not the nearest weights:
a softmax asks for the large ones. So what moments give is where a descent on
the divergence of the weights begins.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from folding.models.attention import attention_logits
from folding.models.transformer import Block

_RATE = 0.03  # of the RMS of an array, a step at first
_LOOKS = 10  # at texts that are not fitted, at equal distances


class Fit(NamedTuple):
  """Parameters of a folded attention layer, and how near its weights are.

  Attributes:
    params: As given, but for what the logits are made of.
    divergence: Nats, mean over heads and tokens, of texts that are not fitted.
  """

  params: dict[str, Any]
  divergence: float


def fit_attention(
  block: Block,
  params: Mapping[str, Any],
  dense_block: Block,
  dense: Mapping[str, Any],
  x: Sequence[jax.Array],
  kept: Sequence[jax.Array],
  steps: int,
) -> Fit:
  """Returns a layer whose attention weights are near those of a dense one.

  Adam on the mean of KL(dense weights || folded weights) over half of the
  texts, of W_Q, W_K, their biases and ALiBi's slopes; of the start and ten
  places on its way, what does best on the other half. So it is never worse there than what was given.

  Args:
    block: Folded.
    params: Of `block`; where the descent begins.
    dense_block: The same layer, dense.
    dense: Its parameters.
    x: float[B, L, D] each, what both layers read.
    kept: bool[B, L] each, True at tokens.
    steps: Of the descent, a batch each; 0: the layer is only measured.
  """
  attn = dict(params["attn"])
  params, dense = jax.device_put((params, dense))  # once, and not at each step
  names = [name for name in ("q", "k", "log_slopes") if name in attn]
  fitted = {name: params["attn"][name] for name in names}
  seen, unseen = halves(x, kept)

  def measured(fitted):
    part = functools.partial(
      _divergence, block, dense_block, fitted, params, dense
    )
    return float(np.divide(*total(part, *zip(*unseen, strict=True))))

  best = Fit(fitted, measured(fitted))
  state = _optimizer(max(steps, 1)).init(fitted)
  for step in range(steps):
    at = seen[step % len(seen)]
    fitted, state = _descend(
      block, dense_block, steps, fitted, state, params, dense, *at
    )
    if (step + 1) * _LOOKS // steps > step * _LOOKS // steps:
      now = measured(fitted)
      if now < best.divergence:
        best = Fit(fitted, now)
  return Fit(attn | jax.tree.map(np.asarray, best.params), best.divergence)


def halves(*data: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
  """Returns every other text of batches, and the rest, as lists of batches.

  Texts of one length come in one batch, so that each half has all lengths; a
  batch with no text of a half is left out of it.

  Args:
    data: Lists of arrays, one of each a batch, with texts as rows.
  """
  found: list[list[tuple[Any, ...]]] = [[], []]
  for number, batch in enumerate(zip(*data, strict=True)):
    for half in range(2):
      rows = tuple(a[(half + number) % 2 :: 2] for a in batch)
      if len(rows[0]):
        found[half].append(rows)
  return found


def total(function: Callable[..., Any], *data: Sequence[Any]) -> Any:
  """Returns the sum of what a function gives of each batch, in float64.

  Args:
    function: Of a batch; returns a tree of arrays.
    data: As of `halves`.
  """
  sums = None
  for batch in zip(*data, strict=True):
    more = jax.tree.map(np.float64, function(*batch))
    sums = more if sums is None else jax.tree.map(np.add, sums, more)
  return sums


def _optimizer(steps: int) -> optax.GradientTransformation:
  return optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(_RATE, steps)),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(block, dense_block, steps, fitted, state, params, dense, x, keep):
  def loss(fitted):
    total, count = _sums(block, dense_block, fitted, params, dense, x, keep)
    return total / jnp.maximum(count, 1)

  grads = jax.grad(loss)(fitted)
  updates, state = _optimizer(steps).update(grads, state, fitted)
  return optax.apply_updates(fitted, updates), state


def _sums(block, dense_block, fitted, params, dense, x, keep):
  """Returns the divergence of the weights, summed, and how many there are."""
  # Computed anew each time, as those of all texts would take much memory.
  aim = jax.lax.stop_gradient(_logits(dense_block, dense, x, keep))
  attn = {**params["attn"], **fitted}
  ours = _logits(block, {**params, "attn": attn}, x, keep)
  log_aim = jax.nn.log_softmax(aim)
  far = jnp.exp(log_aim) * (log_aim - jax.nn.log_softmax(ours))
  rows = jnp.broadcast_to(keep[:, None], far.shape[:-1]).astype(jnp.float32)
  return jnp.sum(far.sum(-1) * rows), jnp.sum(rows)


_divergence = jax.jit(_sums, static_argnums=(0, 1))


def _logits(block, params, x, keep):
  """Returns the attention logits of a layer, [B, H, L, L]."""

  def logits(block: Block) -> jax.Array:
    is_pre = block.config.norm_position == "pre"
    position_L = jnp.arange(x.shape[1])
    q, k, _ = block.attn.project(
      block.norm_attn(x) if is_pre else x, position_L
    )
    return attention_logits(
      q,
      k.transpose(0, 2, 3, 1),
      block.attn.bias(position_L, position_L),
      keep,
      head_dim=block.layer.head_dim,
    )

  return block.apply({"params": params}, method=logits)
