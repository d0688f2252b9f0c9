"""Fits the attention weights of a folded layer to those of the dense one.

`lowrank` finds the nearest logits, but their weights are not the nearest: a
softmax depends on the large logits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from folding.models.exact_attention import attention_logits
from folding.models.transformer import Block
from folding.training.stream import Params, Stream, halves, spread, total

_FIT_RATE = 0.03  # first learning rate of a fit, relative to an array's RMS
_FIT_TOKENS = 1024  # about as many per step
_FIT_CHECKS = 10  # evaluations of a fit on the held-out half
_FIT_HELD_OUT = 4096  # about as many tokens per evaluation


class Fit(NamedTuple):
  """Parameters of a folded attention layer.

  Attributes:
    params: As given, with other arrays behind the logits.
    divergence: Nats, mean over heads and tokens of the held-out half.
  """

  params: dict[str, Any]
  divergence: float


def fit_attention(
  folded: tuple[Block, Params],
  dense: tuple[Block, Params],
  stream: Stream,
  steps: int,
) -> Fit:
  """Returns a layer whose attention weights are near those of a dense one.

  Adam on the mean of KL(dense weights || folded weights) over half of the texts,
  some at a step, moves W_Q, W_K, their biases and ALiBi's slopes. Of the start and
  ten later points the best on texts of the other half is returned, so the fit is
  never worse there than its start.

  Args:
    folded: Block and parameters, where the descent starts.
    dense: The same layer, dense.
    stream: Input of both layers.
    steps: Number of steps, of some texts each; 0 only measures the layer.
  """
  (block, params), (dense_block, aim) = folded, dense
  blocks, attn = (block, dense_block), dict(params["attn"])
  layers = stream.put((params, aim))  # once, not at each step
  names = [name for name in ("q", "k", "log_slopes") if name in attn]
  fitted = {name: layers[0]["attn"][name] for name in names}
  seen, held_out = halves(*stream)
  seen = [part for batch in seen for part in _parts(*batch)]
  sizes = [mask.size for _, mask in held_out]
  held_out = spread(held_out, sizes, _FIT_HELD_OUT)
  # Computed once: at each step the dense layer would be half of the work.
  seen, held_out = (
    [(x, mask, _heads(dense_block, layers[1], x)) for x, mask in part]
    for part in (seen, held_out)
  )

  def measured(fitted):
    divergence, count = total(
      lambda batch: _divergence(blocks, fitted, layers, *batch), held_out
    )
    return float(divergence / count)

  best = Fit(fitted, measured(fitted))
  state = _fit_optimizer(max(steps, 1)).init(fitted)
  for step in range(steps):
    fitted, state = _descend(
      fitted, state, layers, seen[step % len(seen)], blocks=blocks, steps=steps
    )
    if (step + 1) * _FIT_CHECKS // steps > step * _FIT_CHECKS // steps:
      now = measured(fitted)
      if now < best.divergence:
        best = Fit(fitted, now)
  return Fit(attn | jax.tree.map(np.asarray, best.params), best.divergence)


def _parts(x: Any, mask: Any) -> list[tuple[Any, Any]]:
  """Returns a batch as parts of equally many texts, of `_FIT_TOKENS` tokens."""
  count = min(len(x), -(-mask.size // _FIT_TOKENS))
  rows = len(x) // count
  return [
    (x[begin : begin + rows], mask[begin : begin + rows])
    for begin in range(0, count * rows, rows)
  ]


def _fit_optimizer(steps: int) -> optax.GradientTransformation:
  return optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(_FIT_RATE, steps)),
  )


@functools.partial(jax.jit, static_argnames=("blocks", "steps"))
def _descend(fitted, state, layers, batch, *, blocks, steps):
  def loss(fitted):
    total, count = _divergence(blocks, fitted, layers, *batch)
    return total / jnp.maximum(count, 1)

  grads = jax.grad(loss)(fitted)
  updates, state = _fit_optimizer(steps).update(grads, state, fitted)
  return optax.apply_updates(fitted, updates), state


@functools.partial(jax.jit, static_argnums=0)
def _divergence(blocks, fitted, layers, x, mask, dense_heads):
  """Returns the summed divergence of the weights, and the number of rows."""
  (block, dense_block), (params, dense) = blocks, layers
  # Computed at each step, as those of all texts would take much memory.
  aim = jax.lax.stop_gradient(_logits(dense_block, dense, dense_heads, mask))
  params = {**params, "attn": {**params["attn"], **fitted}}
  ours = _logits(block, params, _heads(block, params, x), mask)
  log_aim = jax.nn.log_softmax(aim)
  far = jnp.exp(log_aim) * (log_aim - jax.nn.log_softmax(ours))
  rows = jnp.broadcast_to(mask[:, None], far.shape[:-1]).astype(jnp.float32)
  return jnp.sum(far.sum(-1) * rows), jnp.sum(rows)


@functools.partial(jax.jit, static_argnums=0)
def _heads(block, params, x):
  """Returns the queries and the keys of a layer."""

  def project(block: Block) -> tuple[jax.Array, jax.Array]:
    q, k, _ = block.attn.project(
      block.attention_input(x), jnp.arange(x.shape[1])
    )
    return q, k

  return block.apply({"params": params}, method=project)


def _logits(block, params, heads, mask):
  """Returns the attention logits of a layer, [B, H, L, L]."""
  q, k = heads

  def logits(block: Block) -> jax.Array:
    position_L = jnp.arange(q.shape[1])
    return attention_logits(
      q.swapaxes(1, 2),
      k.transpose(0, 2, 3, 1),
      block.attn.bias(position_L, position_L),
      mask,
      **block.attn.logit_options,
    )

  return block.apply({"params": params}, method=logits)
