"""Texts -> classes with probabilities, scores, or vectors."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.model import Model
from folding.model import Prediction as Prediction
from folding.serving.batched import (
  outputs,
  require_several,
  require_size,
  require_texts,
)
from folding.tasks import Labels, task_of

_log = logging.getLogger(__name__)

_BATCHES_SORTED = 32  # texts are sorted by length across this many batches


def predict(
  model: Model,
  texts: Iterable[Text],
  *,
  batch_size: int = 64,
  at_once: bool = False,
) -> Iterator[Prediction]:
  """Yields a prediction per text, in their order.

  Texts of similar length share a batch, in one of a few shapes, so the model is
  compiled once per shape. A prediction does not depend on the other texts of
  its batch, to float rounding.

  Args:
    model: From `folding.load`; not a language model.
    texts: Any number; about 32 batches of them are held at a time. Pairs if the
      model was trained on pairs.
    batch_size: Texts per batch.
    at_once: Whether to answer after each `batch_size` texts, in batches of
      less similar length.

  Raises:
    ConfigError: the model has no head for texts, the batch size is out of range,
      one text is given in place of several, single texts for pairs or pairs for
      single texts, or the model returns NaN.
  """
  require_size(batch_size)
  require_several(texts)
  task = task_of(model)
  if task.labels is None:
    raise ConfigError(
      f"this model is of task {task.name!r} and has no classes to predict; use "
      f"folding {task.verb}, or a model of task 'classify', 'multilabel' or "
      "'regress'"
    )
  count = model.params["head"]["kernel"].shape[-1]
  if len(model.labels) != count:
    raise ConfigError(
      f"there are {len(model.labels)} labels for the {count} outputs of the model"
    )
  return _predict(model, iter(texts), task.labels, batch_size, at_once)


def _predict(
  model: Model,
  texts: Iterator[Text],
  form: Labels,
  batch_size: int,
  at_once: bool,
) -> Iterator[Prediction]:
  params, pair = jax.device_put(model.params), model.pair
  size = batch_size if at_once else batch_size * _BATCHES_SORTED
  labelled = tuple(f"{label}\t" for label in model.labels)
  while group := list(itertools.islice(texts, size)):
    require_texts(group, pair)
    firsts = (text if isinstance(text, str) else text[0] for text in group)
    if labelled and all(text.startswith(labelled) for text in firsts):
      _log.warning("each line begins with a label, which is read as its text")
      labelled = ()
    found = outputs(
      model.module,
      model.tokenizer,
      params,
      group,
      batch_size=batch_size,
      activate=task_of(model).activate,
    )
    for text, row in zip(group, found, strict=True):
      probabilities = row[:0] if form.kind == "score" else row
      yield Prediction(text, form.answer(row, model.labels), probabilities)


def encode(
  model: Model,
  texts: Sequence[str],
  *,
  batch_size: int = 64,
  report: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
  """Returns the vectors of texts, float32[texts, D].

  Args:
    model: From `folding.load`; of task "embed".
    texts: Any number. The model reads at most `shape.max_length` tokens of each.
    batch_size: Texts per batch; those of a batch are of similar length.
    report: Called after each batch with its number of texts.

  Raises:
    ConfigError: the task of the model is not "embed", a text is not a string,
      or the model returns NaN.
  """
  require_size(batch_size)
  model.require_encoder()
  require_several(texts)
  texts = list(texts)
  require_texts(texts)
  return outputs(
    model.module,
    model.tokenizer,
    jax.device_put(model.params),
    texts,
    batch_size=batch_size,
    activate=task_of(model).activate,
    report=report,
  )
