"""Reads a trained dense model, which a run starts from or learns from."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from folding import paths
from folding.config import (
  HEAD,
  IN_MEMORY,
  SHAPE,
  Config,
  DataConfig,
  Order,
  resolve,
)
from folding.data import corpus
from folding.data.batches import Data
from folding.data.tokenizers import (
  MappedTokenizer,
  Tokenizer,
  load_tokenizer,
)
from folding.data.trim import trimmed
from folding.errors import ConfigError
from folding.model import Model, Origin
from folding.models import sentence
from folding.models.hf_weights import (
  TOKENIZER,
  find_pretrained,
  load_pretrained,
)
from folding.models.shape import Shape, model_of
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.tasks import Task, task_of
from folding.training import distributed, sharding
from folding.training.checkpoint import load_run


def dense_start(
  source: Model,
  shape: Shape,
  data: Data,
  task: Task,
  seed: int,
  *,
  needs_head: bool = False,
) -> tuple[Model, bool]:
  """Returns the dense baseline of a shape with the parameters of a source.

  Rows of the embedding and of the output layer past the tokenizer's ids, and
  positions past those of the shape, are left out. A classifier for other classes is
  drawn by the seed.

  Args:
    source: From `read_source`.
    shape: Shape of the model.
    data: Has its tokenizer and classes.
    task: The task to train for.
    seed: Draws a classifier.
    needs_head: Whether a missing classifier is an error.

  Returns:
    (model with all tokens of the tokenizer and the arrays of the source, which
    `sharding.put_params` places; whether its head is drawn).

  Raises:
    ConfigError: the source has another shape, or an array does not fit.
  """
  path = source.origin.base
  _require_shape(source, shape, data)
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
  if missing:
    reason = _no_head(missing[0], source, data, task)
    if needs_head:
      raise ConfigError(
        f"{reason}, so it cannot teach these classes; train it with "
        "dense=True, and give distill.teacher that run"
      )
    if "head/kernel" in missing and jax.process_index() == 0:
      print(f"{reason}; it is learned from scratch", flush=True)
    given |= _drawn(missing, model, data.config.length, seed)

  def value(name, like):
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
    return w

  params = paths.map_named(value, shapes)
  for name in given:
    if name not in known and not is_head(name):
      raise ConfigError(f"{path} has {name}, which this model does not have")
  return dataclasses.replace(
    source,
    shape=shape.dense(),
    task=task.name,
    params=params,
    tokenizer=data.tokenizer,
    labels=data.label_names,
    pair=data.pair,
  ), bool(missing)


def _no_head(name: str, source: Model, data: Data, task: Task) -> str:
  """Returns a message about an array of the head that a source does not have."""
  names = ", ".join(data.label_names[:8])
  message = f"{source.origin.base} has no {name.split('/')[0]} for {names}"
  if source.task != task.name and source.labels:
    names = ", ".join(source.labels[:8])
    message += f" (its head is for task {source.task!r}: {names})"
  return message


def _drawn(
  names: Sequence[str], model: Transformer, length: int, seed: int
) -> dict[str, np.ndarray]:
  """Returns arrays of a model, by name, as the seed draws them."""

  @jax.jit  # other parameters are not drawn, as nothing reads them
  def draw(key, tokens):
    drawn = paths.flatten(model.init(key, tokens)["params"])
    return {name: drawn[name] for name in names}

  tokens = np.zeros((1, length), np.int32)
  found = draw(jax.random.key(seed), tokens)
  return {name: np.asarray(w) for name, w in found.items()}


def _is_run(path: str) -> bool:
  return os.path.isdir(os.path.join(path, "checkpoints"))


def read_source(
  path: str,
  data: Data,
  row: Task,
  *,
  segments: bool,
  mesh: Mesh | None = None,
) -> Model:
  """Reads a trained model to start from or to learn from, in its dense form.

  A head for the same classes gets their order in the data. Arrays of a checkpoint
  stay in its files until they are placed, see `load_pretrained`.

  Args:
    path: Checkpoint folder, hub id or run.
    data: Has the tokenizer and classes that the model is for.
    row: The task that it is for.
    segments: Whether a checkpoint keeps its segment embedding.
    mesh: As for `load_run`.

  Raises:
    ConfigError: it cannot be read, has no dense form or another tokenizer.
  """
  if path == IN_MEMORY:
    raise ConfigError(
      "a model in memory cannot be read again; call train with it, and with its "
      "teacher if distill is used"
    )
  if _is_run(path):
    model = load_run(path, mesh)
    if isinstance(model.tokenizer, MappedTokenizer):
      raise ConfigError(
        f"the tokenizer of {path} was trimmed; start from an earlier dense run"
      )
    if not model.shape.is_dense:
      params = distributed.host_copy(model.params)
      model = dataclasses.replace(model, params=params).dense()
  else:
    model = read_checkpoint(path, row.name, segments=segments, mapped=True)
    labels = _class_names(model.labels, data.label_names)
    model = dataclasses.replace(model, labels=labels)
  ours = data.tokenizer
  if _trimmed_as(ours, model.tokenizer).to_json() != ours.to_json():
    file = os.path.join(find_pretrained(path), TOKENIZER)
    raise ConfigError(
      f"{path} has another tokenizer than data.tokenizer="
      f"{data.config.tokenizer!r}; use data.tokenizer={file!r}"
    )
  params = model.params
  if model.task != row.name and model.labels:
    params = {name: w for name, w in params.items() if name != "head"}
  elif row.labels and row.labels.kind != "score":
    params = _with_classes(params, model.labels, data.label_names)
  return dataclasses.replace(
    model, params=params, origin=Origin(path), targets=None
  )


def read_checkpoint(
  path: str,
  task: str | None = None,
  *,
  segments: bool = False,
  mapped: bool = False,
) -> Model:
  """Reads a Hugging Face checkpoint.

  Args:
    path: Folder or hub id.
    task: As for `load_pretrained`. None: that of its head; without one, or if
      files of sentence-transformers say so, it makes vectors.
    segments: Whether it keeps a segment embedding, for pairs.
    mapped: As for `load_pretrained`.

  Raises:
    ConfigError: see `load_pretrained`, or its tokenizer does not fit it.
  """
  folder = find_pretrained(path)
  how = sentence.read(folder) if task is None else None
  found = load_pretrained(
    folder, task="embed" if how else task, segments=segments, mapped=mapped
  )
  if task is None and found.head == "none":
    how = how or sentence.Sentence()
  tokenizer = load_tokenizer(found.tokenizer_path)
  if tokenizer.vocab_size > found.vocab_size:
    raise ConfigError(
      f"{found.tokenizer_path} does not fit the model: its ids go up to "
      f"{tokenizer.vocab_size - 1}, and there are {found.vocab_size} embeddings"
    )
  # transformers pools at the last token that is not the pad token.
  is_causal_classifier = found.config.causal and bool(found.label_names)
  if is_causal_classifier and tokenizer.ends_with_pad:
    raise ConfigError(
      f"{found.tokenizer_path} ends each text with the pad token "
      f"({tokenizer.pad_id}), which this kind of classifier ignores; save the "
      "tokenizer with add_eos_token=False, which computes the same"
    )
  length, params = found.max_length, dict(found.params)
  config = Config(
    task=found.task,
    preset="none",
    data=DataConfig(length=length),
    model=found.config,
  )
  origin = Origin(dtype=found.dtype)
  if how is None:
    return Model.of(
      resolve(config), params, tokenizer, found.label_names, origin
    )
  params.pop("pooler", None)
  config = dataclasses.replace(
    config, task="embed", model=how.applied(found.config)
  )
  encoder = Model.of(resolve(config), params, tokenizer, origin=origin)
  return encoder.reading(min(length, how.max_length or length))


def _require_shape(source: Model, shape: Shape, data: Data) -> None:
  """Raises `ConfigError` unless arrays mean the same in source and shape."""
  size = np.shape(source.params.get("head", {}).get("kernel"))
  keeps_head = shape.output == "scores" and size[-1:] == (data.num_classes,)
  them, us = model_of(source.shape), model_of(shape)
  for name in SHAPE + HEAD * keeps_head:
    theirs, ours = getattr(them, name), getattr(us, name)
    if theirs != ours:
      raise ConfigError(
        f"{source.origin.base} has {name} {theirs!r}, and model.{name} is {ours!r}; "
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
    at = np.array(order)
    params["head"] = {name: w[..., at] for name, w in head.items()}
  return params


def teacher_of(
  shape: Shape, data: Data, order: Order, source: Model | None = None
) -> Model | None:
  """Returns the dense teacher of a run, None without distillation.

  Its parameters are bfloat16 and split over the mesh of the order; each layer
  computes in `model.dtype`. That of task "embed", which metrics too compare with,
  is exact and keeps all tokens. If `distill.teacher` names it, its shape and
  tokenizer are its own.

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
  mesh = sharding.make_mesh(order.mesh)
  if source is None or source.origin.base != path:
    source = read_source(
      path, data, task, segments=shape.segments > 0, mesh=mesh
    )
  model, _ = dense_start(
    source, shape, data, task, order.seed, needs_head=d.logits > 0
  )
  dtype = np.float32
  if not task.makes_vectors:
    model, dtype = without_trimmed(model), jnp.bfloat16
  params = sharding.put_params(mesh, model.params, dtype)
  return dataclasses.replace(model, params=params)


def _trimmed_as(ours: Tokenizer, theirs: Tokenizer) -> Tokenizer:
  """Returns a whole tokenizer without the tokens that ours has lost."""
  if isinstance(ours, MappedTokenizer) and (ours.token_map < 0).any():
    return trimmed(theirs, ours.token_map >= 0)
  return theirs


def teacher_in_memory(
  teacher: Model, shape: Shape, data: Data, order: Order
) -> Model:
  """Returns a teacher of a run; that of tokens or classes reads the run's ids.

  Args:
    teacher: A model with the classes of the data, and with its tokens or those
      that its tokenizer had before some were removed. One of vectors reads
      `teacher_tokens` if batches have them.
    shape: Shape of the model that learns.
    data: Has the tokenizer.
    order: Has the losses.

  Raises:
    ConfigError: it has other classes or tokens, or a loss needs another shape.
  """
  _require_comparable("the teacher", teacher.shape, shape, order)
  teacher = without_padding(teacher)
  tokenizer, read = data.tokenizer, teacher.tokenizer
  if task_of(order).makes_vectors:
    ours = data.teacher_tokenizer or tokenizer
    pairs = [("tokenizer", corpus.identity(read), corpus.identity(ours))]
  else:
    is_trimmed = isinstance(tokenizer, MappedTokenizer)
    if is_trimmed and teacher.num_rows == tokenizer.plain_size:
      read = _trimmed_as(tokenizer, read)
      teacher = without_trimmed(
        dataclasses.replace(teacher, tokenizer=tokenizer)
      )
    pairs = [
      ("classes", teacher.labels, data.label_names),
      ("number of tokens", teacher.num_rows, tokenizer.vocab_size),
      ("tokenizer", read.to_json(), tokenizer.to_json()),
    ]
  for name, theirs, ours in pairs:
    if theirs != ours:
      raise ConfigError(
        f"the {name} of the teacher and of the data differ: {theirs!r:.80} and "
        f"{ours!r:.80}; give the dense model of the same task"
      )
  return teacher


def _encoder(path: str, ours: Shape, order: Order) -> Model:
  """Returns a teacher of vectors, of its own shape and tokenizer.

  Raises:
    ConfigError: the teacher cannot be read, makes no vectors or reads fewer
      tokens, or a loss or metric needs a teacher of another shape.
  """
  model = load_run(path) if _is_run(path) else read_checkpoint(path)
  shape = model.shape
  if shape.output != "vector":
    raise ConfigError(f"{path} makes no vectors; give a sentence encoder")
  if shape.max_length < order.data.length:
    raise ConfigError(
      f"{path} reads at most {shape.max_length} tokens; lower data.length"
    )
  _require_comparable(path, shape, ours, order)
  return model


def _require_comparable(
  name: str, theirs: Shape, ours: Shape, order: Order
) -> None:
  """Raises `ConfigError` if a loss or metric needs a teacher of another shape."""
  edits = []
  is_wide = theirs.width != ours.width
  if order.distill.hidden and (is_wide or theirs.num_layers != ours.num_layers):
    edits.append("distill.hidden=0")
  if is_wide and task_of(order).makes_vectors:
    if not order.distill.pairs:
      edits.append("distill.pairs=1")
    if order.train.metric in (None, "cosine"):
      edits.append("train.metric=similarity")
  if edits:
    raise ConfigError(
      f"{name} has {theirs.num_layers} layers of width {theirs.width}, and the "
      f"model {ours.num_layers} of {ours.width}; set {', '.join(edits)}"
    )


def without_trimmed(model: Model) -> Model:
  """Returns a model without the parameters of tokens that its tokenizer lost.

  Args:
    model: Its parameters have a row per token of the whole tokenizer.
  """
  if not isinstance(model.tokenizer, MappedTokenizer):
    return model
  return _with_rows(model, model.tokenizer.plain_ids)


def without_padding(model: Model) -> Model:
  """Returns a model without the rows past the ids of its tokenizer.

  Checkpoints have them so that the number of rows is round.
  """
  size = model.tokenizer.vocab_size
  if "embed" not in model.params or model.num_rows <= size:
    return model
  return _with_rows(model, slice(size))


def _with_rows(model: Model, at: slice | np.ndarray) -> Model:
  """Returns a model with some rows of its embedding and its output layer."""
  params = dict(model.params)
  params["embed"] = {"embedding": params["embed"]["embedding"][at]}
  if model.shape.output == "tokens" and "head" in params:
    head = {name: w[..., at] for name, w in params["head"].items()}
    params["head"] = head
  return dataclasses.replace(model, params=params)
