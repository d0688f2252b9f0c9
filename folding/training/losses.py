"""Losses: nats a token (next token) or an example (classification)."""

from collections.abc import Mapping
from typing import Any

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


def soft_loss(
  logits: Float[Array, "*batch C"],
  taught: Float[Array, "*batch C"],
  weights: Float[Array, "*batch"],
  temperature: float,
) -> Float[Array, ""]:
  """Returns T^2 KL(teacher || student) of both softened by T, nats.

  T^2 keeps the gradient of the size that it has at T = 1 (Hinton et al. 2015).
  """
  student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  teacher = jax.nn.log_softmax(taught.astype(jnp.float32) / temperature)
  nats = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
  total = jnp.sum(nats * weights) / jnp.maximum(jnp.sum(weights), 1)
  return temperature**2 * total


def hidden_loss(hidden: Any, taught: Any, batch: Batch) -> Float[Array, ""]:
  """Returns how far what the layers write is from what the teacher's do.

  The mean over layers of the squared distance, as a share of the mean square
  of the teacher's.

  Args:
    hidden: Tree of float[B, L, D], one a layer.
    taught: The same of the teacher.
    batch: Its "mask" bool[B, L], if any, is True at tokens that count.
  """
  keep = batch.get("mask")

  def share(ours, theirs):
    weight = 1.0 if keep is None else keep[..., None].astype(jnp.float32)
    theirs = theirs.astype(jnp.float32)
    wrong = jnp.square(ours.astype(jnp.float32) - theirs)
    size = jnp.sum(jnp.square(theirs) * weight)
    return jnp.sum(wrong * weight) / jnp.maximum(size, 1e-6)

  shares = jax.tree.leaves(jax.tree.map(share, hidden, taught))
  return jnp.mean(jnp.stack(shares))
