"""Sums of losses over the tokens or texts of a batch; the task has the loss."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from folding.models.block_attention import in_blocks
from folding.models.transformer import unit
from folding.tasks import Task, squared_error
from folding.training import sharding

LOGITS = 2**27  # most next-token logits of a block per device: 512 MiB

Batch = Mapping[str, jax.Array]


def summed_loss(
  task: Task, out: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
  """Returns the weighted sum of the loss over a batch.

  Args:
    task: Has the loss, and names the entry of the batch that it is about.
    out: [B, L, V] logits of tokens, [B, C] of texts, or [B, D] vectors.
    batch: Also "weights", one per target or row; 0 leaves it out.

  Returns:
    {"loss", "weight", and "cosine" of vectors}: float32[] sums over the batch. If
    the teacher's vectors have another width, there is no "cosine", and the loss is
    that of `pairs_loss`.

  Raises:
    AssertionError: output, labels and weights do not fit in shape.
  """
  out, aim = out.astype(jnp.float32), batch[task.aim]
  weights, width = batch["weights"], None
  if task.labels and task.labels.kind == "score":
    width = 1
  chex.assert_shape(out, (*weights.shape, width))
  if task.makes_vectors and aim.shape != out.shape:
    weight = jnp.sum(weights)
    return {"loss": weight * pairs_loss(out, aim, weights), "weight": weight}
  chex.assert_shape(aim, out.shape if aim.ndim == out.ndim else weights.shape)
  sums = {
    "loss": jnp.sum(task.loss(out, aim) * weights),
    "weight": jnp.sum(weights),
  }
  if task.makes_vectors:
    cosine_B = optax.cosine_similarity(out, aim, epsilon=1e-12)
    sums["cosine"] = jnp.sum(cosine_B * weights)
  return sums


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
    found = jax.lax.map(block_sums, in_blocks(batch, count))
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
  task: Task,
  logits: Float[Array, "*batch C"],
  taught: Float[Array, "*batch C"],
  weights: Float[Array, "*batch"],
  temperature: float,
) -> Float[Array, ""]:
  """Returns the sum of T^2 times the distance to a teacher, softened by T.

  T^2 keeps the gradient as large as it is at T = 1.

  Args:
    task: Has the distance.
    logits: The student's.
    taught: The teacher's.
    weights: 0 leaves a target out.
    temperature: T.

  References: Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015.
  """
  student, teacher = logits.astype(jnp.float32), taught.astype(jnp.float32)
  if task.soft_loss is None:
    return jnp.sum(squared_error(student, teacher[..., 0]) * weights)
  each = task.soft_loss(student / temperature, teacher / temperature)
  return temperature**2 * jnp.sum(each * weights)


def pairs_loss(
  vectors: Float[Array, "B D"],
  taught: Float[Array, "B E"],
  weights: Float[Array, " B"],
) -> Float[Array, ""]:
  """Returns the mean squared error of the cosines of all pairs of texts.

  Args:
    vectors: The student's.
    taught: The teacher's, perhaps of another width.
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

  Per token and layer it is |student - teacher|^2 / |teacher|^2; the result is the
  mean over tokens and layers. A token counts as much as any other: the vector of
  the first one is often so long that a share of the whole sum would be its own.

  Args:
    hidden: Tree of float[..., D], one leaf per layer.
    taught: Those of the teacher, of the same shapes.
    mask: bool[...], True at tokens that count; None: all do.

  Raises:
    AssertionError: the two trees differ in structure or shapes.
  """
  chex.assert_trees_all_equal_shapes(hidden, taught)

  def distance(ours, theirs):
    ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
    off, size = (jnp.sum(jnp.square(x), -1) for x in (ours - theirs, theirs))
    shares = off / jnp.maximum(size, 1e-6)
    weights = jnp.ones_like(size) if mask is None else mask
    return jnp.sum(shares * weights) / jnp.maximum(jnp.sum(weights), 1)

  distances = jax.tree.leaves(jax.tree.map(distance, hidden, taught))
  return jnp.mean(jnp.stack(distances))
