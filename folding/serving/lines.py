"""Input and output lines of the command line: texts and predictions."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from folding.data.tokenizers import Text
from folding.errors import ConfigError, printable
from folding.model import Model
from folding.serving.predict import Prediction
from folding.tasks import task_of

_TABLES = (".csv", ".jsonl", ".parquet", ".arrow")


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[Iterator[str]]:
  """Yields an iterator of the lines of a file, or of standard input for "-".

  Raises:
    OSError: the file cannot be read.
    ConfigError: the file is a table, or standard input is closed. Reading its lines
      raises it if the file is empty or a line is not UTF-8.
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
  number = 0
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
  if not number:
    raise ConfigError(f"there is no text in {name}")


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


def of_predictions(
  loaded: Model, predictions: Iterable[Prediction], form: str
) -> Iterator[str]:
  """Yields predictions as lines.

  Args:
    loaded: The model that made them.
    predictions: From `predict`.
    form: "tsv": a header, then label and probabilities (or the score) of each
      text. "jsonl": an object per text, with the text too.
  """
  kinds = task_of(loaded).labels
  assert kinds is not None  # `predict` refuses other tasks
  role, labels = kinds.columns[0], loaded.labels
  if kinds.kind == "score":  # it has no probabilities
    labels = ()
  if form == "tsv":
    return _tsv_lines(predictions, role, labels)
  return _jsonl_lines(predictions, role, labels, loaded.pair or ("text",))


def _tsv_lines(
  predictions: Iterable[Prediction], role: str, labels: Sequence[str]
) -> Iterator[str]:
  names = {label: printable(" ".join(label.split())) for label in labels}
  for number, one in enumerate(predictions):
    if number == 0:  # not before a first text was read
      yield "\t".join([role, *names.values()])
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
    if not labels:
      record[role] = round(float(record[role]), 6)
    else:
      numbers = [round(float(p), 6) for p in one.probabilities]
      record["probabilities"] = dict(zip(labels, numbers, strict=True))
    # JSON escapes the other control characters itself.
    yield printable(json.dumps(record, ensure_ascii=False))
