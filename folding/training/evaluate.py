"""Loss and metrics of a model over a whole split."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from folding.errors import TrainingError
from folding.training import losses
from folding.training.sharding import put_batch


def make_eval_step(model: Any) -> Callable[..., dict[str, jax.Array]]:
  """Returns the jitted function (params, batch) -> `losses.summed_loss`."""

  def eval_step(params, batch):
    logits = model.apply(
      {"params": params}, batch["tokens"], batch.get("mask"), True
    )
    return losses.summed_loss(logits, batch)

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
      classification.

  Returns:
    {"loss": nats per token or example, "num_tokens", "perplexity" and
    "bits_per_byte", or "num_examples" and "accuracy"}.

  Raises:
    TrainingError: the loss is not finite.
  """
  totals: dict[str, float] = {"nats": 0.0, "weight": 0.0, "correct": 0.0}
  for batch in batches:
    sums = jax.device_get(eval_step(params, put_batch(mesh, batch)))
    for name in totals:
      totals[name] += float(sums[name])
  count = totals["weight"]
  loss = totals["nats"] / count
  if not math.isfinite(loss):
    raise TrainingError(f"the loss of the evaluation is {loss}")
  if num_bytes is None:
    return {
      "loss": loss,
      "accuracy": totals["correct"] / count,
      "num_examples": round(count),
    }
  return {
    "loss": loss,
    "perplexity": math.exp(min(loss, 700.0)),
    "bits_per_byte": totals["nats"] / math.log(2) / num_bytes,
    "num_tokens": round(count),
  }
