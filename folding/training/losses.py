"""Losses in nats per token (next token) or per example (classification)."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Batch = Mapping[str, jax.Array]


def token_losses(
  logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
  """Returns -log softmax(logits)[label] in float32, nats."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )


def summed_loss(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Returns the weighted sums of loss and metrics over a batch.

  Args:
    logits: [B, L, V] with batch["targets"] [B, L], or [B, C] with
      batch["labels"] [B].
    batch: Also "weights", of the shape of the targets; 0 leaves a target out.

  Returns:
    {"nats", "weight", "correct"}: float32[] sums over the batch.

  Raises:
    AssertionError: logits, targets and weights differ in their leading shape.
  """
  labels = batch["targets"] if "targets" in batch else batch["labels"]
  weights = batch["weights"]
  chex.assert_equal_shape([labels, weights])
  chex.assert_shape(logits, (*labels.shape, None))
  nats = token_losses(logits, labels)
  correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  return {
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

  T^2 keeps the gradient as large as it is at T = 1.

  Args:
    logits: The student's.
    taught: The teacher's.
    weights: 0 leaves a target out.
    temperature: T.

  References: Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015.
  """
  student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  teacher = jax.nn.log_softmax(taught.astype(jnp.float32) / temperature)
  nats = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
  total = jnp.sum(nats * weights) / jnp.maximum(jnp.sum(weights), 1)
  return temperature**2 * total


def hidden_loss(
  hidden: Any, taught: Any, mask: Bool[Array, "B L"] | None
) -> Float[Array, ""]:
  """Returns the distance between the hidden states of student and teacher.

  Per layer it is sum((student - teacher)^2) / sum(teacher^2); the result is the
  mean over layers.

  Args:
    hidden: Tree of float[B, L, D], one leaf per layer.
    taught: The same of the teacher.
    mask: True at tokens that count; None: all do.

  Raises:
    AssertionError: the two trees differ in structure or shapes.
  """
  chex.assert_trees_all_equal_shapes(hidden, taught)

  def distance(ours, theirs):
    weight = 1.0 if mask is None else mask[..., None].astype(jnp.float32)
    theirs = theirs.astype(jnp.float32)
    squares = jnp.square(ours.astype(jnp.float32) - theirs)
    size = jnp.sum(jnp.square(theirs) * weight)
    return jnp.sum(squares * weight) / jnp.maximum(size, 1e-6)

  distances = jax.tree.leaves(jax.tree.map(distance, hidden, taught))
  return jnp.mean(jnp.stack(distances))
