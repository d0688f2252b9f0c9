"""Runs a model over texts, in batches of similar length."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from folding.config import Config
from folding.data.padding import by_length, encode_rows, padded, segments_of
from folding.data.tokenizers import Text, Tokenizer
from folding.errors import ConfigError


def require_size(batch_size: int) -> None:
  """Raises `ConfigError` if a batch size is out of range."""
  if not 1 <= batch_size <= 65_536:
    raise ConfigError(f"the batch size must be 1 to 65,536; it is {batch_size}")


def require_several(texts: Iterable[Text]) -> None:
  """Raises `ConfigError` for one text, whose characters would be the texts."""
  if isinstance(texts, str):
    raise ConfigError("give a list of texts; this is one text")


def require_numbers(are_numbers: np.ndarray, dtype: str) -> None:
  """Raises `ConfigError` unless all outputs of a model are numbers."""
  if not are_numbers.all():
    raise ConfigError(
      "the model returns no numbers (NaN); its weights are damaged, or too "
      f"large for model.dtype {dtype}"
    )


def outputs(
  config: Config,
  tokenizer: Tokenizer,
  forward: Callable[..., jax.Array],
  texts: Sequence[Text],
  *,
  batch_size: int,
  width: int,
  report: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
  """Returns float32[texts, width], the outputs of a model in the texts' order.

  Args:
    config: Resolved config of the model.
    tokenizer: Tokenizer of the model.
    forward: (tokens, mask, segments or None) -> float[B, width].
    texts: All single, or all pairs.
    batch_size: Texts per batch; those of a batch are of similar length.
    width: Numbers per text.
    report: Called after each batch with its number of texts.
  """
  length = config.data.length
  rows, seconds = encode_rows(tokenizer, texts, length)
  found = np.zeros((len(rows), width), np.float32)
  for members, bucket in by_length(rows, length, batch_size):
    # The full batch size, so that a smaller last batch compiles nothing.
    tokens, mask = padded(
      [rows[i] for i in members], (batch_size, bucket), tokenizer.pad_id
    )
    segments = None  # a model without a segment embedding ignores them
    if seconds is not None:
      segments = segments_of(seconds[members], mask)
    out = np.asarray(forward(tokens, mask, segments))
    found[members] = out[: len(members)]
    report(len(members))
  return found
