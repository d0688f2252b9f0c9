"""A model as one value: what users load, train and save."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import folding
from folding import config as config_lib
from folding.config import Config
from folding.data.tokenizers import Text, Tokenizer
from folding.errors import ConfigError
from folding.models.dense_form import filled
from folding.models.shape import Shape, shape_of, with_shape
from folding.models.transformer import Transformer, make_model
from folding.tasks import Label, task_of


class Prediction(NamedTuple):
  """Output of a model for a text.

  Attributes:
    text: As given; the model reads at most `shape.max_length` tokens of it.
    label: The most probable class (task "classify"), the classes with a
      probability above 0.5 ("multilabel"), or the score ("regress").
    probabilities: float32[C], in the order of `Model.labels`; float32[0] beside
      a score.
  """

  text: Text
  label: Label
  probabilities: np.ndarray


class Origin(NamedTuple):
  """Where a model comes from, as its card says.

  Attributes:
    base: Name of the checkpoint: its hub id, or that of its folder; "": none.
    license: Name of its licence, as on the hub.
    license_text: Its LICENSE.
    notes: Lines about the quality of the model.
    dtype: Type of the weights in the files of the checkpoint.
  """

  base: str = ""
  license: str = ""
  license_text: str = ""
  notes: tuple[str, ...] = ()
  dtype: str = "float32"


class Targets(NamedTuple):
  """Fractions to zero.

  Attributes:
    layers: For each layer, the fraction of W_O and the MLP, and of W_Q, W_K and
      W_V if `fpp.attention` includes them.
    head: Fraction of the output layer.
    embedding: Fraction of the embeddings.
  """

  layers: tuple[float, ...]
  head: float
  embedding: float

  @property
  def prune(self) -> bool:
    """Whether anything is zeroed; folding alone may save as much."""
    return any((self.head, self.embedding, *self.layers))


@dataclasses.dataclass(frozen=True)
class Model:
  """A model: its shape, arrays, tokenizer and labels.

  `folding.load` and `folding.compress` return one. `predict`, `encode` and
  `generate` answer texts, and `save` writes it.

  Attributes:
    shape: Which arrays it has.
    task: Name of its row in `folding.tasks`.
    params: Nested dicts of arrays; {} if training draws them.
    tokenizer: Text to the ids that the model reads.
    labels: Names of the head's outputs, classes in id order; () for a next-token
      model, and for an encoder of sentences.
    pair: Names of the two texts of a pair; None: the model reads single texts.
    origin: The checkpoint that the model was made from, for the model card.
    targets: Fractions that a plan leaves to a run to prune; None: its order says.
  """

  shape: Shape
  task: str
  params: dict[str, Any] = dataclasses.field(repr=False)  # too long to show
  tokenizer: Tokenizer
  labels: tuple[str, ...] = ()
  pair: tuple[str, str] | None = None
  origin: Origin = dataclasses.field(default=Origin(), repr=False)
  targets: Targets | None = None

  @classmethod
  def of(
    cls,
    config: Config,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    labels: Sequence[str] = (),
    origin: Origin | None = None,
  ) -> "Model":
    """Returns the model of a config with these parameters."""
    fields = config.data.text_field
    pair = fields if isinstance(fields, tuple) else None
    shape = shape_of(config)
    names, origin = tuple(labels), origin or Origin()
    return cls(shape, config.task, params, tokenizer, names, pair, origin)

  @property
  def config(self) -> Config:
    """A config of this model, which `of` reads."""
    data = config_lib.DataConfig(
      length=self.shape.max_length, text_field=self.pair
    )
    config = Config(task=self.task, preset="none", data=data)
    return config_lib.resolve(with_shape(config, self.shape))

  def encode(
    self,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda _: None,
  ) -> np.ndarray:
    """Returns the vectors of texts; see `folding.serving.predict.encode`."""
    return folding.encode(self, texts, batch_size=batch_size, report=report)

  def predict(
    self, texts: Iterable[Text], *, batch_size: int = 64
  ) -> list[Prediction]:
    """Returns a prediction per text; see `folding.serving.predict`."""
    return list(folding.predict(self, texts, batch_size=batch_size))

  def generate(
    self,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
  ) -> list[str]:
    """Returns the continuation of each text.

    Args:
      texts: Prompts; an empty one begins a new document.
      max_new_tokens: Tokens per text, at most.
      temperature: 0: always the likeliest token; higher: more random.
      top_k: Draw from this many of the likeliest tokens; None: from all.
      top_p: Draw from the likeliest tokens whose probabilities sum to this.
      seed: Seed of sampling.

    Raises:
      ConfigError: this is not a language model, or an option is out of range.
    """
    sampling = folding.Sampling(temperature, top_k, top_p, seed)
    return folding.generate(
      self, texts, max_new_tokens=max_new_tokens, sampling=sampling
    )

  def save(
    self,
    path: str | os.PathLike,
    format: str = "safetensors",
    dtype: str | None = None,
    *,
    max_drop: float | None = None,
    data: str | None = None,
    push_to_hub: str | None = None,
  ) -> dict[str, int]:
    """Writes the model; see `folding.serving.formats.save`."""
    return folding.save(
      self,
      path,
      format,
      dtype,
      max_drop=max_drop,
      data=data,
      push_to_hub=push_to_hub,
    )

  def require_encoder(self) -> None:
    """Raises `ConfigError` unless the model makes vectors of texts."""
    task = task_of(self)
    if task.predicts_tokens:
      raise ConfigError(
        "this is a language model without a pooling of its tokens; give an "
        "encoder, or a checkpoint with the modules.json of sentence-transformers"
      )
    if not task.makes_vectors:
      raise ConfigError(
        f"this model is of task {task.name!r} and makes no vectors; use folding "
        f"{task.verb}"
      )

  def reading(self, length: int) -> "Model":
    """Returns the model that reads at most `length` tokens of a text.

    Raises:
      ConfigError: it has learned fewer positions.
    """
    params = dict(self.params)
    if "position_embed" in params:
      w = params["position_embed"]["embedding"]
      if len(w) < length:
        raise ConfigError(
          f"the model reads at most {len(w)} tokens; lower data.length {length}"
        )
      params["position_embed"] = {"embedding": w[:length]}
    shape = dataclasses.replace(self.shape, max_length=length)
    return dataclasses.replace(self, shape=shape, params=params)

  def dense(self) -> "Model":
    """Returns the dense model that computes the same, up to float rounding.

    Removed heads and neurons are zeros in it.

    Raises:
      ConfigError: it has another number of key heads than the dense baseline,
        because a diagonal W_V gives each head values of its own.
    """
    shape = self.shape.dense()
    widths = [layer.mlp_width for layer in shape.layers]
    params = filled(self.shape, self.params, shape.num_heads, widths)
    if params["blocks_0"]["attn"]["k"]["kernel"].shape[1] != shape.num_kv_heads:
      raise ConfigError(
        "a diagonal W_V with heads that share keys has no dense form of this "
        "shape; use fold.values='dense'"
      )
    return dataclasses.replace(self, shape=shape, params=params, targets=None)

  @property
  def module(self) -> Transformer:
    """The Linen module: `model.apply({"params": params}, tokens, mask)`."""
    # A loop over layers would stack, and so copy, the weights at each call.
    shape = dataclasses.replace(self.shape, scan_layers=False)
    return make_model(shape, self.num_rows, len(self.labels))

  model = module  # its earlier name, for one release

  @property
  def dtype(self) -> str:
    """Name of the type of its weights, such as "float32"."""
    return self.params["embed"]["embedding"].dtype.name

  @property
  def num_rows(self) -> int:
    """V, the rows of the embedding."""
    return self.params["embed"]["embedding"].shape[0]
