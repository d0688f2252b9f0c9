"""Losses: nats a token (next token) or an example (classification)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Batch = Mapping[str, jax.Array]


def token_losses(
  logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
  """Returns -log softmax(logits)[label] in float32, nats."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )


def summed_loss(
  logits: jax.Array, batch: Batch, label_smoothing: float = 0.0
) -> dict[str, jax.Array]:
  """Returns the sums that metrics are made of.

  Args:
    logits: [B, L, V] with batch["targets"] [B, L], or [B, C] with
      batch["labels"] [B].
    batch: Also "weights", of the shape of the targets; 0 does not count.
    label_smoothing: Mass moved from the target to all classes alike; it is in
      "loss", not in "nats".

  Returns:
    {"loss", "nats", "weight", "correct"}: float32[] sums over the batch.
  """
  labels = batch["targets"] if "targets" in batch else batch["labels"]
  weights = batch["weights"]
  nats = token_losses(logits, labels)
  loss = nats
  if label_smoothing:
    uniform = -jax.nn.log_softmax(logits.astype(jnp.float32)).mean(-1)
    loss = (1 - label_smoothing) * nats + label_smoothing * uniform
  correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  return {
    "loss": jnp.sum(loss * weights),
    "nats": jnp.sum(nats * weights),
    "weight": jnp.sum(weights),
    "correct": jnp.sum(correct * weights),
  }
