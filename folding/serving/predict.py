"""Classification in use: texts -> class names and probabilities."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from folding.data.batches import encode_rows
from folding.data.buckets import bucket_lengths
from folding.schema import ConfigError, require
from folding.serving.export import Loaded

_BATCHES_SORTED = 32  # texts are sorted by length among so many batches


class Prediction(NamedTuple):
  """What a classifier says about a text.

  Attributes:
    text: As it was given; what does not fit into the model is not read.
    label: Name of the most probable class.
    probabilities: float32[C], in the order of `Loaded.labels`.
  """

  text: str
  label: str
  probabilities: np.ndarray


def predict(
  loaded: Loaded,
  texts: Iterable[str],
  *,
  batch_size: int = 64,
  at_once: bool = False,
) -> Iterator[Prediction]:
  """Yields a prediction for each text, in their order.

  Texts of similar length share a batch, in one of a few shapes, so that the
  model is compiled once for each. A text is predicted as it would be alone,
  to float rounding.

  Args:
    loaded: A classifier, from `folding.load`.
    texts: Any number; about 32 batches of them are held at a time.
    batch_size: Texts that are predicted together.
    at_once: Whether to answer after each `batch_size` texts, in batches of
      less similar length.

  Raises:
    ConfigError: the model is no classifier, or the batch size is out of range.
  """
  require(
    1 <= batch_size <= 65_536,
    f"the batch size must be 1 to 65,536; it is {batch_size}",
  )
  require(
    loaded.config.task == "classify" and bool(loaded.labels),
    "this model has no classes to predict; give one of task 'classify'",
  )
  return _predict(loaded, iter(texts), batch_size, at_once)


def _predict(
  loaded: Loaded, texts: Iterator[str], batch_size: int, at_once: bool
) -> Iterator[Prediction]:
  model = loaded.model

  @jax.jit
  def forward(params, tokens_BL, keep_BL):
    logits_BC: Any = model.apply({"params": params}, tokens_BL, keep_BL)
    return jax.nn.softmax(logits_BC, axis=-1)

  params = jax.device_put(loaded.params)
  size = batch_size if at_once else batch_size * _BATCHES_SORTED
  while group := list(itertools.islice(texts, size)):
    found = _probabilities(
      loaded, functools.partial(forward, params), group, batch_size
    )
    require_numbers(np.isfinite(found), loaded.config.model.dtype)
    for text, row in zip(group, found, strict=True):
      yield Prediction(text, loaded.labels[int(row.argmax())], row)


def require_numbers(are_numbers: np.ndarray, dtype: str) -> None:
  """Raises `ConfigError` unless all that a model of a dtype gives are numbers."""
  require(
    bool(are_numbers.all()),
    "the model gives no numbers (NaN); its weights are damaged, or too large "
    f"for model.dtype {dtype}",
  )


def _probabilities(
  loaded: Loaded, forward, texts: list[str], batch_size: int
) -> np.ndarray:
  length = loaded.config.data.length
  rows = encode_rows(loaded.tokenizer, texts, length)
  buckets = bucket_lengths(length)
  order = np.argsort([row.size for row in rows], kind="stable")
  found = np.zeros((len(rows), len(loaded.labels)), np.float32)
  for start in range(0, len(rows), batch_size):
    members = order[start : start + batch_size]
    bucket = buckets[int(np.searchsorted(buckets, rows[members[-1]].size))]
    # Always of the full size, so that a last, small batch compiles nothing.
    tokens = np.full((batch_size, bucket), loaded.tokenizer.pad_id, np.int32)
    keep = np.zeros((batch_size, bucket), bool)
    for place, i in enumerate(members):
      tokens[place, : rows[i].size] = rows[i]
      keep[place, : rows[i].size] = True
    found[members] = np.asarray(forward(tokens, keep))[: len(members)]
  return found


@contextlib.contextmanager
def open_lines(path: str, stdin: Iterable[bytes]) -> Iterator[Iterator[str]]:
  """Gives the lines of a file, or of standard input for "-", as they come.

  Raises:
    OSError: the file cannot be read.
    ConfigError: a line is not UTF-8; raised when the line is reached.
  """
  if path == "-":
    yield _lines(stdin, "standard input")
  else:
    with open(path, "rb") as file:
      yield _lines(file, path)


def _lines(file: Iterable[bytes], name: str) -> Iterator[str]:
  for number, line in enumerate(file, 1):
    # A byte order mark is no text, and neither is the end of a line.
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
      yield line.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
      raise ConfigError(
        f"{name}, line {number}, is not UTF-8 ({error.reason})"
      ) from None


def tsv_lines(
  predictions: Iterable[Prediction], labels: Sequence[str]
) -> Iterator[str]:
  """Yields a header, then the label and the probabilities of each text."""
  names = {label: " ".join(label.split()) for label in labels}
  yield "\t".join(["label", *names.values()])
  for one in predictions:
    numbers = [f"{p:.6f}" for p in one.probabilities]
    yield "\t".join([names[one.label], *numbers])


def jsonl_lines(
  predictions: Iterable[Prediction], labels: Sequence[str]
) -> Iterator[str]:
  """Yields an object with text, label and {label: probability} of each text."""
  for one in predictions:
    numbers = [round(float(p), 6) for p in one.probabilities]
    record = {
      "text": one.text,
      "label": one.label,
      "probabilities": dict(zip(labels, numbers, strict=True)),
    }
    yield json.dumps(record, ensure_ascii=False)


LINES = {"tsv": tsv_lines, "jsonl": jsonl_lines}
