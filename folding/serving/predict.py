"""Texts or pairs of texts -> classes with probabilities, or scores."""

import contextlib
import functools
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from folding.config import UNLABELLED
from folding.data.labels import Label
from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.serving.batched import (
  outputs,
  require_numbers,
  require_several,
  require_size,
)
from folding.serving.loaded import Loaded

_log = logging.getLogger(__name__)

_TABLES = (".csv", ".jsonl", ".parquet", ".arrow")
_BATCHES_SORTED = 32  # texts are sorted by length among so many batches


class Prediction(NamedTuple):
  """What a model says of a text.

  Attributes:
    text: As given; the model reads at most `data.length` tokens of it.
    label: By task. "classify": the most probable class. "multilabel": the
      classes with a probability above 0.5. "regress": the score.
    probabilities: float32[C], in the order of `Loaded.labels`; float32[0] beside
      a score.
  """

  text: Text
  label: Label
  probabilities: np.ndarray


def predict(
  loaded: Loaded,
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
    loaded: From `folding.load`; not a language model.
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
  task = loaded.config.task
  if task in UNLABELLED:
    verb = {"lm": "generate", "embed": "encode"}[task]
    raise ConfigError(
      f"this model is of task {task!r} and has no classes to predict; use "
      f"folding {verb}, or a model of task 'classify', 'multilabel' or 'regress'"
    )
  return _predict(loaded, iter(texts), batch_size, at_once)


def _predict(
  loaded: Loaded, texts: Iterator[Text], batch_size: int, at_once: bool
) -> Iterator[Prediction]:
  model, params = loaded.model, jax.device_put(loaded.params)
  task, pair = loaded.config.task, columns_of_pair(loaded)
  activate = _ACTIVATIONS[task]

  @jax.jit
  def forward(params, tokens_BL, mask_BL, segments_BL):
    logits_BC: Any = model.apply(
      {"params": params}, tokens_BL, mask_BL, True, segments_BL
    )
    return activate(logits_BC)

  size = batch_size if at_once else batch_size * _BATCHES_SORTED
  labelled = tuple(f"{label}\t" for label in loaded.labels)
  while group := list(itertools.islice(texts, size)):
    if any(isinstance(text, str) == bool(pair) for text in group):
      raise ConfigError(
        f"this model reads pairs ({' and '.join(pair)}), and a text is not one"
        if pair
        else "this model reads single texts, and a text is a pair"
      )
    firsts = (text if isinstance(text, str) else text[0] for text in group)
    if labelled and all(text.startswith(labelled) for text in firsts):
      _log.warning("each line begins with a label, which is read as its text")
      labelled = ()
    found = outputs(
      loaded.config,
      loaded.tokenizer,
      functools.partial(forward, params),
      group,
      batch_size=batch_size,
      width=len(loaded.labels),
    )
    require_numbers(np.isfinite(found), loaded.config.model.dtype)
    for text, row in zip(group, found, strict=True):
      if task == "regress":
        yield Prediction(text, float(row[0]), row[:0])
      elif task == "multilabel":
        chosen = zip(loaded.labels, row > 0.5, strict=True)
        yield Prediction(text, tuple(x for x, is_in in chosen if is_in), row)
      else:
        yield Prediction(text, loaded.labels[int(row.argmax())], row)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "classify": functools.partial(jax.nn.softmax, axis=-1),
  "multilabel": jax.nn.sigmoid,
  "regress": lambda logits: logits,
}


def columns_of_pair(loaded: Loaded) -> tuple[str, str] | None:
  """Returns the names of the two texts that a model reads; None: it reads one."""
  names = loaded.config.data.text_field
  return names if isinstance(names, tuple) else None


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[Iterator[str]]:
  """Yields an iterator of the lines of a file, or of standard input for "-".

  Raises:
    OSError: the file cannot be read.
    ConfigError: the file has rows with columns, or standard input is closed; or,
      when that line is reached, a line is not UTF-8.
  """
  if path.endswith(_TABLES):
    raise ConfigError(
      f"{path}: a text per line is read here, or a pair with a tab between; write "
      "the column of texts to a .txt"
    )
  if path != "-":
    with open(path, "rb") as file:
      yield _decoded(file, path)
  elif sys.stdin is None:  # as in a daemon
    raise ConfigError("there is no standard input to read")
  else:
    yield _decoded(sys.stdin.buffer, "standard input")


def _decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
  for number, line in enumerate(file, 1):
    # A byte order mark is not text, at the start of the file only.
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
      text = line.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
      raise ConfigError(
        f"{name}, line {number}, is not UTF-8 ({error.reason})"
      ) from None
    if number == 1 and not line.endswith(b"\n"):
      yield from text.split("\r")  # all of it, with the line ends of old Macs
    else:
      yield text


def pairs(lines: Iterable[str], columns: tuple[str, str]) -> Iterator[Text]:
  """Yields the two texts of each line, with a tab between them.

  Raises:
    ConfigError: a line has another number of texts.
  """
  for number, line in enumerate(lines, 1):
    texts = line.split("\t")
    if len(texts) != 2:
      raise ConfigError(
        f"line {number} has {len(texts)} texts between tabs; this model reads "
        f"{columns[0]}<TAB>{columns[1]}"
      )
    yield texts[0], texts[1]


def lines_of(
  loaded: Loaded, predictions: Iterable[Prediction], form: str
) -> Iterator[str]:
  """Yields predictions as lines.

  Args:
    loaded: The model that made them.
    predictions: From `predict`.
    form: "tsv": a header, then label and probabilities (or the score) of each
      text. "jsonl": an object per text, with the text too.
  """
  role = _ROLES[loaded.config.task]
  if form == "tsv":
    return _tsv_lines(predictions, role, loaded.labels)
  names = columns_of_pair(loaded) or ("text",)
  return _jsonl_lines(predictions, role, loaded.labels, names)


_ROLES = {"classify": "label", "multilabel": "labels", "regress": "score"}


def _tsv_lines(
  predictions: Iterable[Prediction], role: str, labels: Sequence[str]
) -> Iterator[str]:
  names = {label: " ".join(label.split()) for label in labels}
  yield "\t".join([role, *(() if role == "score" else names.values())])
  for one in predictions:
    numbers = [f"{p:.6f}" for p in one.probabilities]
    if isinstance(one.label, str):
      shown = names[one.label]
    elif isinstance(one.label, tuple):
      shown = ",".join(names[label] for label in one.label)
    else:
      shown = f"{one.label:.6f}"
    yield "\t".join([shown, *numbers])


def _jsonl_lines(
  predictions: Iterable[Prediction],
  role: str,
  labels: Sequence[str],
  names: Sequence[str],
) -> Iterator[str]:
  for one in predictions:
    texts = (one.text,) if isinstance(one.text, str) else one.text
    record: dict[str, Any] = dict(zip(names, texts, strict=True))
    record[role] = one.label
    if role == "score":
      record[role] = round(float(record[role]), 6)
    else:
      numbers = [round(float(p), 6) for p in one.probabilities]
      record["probabilities"] = dict(zip(labels, numbers, strict=True))
    yield json.dumps(record, ensure_ascii=False)
