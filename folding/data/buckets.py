"""Texts of like length together, so that little of a batch is padding."""

import numpy as np

SHORTEST_BUCKET = 16


def bucket_lengths(length: int) -> list[int]:
  """Returns the bucket lengths: powers of two below `length`, and `length`.

  Example:
    >>> bucket_lengths(100), bucket_lengths(64)
    ([16, 32, 64, 100], [16, 32, 64])
  """
  lengths, bucket = [], SHORTEST_BUCKET
  while bucket < length:
    lengths.append(bucket)
    bucket *= 2
  return [*lengths, length]


def bucketed(
  rng: np.random.Generator,
  bucket_of: np.ndarray,
  buckets: list[int],
  batch_size: int,
) -> list[tuple[int, np.ndarray]]:
  """Returns an epoch's batches as (bucket length, rows), in random order.

  Fewer than B rows are left out, of any length. Others that do not fill a batch
  of their bucket move up to the next.

  Args:
    rng: Of the epoch.
    bucket_of: int[N], the bucket of each row.
    buckets: Their lengths.
    batch_size: B; N or fewer.
  """
  batches, left = [], np.array([], np.int64)
  num_rows = len(bucket_of) // batch_size * batch_size
  stays = rng.permutation(len(bucket_of))[:num_rows]
  for bucket, length in enumerate(buckets):
    own = stays[bucket_of[stays] == bucket]
    # What moved up goes first, lest it move up again.
    members = np.concatenate([left, own])
    num_full = len(members) // batch_size * batch_size
    for batch in rng.permutation(members[:num_full]).reshape(-1, batch_size):
      batches.append((length, batch))
    left = members[num_full:]
  return [batches[i] for i in rng.permutation(len(batches))]
