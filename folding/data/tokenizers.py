"""Text <-> token ids, always by a Hugging Face `tokenizers.Tokenizer`.

Our own tokenizers work on UTF-8 bytes, so they take any text and give it back
exactly; each document of a stream begins with `begin_ids`, which ours lack, and
ends with `end_id`, and `pad_id` fills up.
"""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from folding import config, files, schema
from folding.data import pieces, special_tokens
from folding.data.special_tokens import END, PAD, UNKNOWN, SpecialTokens

NUM_BYTES = 256
TOKEN_MAP = "token_map.json"  # beside tokenizer.json, if ids are mapped

# What may become one token: a word with the character before it, up to three
# digits, punctuation with the line break and indent after it, or white space.
# On Python source it gives 4% more bytes a token than GPT-2's pattern.
_PATTERN = (
  r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+(?:\s*\n\s*)?|\s+(?!\S)|\s+"
)

_GROUP_TEXTS = 4096


class Tokenizer:
  """A tokenizer with the special ids that batches need.

  Attributes:
    vocab_size: V, number of ids, special tokens included.
    plain_size: V before ids were mapped to fewer.
    special: Names of those that pad and end, as far as a file gives them; see
      `folding.data.special_tokens` for what holds otherwise.
    pad_id: Id that fills up a batch.
    end_ids: int32, each ends a text.
    begin_ids: int32, what the tokenizer puts before a text by itself, such as a
      Llama's "<s>"; often nothing.

  Example:
    >>> from folding.config import DataConfig
    >>> tokenizer = train_tokenizer(DataConfig(tokenizer="bytes"), [])
    >>> tokenizer.vocab_size
    258
    >>> [ids] = tokenizer.encode_batch(["é!"])
    >>> len(ids), tokenizer.decode(ids)
    (3, 'é!')
  """

  def __init__(
    self,
    inner: tokenizers.Tokenizer,
    special: SpecialTokens = UNKNOWN,
  ):
    # A file may ask to cut or pad; both are decided by batches.
    inner.no_truncation()
    inner.no_padding()
    # "<end>" that occurs in a text is text, not the end of a document.
    inner.encode_special_tokens = True
    vocabulary = inner.get_vocab(with_added_tokens=True)
    schema.require(bool(vocabulary), "the tokenizer has no tokens")
    self._inner = inner
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
    self.plain_size = self.vocab_size
    begin = _begin(inner, ["a", *itertools.islice(vocabulary, 1000)])
    self.begin_ids = np.array(begin, np.int32)
    self._piece_end = pieces.piece_end(inner)
    self.special = special
    ends, self.pad_id = special.ids(vocabulary, begin)
    self.end_ids = np.array(ends, np.int32)

  @property
  def end_id(self) -> int:
    """What ends a document of a stream."""
    return int(self.end_ids[0])

  @property
  def ends_with_pad(self) -> bool:
    """Whether it puts what fills up a batch after a text by itself."""
    framed = self.encode_batch(
      [""], self._inner.num_special_tokens_to_add(False) + 1
    )[0]
    return self.pad_id in framed[self.begin_ids.size :]

  def stream(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields ids of documents in a row, each with its begin and its end.

    Where nothing begins one, the first is after an end, as the others are.
    """
    end = np.array([self.end_id], np.int32)
    yield self.prompt(end[:0])
    for number, ids in enumerate(self.encode_batch(texts)):
      if number:
        yield self.begin_ids
      yield ids
      yield end

  def prompt(self, ids: np.ndarray) -> np.ndarray:
    """Returns the ids of a text's start, none as well, as a model reads them.

    What begins a document comes before them; at least one id is given, so that
    there is something to predict from.
    """
    found = np.concatenate([self.begin_ids, ids])
    return found if found.size else np.array([self.end_id], np.int32)

  def encode_batch(
    self, texts: Sequence[str], max_length: int | None = None
  ) -> list[np.ndarray]:
    """Returns int32 ids of each text.

    Args:
      texts: Any strings.
      max_length: None: the ids of the text alone, as a stream needs them. A
        number: ids of a text by itself, with the special tokens that the
        tokenizer frames one with ("[CLS]", "[SEP]"; ours adds none), cut to
        this length inside the frame.
    """
    if max_length is not None:
      return self._encode_framed(texts, max_length)
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    for group in pieces.groups(texts, self._piece_end):
      encodings = self._encode(
        [piece for _, piece in group], add_special_tokens=False
      )
      for (index, _), encoding in zip(group, encodings, strict=True):
        ids[index].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(parts) for parts in ids]

  def _encode_framed(
    self, texts: Sequence[str], max_length: int
  ) -> list[np.ndarray]:
    frame = self._inner.num_special_tokens_to_add(is_pair=False)
    schema.require(
      max_length > frame,
      f"data.length {max_length} has no room for a text beside the {frame} special "
      "tokens that the tokenizer puts around it",
    )
    ids = []
    self._inner.enable_truncation(max_length)
    try:
      # In groups: the library also keeps what it cuts off.
      for start in range(0, len(texts), _GROUP_TEXTS):
        group = list(texts[start : start + _GROUP_TEXTS])
        encodings = self._encode(group)
        ids += [np.array(e.ids, np.int32) for e in encodings]
    finally:
      self._inner.no_truncation()
    return ids

  def _encode(
    self, texts: list[str], **options: bool
  ) -> list[tokenizers.Encoding]:
    try:
      return self._inner.encode_batch_fast(texts, **options)
    except Exception as error:  # the library has no class of its own
      raise schema.ConfigError(
        f"the tokenizer cannot read a text: {error}"
      ) from error

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, special tokens left out."""
    return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

  def to_json(self) -> str:
    """Returns what `save` writes."""
    return self._inner.to_str()

  def save(self, path: str) -> None:
    """Writes a tokenizer.json that `load_tokenizer` and others read."""
    files.write_file(path, self._inner.to_str(pretty=True))
    self.special.save(pathlib.Path(path))
    pathlib.Path(path).with_name(TOKEN_MAP).unlink(missing_ok=True)


class MappedTokenizer(Tokenizer):
  """A tokenizer whose ids are replaced by those of a smaller embedding.

  Attributes:
    token_map: int[V], the new id of each id of the tokenizer it was made from;
      -1: that one does not make it any more.
    plain_ids: int[vocab_size], an old id of each new one.
  """

  def __init__(self, plain: Tokenizer, token_map: np.ndarray):
    """Makes one; a map of a map is one map.

    Raises:
      schema.ConfigError: there are tokens that the map leaves out.
    """
    schema.require(
      len(token_map) >= plain.vocab_size,
      f"a map of {len(token_map)} tokens does not fit a tokenizer of "
      f"{plain.vocab_size}",
    )
    inner = tokenizers.Tokenizer.from_str(plain.to_json())
    super().__init__(inner, plain.special)
    self.plain_size = len(token_map)
    if isinstance(plain, MappedTokenizer):
      self.plain_size = plain.plain_size
      before = plain.token_map
      token_map = np.where(before < 0, -1, token_map[before])
    made = np.fromiter(self._inner.get_vocab().values(), np.int64)
    schema.require(
      bool((token_map[made] >= 0).all()),
      "the map of tokens has no id for one that the tokenizer makes",
    )
    self.token_map = token_map
    self.vocab_size = int(token_map.max()) + 1
    self.pad_id = int(token_map[self.pad_id])
    self.end_ids = token_map[self.end_ids].astype(np.int32)
    self.begin_ids = token_map[self.begin_ids].astype(np.int32)
    # Of the tokens that share an id, none is the one to decode to.
    new, old, count = np.unique(
      token_map, return_index=True, return_counts=True
    )
    self.plain_ids = old[new >= 0]
    single = (count == 1) & (new >= 0)
    self._old_ids = dict(
      zip(new[single].tolist(), old[single].tolist(), strict=True)
    )

  def encode_batch(
    self, texts: Sequence[str], max_length: int | None = None
  ) -> list[np.ndarray]:
    rows = super().encode_batch(texts, max_length)
    return [self.token_map[ids].astype(np.int32) for ids in rows]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids; tokens that share an id are left out."""
    old_ids = self._old_ids
    return super().decode([old_ids[int(i)] for i in ids if int(i) in old_ids])

  def save(self, path: str) -> None:
    """Writes the tokenizer.json as it was, and the map beside it."""
    super().save(path)
    map_path = pathlib.Path(path).with_name(TOKEN_MAP)
    files.write_file(str(map_path), json.dumps(self.token_map.tolist()))


def train_tokenizer(data: config.DataConfig, texts: Sequence[str]) -> Tokenizer:
  """Returns the tokenizer that `data.tokenizer` asks for.

  "bytes" has the 256 bytes and two special tokens; "bpe" merges frequent pairs
  of the texts until there are `data.vocab_size` tokens (or no pair occurs
  twice); anything else is the path of a tokenizer.json, and texts are unused.

  Args:
    data: Which tokenizer.
    texts: The training split, and only that.

  Raises:
    schema.ConfigError: the vocabulary cannot hold the bytes, or the file of an
      existing tokenizer is missing or broken.
  """
  if data.tokenizer not in ("bytes", "bpe"):
    return load_tokenizer(data.tokenizer)
  # Ids by code point, the special ones first: the same on every machine.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([PAD, END, *alphabet])}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  inner.add_special_tokens([PAD, END])
  inner.decoder = decoders.ByteLevel()
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  inner.pre_tokenizer = to_bytes
  if data.tokenizer == "bpe":
    schema.require(
      data.vocab_size >= len(vocabulary),
      f"data.vocab_size {data.vocab_size} cannot hold the {NUM_BYTES} bytes "
      f"and 2 special tokens; use {len(vocabulary)} or more, or "
      "data.tokenizer='bytes'",
    )
    split = pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
      vocab_size=data.vocab_size,
      min_frequency=2,
      special_tokens=[PAD, END],
      initial_alphabet=alphabet,
      show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
  return Tokenizer(inner)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
  """Reads a tokenizer.json, ours or another's, and what is told beside it.

  That is which tokens pad and end, see `folding.data.special_tokens`, and a map
  of its ids.

  Raises:
    schema.ConfigError: the file is missing or is not a tokenizer, or a file
      beside it is damaged or does not fit it.
  """
  path = pathlib.Path(path)
  schema.require(
    path.is_file(),
    f"there is no tokenizer file {path}; data.tokenizer is 'bytes', 'bpe' or "
    "the path of a tokenizer.json",
  )
  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  # The library raises plain Exception for every kind of broken file.
  except Exception as error:
    raise schema.ConfigError(
      f"{path} is not a tokenizer.json of the `tokenizers` library ({error})"
    ) from error
  plain = Tokenizer(inner, special_tokens.find(path, inner))
  map_path = path.with_name(TOKEN_MAP)
  if not map_path.exists():
    return plain
  try:
    token_map = np.array(json.loads(map_path.read_text("utf-8")), np.int32)
  except (ValueError, TypeError, OverflowError):
    token_map = np.array([], np.int32)
  schema.require(
    token_map.ndim == 1 and token_map.size > 0 and int(token_map.min()) >= -1,
    f"{map_path} is no list of token ids",
  )
  return MappedTokenizer(plain, token_map)


def _begin(inner: tokenizers.Tokenizer, words: Sequence[str]) -> list[int]:
  """Returns what is put before the first of some words that it has ids for."""
  for word in words:
    with contextlib.suppress(Exception):  # a word that it has nothing for
      framed = inner.encode(word)
      if 0 in framed.special_tokens_mask:
        return framed.ids[: framed.special_tokens_mask.index(0)]
  return []
