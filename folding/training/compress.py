"""A trained model as the start of a run: read, fold, prune.

`compress_trained` is the pipeline: the source is read over a fresh draw of the
dense baseline, groups and pruning are allocated, the model is folded layer by
layer and, with `compress.prune`, pruned at once. Training then recovers what
was lost.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding import files, paths
from folding.config import CompressConfig, Config, FoldConfig, FPPConfig
from folding.data.batches import Data, make_data
from folding.data.tokenizers import MappedTokenizer, Tokenizer, load_tokenizer
from folding.data.trim import token_usage, trimmed
from folding.errors import ConfigError
from folding.models.hf_weights import (
  describe_pretrained,
  find_pretrained,
  load_pretrained,
)
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.training.allocate import allocate, outer_fractions
from folding.training.checkpoint import load_run
from folding.training.fold_pretrained import fold_pretrained
from folding.training.optimizer import embedding_fraction, make_rules
from folding.training.progress import aligned
from folding.training.prune_trained import (
  neuron_pruner,
  prune_trained,
  without_neurons,
)
from folding.training.run_dir import load_config, load_labels
from folding.training.sensitivity import sensitivities


class Compressed(NamedTuple):
  """Where a run starts from.

  Attributes:
    config: The config of the run. It differs from the given one if
      `compress.plan` is "auto" (it states the choice of each layer), and if
      neurons were removed at once (it has the widths that are left).
    params: Parameters of the folded model.
    report: One row per layer, see `fold_pretrained`; [] if nothing was folded.
  """

  config: Config
  params: dict[str, Any]
  report: list[dict[str, Any]]


class DenseStart(NamedTuple):
  """A dense model to start from.

  Attributes:
    model: The dense baseline.
    params: Its parameters.
    is_head_drawn: Whether the source has no head for the task.
  """

  model: Transformer
  params: dict[str, Any]
  is_head_drawn: bool


def path_and_level(where: str) -> tuple[str, float | None]:
  """Returns the parts of "PATH,LEVEL"; the level is None in "PATH".

  Raises:
    ConfigError: the level is not a fraction between 0 and 1.
  """
  found = re.fullmatch(r"(.*),(\d*\.?\d+)", where)
  path, level = (found[1], float(found[2])) if found else (where, None)
  if level is not None and not 0 < level < 1:
    raise ConfigError(
      f"{where!r}: the saving is a fraction between 0 and 1, such as PATH,0.3"
    )
  return path, level


def recipe(config: Config, saving: float | None = None) -> Config:
  """Returns a config with the plan that makes a trained model small.

  Arrays of an encoder are small before training begins. For a language model
  FPP zeroes single weights while training: stories260K at half its size has
  perplexity 8.1, and 10.7 with smaller ranks and fewer neurons (one seed, the
  same 300 steps).

  Args:
    config: Of a dense model; its sections `fold`, `fpp` and `compress` are
      replaced.
    saving: Fraction of the parameters to save; None: that of the preset.
  """
  is_lm = config.task == "lm"
  m = config.model
  is_rotary = m.positions == "rope"
  # A quarter of a head, for plans that fold all layers alike.
  K = m.head_dim or max(1, m.width // m.num_heads)
  groups = max(G for G in range(1, max(2, K // 4 + 1)) if K % G == 0)
  if is_rotary:  # by whole pairs, which need not divide it
    groups = max(2, K // 8 * 2)
  if m.qk_norm:  # cannot be folded
    groups = 0
  # Beside single weights a plan may choose a diagonal W_V, if heads share out
  # the width and a bias of W_O can replace that of W_V.
  shares_width = m.num_heads * K == m.width
  has_place = bool(m.use_bias) or not m.qkv_bias
  is_free = is_lm and shares_width and has_place
  fold = FoldConfig(
    groups=groups,
    rope="pairs" if is_rotary else "copy",
    values="diagonal" if is_free else "dense",
  )
  fpp = FPPConfig(
    granularity="weight" if is_lm else "neuron",
    attention="output" if is_lm else "none",  # of low rank instead
    embedding_granularity="weight" if is_lm else "rank",
    # For language models too: with 0.2 stories260K has perplexity 9.8.
    embedding_share=1.0,
    overall=saving,
    # While training, early, so that most of it recovers from pruning.
    begin=0.02,
    end=0.3,
  )
  compress = CompressConfig(
    plan="auto",
    prune="none" if is_lm else "sparsegpt",
    # Vectors of MiniLM at 70% keep 0.95 of Spearman's correlation on SICK by
    # errors, 0.93 by share. Classifiers are as accurate by share, and faster.
    embedding="errors" if config.task == "embed" else "share",
  )
  return dataclasses.replace(
    config, preset="paper", fold=fold, fpp=fpp, compress=compress
  )


def recovery_rate(width: int) -> float:
  """Returns a learning rate for a compressed model of width D.

  It falls with the width, as the best rates of matrices do (Yang et al. 2022):
  5e-4 for MiniLM, 3e-3 for stories260K (docs/experiments.md).
  """
  return min(3e-3, 0.192 / width)


def compress_trained(config: Config, data: Data) -> Compressed:
  """Returns the start of a run with `pretrained`.

  Args:
    config: Resolved.
    data: Calibration text comes from its training split.

  Raises:
    ConfigError: see `dense_start`, `allocate` and `fold_pretrained`.
  """
  _, dense, is_head_drawn = dense_start(config.pretrained or "", config, data)
  if config.dense:
    return Compressed(config, dense, [])
  if jax.process_count() > 1:
    raise ConfigError(
      "each process would fold on texts of its own; fold in one process, and "
      "resume that run in several"
    )
  # A stopped run that begins again has its plan, with heads.
  heads, config = config.model.heads, config_lib.unshrunk(config)
  config.model.heads = heads
  batches, size = calibration(config, data), data.tokenizer.plain_size
  usage_V = None  # only an embedding of low rank is weighted by it
  is_open = config.fpp.embedding_granularity == "rank"
  if is_open or config.fold.embedding_rank:
    usage_V = token_usage(data.token_counts(), size)
  compressed = compress_params(
    config, dense, batches, usage_V, is_head_drawn=is_head_drawn
  )
  params = without_trimmed(data.tokenizer, compressed.params)
  return compressed._replace(params=params)


def compress_params(
  config: Config,
  dense: dict[str, Any],
  batches: Sequence[Mapping[str, Any]],
  usage_V: np.ndarray | None = None,
  *,
  is_head_drawn: bool = False,
) -> Compressed:
  """Returns a dense model compressed: allocate, fold, prune.

  Args:
    config: Resolved.
    dense: Parameters of its dense baseline.
    batches: Calibration text, as for `fold_pretrained`.
    usage_V: As for `fold_pretrained`.
    is_head_drawn: Whether the head is untrained; sensitivities ignore it.

  Raises:
    ConfigError: see `allocate` and `fold_pretrained`; or weights are not finite.
  """
  try:
    sensitivity = {}
    if _reads_sensitivities(config):
      trained = dict(dense)
      if is_head_drawn:
        trained.pop("head", None)
      sensitivity = sensitivities(config, trained, batches)
    return _compress(config, dense, batches, usage_V, sensitivity)
  except ConfigError:
    raise
  except ValueError as error:  # weights are not finite, or moments singular
    source = f"{config.pretrained}: " if config.pretrained else ""
    raise ConfigError(f"{source}{error}") from error


def _reads_sensitivities(config: Config) -> bool:
  """Returns whether a plan, neurons or ranks are chosen by sensitivities."""
  return bool(
    config.compress.plan == "auto"
    or config.fpp.granularity == "neuron"
    or config.fold.embedding_rank
    or np.any(config.fold.value_rank)
  )


def _compress(config, dense, batches, usage_V, sensitivity) -> Compressed:
  params, report = dense, []
  if config.compress.plan == "auto":
    config = allocate(config, dense, batches, sensitivity)
  is_pruned = config.compress.prune != "none"
  prune_layer = None
  if is_pruned and config.fpp.granularity == "neuron":
    size = len(dense["embed"]["embedding"])
    classes = np.shape(dense.get("head", {}).get("kernel"))[-1:]
    model = make_model(config, size, *classes)
    prune_layer = neuron_pruner(config, param_shapes(model), dense, sensitivity)
  if prune_layer or config.fold != config_lib.dense_baseline(config).fold:
    params, report = fold_pretrained(
      config,
      dense,
      batches,
      prune=prune_layer,
      usage_V=usage_V,
      sensitivity=sensitivity,
    )
  if is_pruned:
    params = prune_trained(config, params, dense, batches)
  if prune_layer:
    config, params = without_neurons(config, params)
  return Compressed(config, params, report)


def with_pairs(config: Config, data: Data) -> Config:
  """Returns the config of a new run with the pairs that its data has.

  It names their columns and, if the tokenizer and the model to start from tell
  the two texts apart, gives the model a segment embedding.

  Args:
    config: Resolved.
    data: Of the run.

  Raises:
    ConfigError: the model to start from cannot be read.
  """
  if data.pair is None:
    return config
  segments = 2 if data.has_segments else 0
  path = config.pretrained
  if path is not None and _is_run(path):
    segments = load_config(path).model.segments
  elif path is not None:
    described = describe_pretrained(find_pretrained(path))
    segments = segments if described.token_types == 2 else 0
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, text_field=data.pair),
    model=dataclasses.replace(config.model, segments=segments),
  )


def require_whole(config: Config) -> None:
  """Raises `ConfigError` if a new run asks for a shrunk shape of a source."""
  m = config.model
  if config.pretrained and (m.heads or m.dense_mlp_width is not None):
    raise ConfigError(
      "model.heads and model.dense_mlp_width describe a shrunk model, and "
      "training starts from a whole one; leave them out with pretrained"
    )


def calibration(config: Config, data: Data) -> list[dict[str, Any]]:
  """Returns training batches, as many texts as `compress.calibration` says.

  They come from the first epoch, so no text comes twice. Ids are those before
  the tokenizer was trimmed.
  """
  size = config.data.batch_size
  count = -(-config.compress.calibration // size)
  batches = list(itertools.islice(data.first_epoch(), count))
  if isinstance(data.tokenizer, MappedTokenizer):
    for batch in batches:
      batch["tokens"] = data.tokenizer.plain_ids[batch["tokens"]]
  return batches


def write_fold(
  workdir: str, report: list[dict[str, Any]], config: Config
) -> None:
  """Writes `fold.json`, the report of folding, and prints it.

  Args:
    workdir: The run directory.
    report: From `fold_pretrained`.
    config: Resolved; has the fraction to prune of each layer.
  """
  path = os.path.join(workdir, "fold.json")
  files.write_file(path, json.dumps(report, indent=1))
  print(fold_table(report, config.fpp.linear_layers), flush=True)
  if rank := config.fold.embedding_rank:
    width = config.model.embed_width or config.model.width
    print(f"The embedding has rank {rank} of {width}", flush=True)


def fold_table(
  report: list[dict[str, Any]], prune: tuple[float, ...] | None = None
) -> str:
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
# Reading a dense model.

# Fields of the model that a source must share, or its arrays mean something
# else; the second tuple only if its classifier is kept.
_SHAPE = (
  "num_layers",
  "width",
  "embed_width",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "norm",
  "norm_position",
  "parallel",
  "embed_norm",
  "norm_epsilon",
  "positions",
  "rope_base",
  "rope_scaling",
  "rope_share",
  "window",
  "relative_buckets",
  "qk_norm",
  "attention_cap",
  "logit_cap",
  "scale_embeddings",
  "activation",
  "gated",
  "causal",
)
_HEAD = ("pooling", "pooler", "pooler_activation", "pooler_norm")


def dense_start(
  path: str, config: Config, data: Data, *, needs_head: bool = False
) -> DenseStart:
  """Returns the dense baseline with the parameters of a source.

  Rows of the embedding and of the output layer past the tokenizer's ids, and
  positions past `data.length`, are left out. A classifier for other classes is
  drawn by the seed.

  Args:
    path: Checkpoint folder, hub id or run.
    config: Resolved.
    data: The tokenizer and classes of the model.
    needs_head: Whether a missing classifier is an error.

  Raises:
    ConfigError: see `read_source`; or an array does not fit.
  """
  model = make_model(
    config_lib.dense_baseline(config),
    data.tokenizer.plain_size,
    data.num_classes,
  )
  tokens = np.zeros((1, config.data.length), np.int32)
  drawn = jax.jit(model.init)(jax.random.key(config.seed), tokens)["params"]
  found, note = read_source(path, config, data)
  source = paths.flatten(found)

  def is_head(name):
    is_of_head = name.startswith(("head/", "pooler/", "norm_pooler/"))
    return config.task != "lm" and is_of_head

  def value(name, fresh):
    w = source.get(name)
    if is_head(name) and (w is None or w.shape != fresh.shape):
      names = ", ".join(data.label_names[:8])
      missing = f"{path} has no {name.split('/')[0]} for {names}{note}"
      if needs_head:
        raise ConfigError(
          f"{missing}, so it cannot teach these classes; train it with "
          "dense=True, and give distill.teacher that run"
        )
      if name == "head/kernel" and jax.process_index() == 0:
        print(f"{missing}; it is learned from scratch", flush=True)
      return np.asarray(fresh)
    if w is None:
      raise ConfigError(f"{path} has no {name}, which this model needs")
    if name.endswith("embed/embedding"):
      w = w[: fresh.shape[0]]
    elif name == "head/kernel":
      w = w[:, : fresh.shape[1]]
    if w.shape != fresh.shape:
      raise ConfigError(
        f"{path}: {name} is {w.shape}, and this model's is {fresh.shape}"
      )
    return np.asarray(w, np.float32)

  params = paths.map_named(value, drawn)
  known = paths.flatten(drawn)
  for name in source:
    if name not in known and not is_head(name):
      raise ConfigError(f"{path} has {name}, which this model has no place for")
  is_head_drawn = any(
    is_head(name) and np.shape(source.get(name, 0)) != w.shape
    for name, w in known.items()
  )
  return DenseStart(model, params, is_head_drawn)


def _is_run(path: str) -> bool:
  return os.path.isdir(os.path.join(path, "checkpoints"))


def read_source(
  path: str, config: Config, data: Data
) -> tuple[dict[str, Any], str]:
  """Returns the parameters of a checkpoint folder, hub id or run, and a note.

  The note, for messages, names the task of a head that is for another one.

  Raises:
    ConfigError: it cannot be read, its model has another shape, or it has
      another tokenizer.
  """
  if _is_run(path):
    found, params, tokenizer = load_run(path)
    model, tokenizer_path = found.model, os.path.join(path, "tokenizer.json")
    classes, task = load_labels(path), found.task
    if not config_lib.is_whole(found):
      raise ConfigError(f"{path} is folded or shrunk; start from a dense run")
    if isinstance(tokenizer, MappedTokenizer):
      raise ConfigError(
        f"the tokenizer of {path} was trimmed; start from the dense run before"
      )
  else:
    source = load_pretrained(
      path, task=config.task, segments=config.model.segments > 0
    )
    model, params, task = source.config, source.params, source.task
    classes = _class_names(source.label_names, data.label_names)
    tokenizer_path = str(source.tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
  note = ""
  if task != config.task and classes:
    note = f" (its head is for task {task!r}: {', '.join(classes[:8])})"
    params = {name: w for name, w in params.items() if name != "head"}
  elif config.task != "regress":
    params = _with_classes(params, classes, data.label_names)
  shape = np.shape(params.get("head", {}).get("kernel"))
  keeps_head = config.task != "lm" and shape[-1:] == (data.num_classes,)
  for name in (*_SHAPE, *(_HEAD if keeps_head else ())):
    theirs, ours = getattr(model, name), getattr(config.model, name)
    if theirs != ours:
      raise ConfigError(
        f"{path} has {name} {theirs!r}, and model.{name} is {ours!r}; "
        "configs/pretrained.py takes the shape from the checkpoint"
      )
  wanted = data.tokenizer
  if isinstance(wanted, MappedTokenizer) and (wanted.token_map < 0).any():
    tokenizer = trimmed(tokenizer, wanted.token_map >= 0)
  if tokenizer.to_json() != wanted.to_json():
    raise ConfigError(
      f"{path} has another tokenizer than data.tokenizer="
      f"{config.data.tokenizer!r}; use data.tokenizer={tokenizer_path!r}"
    )
  return params, note


def _class_names(
  theirs: tuple[str, ...], ours: tuple[str, ...]
) -> tuple[str, ...]:
  """Returns the class names of a checkpoint, () if it does not name them."""
  numbers = tuple(map(str, range(len(theirs))))
  if sorted(ours) == sorted(numbers):  # the data has ids instead of names
    return numbers
  is_named = theirs != tuple(f"LABEL_{i}" for i in numbers)
  return theirs if is_named else ()


def _with_classes(
  params: dict[str, Any], theirs: tuple[str, ...], ours: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the parameters with the head in the order of our classes.

  Names are compared without case. A head for other classes is left out.
  """
  if theirs in ((), ours) or "head" not in params:
    return params
  params = dict(params)
  head = params.pop("head")
  index = {name.casefold(): i for i, name in enumerate(theirs)}
  order = [index.get(name.casefold()) for name in ours]
  # Each of theirs exactly once, even if names differ by case alone.
  if len(order) == len(theirs) and set(order) == set(range(len(theirs))):
    params["head"] = {name: w[..., order] for name, w in head.items()}
  return params


def teacher_of(
  config: Config, data: Data
) -> tuple[Transformer, dict[str, Any]] | None:
  """Returns the dense teacher of a run, None without distillation.

  Its parameters are bfloat16; each layer computes in `model.dtype`. That of task
  "embed", which metrics too compare with, is exact and keeps all tokens.

  Raises:
    ConfigError: task "embed" has no teacher, or nothing to train.
  """
  d, is_embed = config.distill, config.task == "embed"
  if not (d.is_used or is_embed):
    return None
  if is_embed and config.dense:
    raise ConfigError(
      "task 'embed' learns from its dense checkpoint; dense=True would train "
      "nothing"
    )
  path = d.teacher or config.pretrained
  if path is None:
    raise ConfigError(
      "task 'embed' learns from a trained encoder; set pretrained=PATH, as "
      "configs/embed.py does"
    )
  model, params, _ = dense_start(path, config, data, needs_head=d.logits > 0)
  if is_embed:
    return model, params
  params = without_trimmed(data.tokenizer, params)
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  return model.clone(vocab_size=data.tokenizer.vocab_size), half


def without_trimmed(
  tokenizer: Tokenizer, params: dict[str, Any]
) -> dict[str, Any]:
  """Returns the parameters without tokens that the tokenizer lost."""
  if not isinstance(tokenizer, MappedTokenizer):
    return params
  embedding_VD = params["embed"]["embedding"][tokenizer.plain_ids]
  return {**params, "embed": {"embedding": embedding_VD}}


# ---------------------------------------------------------------------------
# Tokens removed from the tokenizer before training.


def trim_vocabulary(config: Config, data: Data) -> Data:
  """Returns the same data, tokenized without the tokens that it uses least.

  The tokenizer loses as many tokens as the config prunes rows of the embedding;
  it cuts words that had them into other tokens. Special tokens stay, and in a
  BPE the parts of other tokens, so fewer may be removed. FPP then zeroes rows.

  Args:
    config: Resolved; `fpp.embedding_granularity` is "trim".
    data: Has the tokenizer of the model to start from.

  Raises:
    ConfigError: tokens of this kind of tokenizer cannot be removed.
  """
  size = data.tokenizer.vocab_size
  if config.compress.plan == "auto":
    _, fraction = outer_fractions(config)
  else:
    params, dense = (
      param_shapes(make_model(each, size, data.num_classes))
      for each in (config, config_lib.dense_baseline(config))
    )
    fraction = embedding_fraction(make_rules(config, params, dense))
  if not fraction:
    return data
  usage_V = token_usage(data.token_counts(), size)
  # Tokens that have to stay rank first, so that the right number leaves.
  stays_V = trimmed(data.tokenizer, np.zeros(size, bool)).token_map >= 0
  order = np.argsort(-(usage_V + stays_V), kind="stable")
  keep_V = np.zeros(size, bool)
  keep_V[order[: round((1 - fraction) * size)]] = True
  return make_data(
    config,
    trimmed(data.tokenizer, keep_V),
    jax.process_index(),
    jax.process_count(),
    data.texts,
  )
