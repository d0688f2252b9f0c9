"""Runs a model over texts, in batches of similar length."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from folding.compression import checks
from folding.data.padding import (
  by_length,
  encode_rows,
  fine_bucket_lengths,
  padded,
  segments_of,
)
from folding.data.tokenizers import Text, Tokenizer
from folding.errors import ConfigError
from folding.models.transformer import Transformer

_LONG = 512  # tokens per text, from which on a batch has fewer rows


def require_size(batch_size: int) -> None:
  """Raises `ConfigError` if a batch size is out of range."""
  if not checks.is_whole(batch_size, 1, 65_537):
    raise ConfigError(
      f"the batch size must be a whole number, 1 to 65,536; it is {batch_size!r}"
    )


def require_several(texts: Iterable[Text]) -> None:
  """Raises `ConfigError` for a string: its characters would be the texts."""
  if isinstance(texts, str):
    raise ConfigError("give a list of texts; this is one text")


def require_texts(
  texts: Iterable[Any], pair: tuple[str, str] | None = None
) -> None:
  """Raises `ConfigError` unless all texts are strings or, for pairs, two each."""
  for text in texts:
    if pair:
      is_two = isinstance(text, tuple | list) and len(text) == 2
      is_right = is_two and all(isinstance(part, str) for part in text)
    else:
      is_right = isinstance(text, str)
    if not is_right:
      kind = f"pairs ({' and '.join(pair)})" if pair else "single texts"
      raise ConfigError(f"this model reads {kind}, and {text!r:.80} is not one")


def require_finite(is_finite: np.ndarray, dtype: str) -> None:
  """Raises `ConfigError` unless all outputs of a model are finite."""
  if not is_finite.all():
    raise ConfigError(
      "the model returns no numbers (NaN); its weights are damaged, or too "
      f"large for model.dtype {dtype}"
    )


@functools.partial(jax.jit, static_argnames=("model", "activate"))
def forward(params, tokens_BL, mask_BL, segments_BL, *, model, activate):
  """Returns probabilities or scores [B, C], or vectors [B, D]."""
  return activate(
    model.apply({"params": params}, tokens_BL, mask_BL, True, segments_BL)
  )


def _rows_of(bucket: int, batch_size: int) -> int:
  """Returns the rows of a batch: fewer if its texts are longer than most."""
  return min(batch_size, max(1, batch_size * _LONG // bucket))


def _batches(
  rows: Sequence[np.ndarray], buckets: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields `by_length`, in batches of at most `_rows_of` their bucket."""
  for members, bucket in by_length(rows, buckets, batch_size):
    size = _rows_of(bucket, batch_size)
    for part, length in by_length([rows[i] for i in members], buckets, size):
      yield members[part], length


def outputs(
  model: Transformer,
  tokenizer: Tokenizer,
  params: Any,
  texts: Sequence[Text],
  *,
  batch_size: int,
  activate: Callable[[Any], Any],
  report: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
  """Returns the outputs of `forward` in the order of the texts, as float32.

  Texts are all single, or all pairs. `activate` turns outputs of the model into
  those of `forward`. `report` is called after each batch with its number of
  texts.

  Raises:
    ConfigError: the model returns NaN.
  """
  length = model.shape.max_length
  rows, seconds = encode_rows(tokenizer, texts, length)
  width = model.num_classes or model.shape.width
  found = np.zeros((len(rows), width), np.float32)
  buckets = fine_bucket_lengths(length)
  for members, bucket in _batches(rows, buckets, batch_size):
    # The full batch size, so that a smaller last batch compiles nothing.
    shape = _rows_of(bucket, batch_size), bucket
    tokens, mask = padded([rows[i] for i in members], shape, tokenizer.pad_id)
    segments = None  # a model without a segment embedding ignores them
    if seconds is not None:
      segments = segments_of(seconds[members], mask)
    out = forward(
      params, tokens, mask, segments, model=model, activate=activate
    )
    found[members] = np.asarray(out)[: len(members)]
    report(len(members))
  require_finite(np.isfinite(found), model.shape.dtype)
  return found
