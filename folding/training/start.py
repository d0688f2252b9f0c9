"""Where training starts from: a checkpoint or a run instead of random numbers.

What is read is laid over freshly drawn parameters of the dense twin, folded as
the config asks, and drawn anew where the source has nothing (a head for other
classes).
"""

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from folding import config as config_lib
from folding import files, paths
from folding.config import Config
from folding.data.batches import Data
from folding.data.tokenizers import MappedTokenizer, load_tokenizer
from folding.data.trim import trimmed
from folding.models.hf_weights import load_pretrained
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.schema import ConfigError, require
from folding.training.checkpoint import load_run
from folding.training.fold_pretrained import Watch, fold_pretrained
from folding.training.planner import plan
from folding.training.prune_trained import (
  neuron_pruner,
  prune_trained,
  without_neurons,
)
from folding.training.run_dir import load_labels

# Of the model: a source must have the same, or its arrays mean something else.
_SHAPE = (
  *("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "norm"),
  *("norm_position", "positions", "rope_base", "rope_scaling", "window"),
  *("activation", "gated", "causal", "norm_epsilon"),
)
# Of a classifier as well, where its head is kept.
_HEAD = ("pooling", "pooler", "pooler_activation")


def read_start(path: str, config: Config, data: Data) -> dict[str, Any]:
  """Returns the parameters of a checkpoint folder, hub id or run.

  Raises:
    ConfigError: it cannot be read, is a model of another shape, or of another
      tokenizer.
  """
  m = config.model
  if m.heads is not None or m.dense_mlp_width is not None:
    raise ConfigError(
      "model.heads and model.dense_mlp_width describe a shrunk model, and "
      "training starts from a whole one; leave them out with pretrained"
    )
  if os.path.isdir(os.path.join(path, "checkpoints")):
    found, params, tokenizer = load_run(path)
    model, tokenizer_path = found.model, os.path.join(path, "tokenizer.json")
    classes = load_labels(path)
    layers = config_lib.layers_of(model, found.fold)
    require(
      not any(layer.groups or layer.values != "dense" for layer in layers),
      f"{path} is a folded run; start from a dense one",
    )
    require(
      not isinstance(tokenizer, MappedTokenizer),
      f"tokens have left the tokenizer of {path}; start from the dense run before "
      "that",
    )
  else:
    source = load_pretrained(path, task=config.task)
    model, params = source.config, source.params
    classes = _named(source.label_names, data.label_names)
    tokenizer_path = str(source.tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
  params = _for_classes(params, classes, data.label_names)
  shape = np.shape(params.get("head", {}).get("kernel"))
  keeps_head = config.task == "classify" and shape[-1:] == (data.num_classes,)
  for name in (*_SHAPE, *(_HEAD if keeps_head else ())):
    theirs, ours = getattr(model, name), getattr(config.model, name)
    require(
      theirs == ours,
      f"{path} has {name} {theirs!r}, and model.{name} is {ours!r}; "
      "configs/pretrained.py takes the shape from the checkpoint",
    )
  wanted = data.tokenizer
  if isinstance(wanted, MappedTokenizer) and (wanted.token_map < 0).any():
    tokenizer = trimmed(tokenizer, wanted.token_map >= 0)
  require(
    tokenizer.to_json() == wanted.to_json(),
    f"{path} reads the ids of another tokenizer than data.tokenizer "
    f"{config.data.tokenizer!r}; use data.tokenizer={tokenizer_path!r}",
  )
  return params


def _named(theirs: tuple[str, ...], ours: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the class names of a checkpoint, () where they are no names."""
  numbers = tuple(map(str, range(len(theirs))))
  if sorted(ours) == sorted(numbers):  # what the data have are their ids
    return numbers
  is_named = theirs != tuple(f"LABEL_{i}" for i in numbers)
  return theirs if is_named else ()


def _for_classes(
  params: dict[str, Any], theirs: tuple[str, ...], ours: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the parameters, their head in the order of our classes.

  Names are the same in any case. A head of other classes is left out.
  """
  if theirs in ((), ours) or "head" not in params:
    return params
  params = dict(params)
  head = params.pop("head")
  place = {name.casefold(): i for i, name in enumerate(theirs)}
  order = [place.get(name.casefold()) for name in ours]
  # Each of theirs once: names that differ in case alone are no two of ours.
  if len(order) == len(theirs) and set(order) == set(range(len(theirs))):
    params["head"] = {name: w[..., order] for name, w in head.items()}
  return params


def dense_start(
  path: str, config: Config, data: Data, needs_head: bool = False
) -> tuple[Transformer, dict[str, Any]]:
  """Returns the dense twin with the parameters of a source.

  Rows of the embedding and of the output layer past the tokenizer's ids, and
  positions past `data.length`, are left out. Where a source has no classifier
  for as many classes, that is drawn anew.

  Args:
    path: Checkpoint folder, hub id or run.
    config: Resolved.
    data: Its tokenizer and classes are the model's.
    needs_head: Whether a classifier that would be drawn is a mistake.

  Raises:
    ConfigError: see `read_start`; or an array does not fit.
  """
  model = make_model(
    config_lib.dense_twin(config),
    data.tokenizer.plain_size,
    data.num_classes,
  )
  drawn = _draw(model, config)
  found = paths.flatten(read_start(path, config, data))
  is_classifier = config.task == "classify"

  def lay(name, fresh):
    w = found.pop(name, None)
    if is_classifier and name.startswith(("head/", "pooler/")):
      if w is None or w.shape != fresh.shape:
        names = ", ".join(data.label_names[:8])
        missing = f"{path} has no {name} of {fresh.shape} for {names}"
        require(
          not needs_head,
          f"{missing}, so it cannot teach these classes; train it with "
          "dense=True, and give distill.teacher that run",
        )
        if name == "head/kernel" and jax.process_index() == 0:
          print(f"{missing}: these classes are learned anew", flush=True)
        return np.asarray(fresh)
    require(w is not None, f"{path} has no {name}, which this model needs")
    if name.endswith("embed/embedding"):
      w = w[: fresh.shape[0]]
    elif name == "head/kernel":
      w = w[:, : fresh.shape[1]]
    if w.shape != fresh.shape:
      raise ConfigError(
        f"{path}: {name} is {w.shape}, and this model's is {fresh.shape}"
      )
    return np.asarray(w, np.float32)

  params = paths.map_named(lay, drawn)
  left = [
    name
    for name in found
    if not (is_classifier and name.startswith(("head/", "pooler/")))
  ]
  require(
    not left,
    f"{path} has {left[0] if left else ''}, which this model has no place for",
  )
  return model, params


def folded_start(
  config: Config, data: Data
) -> tuple[Config, dict[str, Any], list[dict[str, Any]]]:
  """Returns (config, parameters, report by layer) of a run with `pretrained`.

  The config is another than that given where `compress.plan` is "auto": then
  it holds what was decided for each layer; and where neurons were removed at
  once: then it has the widths that are left, in multiples of 8.

  Raises:
    ConfigError: see `dense_start`, `plan` and `fold_pretrained`.
  """
  assert config.pretrained is not None
  _, params = dense_start(config.pretrained, config, data)
  if config.dense:
    return config, params, []
  require(
    jax.process_count() == 1,
    "each process would fold by texts of its own; fold in one process, and "
    "resume that run in several",
  )
  config = config_lib.unshrunk(config)  # of a run that was stopped at once
  batches = calibration(config, data)
  dense, report = params, []
  try:
    if config.compress.plan == "auto":
      config = plan(config, params, batches, _bar("measuring"))
    model = make_model(config, data.tokenizer.plain_size, data.num_classes)
    is_pruned = config.compress.prune != "none"
    prune = None
    if is_pruned and config.fpp.granularity == "neuron":
      prune = neuron_pruner(config, param_shapes(model), dense)
    if prune or config.fold != config_lib.dense_twin(config).fold:
      watch = _bar("folding")
      params, report = fold_pretrained(config, params, batches, watch, prune)
    if is_pruned:
      params = prune_trained(config, params, dense, batches)
      if prune:
        config, params = without_neurons(config, params)
  except ConfigError:
    raise
  except ValueError as error:  # weights that are not finite, or say nothing
    raise ConfigError(f"{config.pretrained}: {error}") from error
  return config, _with_rows_of(data, params), report


def _bar(doing: str) -> Watch:
  """Returns what shows, on a terminal, how many layers are done."""
  console = rich.console.Console()
  return functools.partial(
    rich.progress.track,
    description=f"{doing} layers",
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )


def _with_rows_of(data: Data, params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters without tokens that the tokenizer has no more."""
  if not isinstance(data.tokenizer, MappedTokenizer):
    return params
  embedding_VD = params["embed"]["embedding"][data.tokenizer.plain_ids]
  return {**params, "embed": {"embedding": embedding_VD}}


def _draw(model: Transformer, config: Config) -> dict[str, Any]:
  """Returns the parameters that a run of this seed begins with."""
  tokens = np.zeros((1, config.data.length), np.int32)
  return jax.jit(model.init)(jax.random.key(config.seed), tokens)["params"]


def write_fold(
  workdir: str, report: list[dict[str, Any]], config: Config
) -> None:
  """Writes `fold.json`, what folding kept of each layer, and prints it.

  Args:
    workdir: The run directory.
    report: From `fold_pretrained`.
    config: Resolved; says what will be pruned of each layer.
  """
  path = os.path.join(workdir, "fold.json")
  files.write_file(path, json.dumps(report, indent=1))
  print(fold_table(report, config.fpp.linear_layers), flush=True)


def fold_table(
  report: list[dict[str, Any]], prune: tuple[float, ...] | None = None
) -> str:
  """Returns the report by layer as a table of aligned columns.

  Example:
    >>> row = {"layer": 0, "groups": 2, "values": "dense", "logits_kept": 0.98}
    >>> row |= {"divergence": 0.1, "attention_r2": 1.0, "mlp_r2": 0.5}
    >>> print(fold_table([row], (0.4,)))
    layer  groups    W_V  logits kept  KL, nats  attention R2  MLP R2  to prune
        0       2  dense        98.0%     0.100         1.000   0.500       40%
  """
  rows = [
    [
      *("layer", "groups", "W_V", "logits kept", "KL, nats"),
      *("attention R2", "MLP R2"),
    ],
    *(
      [
        str(row["layer"]),
        str(row["groups"] or "dense"),
        row["values"],
        "-" if row["logits_kept"] is None else f"{row['logits_kept']:.1%}",
        f"{row['divergence']:.3f}",
        f"{row['attention_r2']:.3f}",
        f"{row['mlp_r2']:.3f}",
      ]
      for row in report
    ),
  ]
  if prune is not None:
    last = ["to prune", *(f"{part:.0%}" for part in prune)]
    rows = [[*row, cell] for row, cell in zip(rows, last, strict=True)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = (map(str.rjust, row, widths) for row in rows)
  return "\n".join("  ".join(line) for line in lines)


def calibration(config: Config, data: Data) -> Sequence[Mapping[str, Any]]:
  """Returns batches of training, as many texts as the config says.

  They are those of the first epoch, at most all of it: a text that comes twice
  is no new one. Where the tokenizer was trimmed, the ids are those before.
  """
  size = config.data.batch_size
  count = -(-config.compress.calibration // size)
  batches = list(itertools.islice(data.first_epoch(), count))
  if isinstance(data.tokenizer, MappedTokenizer):
    for batch in batches:
      batch["tokens"] = data.tokenizer.plain_ids[batch["tokens"]]
  return batches


def teacher_of(
  config: Config, data: Data
) -> tuple[Transformer, dict[str, Any]] | None:
  """Returns the dense teacher of a run, None without distillation.

  Its parameters are kept in bfloat16, and computed with in `model.dtype`, layer
  by layer.
  """
  d = config.distill
  if not (d.logits or d.hidden):
    return None
  path = d.teacher or config.pretrained
  assert path is not None
  model, params = dense_start(path, config, data, needs_head=d.logits > 0)
  params = _with_rows_of(data, params)
  half = jax.tree.map(lambda w: w.astype(jax.numpy.bfloat16), params)
  return model.clone(vocab_size=data.tokenizer.vocab_size), half
