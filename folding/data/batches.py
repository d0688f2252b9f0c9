"""Tokens in memory -> batches of a fixed shape, as a function of the step.

A whole data set of ids is held in memory, two bytes a token (four where the
vocabulary passes 65,536): good for a few hundred megabytes of text.

B is the batch size over all processes, L the length of an example.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np

from folding import config as config_lib
from folding import schema
from folding.data import sources, tokenizers
from folding.data.buckets import bucket_lengths, bucketed

Batch: TypeAlias = dict[str, np.ndarray]

_FOREVER = 1 << 40  # steps; Grain wants some number


@dataclasses.dataclass(frozen=True)
class Data:
  """The batches of a run. Made by `make_data`.

  A batch of a language model ("lm"), next-token prediction:
    tokens: int32[B, L].
    targets: int32[B, L], the token after each.
    weights: float32[B, L], 1 where the target is scored, 0 at padding.
  The documents of a split are one stream (see `Tokenizer.stream`), in windows
  that share one token; so each token but the first of all is a target once.

  A batch of classification ("classify"), Lb one of a few bucket lengths:
    tokens: int32[B, Lb].
    mask: bool[B, Lb], True at tokens, False at padding.
    labels: int32[B].
    weights: float32[B], 1 for a row, 0 for padding.

  With several processes each gets its share of the rows: B / count.

  Attributes:
    tokenizer: Text to ids; its vocabulary is the model's.
    num_classes: Of classification; 0 for "lm".
    label_names: Class names in id order; () for "lm".
    num_bytes: UTF-8 bytes of text behind the targets of a split ("lm"; end
      tokens stand for 0 bytes), so that the sum of the loss in nats over an
      evaluation / ln 2 / num_bytes is bits per byte. {} for "classify".
    num_examples: Windows or rows of each split.
    digest: SHA-256 of all text and labels, in hexadecimal.
  """

  tokenizer: tokenizers.Tokenizer
  num_classes: int
  label_names: tuple[str, ...]
  num_bytes: dict[str, int]
  num_examples: dict[str, int]
  digest: str
  _batch_size: int
  _first_batch: int
  _train_ids: Sequence[np.ndarray]
  _train_batch: Callable[[int], Batch]
  _eval_batch: Callable[[str, int], Batch]
  _eval_batch_size: int
  _prefetch_batches: int

  def train_batch(self, step: int) -> Batch:
    """Returns the batch of a step: the same whenever it is asked for."""
    return self._train_batch(self._first_batch + step)

  def first_epoch(self) -> Iterator[Batch]:
    """Yields batches of training that share no row, whatever the first step is."""
    for index in range(self.num_examples["train"] // self._batch_size):
      yield self._train_batch(index)

  def token_counts(self) -> np.ndarray:
    """Returns int64[V], how often the text of training has each token."""
    size, group = self.tokenizer.vocab_size, 256
    count_V = np.zeros(size, np.int64)
    # Not all at once: NumPy counts in eight bytes a token.
    for start in range(0, len(self._train_ids), group):
      ids = np.concatenate(self._train_ids[start : start + group])
      count_V += np.bincount(ids, minlength=size)
    return count_V

  def full_share(self, length: int) -> float:
    """Returns which share of the training texts has so many tokens, or more."""
    return float(np.mean([ids.size >= length for ids in self._train_ids]))

  def train_batches(self, first_step: int) -> Iterator[Batch]:
    """Yields the batches from a step on, prepared ahead by a thread."""
    ahead = self._prefetch_batches
    options = grain.ReadOptions(
      num_threads=min(ahead, 1), prefetch_buffer_size=ahead
    )
    steps = grain.MapDataset.range(first_step, _FOREVER)
    return iter(steps.map(self.train_batch).to_iter_dataset(options))

  def eval_batches(self, split: str) -> Iterator[Batch]:
    """Yields a whole split once, in order; padding has weight 0.

    Raises:
      schema.ConfigError: the split is empty.
    """
    size = self.num_examples[split]
    schema.require(
      size > 0,
      f"there is no {split} split; set data.{split}_fraction above 0",
    )
    for index in range(-(-size // self._eval_batch_size)):
      yield self._eval_batch(split, index)


def make_data(
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Data:
  """Reads the text, trains or takes the tokenizer, and plans the batches.

  Args:
    config: A resolved config; its seed decides the order of training.
    tokenizer: What a run was trained with; None: what the config says.
    process_index: This process.
    process_count: Processes that share each batch.

  Raises:
    schema.ConfigError: the source or the tokenizer is at fault, or the train
      split does not fill one batch, or processes cannot share a batch evenly.
  """
  data = config.data
  for name in ("batch_size", "eval_batch_size"):
    size = getattr(data, name)
    schema.require(
      size % process_count == 0,
      f"data.{name} {size} does not divide among {process_count} processes; "
      "use a multiple",
    )
  texts = sources.load_texts(data, config.task)
  if tokenizer is None:
    tokenizer = tokenizers.train_tokenizer(data, texts.texts["train"])
  # One number of 32 bits, so that seeds 0 and 1 share no epoch: Grain adds the
  # epoch to the seed.
  seed = int(np.random.SeedSequence(config.seed % 2**64).generate_state(1)[0])
  share = slice(process_index, None, process_count)
  plan = _plan_lm if config.task == "lm" else _plan_classify
  train_batch, eval_batch, num_examples, train_ids = plan(
    data, texts, tokenizer, seed, share
  )
  num_bytes = {}
  if config.task == "lm":
    num_bytes = {
      split: sum(len(text.encode("utf-8")) for text in texts.texts[split])
      for split in sources.SPLITS
    }
  return Data(
    tokenizer=tokenizer,
    num_classes=len(texts.label_names),
    label_names=texts.label_names,
    num_bytes=num_bytes,
    num_examples=num_examples,
    digest=_digest(texts),
    _batch_size=data.batch_size,
    _first_batch=data.first_batch,
    _train_ids=train_ids,
    _train_batch=train_batch,
    _eval_batch=eval_batch,
    _eval_batch_size=data.eval_batch_size,
    _prefetch_batches=data.prefetch_batches,
  )


def vocab_size(data: config_lib.DataConfig) -> int:
  """Returns the number of ids that a tokenizer has, or is to have.

  Raises:
    schema.ConfigError: see `tokenizers.load_tokenizer`.
  """
  if data.tokenizer == "bytes":
    return tokenizers.NUM_BYTES + 2
  if data.tokenizer == "bpe":
    return data.vocab_size
  return tokenizers.load_tokenizer(data.tokenizer).vocab_size


def _digest(texts: sources.Texts) -> str:
  sha = hashlib.sha256()
  for split in sources.SPLITS:
    for text in texts.texts[split]:
      encoded = text.encode("utf-8")
      sha.update(len(encoded).to_bytes(8, "little") + encoded)
    sha.update(b"end")
    if texts.labels is not None:
      sha.update(texts.labels[split].tobytes())
  return sha.hexdigest()


def _plan_lm(
  data: config_lib.DataConfig,
  texts: sources.Texts,
  tokenizer: tokenizers.Tokenizer,
  seed: int,
  share: slice,
):
  """Returns the two batch functions, windows by split, ids of training."""
  length = data.length
  streams = {
    split: _stream(tokenizer, texts.texts[split]) for split in sources.SPLITS
  }
  sizes = {
    split: -(-(len(stream) - 1) // length) if texts.texts[split] else 0
    for split, stream in streams.items()
  }
  sizes["train"] = (len(streams["train"]) - 1) // length
  _require_a_batch(data, sizes["train"], f"windows of {length} tokens")
  order = grain.MapDataset.range(sizes["train"]).shuffle(seed=seed).repeat()
  rows = order[share].batch(data.batch_size // (share.step or 1))

  def windows(split: str, index: np.ndarray) -> Batch:
    stream = streams[split]
    at = index[:, None] * length + np.arange(length + 1)
    ids = np.where(
      at < len(stream),
      stream[np.minimum(at, len(stream) - 1)].astype(np.int32),
      np.int32(tokenizer.pad_id),
    )
    weights = (at[:, 1:] < len(stream)).astype(np.float32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}

  def train_batch(step: int) -> Batch:
    return windows("train", np.asarray(rows[step]))

  def eval_batch(split: str, index: int) -> Batch:
    start = index * data.eval_batch_size
    return windows(split, np.arange(start, start + data.eval_batch_size)[share])

  stream = streams["train"]
  pieces = [stream[i : i + 4096] for i in range(0, len(stream), 4096)]
  return train_batch, eval_batch, sizes, pieces


def _stream(tokenizer: tokenizers.Tokenizer, texts) -> np.ndarray:
  """Returns the documents in a row, as the smallest integers."""
  dtype = _dtype(tokenizer)
  return np.concatenate([ids.astype(dtype) for ids in tokenizer.stream(texts)])


def _plan_classify(
  data: config_lib.DataConfig,
  texts: sources.Texts,
  tokenizer: tokenizers.Tokenizer,
  seed: int,
  share: slice,
):
  """Returns the two batch functions, rows by split, and ids of training."""
  assert texts.labels is not None
  labels = texts.labels
  buckets = bucket_lengths(data.length)
  ids = {
    split: [
      row.astype(_dtype(tokenizer))
      for row in encode_rows(tokenizer, texts.texts[split], data.length)
    ]
    for split in sources.SPLITS
  }
  sizes = {split: len(rows) for split, rows in ids.items()}
  _require_a_batch(data, sizes["train"], "texts")
  bucket_of = np.searchsorted(buckets, [row.size for row in ids["train"]])
  num_batches = sizes["train"] // data.batch_size

  def rows(split: str, index: np.ndarray, bucket: int, size: int) -> Batch:
    tokens = np.full((size, bucket), tokenizer.pad_id, np.int32)
    lengths = np.zeros(size, np.int64)
    batch_labels = np.zeros(size, np.int32)
    for place, i in enumerate(index):
      row = ids[split][i]
      tokens[place, : row.size] = row
      lengths[place] = row.size
      batch_labels[place] = labels[split][i]
    batch = {
      "tokens": tokens,
      "mask": np.arange(bucket) < lengths[:, None],
      "labels": batch_labels,
      "weights": (np.arange(size) < len(index)).astype(np.float32),
    }
    return {name: array[share] for name, array in batch.items()}

  # Two, for a thread that is an epoch ahead of its reader.
  @functools.lru_cache(maxsize=2)
  def epoch_batches(epoch: int) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng([seed, epoch])
    return bucketed(rng, bucket_of, buckets, data.batch_size)

  def train_batch(step: int) -> Batch:
    epoch, index = divmod(step, num_batches)
    bucket, members = epoch_batches(epoch)[index]
    return rows("train", members, bucket, data.batch_size)

  def eval_batch(split: str, index: int) -> Batch:
    size = data.eval_batch_size
    members = np.arange(index * size, min((index + 1) * size, sizes[split]))
    longest = max(ids[split][i].size for i in members)
    bucket = buckets[int(np.searchsorted(buckets, longest))]
    return rows(split, members, bucket, size)

  return train_batch, eval_batch, sizes, ids["train"]


def encode_rows(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int
) -> list[np.ndarray]:
  """Returns int32 ids of each text, at least one and at most `length`."""
  end = np.array([tokenizer.end_id], np.int32)
  # A foreign tokenizer may find nothing in a text; a model needs a token.
  return [
    row if row.size else end for row in tokenizer.encode_batch(texts, length)
  ]


def _dtype(tokenizer: tokenizers.Tokenizer) -> type[np.integer]:
  return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def _require_a_batch(data: config_lib.DataConfig, size: int, what: str) -> None:
  schema.require(
    size >= data.batch_size,
    f"the train split has {size} {what}, fewer than one batch of "
    f"{data.batch_size}; lower data.batch_size or give more text",
  )
