"""Texts -> rows of ids -> padded arrays of a few lengths, the buckets.

A program is compiled once per shape, so rows of similar length share a batch,
and its length is rounded up to that of a bucket.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from folding.data.tokenizers import Encoded, Text, Tokenizer


def encode_rows(
  tokenizer: Tokenizer, texts: Sequence[Text], length: int
) -> Encoded:
  """Returns int32 ids of each text, at least one and at most `length`."""
  end = np.array([tokenizer.end_id], np.int32)
  found = tokenizer.encode_rows(texts, length)
  # A tokenizer may find no token in a text; a model needs one.
  return found._replace(ids=[x if x.size else end for x in found.ids])


def windows(
  tokenizer: Tokenizer, texts: Iterable[str], length: int, count: int
) -> np.ndarray:
  """Returns windows of the stream of texts, int32[W, length], evenly spaced.

  There are fewer than `count` windows if the texts are shorter.
  """
  ids = np.concatenate([np.zeros(0, np.int32), *tokenizer.stream(texts)])
  whole = ids.size // length
  return ids[: whole * length].reshape(whole, length)[spaced(whole, count)]


def spaced(count: int, most: int) -> np.ndarray:
  """Returns at most `most` of `count` indices, evenly spaced.

  Example:
    >>> spaced(6, 3).tolist(), spaced(2, 3).tolist()
    ([0, 2, 4], [0, 1])
  """
  most = min(count, most)
  return np.arange(most) * count // max(most, 1)


def padded(
  rows: Sequence[np.ndarray], shape: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 tokens of a shape and their mask, False at padding.

  Args:
    rows: Ids of each row; missing rows are padding.
    shape: (B, L), at least the number of rows and the longest one.
    pad_id: Id of padding.

  Example:
    >>> tokens, mask = padded([np.array([5, 6]), np.array([7])], (2, 3), 0)
    >>> tokens.tolist(), mask.sum(1).tolist()
    ([[5, 6, 0], [7, 0, 0]], [2, 1])
  """
  tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
  for row, ids in enumerate(rows):
    tokens[row, : ids.size] = ids
    mask[row, : ids.size] = True
  return tokens, mask


def segments_of(seconds: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
  """Returns int32[B, L], the segment of each token; 0 at padding.

  `seconds` is that of `tokenizers.Encoded`, and may have fewer rows than the
  mask.
  """
  rows, length = mask_BL.shape
  second_B1 = np.full((rows, 1), length)
  second_B1[: len(seconds), 0] = seconds
  return (mask_BL & (np.arange(length) >= second_B1)).astype(np.int32)


def bucket_lengths(length: int, shortest: int = 16) -> list[int]:
  """Returns the bucket lengths: doubled from the shortest, and `length`.

  Example:
    >>> bucket_lengths(100), bucket_lengths(64)
    ([16, 32, 64, 100], [16, 32, 64])
  """
  lengths, bucket = [], shortest
  while bucket < length:
    lengths.append(bucket)
    bucket *= 2
  return [*lengths, length]


def fine_bucket_lengths(length: int) -> list[int]:
  """Returns twice as many bucket lengths: less padding, more programs.

  Example:
    >>> fine_bucket_lengths(64)
    [8, 12, 16, 24, 32, 48, 64]
  """
  return sorted({*bucket_lengths(length, 8), *bucket_lengths(length, 12)})


def by_length(
  rows: Sequence[np.ndarray], buckets: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields batches of rows of similar length, each with its bucket length.

  The last batch may have fewer rows.

  Example:
    >>> rows = [np.zeros(size) for size in (40, 3, 20)]
    >>> [(x.tolist(), bucket) for x, bucket in by_length(rows, [32, 64], 2)]
    [([1, 2], 32), ([0], 64)]
  """
  order = np.argsort([row.size for row in rows], kind="stable")
  for start in range(0, len(rows), batch_size):
    members = order[start : start + batch_size]
    longest = rows[members[-1]].size
    yield members, buckets[int(np.searchsorted(buckets, longest))]
