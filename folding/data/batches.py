"""Token ids -> batches of fixed shapes, as a function of the step.

The ids of a data set are in memory, or, for large text of a language model,
mapped into it (`corpus`): two bytes per token, four if the vocabulary passes
65,536.

B is the batch size over all processes, L the sequence length.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import TypeAlias

import grain
import numpy as np

from folding.config import DataConfig, Order
from folding.data import corpus, sources, tokenizers
from folding.data.padding import (
  bucket_lengths,
  encode_rows,
  padded,
  segments_of,
)
from folding.data.tokenizers import MappedTokenizer, Tokenizer, flat
from folding.errors import ConfigError
from folding.models.hf_weights import find_pretrained, find_tokenizer
from folding.tasks import task_of

Batch: TypeAlias = dict[str, np.ndarray]

STS = "sts"  # split of `DataConfig.sts`
_NUM_STEPS = 1 << 40  # endless; Grain needs a number
_COUNTED = 1 << 20  # tokens that are counted together


@dataclasses.dataclass(frozen=True)
class Data:
  """The batches of a run. Made by `make_data`.

  A batch of a language model ("lm"), next-token prediction:

  - `tokens`: int32[B, L].
  - `targets`: int32[B, L], the token after each.
  - `weights`: float32[B, L], 1 if the target is scored, 0 at padding.

  The documents of a split are one stream (see `Tokenizer.stream`). Windows of
  it share one token, so each token but the first of all is a target once.

  A batch of the other tasks, Lb one of a few bucket lengths:

  - `tokens`: int32[B, Lb].
  - `mask`: bool[B, Lb], False at padding.
  - `segments`: int32[B, Lb], 1 at the second text of a pair; left out if the
    tokenizer does not distinguish the two.
  - `labels`: int32[B] classes ("classify"), float32[B] scores ("regress"), or
    float32[B, C], 1 at the classes of a row ("multilabel").
  - `weights`: float32[B], 1 for a row, 0 for padding.

  Task "embed" has no labels. If its teacher has another tokenizer, batches also
  have the texts as the teacher reads them: `teacher_tokens`, `teacher_mask`.

  With several processes, each gets its share of the rows: B / count.

  Attributes:
    tokenizer: Text to ids; its vocabulary is that of the model.
    digest: SHA-256 of all text and labels, in hexadecimal.
    config: Batch sizes and the like.
    examples: Ids of all splits, cut into batches.
    num_bytes: UTF-8 bytes of text behind the targets of each split ("lm"). An
      end token stands for 0 bytes. The summed loss in nats of an evaluation /
      ln 2 / num_bytes is bits per byte. {} for other tasks.
    label_names: Names of the head's outputs, classes in id order; () without a
      head.
    pair: Columns of pairs; None for single texts.
    scores: float32[pairs] of `data.sts`, whose texts are the split "sts": all
      the first ones, then all the second ones. None without.
    texts: The text itself, if tokens are to leave the tokenizer; otherwise None.
    teacher_tokenizer: That of `teacher_tokens`; None: batches have none.
  """

  tokenizer: Tokenizer
  digest: str
  config: DataConfig
  examples: "_Windows | _Rows"
  num_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
  label_names: tuple[str, ...] = ()
  pair: tuple[str, str] | None = None
  scores: np.ndarray | None = None
  texts: sources.Texts | None = None
  teacher_tokenizer: Tokenizer | None = None

  @property
  def num_classes(self) -> int:
    """Number of outputs of the head; 0 without a head."""
    return len(self.label_names)

  @property
  def num_examples(self) -> dict[str, int]:
    """Number of windows or rows of each split."""
    return self.examples.sizes

  @property
  def has_segments(self) -> bool:
    """Whether batches have "segments"."""
    return self.examples.has_segments

  def train_batch(self, step: int) -> Batch:
    """Returns the batch of a step, a function of (config, seed, step)."""
    step += self.config.first_batch
    return self.examples.train_batch(step, self.examples.share)

  def first_epoch(self) -> Iterator[Batch]:
    """Yields the batches of the first epoch, whatever `first_batch` is.

    Each process gets all rows.
    """
    for step in range(self.num_examples["train"] // self.config.batch_size):
      yield self.examples.train_batch(step, slice(None))

  def token_counts(self) -> np.ndarray:
    """Returns int64[V], the number of each token in the training split."""
    size = self.tokenizer.vocab_size
    count_V = np.zeros(size, np.int64)
    rows = self.examples.train_ids
    ids = rows[0] if len(rows) == 1 else np.concatenate(rows)
    # In pieces: NumPy counts in eight bytes per token.
    for start in range(0, ids.size, _COUNTED):
      count_V += np.bincount(ids[start : start + _COUNTED], minlength=size)
    return count_V

  def full_share(self, length: int) -> float:
    """Returns the share of training texts with at least `length` tokens."""
    sizes = [ids.size for ids in self.examples.train_ids]
    return float(np.mean(np.array(sizes) >= length))

  def train_batches(self, first_step: int) -> Iterator[Batch]:
    """Yields the batches from a step on, prepared ahead by a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    steps = grain.MapDataset.range(first_step, _NUM_STEPS)
    return iter(steps.map(self.train_batch).to_iter_dataset(options))

  def eval_batches(self, split: str) -> Iterator[Batch]:
    """Yields a whole split once, in order; padding has weight 0.

    Raises:
      ConfigError: the split is empty.
    """
    size = self.num_examples[split]
    if size == 0:
      raise ConfigError(
        f"there is no {split} split; set data.{split}_fraction above 0"
      )
    for index in range(-(-size // self.config.eval_batch_size)):
      yield self.examples.eval_batch(split, index)


def make_data(
  order: Order,
  tokenizer: Tokenizer | None = None,
  process_index: int = 0,
  process_count: int = 1,
  texts: sources.Texts | None = None,
  *,
  keep_tokens: bool = True,
) -> Data:
  """Reads the text, trains or loads the tokenizer, and plans the batches.

  Args:
    order: Resolved; its seed decides the order of training.
    tokenizer: The tokenizer of a trained model; None: that of the config.
    process_index: Index of this process.
    process_count: Number of processes that share each batch.
    texts: Texts of data that was made before; None: read them.
    keep_tokens: Whether to keep the ids of large text on disk, for later runs.

  Raises:
    ConfigError: the source or the tokenizer is not valid, the train split does
      not fill one batch, or processes cannot share a batch evenly.
  """
  data = order.data
  for name in ("batch_size", "eval_batch_size"):
    size = getattr(data, name)
    if size % process_count:
      raise ConfigError(
        f"data.{name} {size} does not divide among {process_count} processes; "
        "use a multiple"
      )
  # Hashed, so seeds 0 and 1 share no epoch: Grain adds the epoch to the seed.
  seed = int(np.random.SeedSequence(order.seed % 2**64).generate_state(1)[0])
  share = slice(process_index, None, process_count)
  if task_of(order).predicts_tokens:
    tokenizer, tokens = corpus.tokenised(data, tokenizer, keep_tokens)
    made = Data(
      tokenizer=tokenizer,
      digest=tokens.digest,
      config=data,
      examples=_Windows(
        tokens.streams, tokenizer, data, seed=seed, share=share
      ),
      num_bytes=tokens.num_bytes,
    )
    unit, lower = f"windows of {data.length} tokens", "data.length or "
  else:
    made = _data_of_rows(order, tokenizer, texts, seed=seed, share=share)
    unit, lower = "texts", ""
  count = made.num_examples["train"]
  if count < data.batch_size:
    raise ConfigError(
      f"the train split has {count} {unit}, fewer than one batch of "
      f"{data.batch_size}; lower {lower}data.batch_size, or give more text"
    )
  return made


def _data_of_rows(
  order: Order,
  tokenizer: Tokenizer | None,
  texts: sources.Texts | None,
  *,
  seed: int,
  share: slice,
) -> Data:
  """Returns the batches of the other tasks; see `make_data`."""
  data, scores, kept = order.data, None, None
  texts = texts or sources.load_texts(data, order.task)
  if data.sts is not None:
    firsts, seconds, scores = sources.load_scored_pairs(data.sts)
    every = texts.texts | {STS: firsts + seconds}
    texts = dataclasses.replace(texts, texts=every)
  if tokenizer is None:
    tokenizer = tokenizers.train_tokenizer(data, texts.texts["train"])
    kept = texts if order.fpp.embedding_granularity == "trim" else None
  teacher = _teacher_tokenizer(order, tokenizer)
  examples = _Rows(
    texts, tokenizer, data, seed=seed, share=share, teacher=teacher
  )
  return Data(
    tokenizer=tokenizer,
    digest=_digest(texts, scores),
    config=data,
    examples=examples,
    label_names=texts.label_names,
    pair=texts.pair,
    scores=scores,
    texts=kept,
    teacher_tokenizer=teacher,
  )


def _teacher_tokenizer(order: Order, tokenizer: Tokenizer) -> Tokenizer | None:
  """Returns the tokenizer of the teacher of vectors; None: it is the same."""
  if not task_of(order).makes_vectors:
    return None
  if order.distill.teacher is not None:
    path = find_tokenizer(find_pretrained(order.distill.teacher))
  elif isinstance(tokenizer, MappedTokenizer):
    path = order.data.tokenizer
  else:
    return None
  theirs = tokenizers.load_tokenizer(path)
  is_same = corpus.identity(theirs) == corpus.identity(tokenizer)
  return None if is_same else theirs


def _digest(texts: sources.Texts, scores: np.ndarray | None) -> str:
  sha = hashlib.sha256()
  for split in texts.texts:
    for text in flat(texts.texts[split]):
      encoded = text.encode("utf-8")
      sha.update(len(encoded).to_bytes(8, "little") + encoded)
    sha.update(b"end")
    if texts.labels is not None:
      sha.update(texts.labels[split].tobytes())
  if scores is not None:
    sha.update(scores.tobytes())
  return sha.hexdigest()


class _Windows:
  """Windows of a stream of documents, for a language model.

  Attributes:
    share: Rows of a batch that this process gets.
    sizes: Number of windows of each split.
    train_ids: The training stream, as a list of one.
  """

  has_segments = False

  def __init__(
    self,
    streams: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    seed: int,
    share: slice,
  ):
    self._data, self.share, self._pad_id = data, share, tokenizer.pad_id
    self._streams = streams
    self.train_ids = [streams["train"]]
    self.sizes = {
      split: -(-(len(stream) - 1) // data.length) if stream.size else 0
      for split, stream in streams.items()
    }
    # Training has whole windows only.
    self.sizes["train"] = (len(streams["train"]) - 1) // data.length
    order = grain.MapDataset.range(self.sizes["train"])
    order = order.shuffle(seed=seed).repeat()
    self._order = order.batch(data.batch_size)

  def train_batch(self, step: int, share: slice) -> Batch:
    """Returns some rows of the batch of a step."""
    return self._windows("train", np.asarray(self._order[step])[share])

  def eval_batch(self, split: str, index: int) -> Batch:
    """Returns this process's share of a batch of an evaluation."""
    size = self._data.eval_batch_size
    windows = np.arange(index * size, (index + 1) * size)
    return self._windows(split, windows[self.share])

  def _windows(self, split: str, index: np.ndarray) -> Batch:
    stream, length = self._streams[split], self._data.length
    at = index[:, None] * length + np.arange(length + 1)
    ids = np.where(
      at < len(stream),
      stream[np.minimum(at, len(stream) - 1)].astype(np.int32),
      np.int32(self._pad_id),
    )
    weights = (at[:, 1:] < len(stream)).astype(np.float32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


class _Rows:
  """Rows of text and perhaps label, in batches of similar length.

  Attributes:
    share: Rows of a batch that this process gets.
    sizes: Number of rows of each split.
    train_ids: Ids of each training row.
    has_segments: Whether the tokenizer distinguishes the texts of a pair.
  """

  def __init__(
    self,
    texts: sources.Texts,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    seed: int,
    share: slice,
    teacher: Tokenizer | None = None,
  ):
    self._data, self._seed, self.share = data, seed, share
    self._pad_id, self._labels = tokenizer.pad_id, texts.labels
    rows = {
      split: encode_rows(tokenizer, found, data.length)
      for split, found in texts.texts.items()
    }
    self._ids = {
      split: [row.astype(tokenizer.dtype) for row in found.ids]
      for split, found in rows.items()
    }
    self._teacher_ids: dict[str, list[np.ndarray]] = {}
    if teacher is not None:
      self._teacher_pad_id = teacher.pad_id
      self._teacher_ids = {
        split: encode_rows(teacher, found, data.length).ids
        for split, found in texts.texts.items()
      }
    self._seconds = {split: found.seconds for split, found in rows.items()}
    self.has_segments = rows["train"].has_segments
    self.train_ids = self._ids["train"]
    self.sizes = {split: len(ids) for split, ids in self._ids.items()}
    self._buckets = bucket_lengths(data.length)
    sizes = self._lengths("train", np.arange(self.sizes["train"]))
    self._bucket_of = np.searchsorted(self._buckets, sizes)
    # Two epochs, since a thread may be one ahead of its reader.
    self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

  def _lengths(self, split: str, index: np.ndarray) -> list[int]:
    """Returns the tokens per row, by the tokenizer that makes more of them."""
    parts = [x[split] for x in (self._ids, self._teacher_ids) if x]
    return [max(part[i].size for part in parts) for i in index]

  def train_batch(self, step: int, share: slice) -> Batch:
    """Returns some rows of the batch of a step."""
    size = self._data.batch_size
    epoch, index = divmod(step, self.sizes["train"] // size)
    bucket, members = self._epoch(epoch)[index]
    return self._rows("train", members, (size, bucket), share)

  def eval_batch(self, split: str, index: int) -> Batch:
    """Returns this process's share of a batch of an evaluation."""
    size = self._data.eval_batch_size
    stop = min((index + 1) * size, self.sizes[split])
    members = np.arange(index * size, stop)
    longest = max(self._lengths(split, members))
    bucket = self._buckets[int(np.searchsorted(self._buckets, longest))]
    return self._rows(split, members, (size, bucket), self.share)

  def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Returns an epoch's batches as (bucket length, rows), in random order.

    Fewer than B random rows are left out. Rows that do not fill a batch of their
    bucket move up to the next.
    """
    size, num_rows = self._data.batch_size, len(self._bucket_of)
    rng = np.random.default_rng([self._seed, epoch])
    batches, left = [], np.array([], np.int64)
    chosen = rng.permutation(num_rows)[: num_rows // size * size]
    for bucket, length in enumerate(self._buckets):
      own = chosen[self._bucket_of[chosen] == bucket]
      # Rows that moved up come first, so they do not move up again.
      members = np.concatenate([left, own])
      num_full = len(members) // size * size
      for batch in rng.permutation(members[:num_full]).reshape(-1, size):
        batches.append((length, batch))
      left = members[num_full:]
    return [batches[i] for i in rng.permutation(len(batches))]

  def _rows(
    self, split: str, index: np.ndarray, shape: tuple[int, int], share: slice
  ) -> Batch:
    """Returns a share of a batch of these rows, padded to its shape."""
    size = shape[0]
    rows = [self._ids[split][i] for i in index]
    tokens, mask = padded(rows, shape, self._pad_id)
    batch = {
      "tokens": tokens,
      "mask": mask,
      "weights": (np.arange(size) < len(index)).astype(np.float32),
    }
    if self._labels is not None:
      found = self._labels[split]
      labels = np.zeros((size, *found.shape[1:]), found.dtype)
      labels[: len(index)] = found[index]
      batch["labels"] = labels
    if self._teacher_ids:
      rows = [self._teacher_ids[split][i] for i in index]
      batch["teacher_tokens"], batch["teacher_mask"] = padded(
        rows, shape, self._teacher_pad_id
      )
    seconds = self._seconds[split]
    if self.has_segments and seconds is not None:
      batch["segments"] = segments_of(seconds[index], mask)
    return {name: array[share] for name, array in batch.items()}
