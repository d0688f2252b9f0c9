"""Losses per token (next token) or per example (other tasks).

The labels of a batch say which loss it has:
  targets int32[B, L], or labels int32[B]: cross-entropy with a class, nats.
  labels float32[B]: squared error of a score.
  labels float32[B, C]: cross-entropy with each of C labels, yes or no, summed
    over labels, nats.
Sentence vectors have no labels: a teacher's vectors are their targets.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from folding.config import Task
from folding.models import blocks
from folding.models.transformer import unit
from folding.training import sharding

LOGITS = 2**27  # most next-token logits of a block per device: 512 MiB

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


def sum_over_blocks(
  summed: Callable[[Any, Any], dict[str, jax.Array]],
  weights: Any,
  batch: Any,
  *,
  count: int,
  mesh: Mesh | None,
) -> dict[str, jax.Array]:
  """Returns the sum of summed(weights, block) over blocks of positions.

  The backward pass computes the logits of a block again, so those of one block
  exist at a time. Over devices that split the rows of the batch, the weights are
  gathered once, before the first block, and their gradient is summed once, after
  the last.

  Args:
    summed: Returns sums over the targets of a part of the batch.
    weights: The parameters that `summed` reads.
    batch: Arrays [B, L, ...]; padding has weight 0. Of any shape if the count
      is 1.
    count: From `num_blocks`. 1: returns summed(weights, batch).
    mesh: Where the batch lies; None: on one device.
  """
  if count == 1:
    return summed(weights, batch)

  def sum_rows(weights, batch):
    block_sums = jax.checkpoint(functools.partial(summed, weights))
    found = jax.lax.map(block_sums, blocks.cut(batch, count))
    return jax.tree.map(lambda x: x.sum(0), found)

  return sharding.sum_over_rows(mesh, sum_rows, weights, batch)


def num_blocks(batch: Batch, vocab_size: int, mesh: Mesh | None) -> int:
  """Returns the number of blocks that keep the logits of a batch small.

  Args:
    batch: A batch with labels of texts is one block.
    vocab_size: V.
    mesh: Where the batch lies; None: on one device.
  """
  if "targets" not in batch:
    return 1
  B, L = batch["targets"].shape
  if mesh is not None:
    B = sharding.batch_sharding(mesh, B).shard_shape((B,))[0]
    vocab_size = -(-vocab_size // mesh.shape["tensor"])
  return min(L, -(-B * L * vocab_size // LOGITS))


def summed_soft_loss(
  logits: Float[Array, "*batch C"],
  taught: Float[Array, "*batch C"],
  weights: Float[Array, "*batch"],
  temperature: float,
  task: Task = "classify",
) -> Float[Array, ""]:
  """Returns the sum of T^2 KL(teacher || student), softened by T, nats.

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
    return jnp.sum(each * weights)
  student, teacher = student / temperature, teacher / temperature
  if task == "multilabel":
    share = jax.nn.sigmoid(teacher)
    each = optax.sigmoid_binary_cross_entropy(student, share)
    each -= optax.sigmoid_binary_cross_entropy(teacher, share)
    nats = jnp.sum(each, axis=-1)
  else:
    student, teacher = (jax.nn.log_softmax(x) for x in (student, teacher))
    nats = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
  return temperature**2 * jnp.sum(nats * weights)


def summed_vector_loss(
  vectors: Float[Array, "B D"],
  taught: Float[Array, "B D"],
  weights: Float[Array, " B"],
) -> dict[str, jax.Array]:
  """Returns how far sentence vectors are from those of a teacher.

  Returns:
    {"loss": |v - u|^2 / |u|^2, "cosine": of v and u, "weight"}: float32[] sums
    over the batch, v the student's and u the teacher's.
  """
  chex.assert_equal_shape([vectors, taught])
  v_BD, u_BD = vectors.astype(jnp.float32), taught.astype(jnp.float32)
  size_B = jnp.maximum(jnp.sum(jnp.square(u_BD), axis=-1), 1e-12)
  error_B = jnp.sum(jnp.square(v_BD - u_BD), axis=-1) / size_B
  cosine_B = optax.cosine_similarity(v_BD, u_BD, epsilon=1e-12)
  return {
    "loss": jnp.sum(error_B * weights),
    "cosine": jnp.sum(cosine_B * weights),
    "weight": jnp.sum(weights),
  }


def pairs_loss(
  vectors: Float[Array, "B D"],
  taught: Float[Array, "B D"],
  weights: Float[Array, " B"],
) -> Float[Array, ""]:
  """Returns the mean squared error of the cosines of all pairs of texts.

  Args:
    vectors: The student's.
    taught: The teacher's.
    weights: 0 leaves a text out.
  """

  def cosines(x_BD):
    x_BD = unit(x_BD)
    return x_BD @ x_BD.T

  vectors, taught = (x.astype(jnp.float32) for x in (vectors, taught))
  square_BB = jnp.square(cosines(vectors) - cosines(taught))
  counts_BB = jnp.outer(weights, weights) * (1 - jnp.eye(len(weights)))
  return jnp.sum(square_BB * counts_BB) / jnp.maximum(jnp.sum(counts_BB), 1)


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
