"""Reads a trained dense model, which a run starts from or learns from."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding import paths
from folding.config import (
  HEAD,
  SHAPE,
  Config,
  DataConfig,
  ModelConfig,
  Order,
  resolve,
)
from folding.data.batches import Data
from folding.data.tokenizers import MappedTokenizer, Tokenizer, load_tokenizer
from folding.data.trim import trimmed
from folding.errors import ConfigError
from folding.models import sentence
from folding.models.hf_weights import find_pretrained, load_pretrained
from folding.models.shape import Shape, model_of, shape_of
from folding.models.transformer import (
  Transformer,
  make_model,
  model_for,
  param_shapes,
)
from folding.tasks import Task, task_of
from folding.training.checkpoint import load_run
from folding.training.run_dir import load_labels


class Source(NamedTuple):
  """A trained dense model that fits the data of a run.

  Attributes:
    path: Checkpoint folder, hub id or run.
    model: Its shape.
    params: Its parameters; a head has the order of the data's classes.
    note: For messages: the task of a head that is for another one.
  """

  path: str
  model: ModelConfig
  params: dict[str, Any]
  note: str


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


def dense_start(
  source: Source,
  shape: Shape,
  data: Data,
  order: Order,
  *,
  needs_head: bool = False,
) -> DenseStart:
  """Returns the dense baseline of a shape with the parameters of a source.

  Rows of the embedding and of the output layer past the tokenizer's ids, and
  positions past `data.length`, are left out. A classifier for other classes is
  drawn by the seed.

  Args:
    source: From `read_source`.
    shape: Shape of the model.
    data: The tokenizer and classes of the model.
    order: Has the task, and the seed of a classifier.
    needs_head: Whether a missing classifier is an error.

  Raises:
    ConfigError: the source has another shape, or an array does not fit.
  """
  path, task = source.path, task_of(order)
  _require_shape(source, shape, data, task)
  model = make_model(
    shape.dense(),
    data.tokenizer.plain_size,
    data.num_classes,
  )
  shapes = param_shapes(model)
  known, given = paths.flatten(shapes), paths.flatten(source.params)
  heads = ("head/", "pooler/", "norm_pooler/")
  if task.predicts_tokens:
    heads = ()  # the output layer must be there

  def is_head(name):
    return name.startswith(heads)

  missing = [
    name
    for name, w in known.items()
    if is_head(name) and (name not in given or given[name].shape != w.shape)
  ]
  drawn = {}
  if missing:
    names = ", ".join(data.label_names[:8])
    reason = (
      f"{path} has no {missing[0].split('/')[0]} for {names}{source.note}"
    )
    if needs_head:
      raise ConfigError(
        f"{reason}, so it cannot teach these classes; train it with "
        "dense=True, and give distill.teacher that run"
      )
    if "head/kernel" in missing and jax.process_index() == 0:
      print(f"{reason}; it is learned from scratch", flush=True)
    tokens = np.zeros((1, shape.max_length), np.int32)
    init = jax.jit(model.init)(jax.random.key(order.seed), tokens)
    drawn = paths.flatten(init["params"])

  def value(name, like):
    if name in missing:
      return np.asarray(drawn[name])
    if name not in given:
      raise ConfigError(f"{path} has no {name}, which this model needs")
    w = given[name]
    if name.endswith("embed/embedding"):
      w = w[: like.shape[0]]
    elif name == "head/kernel":
      w = w[:, : like.shape[1]]
    if w.shape != like.shape:
      raise ConfigError(
        f"{path}: {name} is {w.shape}, and this model's is {like.shape}"
      )
    return np.asarray(w, np.float32)

  params = paths.map_named(value, shapes)
  for name in given:
    if name not in known and not is_head(name):
      raise ConfigError(f"{path} has {name}, which this model does not have")
  return DenseStart(model, params, is_head_drawn=bool(missing))


def _is_run(path: str) -> bool:
  return os.path.isdir(os.path.join(path, "checkpoints"))


def read_source(path: str, data: Data, row: Task, *, segments: bool) -> Source:
  """Reads a trained dense model to start from or to learn from.

  Args:
    path: Checkpoint folder, hub id or run.
    data: The tokenizer and classes that the model is for.
    row: The task that it is for.
    segments: Whether a checkpoint keeps its segment embedding.

  Raises:
    ConfigError: it cannot be read, is not dense, or has another tokenizer.
  """
  if _is_run(path):
    found, params, tokenizer = load_run(path)
    model, tokenizer_path = found.model, os.path.join(path, "tokenizer.json")
    classes, task = load_labels(path), found.task
    if not shape_of(found).is_dense:
      raise ConfigError(f"{path} is folded or shrunk; start from a dense run")
    if isinstance(tokenizer, MappedTokenizer):
      raise ConfigError(
        f"the tokenizer of {path} was trimmed; start from an earlier dense run"
      )
  else:
    found = load_pretrained(path, task=row.name, segments=segments)
    model, params, task = found.config, found.params, found.task
    classes = _class_names(found.label_names, data.label_names)
    tokenizer_path = str(found.tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
  ours = data.tokenizer
  if isinstance(ours, MappedTokenizer) and (ours.token_map < 0).any():
    tokenizer = trimmed(tokenizer, ours.token_map >= 0)
  if tokenizer.to_json() != ours.to_json():
    raise ConfigError(
      f"{path} has another tokenizer than data.tokenizer="
      f"{data.config.tokenizer!r}; use data.tokenizer={tokenizer_path!r}"
    )
  note = ""
  if task != row.name and classes:
    note = f" (its head is for task {task!r}: {', '.join(classes[:8])})"
    params = {name: w for name, w in params.items() if name != "head"}
  elif row.labels and row.labels.kind != "score":
    params = _with_classes(params, classes, data.label_names)
  return Source(path, model, params, note)


def _require_shape(source: Source, shape: Shape, data: Data, row: Task) -> None:
  """Raises `ConfigError` unless arrays mean the same in source and shape."""
  size = np.shape(source.params.get("head", {}).get("kernel"))
  keeps_head = not row.predicts_tokens and size[-1:] == (data.num_classes,)
  model = model_of(shape)
  for name in SHAPE + HEAD * keeps_head:
    theirs, ours = getattr(source.model, name), getattr(model, name)
    if theirs != ours:
      raise ConfigError(
        f"{source.path} has {name} {theirs!r}, and model.{name} is {ours!r}; "
        "configs/pretrained.py takes the shape from the checkpoint"
      )


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


def with_segments(shape: Shape, data: Data, source: Source | None) -> Shape:
  """Returns the shape of a new run for the pairs that its data has.

  The model has a segment embedding if the tokenizer and the model to start from
  distinguish the two texts of a pair.

  Args:
    shape: As the config describes it.
    data: Data of the run.
    source: The model to start from; None: it is drawn.
  """
  if data.pair is None:
    return shape
  segments = source.model.segments if source else 2 * data.has_segments
  return dataclasses.replace(shape, segments=segments)


def teacher_of(
  shape: Shape, data: Data, order: Order, source: Source | None = None
) -> tuple[Transformer, dict[str, Any]] | None:
  """Returns the dense teacher of a run, None without distillation.

  Its parameters are bfloat16; each layer computes in `model.dtype`. That of task
  "embed", which metrics too compare with, is exact and keeps all tokens. If
  `distill.teacher` names it, its shape and tokenizer are its own.

  Args:
    shape: Shape of the model that it teaches.
    data: Data of the run.
    order: Names the teacher.
    source: A model that was read before.

  Raises:
    ConfigError: task "embed" has no teacher, or nothing to train; or see
      `_encoder`.
  """
  d, task = order.distill, task_of(order)
  if not (d.is_used or task.makes_vectors):
    return None
  if task.makes_vectors and order.dense:
    raise ConfigError(
      f"task {task.name!r} learns from its dense checkpoint; dense=True would "
      "train nothing"
    )
  path = d.teacher or order.pretrained
  if path is None:
    raise ConfigError(
      f"task {task.name!r} learns from a trained encoder; set pretrained=PATH, "
      "as configs/embed.py does"
    )
  if task.makes_vectors and d.teacher:
    return _encoder(d.teacher, shape, order)
  if source is None or source.path != path:
    source = read_source(path, data, task, segments=shape.segments > 0)
  model, params, _ = dense_start(
    source, shape, data, order, needs_head=d.logits > 0
  )
  if task.makes_vectors:
    return model, params
  params = without_trimmed(data.tokenizer, params, task.predicts_tokens)
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  return model.clone(vocab_size=data.tokenizer.vocab_size), half


def _encoder(
  path: str, ours: Shape, order: Order
) -> tuple[Transformer, dict[str, Any]]:
  """Returns a teacher of vectors, of its own shape and tokenizer.

  Args:
    path: Checkpoint folder, hub id or run of task "embed".
    ours: Shape of the model that it teaches.
    order: Has the losses and the metric that compare the two.

  Raises:
    ConfigError: the teacher cannot be read, makes no vectors or reads fewer
      tokens, or a loss or metric needs a teacher of another shape.
  """
  if _is_run(path):
    config, params, _ = load_run(path)
    shape = shape_of(config)
    if shape.output != "vector":
      raise ConfigError(f"{path} makes no vectors; give a sentence encoder")
  else:
    shape, params = _encoder_of_folder(find_pretrained(path))
  if shape.max_length < ours.max_length:
    raise ConfigError(
      f"{path} reads at most {shape.max_length} tokens; lower data.length"
    )
  edits = []
  is_wide = shape.width != ours.width
  if order.distill.hidden and (is_wide or shape.num_layers != ours.num_layers):
    edits.append("distill.hidden=0")
  if is_wide and not order.distill.pairs:
    edits.append("distill.pairs=1")
  if is_wide and order.train.metric in (None, "cosine"):
    edits.append("train.metric=similarity")
  if edits:
    raise ConfigError(
      f"{path} has {shape.num_layers} layers of width {shape.width}, and the model "
      f"{ours.num_layers} of {ours.width}; set {', '.join(edits)}"
    )
  return model_for(shape, params), params


def _encoder_of_folder(folder: pathlib.Path) -> tuple[Shape, dict[str, Any]]:
  """Returns shape and parameters of a Hugging Face sentence encoder."""
  found, how = load_pretrained(folder, task="embed"), sentence.read(folder)
  if how is None and found.config.causal:
    raise ConfigError(
      f"{folder} is a language model, and no {sentence.MODULES} says how it makes "
      "a vector of a text"
    )
  how = how or sentence.Sentence()
  length = min(found.max_length, how.max_length or found.max_length)
  params = {name: w for name, w in found.params.items() if name != "pooler"}
  if "position_embed" in params:
    w = params["position_embed"]["embedding"]
    params["position_embed"] = {"embedding": w[:length]}
  config = Config(
    task="embed",
    preset="none",
    data=DataConfig(length=length),
    model=how.applied(found.config),
  )
  return shape_of(resolve(config)), params


def without_trimmed(
  tokenizer: Tokenizer, params: dict[str, Any], has_logits: bool
) -> dict[str, Any]:
  """Returns the parameters without tokens that the tokenizer lost.

  Args:
    tokenizer: Tokenizer of the smaller model.
    params: Parameters with a row per token of the whole tokenizer.
    has_logits: Whether the head, if there is one, has an output per token.
  """
  if not isinstance(tokenizer, MappedTokenizer):
    return params
  ids = tokenizer.plain_ids
  params = {**params, "embed": {"embedding": params["embed"]["embedding"][ids]}}
  if has_logits and "head" in params:
    head = {name: w[..., ids] for name, w in params["head"].items()}
    params["head"] = head
  return params
