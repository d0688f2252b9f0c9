"""Compresses a trained model for the start of a run.

`compress_trained` is the pipeline. It reads the dense model, allocates groups and
pruning, folds layer by layer and, with `compress.prune`, prunes before the first
step. Training then recovers the quality.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from folding import files, paths
from folding.config import Order
from folding.data.batches import Data, make_data
from folding.data.tokenizers import MappedTokenizer
from folding.data.trim import most_used, token_usage
from folding.errors import ConfigError
from folding.model import Model, Targets
from folding.models.shape import Shape
from folding.models.shrink import shrink
from folding.models.transformer import model_for, param_shapes
from folding.tasks import task_of
from folding.training import distributed, sharding
from folding.training.allocate import (
  Asked,
  allocate,
  measured_options,
  require_reachable,
)
from folding.training.fold_pretrained import fold_pretrained
from folding.training.optimizer import make_rules
from folding.training.progress import aligned
from folding.training.prune_trained import (
  BY_MOMENTS,
  make_pruner,
  prune_trained,
  zero_neurons,
)
from folding.training.sensitivity import sensitivities
from folding.training.stream import require_text
from folding.training.trained import dense_start, without_trimmed

Report: TypeAlias = list[dict[str, Any]]  # a row per layer that was folded


def compress_trained(
  source: Model,
  shape: Shape,
  data: Data,
  order: Order,
  targets: Targets | None = None,
) -> tuple[Model, Report]:
  """Returns the start of a run with `pretrained`, and how it was folded.

  Args:
    source: The dense model.
    shape: As the config describes it.
    data: Calibration text comes from its training split.
    order: Resolved.
    targets: Fractions of the plan that gave the shape; None: there was none yet.

  Raises:
    ConfigError: see `dense_start`, `allocate` and `fold_pretrained`.
  """
  dense, is_head_drawn = dense_start(
    source, shape, data, task_of(order), order.seed
  )
  mesh = sharding.make_mesh(order.mesh)
  params = sharding.put_params(mesh, dense.params)
  dense = dataclasses.replace(dense, params=params)
  if order.dense:
    return dense, []
  # A stopped run that begins again has its plan, with heads.
  shape = shape.whole(keeps_heads=True)
  asked = Asked(shape, order.fpp, order.compress, targets)
  batches = calibration(order.compress.calibration, data)
  size = data.tokenizer.plain_size
  num_texts = sum(len(batch["tokens"]) for batch in batches)
  if distributed.is_main():
    print(  # it takes minutes for some models
      f"compressing {source.origin.base} on {num_texts:,} training texts, before "
      "the first step",
      flush=True,
    )
  usage_V = None  # only an embedding of low rank is weighted by it
  if asked.has_open_rank or shape.embedding_rank:
    count_V = data.token_counts()
    if isinstance(data.tokenizer, MappedTokenizer):  # rows have the plain ids
      count_V = np.bincount(data.tokenizer.plain_ids, count_V, size)
    usage_V = token_usage(count_V, size)
  [(small, report)] = compress_sizes(
    [asked],
    dense,
    [sharding.put_rows(mesh, batch) for batch in batches],
    usage_V,
    source=source.origin.base,
    is_head_drawn=is_head_drawn,
  )
  return without_trimmed(small), report


def compress_sizes(
  sizes: Sequence[Asked],
  model: Model,
  batches: Sequence[Mapping[str, Any]],
  usage_V: np.ndarray | None = None,
  *,
  source: str = "",
  is_head_drawn: bool = False,
) -> Iterator[tuple[Model, Report]]:
  """Yields a dense model compressed to several sizes, and how it was folded.

  It is measured once; then each size is allocated, folded and pruned.

  Args:
    sizes: What it is compressed to; they differ in `fpp.saving`.
    model: The dense model.
    batches: Calibration text, as for `fold_pretrained`.
    usage_V: As for `fold_pretrained`.
    source: Where the model comes from, for messages.
    is_head_drawn: Whether the head is untrained; sensitivities ignore it.

  Raises:
    ConfigError: see `allocate` and `fold_pretrained`; or weights are not finite.
  """
  source, dense = f"{source}: " if source else "", model.params
  for name, w in paths.flatten(dense).items():
    is_finite = jnp.isfinite if isinstance(w, jax.Array) else np.isfinite
    if not is_finite(w).all():
      raise ConfigError(
        f"{source}{name} is not finite; the weights are damaged"
      )
  asked, options, sensitivity = sizes[0], None, {}
  has_ranks = asked.shape.embedding_rank or any(
    layer.value_dim < layer.head_dim for layer in asked.shape.layers
  )
  is_auto = asked.compress.plan == "auto" and asked.targets is None
  for each in sizes if is_auto else ():
    require_reachable(each, dense)
  with _on_text(source):
    is_planned = asked.compress.plan == "auto"
    if is_planned or has_ranks or asked.fpp.granularity == "neuron":
      require_text(asked.shape, batches)
      trained = dict(dense)
      if is_head_drawn:
        trained.pop("head", None)
      sensitivity = sensitivities(asked.shape, trained, batches)
    if is_auto:
      options = measured_options(asked, dense, batches, sensitivity)
  for each in sizes:
    with _on_text(source):
      shape, targets = each.shape, each.targets
      if is_auto:
        shape, targets = allocate(each, dense, batches, sensitivity, options)
      shape, params, report = _compress(
        each, (shape, targets), dense, batches, usage_V, sensitivity
      )
    small = dataclasses.replace(
      model, shape=shape, params=params, targets=targets
    )
    yield small, report


@contextlib.contextmanager
def _on_text(source: str) -> Iterator[None]:
  """Limits BLAS to one thread, and names the model if moments are singular."""
  # On a busy machine, several threads wait for each other for minutes.
  with threadpoolctl.threadpool_limits(1, user_api="blas"):
    try:
      yield
    except ConfigError:
      raise
    except ValueError as error:
      raise ConfigError(f"{source}{error}") from error


def _compress(
  asked, plan, dense, batches, usage_V, sensitivity
) -> tuple[Shape, dict[str, Any], Report]:
  """Returns a dense model folded and pruned by a plan."""
  params, report = dense, []
  shape, targets = plan
  method = asked.compress.prune
  if targets is not None and not targets.prune:
    method = "none"  # folding alone saves as much
  by_neuron = asked.fpp.granularity == "neuron"
  is_fitted = targets is not None or not shape.is_dense or by_neuron
  pruner, rules = None, []
  if method != "none":
    shapes = param_shapes(model_for(shape, dense))
    rules = make_rules(shape, asked.fpp, shapes, dense, targets)
    if is_fitted and method in BY_MOMENTS:
      pruner = make_pruner(shapes, rules, method, sensitivity)
  if pruner or targets is not None or not shape.is_dense:
    params, report = fold_pretrained(
      shape,
      dense,
      batches,
      fit_steps=asked.compress.fit_steps,
      prune=pruner,
      usage_V=usage_V,
      sensitivity=sensitivity,
    )
  if method != "none" and pruner is None:
    params = prune_trained(shape, params, batches, rules, method)
  if by_neuron and pruner:
    # In multiples of 8; FPP holds all other zeros.
    for n in range(shape.num_layers):
      name = f"blocks_{n}"
      whole = {name: distributed.host_copy(params[name])}
      zeros = zero_neurons(whole)
      shape, small, _ = shrink(
        shape, whole, multiple=8, absorb=False, is_zero=zeros
      )
      kernel = params[name]["mlp"]["down"]["kernel"]
      params[name] = sharding.put_like(small[name], kernel)
  return shape, params, report


def calibration(count: int, data: Data) -> list[dict[str, Any]]:
  """Returns the first training texts, in batches.

  They come from the first epoch, so no text comes twice, and are the same in all
  processes. Ids are those before the tokenizer was trimmed.
  """
  number = -(-count // data.config.batch_size)
  batches = list(itertools.islice(data.first_epoch(), number))
  if isinstance(data.tokenizer, MappedTokenizer):
    for batch in batches:
      batch["tokens"] = data.tokenizer.plain_ids[batch["tokens"]]
  return batches


def write_fold(
  workdir: str,
  model: Model,
  report: Report,
  layers: tuple[float, ...] | None,
) -> None:
  """Writes `fold.json`, the report of folding, and prints it.

  Args:
    workdir: The run directory.
    model: The compressed model.
    report: From `compress_trained`.
    layers: Fraction to prune of each layer if no plan chose it; None: the same.
  """
  if model.targets:
    layers = model.targets.layers
  path = os.path.join(workdir, "fold.json")
  files.write_file(path, json.dumps(report, indent=1))
  print(fold_table(report, layers), flush=True)
  if rank := model.shape.embedding_rank:
    width = model.shape.embed_width or model.shape.width
    print(f"The embedding has rank {rank} of {width}", flush=True)


def fold_table(report: Report, prune: tuple[float, ...] | None = None) -> str:
  """Returns the report of folding as a table of aligned columns.

  Example:
    >>> row = {"layer": 0, "heads": 4, "groups": 2, "values": "dense"}
    >>> row |= {"logits_kept": 0.98, "divergence": 0.1}
    >>> row |= {"attention_r2": 1.0, "mlp_r2": 0.5}
    >>> print(fold_table([row], (0.4,)))
    layer  heads  groups    W_V  logits kept  KL, nats  attention R2  MLP R2  to prune
        0      4       2  dense        98.0%     0.100         1.000   0.500       40%
  """
  header = "layer", "heads", "groups", "W_V", "logits kept", "KL, nats"
  rows = [[*header, "attention R2", "MLP R2"]]
  for row in report:
    kept = row["logits_kept"]
    rows.append(
      [
        str(row["layer"]),
        str(row["heads"]),
        str(row["groups"] or "dense"),
        row["values"],
        "-" if kept is None else f"{kept:.1%}",
        *(f"{row[x]:.3f}" for x in ("divergence", "attention_r2", "mlp_r2")),
      ]
    )
  if prune is not None:
    column = ["to prune", *(f"{part:.0%}" for part in prune)]
    rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
  return "\n".join(aligned(rows))


# ---------------------------------------------------------------------------
# Tokens removed from the tokenizer before training.


def trim_vocabulary(fraction: float, data: Data, order: Order) -> Data:
  """Returns the same data, tokenized without the tokens that it uses least.

  The tokenizer cuts words that had them into other tokens. Special tokens stay,
  and in a BPE the parts of other tokens, so fewer may be removed. FPP then zeroes
  rows of the embedding.

  Args:
    fraction: Fraction of the tokens to remove.
    data: Has the tokenizer of the model to start from.
    order: That of the data.

  Raises:
    ConfigError: tokens of this kind of tokenizer cannot be removed.
  """
  if not fraction:
    return data
  number = round((1 - fraction) * data.tokenizer.vocab_size)
  return make_data(
    order,
    most_used(data.tokenizer, data.token_counts(), number),
    jax.process_index(),
    jax.process_count(),
    data.texts,
  )
