"""Folds a trained model, layer by layer, on calibration text.

Each layer is folded on top of the folded layers below it, and its output
projections are refitted so that the residual stream matches that of the dense
model. So a layer corrects the errors of the layers below.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from folding.compression import lowrank
from folding.config import Config, dense_baseline, layers_of
from folding.errors import ConfigError
from folding.training.fold_layer import (
  Prune,
  fold_layer,
  initial_report,
  target_of,
)
from folding.training.progress import track
from folding.training.sensitivity import Sensitivities
from folding.training.stream import (
  Batch,
  Params,
  Stream,
  embed_batches,
  make_block,
  require_text,
  usage_of,
)


def fold_pretrained(
  config: Config,
  params: Params,
  batches: Iterable[Batch],
  *,
  prune: Callable[[int], Prune] | None = None,
  usage_V: np.ndarray | None = None,
  sensitivity: Sensitivities | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns the folded parameters of a trained dense model, and a report.

  From the first layer to the last:

  1. Heads that `model.heads` leaves out are removed, and W_O is refitted to the
     output of all (`keep_heads`).
  2. W_Q and W_K become the projections of G channels whose logits are nearest
     to the dense ones (`lowrank`), fitted to the dense attention weights
     (`fit_attention`). W_V becomes a diagonal of ones, or W_V and W_O those of
     rank r whose output is nearest.
  3. W_O and the second feed-forward matrix, with their biases, are refitted by
     least squares, so that the residual stream is near that of the dense model.
     With a diagonal W_V, W_O is fitted to the output of the dense layer on the
     same input.

  Before all layers the embedding becomes one of rank `fold.embedding_rank`, if
  set; the layers then compensate for part of its error.

  Progress is shown, see `track`.

  Args:
    config: Resolved; `config.fold` sets the folding of each layer, and
      `config.model.heads` its heads.
    params: Parameters of `dense_baseline(config)`, NumPy or JAX arrays. Entries
      other than blocks are passed through.
    batches: {"tokens": int[B, L], optionally "mask": bool[B, L], True at
      tokens, and "segments" of pairs}. Some thousands of tokens, more than twice
      the width.
    prune: Returns how a layer of a number is pruned. The second feed-forward
      matrix is fitted after that, so that it makes up for the pruned weights.
    usage_V: Frequency of each token, above 0; None: as in the batches.
    sensitivity: How errors count when ranks are chosen, from
      `sensitivity.sensitivities`; None: all alike.

  Returns:
    (params of `config`, [{"layer", "heads": their number, "groups", "values":
    kind or rank of W_V, "logits_kept": share of the variance of the logits before
    the fit (None on the input axis), "divergence": of the attention weights in
    nats, "attention_r2", "mlp_r2": share of the variance that the two
    regressions explain on held-out text}]).

  Raises:
    ConfigError: there is too little text, or trained weights cannot be folded
      this way.
  """
  require_pairs(config)
  batches, sensitivity = list(batches), sensitivity or {}
  require_text(config, batches)
  folded, report = dict(params), []
  stream = None  # that of the dense model until something is folded
  if rank := config.fold.embedding_rank:
    embedding_VD = params["embed"]["embedding"]
    if usage_V is None:
      usage_V = usage_of(batches, len(embedding_VD))
    folded |= lowrank.fold_embedding(
      embedding_VD, usage_V, rank, sensitivity.get("embed")
    )
    stream = embed_batches(config, folded, batches)
  dense = dense_baseline(config)
  dense_stream = embed_batches(dense, params, batches)
  for n in track(range(config.model.num_layers), "folding layers"):
    name = f"blocks_{n}"
    block, dense_block = make_block(config, n), make_block(dense, n)
    target = target_of(dense_block, params[name], dense_stream)
    below = dense_stream
    dense_stream = Stream([one["out"] for one in target], below.masks)
    if stream is None:
      if prune is None and block.layer == dense_block.layer:
        report.append({"layer": n, **initial_report(block.layer)})
        continue
      stream = below
    folded[name], row, stream = fold_layer(
      block,
      dense_block,
      params[name],
      stream,
      target=target,
      fit_steps=config.compress.fit_steps,
      prune=None if prune is None else prune(n),
      sensitivity_DD=sensitivity.get(f"{name}/attn/o"),
    )
    report.append({"layer": n, **row})
  return folded, report


def require_pairs(config: Config) -> None:
  """Checks that rotary heads are folded by pairs.

  Args:
    config: Resolved.

  Raises:
    ConfigError: they would be folded across pairs.
    ValueError: the config is not resolved.
  """
  layers = layers_of(config.model, config.fold)
  is_rotary = config.model.positions == "rope" and config.fold.axis == "output"
  if (
    is_rotary
    and config.fold.rope != "pairs"
    and any(layer.groups for layer in layers)
  ):
    raise ConfigError(
      "trained rotary heads are folded by pairs; use fold.rope='pairs' (and "
      "fold.groups even), or fold.groups=0"
    )
