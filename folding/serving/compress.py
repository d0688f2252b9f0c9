"""One call that makes a trained model smaller, without training."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np

from folding import config as config_lib
from folding.compression.checks import is_whole
from folding.data.padding import (
  bucket_lengths,
  by_length,
  encode_rows,
  padded,
  segments_of,
  spaced,
  windows,
)
from folding.data.tokenizers import Encoded, MappedTokenizer, Text, Tokenizer
from folding.data.trim import most_used, token_usage
from folding.errors import ConfigError
from folding.model import Model
from folding.models.shape import shape_of
from folding.serving.batched import require_several, require_texts
from folding.serving.loaded import load
from folding.tasks import task_of
from folding.training import compress_trained as pipeline
from folding.training.allocate import Asked
from folding.training.recipe import recipe
from folding.training.trained import without_trimmed
from folding.typed import edited

_ROWS, _TOKENS = 64, 8192  # most texts and tokens per batch
WINDOW = 128  # most tokens per window of a language model
_WINDOWS = 16  # per batch, as a language model is wide


def compress(
  model: str | os.PathLike | Model,
  texts: Sequence[Text],
  *,
  saving: float = 0.7,
  max_texts: int = 512,
  structured: bool | None = None,
  uniform: bool = False,
  vocabulary: int | None = None,
  report: Callable[[str], None] = lambda _: None,
) -> Model:
  """Returns a model with fewer parameters, fitted to texts without labels.

  A plan per layer folds projections and removes neurons. The embedding gets a
  low rank. For a language model SparseGPT by default zeroes single weights, and the
  arrays keep their size. Runs of configs/pretrained.py start from such a model.
  Training recovers most of the lost quality.

  Args:
    model: A dense model, or a path or hub id that `folding.load` reads.
    texts: Texts, or pairs of texts, like those that the model will read.
    saving: Fraction of the parameters to save.
    max_texts: Number of texts to fit to, evenly spaced; of a language model, whose
      texts are read as one stream, the number of windows of 128 tokens. A low-rank
      embedding is fitted to all texts.
    structured: Whether the arrays of a language model get smaller too: neurons,
      heads and ranks leave its layers. A tied embedding stays. None: no.
    uniform: Whether all layers get one number of neurons and of heads, and nothing
      is folded, so that `save(..., "hf")` writes a folder that transformers loads
      and that is as small as the model. A plan per layer loses less.
    vocabulary: Number of tokens to keep of a structured language model, those that
      `texts` use most; the tokenizer splits other words further. None: all.
    report: Called with the plan, a table with a line per layer.

  Raises:
    ConfigError: the model is folded or shrunk already, `texts` is one string, too
      short, or not of the model's kind, a number is out of range, or no plan
      saves as much.

  Example:
    from folding.serving.predict import predict

    small = folding.compress("org/model", texts, saving=0.5)
    (found,) = predict(small, ["a text"])
    print(found.label, found.probabilities)
  """
  [small] = compress_sizes(
    model,
    texts,
    [saving],
    max_texts=max_texts,
    structured=structured,
    uniform=uniform,
    vocabulary=vocabulary,
    report=report,
  )
  return small


def compress_sizes(
  model: str | os.PathLike | Model,
  texts: Sequence[Text],
  savings: Sequence[float],
  *,
  max_texts: int = 512,
  structured: bool | None = None,
  uniform: bool = False,
  vocabulary: int | None = None,
  report: Callable[[str], None] = lambda _: None,
) -> Iterator[Model]:
  """Yields a model compressed by each saving, and measures it once.

  The other arguments and the errors are those of `compress`.
  """
  require_several(texts)
  require_fractions(savings)
  if not is_whole(max_texts, 1, math.inf):
    raise ConfigError(
      f"max_texts is a whole number, at least 1; it is {max_texts!r}"
    )
  loaded = model if isinstance(model, Model) else load(model)
  if not loaded.shape.is_dense:
    raise ConfigError("this model is folded or shrunk; give the dense one")
  texts = list(texts)
  if not texts:
    raise ConfigError("give texts like those that the model will read")
  require_texts(texts, loaded.pair)
  source = config_lib.IN_MEMORY if isinstance(model, Model) else str(model)
  tokenizer, kept = loaded.tokenizer, kept_of(loaded, vocabulary)
  if vocabulary is not None:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for ids in tokenizer.stream(cast(list[str], texts)):
      counts += np.bincount(ids, minlength=len(counts))
    tokenizer = most_used(tokenizer, counts, vocabulary)
    kept = tokenizer.vocab_size / loaded.num_rows
  sizes = []
  for saving in savings:
    config = recipe(
      loaded.config,
      float(saving),
      structured=structured,
      uniform=uniform,
      kept=kept,
    )
    # No training follows in which FPP could prune.
    config = edited(config, {"compress.prune": "sparsegpt"})
    config = config_lib.resolve(dataclasses.replace(config, pretrained=source))
    sizes.append(Asked(shape_of(config), config.fpp, config.compress))
  batches, usage_V = _calibration(loaded, tokenizer, texts, max_texts)
  for small, rows in pipeline.compress_sizes(
    sizes, loaded, batches, usage_V, source=source
  ):
    if rows:
      layers = small.targets.layers if small.targets else None
      report(pipeline.fold_table(rows, layers))
    small = dataclasses.replace(small, tokenizer=tokenizer, targets=None)
    yield small if vocabulary is None else without_trimmed(small)


def require_fractions(savings: Sequence[float]) -> None:
  """Raises `ConfigError` unless each saving is between 0 and 1."""
  for saving in savings:
    if not (isinstance(saving, float | np.floating) and 0 < saving < 1):
      raise ConfigError(
        f"saving is a fraction between 0 and 1; it is {saving!r}"
      )


def _calibration(
  loaded: Model, tokenizer: Tokenizer, texts: Sequence[Text], max_texts: int
) -> tuple[list[dict[str, np.ndarray]], np.ndarray | None]:
  """Returns the batches to fit a model to, and `token_usage` of all texts.

  Those of a language model are windows of the stream of texts, read by
  `tokenizer`, and their usage is None.
  """
  length = loaded.shape.max_length
  if task_of(loaded).predicts_tokens:
    stream = cast(list[str], texts)
    ids_WL = windows(tokenizer, stream, min(length, WINDOW), max_texts)
    if isinstance(tokenizer, MappedTokenizer):  # it is fitted as it was trained
      ids_WL = tokenizer.plain_ids[ids_WL]
    return _windows(ids_WL), None
  encoded = encode_rows(loaded.tokenizer, texts, length)
  counts = np.bincount(np.concatenate([np.zeros(0, np.int32), *encoded.ids]))
  batches = _batches(encoded, max_texts, length, loaded.tokenizer.pad_id)
  return batches, token_usage(counts, loaded.num_rows)


def kept_of(model: Model, vocabulary: int | None) -> float | None:
  """Returns the fraction of a model's tokens that `vocabulary` keeps.

  Raises:
    ConfigError: it does not make this model smaller.
  """
  if vocabulary is None:
    return None
  if not task_of(model).predicts_tokens:
    raise ConfigError(
      "vocabulary is for language models; the embedding of an encoder gets a low "
      "rank"
    )
  count = model.tokenizer.vocab_size  # the embedding may have rows past these
  if not 1 <= vocabulary < count:
    raise ConfigError(
      f"vocabulary is the number of tokens to keep, fewer than {count}; "
      f"it is {vocabulary}"
    )
  return vocabulary / count


def _windows(ids_WL: np.ndarray) -> list[dict[str, np.ndarray]]:
  """Returns the windows of a language model in batches."""
  return [
    {"tokens": ids_BL, "mask": np.ones_like(ids_BL, bool)}
    for ids_BL in np.split(ids_WL, range(_WINDOWS, len(ids_WL), _WINDOWS))
  ]


def _batches(
  encoded: Encoded, max_texts: int, length: int, pad_id: int
) -> list[dict[str, np.ndarray]]:
  """Returns texts of similar length in batches, padded to few lengths."""
  # Not the first ones, as a file may be sorted by class.
  chosen = spaced(len(encoded.ids), max_texts)
  rows, batches = [encoded.ids[i] for i in chosen], []
  size, longest = _ROWS, max(row.size for row in rows)
  while size > 1 and size * longest > _TOKENS:
    size //= 2
  count = -(-len(rows) // size)
  if count > 1 and len(rows) >= 32 * count:
    # One even size, because each shape is compiled, and each half of it.
    size = len(rows) // count // 2 * 2
    rows = rows[: size * count]
  groups = list(by_length(rows, bucket_lengths(length), size))
  lengths = [bucket for _, bucket in groups]
  for n, bucket in enumerate(lengths[:-1]):  # a single batch joins the next
    if lengths.count(bucket) == 1 and lengths[n + 1] <= 2 * bucket:
      lengths[n] = lengths[n + 1]
  for (at, _), bucket in zip(groups, lengths, strict=True):
    tokens, mask = padded([rows[i] for i in at], (len(at), bucket), pad_id)
    batch = {"tokens": tokens, "mask": mask}
    if encoded.seconds is not None:
      batch["segments"] = segments_of(encoded.seconds[chosen[at]], mask)
    batches.append(batch)
  return batches
