"""Classification: texts -> class names and probabilities."""

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

from folding.data.batches import bucket_lengths, encode_rows
from folding.errors import ConfigError
from folding.serving.export import Loaded

_log = logging.getLogger(__name__)

_BATCHES_SORTED = 32  # texts are sorted by length among so many batches


class Prediction(NamedTuple):
  """The class of a text.

  Attributes:
    text: As given; the model reads at most `data.length` tokens of it.
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
  """Yields a prediction per text, in their order.

  Texts of similar length share a batch, in one of a few shapes, so the model is
  compiled once per shape. A prediction does not depend on the other texts of
  its batch, to float rounding.

  Args:
    loaded: A classifier, from `folding.load`.
    texts: Any number; about 32 batches of them are held at a time.
    batch_size: Texts per batch.
    at_once: Whether to answer after each `batch_size` texts, in batches of
      less similar length.

  Raises:
    ConfigError: the model is no classifier, the batch size is out of range, or
      the model returns NaN.
  """
  if not 1 <= batch_size <= 65_536:
    raise ConfigError(f"the batch size must be 1 to 65,536; it is {batch_size}")
  if loaded.config.task != "classify" or not loaded.labels:
    raise ConfigError(
      "this model has no classes to predict; give one of task 'classify'"
    )
  return _predict(loaded, iter(texts), batch_size, at_once)


def _predict(
  loaded: Loaded, texts: Iterator[str], batch_size: int, at_once: bool
) -> Iterator[Prediction]:
  model, params = loaded.model, jax.device_put(loaded.params)

  @jax.jit
  def forward(params, tokens_BL, mask_BL):
    logits_BC: Any = model.apply({"params": params}, tokens_BL, mask_BL)
    return jax.nn.softmax(logits_BC, axis=-1)

  size = batch_size if at_once else batch_size * _BATCHES_SORTED
  labelled = tuple(f"{label}\t" for label in loaded.labels)
  while group := list(itertools.islice(texts, size)):
    if labelled and all(text.startswith(labelled) for text in group):
      _log.warning("each line begins with a label, which is read as its text")
      labelled = ()
    found = _probabilities(
      loaded, functools.partial(forward, params), group, batch_size
    )
    require_numbers(np.isfinite(found), loaded.config.model.dtype)
    for text, row in zip(group, found, strict=True):
      yield Prediction(text, loaded.labels[int(row.argmax())], row)


def require_numbers(are_numbers: np.ndarray, dtype: str) -> None:
  """Raises `ConfigError` unless all outputs of a model are numbers."""
  if not are_numbers.all():
    raise ConfigError(
      "the model returns no numbers (NaN); its weights are damaged, or too "
      f"large for model.dtype {dtype}"
    )


def _probabilities(
  loaded: Loaded,
  forward: Callable[[np.ndarray, np.ndarray], jax.Array],
  texts: list[str],
  batch_size: int,
) -> np.ndarray:
  """Returns float32[texts, C]."""
  length = loaded.config.data.length
  rows = encode_rows(loaded.tokenizer, texts, length)
  buckets = bucket_lengths(length)
  order = np.argsort([row.size for row in rows], kind="stable")
  found = np.zeros((len(rows), len(loaded.labels)), np.float32)
  for start in range(0, len(rows), batch_size):
    members = order[start : start + batch_size]
    bucket = buckets[int(np.searchsorted(buckets, rows[members[-1]].size))]
    # The full batch size, so that a smaller last batch compiles nothing.
    tokens = np.full((batch_size, bucket), loaded.tokenizer.pad_id, np.int32)
    mask = np.zeros((batch_size, bucket), bool)
    for position, i in enumerate(members):
      tokens[position, : rows[i].size] = rows[i]
      mask[position, : rows[i].size] = True
    found[members] = np.asarray(forward(tokens, mask))[: len(members)]
  return found


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[Iterator[str]]:
  """Yields an iterator of the lines of a file, or of standard input for "-".

  Raises:
    OSError: the file cannot be read.
    ConfigError: standard input is closed; or, when that line is reached, a line
      is not UTF-8.
  """
  if path != "-":
    with open(path, "rb") as file:
      yield _decoded(file, path)
  elif sys.stdin is None:  # as in a daemon
    raise ConfigError("there is no standard input to read")
  else:
    yield _decoded(sys.stdin.buffer, "standard input")


def _decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
  for number, line in enumerate(file, 1):
    # A byte order mark is no text, but only at the start of the file.
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
  """Yields an object with text, label and {label: probability} per text."""
  for one in predictions:
    numbers = [round(float(p), 6) for p in one.probabilities]
    record = {
      "text": one.text,
      "label": one.label,
      "probabilities": dict(zip(labels, numbers, strict=True)),
    }
    yield json.dumps(record, ensure_ascii=False)


LINES = {"tsv": tsv_lines, "jsonl": jsonl_lines}
