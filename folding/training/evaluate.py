"""Loss and metrics of a model over a whole split."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from folding.errors import TrainingError
from folding.tasks import Task, correlation
from folding.training import distributed, losses
from folding.training.sharding import kernels_on, put_batch


def make_eval_step(
  model: Any,
  task: Task,
  mesh: Mesh | None = None,
  kernel_mesh: Mesh | None = None,
) -> Callable[..., dict[str, jax.Array]]:
  """Returns a jitted function (params, batch) -> sums of `losses.summed_loss`.

  For tasks with labels it also returns "logits", "labels" and "weights" of the
  rows. For sentence vectors it returns "vectors", "taught" (those of the teacher,
  from the batch) and "weights".

  Args:
    model: The Linen model.
    task: What it is trained for.
    mesh: Where batches are placed; None: on one device.
    kernel_mesh: Devices that kernels are split over; None: no kernels.
  """

  def eval_step(params, batch):
    variables, mask = {"params": params}, batch.get("mask")
    segments = batch.get("segments")
    with kernels_on(kernel_mesh):
      x = model.apply(
        variables, batch["tokens"], mask, True, segments, method="encode"
      )
    read_out = functools.partial(model.apply, method="read_out")
    if not task.predicts_tokens:
      out = read_out(variables, x, mask)
      sums = losses.summed_loss(task, out, batch)
      name = "vectors" if task.makes_vectors else "logits"
      rows = {x: batch[x] for x in (task.aim, "weights")}
      return sums | {name: out.astype(np.float32), **rows}

    def summed(weights, block):
      logits = read_out({"params": weights}, block["x"])
      return losses.summed_loss(task, logits, block)

    return losses.sum_over_blocks(
      summed,
      model.read_out_params(params),
      {**batch, "x": x},
      count=losses.num_blocks(batch, model.vocab_size, mesh),
      mesh=mesh,
    )

  return jax.jit(eval_step)


def evaluate(
  eval_step: Callable[..., dict[str, jax.Array]],
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  mesh: Mesh,
  *,
  task: Task,
  num_bytes: float | None = None,
) -> dict[str, Any]:
  """Returns the metrics of a split.

  Args:
    eval_step: From `make_eval_step`.
    params: Parameters of the model.
    batches: The split, once.
    mesh: Where batches are placed.
    task: What the model is trained for.
    num_bytes: UTF-8 bytes of the predicted text, for next-token models; None:
      another task.

  Returns:
    {"loss": mean over tokens or examples}, and "num_tokens", "perplexity" and
    "bits_per_byte" for next-token models. For others "num_examples", and the metrics
    of labels or of vectors: "similarity", from `similarity_to_teacher`, and the mean
    "cosine" if the teacher's have the same width.

  Raises:
    TrainingError: the loss is not finite.
  """
  sums: dict[str, float] = collections.defaultdict(float)
  rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  for batch in batches:
    found = distributed.to_host(eval_step(params, put_batch(mesh, batch)))
    for name in found.keys() & {"loss", "weight", "cosine"}:
      sums[name] += float(found[name])
    if "weights" in found:
      is_row = np.asarray(found["weights"]) > 0
      for name in found.keys() & {"logits", "labels", "vectors", "taught"}:
        rows[name].append(np.asarray(found[name])[is_row])
  total, count = sums["loss"], sums["weight"]
  loss = total / count
  if not math.isfinite(loss):
    raise TrainingError(f"the loss of the evaluation is {loss}")
  if num_bytes is None:
    metrics = {"cosine": sums["cosine"] / count} if "cosine" in sums else {}
    if task.labels:
      logits, labels = (np.concatenate(rows[x]) for x in ("logits", "labels"))
      metrics = task.labels.measure(logits, labels)
    else:
      metrics["similarity"] = similarity_to_teacher(
        rows["vectors"], rows["taught"]
      )
    return {"loss": loss, **metrics, "num_examples": round(count)}
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": total / math.log(2) / num_bytes,
    "num_tokens": round(count),
  }


def similarity_to_teacher(
  vectors: Sequence[np.ndarray], taught: Sequence[np.ndarray]
) -> float:
  """Returns the correlation of the cosines of all pairs of texts in a batch.

  Args:
    vectors: The student's, float[texts, D] of each batch.
    taught: The teacher's, float[texts, E].

  Returns:
    Pearson's correlation over the pairs of all batches, from -1 to 1; 0 without
    pairs.
  """
  from scipy import stats  # slow to import

  def cosines(batches):
    found = []
    for batch in batches:
      rows = batch.astype(np.float64)
      rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-24)
      found.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    return np.concatenate(found)

  return correlation(stats.pearsonr, cosines(vectors), cosines(taught))


def spearman_of_pairs(vectors: np.ndarray, scores: np.ndarray) -> float:
  """Returns the rank correlation of cosines with scores of similarity.

  Args:
    vectors: float[2 pairs, D], all the first ones, then all the second ones.
    scores: float[pairs].

  Returns:
    From -1 to 1; 0 if all cosines or all scores are the same.
  """
  from scipy import stats  # slow to import

  return correlation(
    stats.spearmanr, cosines_of_rows(*np.split(vectors, 2)), scores
  )


def cosines_of_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Returns float64[N], the cosine of each row of [N, D] with that of another."""
  first, second = first.astype(np.float64), second.astype(np.float64)
  sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
  return (first * second).sum(axis=1) / np.maximum(sizes, 1e-24)
