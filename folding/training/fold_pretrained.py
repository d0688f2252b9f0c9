"""Folds a trained model, layer by layer, on calibration text.

Each layer is folded on top of the folded layers below it, and its output
projections are refitted so that the residual stream matches that of the dense
model. So a layer corrects the errors of the layers below.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from folding import memory
from folding.compression import lowrank
from folding.errors import ConfigError
from folding.models.shape import Shape
from folding.training.distributed import host_copy
from folding.training.fold_layer import (
  fold_layer,
  initial_report,
  target_of,
)
from folding.training.progress import track
from folding.training.prune_trained import Pruner
from folding.training.sensitivity import Sensitivities
from folding.training.sharding import put_like
from folding.training.stream import (
  Batch,
  Params,
  Stream,
  embed_batches,
  embedding_tables,
  make_block,
  masks_of,
  require_text,
)


def fold_pretrained(
  shape: Shape,
  params: Params,
  batches: Iterable[Batch],
  *,
  fit_steps: int = 100,
  prune: Pruner | None = None,
  usage_V: np.ndarray | None = None,
  sensitivity: Sensitivities | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns the folded parameters of a trained dense model, and a report.

  From the first layer to the last:

  1. Heads that the shape leaves out are removed, and W_O is refitted to the
     output of all (`keep_heads`).
  2. W_Q and W_K become the projections of G channels whose logits are nearest
     to the dense ones (`lowrank`), fitted to the dense attention weights
     (`fit_attention`). W_V becomes a diagonal of ones, or W_V and W_O those of
     rank r whose output is nearest.
  3. W_O and the second feed-forward matrix, with their biases, are refitted by
     least squares, so that the residual stream is near that of the dense model.
     With a diagonal W_V, W_O is fitted to the output of the dense layer on the
     same input.

  Before all layers the embedding becomes one of rank `shape.embedding_rank`, if
  set; the layers then compensate for part of its error.

  Progress is shown, see `track`.

  Args:
    shape: Shape of the folded model.
    params: Parameters of `shape.dense()`, NumPy or JAX arrays, perhaps split over
      the mesh of the batches. One layer at a time is whole on the host. Entries
      other than blocks are passed through.
    batches: {"tokens": int[B, L], optionally "mask": bool[B, L], True at
      tokens, and "segments" of pairs}. Some thousands of tokens, more than twice
      the width.
    fit_steps: Steps per layer to fit folded attention to dense.
    prune: How it is pruned, from `make_pruner`; None: it is not. Each layer makes
      up for the pruned weights of the layers below, and for its own neurons.
    usage_V: Frequency of each token, above 0; None: as in the batches.
    sensitivity: How errors count when ranks are chosen, from
      `sensitivity.sensitivities`; None: all alike.

  Returns:
    (params of `shape`, split over the mesh of the batches, [{"layer", "heads":
    their number, "groups", "values": kind or rank of W_V, "logits_kept": share of
    the variance of the logits before the fit (None on the input axis),
    "divergence": of the attention weights in nats, "attention_r2", "mlp_r2": share
    of the variance that the two regressions explain on held-out text}]).

  Raises:
    ConfigError: there is too little text, or trained weights cannot be folded
      this way.
  """
  require_pairs(shape)
  batches, sensitivity = list(batches), sensitivity or {}
  require_text(shape, batches)
  [like, *_] = masks_of(batches)
  folded, report = dict(params), []
  stream = None  # that of the dense model until something is folded
  if rank := shape.embedding_rank:
    tables = embedding_tables(shape, params, batches, usage_V)
    weight = host_copy(sensitivity.get("embed"))
    if shape.embedding_shared:
      low = lowrank.fold_embeddings(tables, rank, weight)
    else:
      low = lowrank.fold_embedding(*tables["embed"], rank, weight)
    folded |= put_like(low, like)
  if prune is not None:
    folded = prune.outer(folded)
  if rank or prune is not None:
    stream = embed_batches(shape, folded, batches)
  dense = shape.dense()
  dense_stream = embed_batches(dense, params, batches)
  for n in track(range(shape.num_layers), "folding layers"):
    name = f"blocks_{n}"
    block, dense_block = make_block(shape, n), make_block(dense, n)
    old = host_copy(params[name])
    target = target_of(dense_block, old, dense_stream)
    if stream is None and block.layer != dense_block.layer:
      stream = dense_stream
    dense_stream = Stream([one["out"] for one in target], dense_stream.masks)
    if stream is None:
      report.append({"layer": n, **initial_report(block.layer)})
      continue
    new, row, stream = fold_layer(
      block,
      dense_block,
      old,
      stream,
      target=target,
      fit_steps=fit_steps,
      prune=None if prune is None else prune.layer(n),
      sensitivity_DD=host_copy(sensitivity.get(f"{name}/attn/o")),
    )
    folded[name] = put_like(new, like)
    report.append({"layer": n, **row})
    memory.return_freed()  # layers of other sizes do not fit into the gaps
  return folded, report


def require_pairs(shape: Shape) -> None:
  """Raises `ConfigError` if rotary heads would be folded across pairs."""
  if shape.positions == "rope" and any(
    layer.groups and layer.axis == "output" and layer.rope != "pairs"
    for layer in shape.layers
  ):
    raise ConfigError(
      "trained rotary heads are folded by pairs; use fold.rope='pairs' (and "
      "fold.groups even), or fold.groups=0"
    )
