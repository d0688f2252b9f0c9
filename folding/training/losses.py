"""Losses per token (next token) or per example (other tasks).

The labels of a batch say which loss it has:
  targets int32[B, L], or labels int32[B]: cross-entropy with a class, nats.
  labels float32[B]: squared error of a score.
  labels float32[B, C]: cross-entropy with each of C labels, yes or no, summed
    over labels, nats.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from folding.config import Task

Batch = Mapping[str, jax.Array]


def token_losses(
  logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
  """Returns -log softmax(logits)[label] in float32, nats."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )


def task_of(labels: jax.Array | np.ndarray) -> Task:
  """Returns the task that targets or labels are for, see the module."""
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return "lm" if labels.ndim == 2 else "classify"
  return "multilabel" if labels.ndim == 2 else "regress"


def summed_loss(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Returns the weighted sum of the loss over a batch.

  Args:
    logits: [B, L, V] with batch["targets"], or [B, C] with batch["labels"].
    batch: Also "weights", one per target or row; 0 leaves it out.

  Returns:
    {"loss", "weight"}: float32[] sums over the batch.

  Raises:
    AssertionError: logits, labels and weights do not fit in shape.
  """
  labels = batch["targets"] if "targets" in batch else batch["labels"]
  weights, task = batch["weights"], task_of(labels)
  width = labels.shape[-1] if task == "multilabel" else None
  chex.assert_shape(logits, (*weights.shape, 1 if task == "regress" else width))
  chex.assert_shape(
    labels, logits.shape if task == "multilabel" else weights.shape
  )
  if task == "regress":
    each = jnp.square(logits[..., 0].astype(jnp.float32) - labels)
  elif task == "multilabel":
    each = optax.sigmoid_binary_cross_entropy(
      logits.astype(jnp.float32), labels
    ).sum(axis=-1)
  else:
    each = token_losses(logits, labels)
  return {"loss": jnp.sum(each * weights), "weight": jnp.sum(weights)}


def soft_loss(
  logits: Float[Array, "*batch C"],
  taught: Float[Array, "*batch C"],
  weights: Float[Array, "*batch"],
  temperature: float,
  task: Task = "classify",
) -> Float[Array, ""]:
  """Returns T^2 KL(teacher || student) of both softened by T, nats.

  T^2 keeps the gradient as large as it is at T = 1. Of scores, it is their
  squared distance instead.

  Args:
    logits: The student's.
    taught: The teacher's.
    weights: 0 leaves a target out.
    temperature: T.
    task: From `task_of`.

  References: Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015.
  """
  student, teacher = logits.astype(jnp.float32), taught.astype(jnp.float32)
  if task == "regress":
    each = jnp.square(student - teacher)[..., 0]
    return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1)
  student, teacher = student / temperature, teacher / temperature
  if task == "multilabel":
    share = jax.nn.sigmoid(teacher)
    each = optax.sigmoid_binary_cross_entropy(student, share)
    each -= optax.sigmoid_binary_cross_entropy(teacher, share)
    nats = jnp.sum(each, axis=-1)
  else:
    student, teacher = (jax.nn.log_softmax(x) for x in (student, teacher))
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
