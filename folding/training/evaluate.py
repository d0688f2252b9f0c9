"""Loss and metrics of a model over a whole split."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from folding.config import Task
from folding.errors import TrainingError
from folding.training import distributed, losses
from folding.training.sharding import put_batch


def make_eval_step(
  model: Any, mesh: Mesh | None = None
) -> Callable[..., dict[str, jax.Array]]:
  """Returns a jitted function (params, batch) -> sums of `losses.summed_loss`.

  For tasks with labels it also returns "logits", "labels" and "weights" of the
  rows. For task "embed" the sums are those of `losses.summed_vector_loss`, with
  the teacher's vectors in batch["taught"].

  Args:
    model: The Linen model.
    mesh: Where batches are placed; None: on one device.
  """

  def eval_step(params, batch):
    variables, mask = {"params": params}, batch.get("mask")
    segments = batch.get("segments")
    x = model.apply(
      variables, batch["tokens"], mask, True, segments, method="encode"
    )
    read_out = functools.partial(model.apply, method="read_out")
    if "taught" in batch:
      vectors = read_out(variables, x, mask)
      return losses.summed_vector_loss(
        vectors, batch["taught"], batch["weights"]
      )
    if "labels" in batch:
      logits = read_out(variables, x, mask)
      rows = {name: batch[name] for name in ("labels", "weights")}
      sums = losses.summed_loss(logits, batch)
      return sums | {"logits": logits.astype(np.float32), **rows}

    def summed(weights, block):
      logits = read_out({"params": weights}, block["x"])
      return losses.summed_loss(logits, block)

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
  num_bytes: float | None = None,
) -> dict[str, Any]:
  """Returns the metrics of a split.

  Args:
    eval_step: From `make_eval_step`.
    params: Parameters of the model.
    batches: The split, once.
    mesh: Where batches are placed.
    num_bytes: UTF-8 bytes of the predicted text, for next-token models; None:
      another task.

  Returns:
    {"loss": mean over tokens or examples}, and "num_tokens", "perplexity" and
    "bits_per_byte" for next-token models, "num_examples" and the mean "cosine" for
    task "embed", or "num_examples" and the metrics of `score`.

  Raises:
    TrainingError: the loss is not finite.
  """
  sums: dict[str, float] = collections.defaultdict(float)
  rows: dict[str, list[np.ndarray]] = {"logits": [], "labels": []}
  for batch in batches:
    found = distributed.to_host(eval_step(params, put_batch(mesh, batch)))
    for name in found.keys() & {"loss", "weight", "cosine"}:
      sums[name] += float(found[name])
    if "logits" in found:
      is_row = np.asarray(found["weights"]) > 0
      for name, parts in rows.items():
        parts.append(np.asarray(found[name])[is_row])
  total, count = sums["loss"], sums["weight"]
  loss = total / count
  if not math.isfinite(loss):
    raise TrainingError(f"the loss of the evaluation is {loss}")
  if "cosine" in sums:
    cosine = sums["cosine"] / count
    return {"loss": loss, "cosine": cosine, "num_examples": round(count)}
  if num_bytes is None:
    logits, labels = (np.concatenate(parts) for parts in rows.values())
    metrics = score(logits, labels, losses.task_of(labels))
    return {"loss": loss, **metrics, "num_examples": round(count)}
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": total / math.log(2) / num_bytes,
    "num_tokens": round(count),
  }


def score(
  logits: np.ndarray, labels: np.ndarray, task: Task
) -> dict[str, float]:
  """Returns the metrics of a task with labels.

  Args:
    logits: float[rows, C], of finite numbers.
    labels: Label of each row, see `labels.to_array`.
    task: The task.

  Returns:
    "classify": {"accuracy", "macro_f1", "matthews"}. "multilabel": {"accuracy" of
    all labels of a row, "macro_f1"}. "regress": {"pearson", "spearman"}; 0 if the
    scores or the labels are all the same.
  """
  if task == "regress":
    scores = logits[:, 0].astype(np.float64)
    return {
      "pearson": _correlation("pearsonr", scores, labels),
      "spearman": _correlation("spearmanr", scores, labels),
    }
  from sklearn import metrics  # slow to import

  found = logits > 0 if task == "multilabel" else logits.argmax(axis=-1)
  options: dict[str, Any] = {"average": "macro", "zero_division": 0}
  values = {
    "accuracy": float(metrics.accuracy_score(labels, found)),
    "macro_f1": float(metrics.f1_score(labels, found, **options)),
  }
  if task == "classify":
    values["matthews"] = float(metrics.matthews_corrcoef(labels, found))
  return values


def spearman_of_pairs(vectors: np.ndarray, scores: np.ndarray) -> float:
  """Returns the rank correlation of cosines with scores of similarity.

  Args:
    vectors: float[2 pairs, D], all the first ones, then all the second ones.
    scores: float[pairs].

  Returns:
    From -1 to 1; 0 if all cosines or all scores are the same.
  """
  first, second = np.split(vectors.astype(np.float64), 2)
  sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
  cosines = (first * second).sum(axis=1) / np.maximum(sizes, 1e-24)
  return _correlation("spearmanr", cosines, scores)


def _correlation(
  kind: Literal["pearsonr", "spearmanr"], x: np.ndarray, y: np.ndarray
) -> float:
  """Returns a correlation of `scipy.stats`; 0 if all x or all y are the same."""
  from scipy import stats  # slow to import

  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return 0.0
  found: Any = getattr(stats, kind)(x, y)
  return float(found.statistic)
