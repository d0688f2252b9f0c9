"""Text <-> token ids, by a `tokenizers.Tokenizer` of Hugging Face.

Our own tokenizers work on UTF-8 bytes, so they encode any text and decode it
exactly.
"""

import contextlib
import itertools
import json
import logging
import pathlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from folding import files
from folding.config import DataConfig
from folding.data import pieces, special_tokens
from folding.data.special_tokens import END, PAD, SpecialTokens
from folding.errors import ConfigError

Text: TypeAlias = str | tuple[str, str]  # or a pair of texts
_Single = TypeVar("_Single", bound=str | Iterable[str])  # a string, or slices

_log = logging.getLogger(__name__)

NUM_BYTES = 256
BUILT_IN = ("bytes", "bpe")  # values of `data.tokenizer` that are no path
_GROUP = 4096  # rows that are encoded together
_MAX_IDS = 1 << 24  # beyond any vocabulary; the library counts to the last id
# Truncation is a state of the library's tokenizer, so one thread encodes at a time.
# The lock is global, so that a tokenizer can be pickled.
_ENCODING = threading.Lock()
TOKEN_MAP = "token_map.json"  # beside tokenizer.json, if ids are mapped

# What may become one token: a word with the character before it, up to three
# digits, punctuation with the line break and indent after it, or white space.
# On Python source it gives 4% more bytes per token than GPT-2's pattern.
_PATTERN = (
  r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+(?:\s*\n\s*)?|\s+(?!\S)|\s+"
)
# Training cuts longer words; each character stands for a byte.
_PART_OF_WORD = r".{1,256}"


class Encoded(NamedTuple):
  """Rows as a sentence model reads them.

  Attributes:
    ids: int32 ids of each row.
    seconds: int64[rows], index of the first token of segment 1; None for single
      texts.
  """

  ids: list[np.ndarray]
  seconds: np.ndarray | None = None

  @property
  def has_segments(self) -> bool:
    """Whether any row has a token of segment 1."""
    sizes = np.array([row.size for row in self.ids])
    return self.seconds is not None and bool((self.seconds < sizes).any())


class Tokenizer:
  """A tokenizer with the special ids that batches need.

  Attributes:
    vocab_size: V, number of ids, special tokens included.
    plain_size: V before ids were mapped to fewer.
    special: Special tokens by name, as far as files name them.
    pad_id: Id of padding.
    end_ids: int32, each ends a text.
    begin_ids: int32, ids that the tokenizer puts before a text, such as Llama's
      "<s>"; often none.

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
    special: SpecialTokens | None = None,
  ):
    # Batches truncate and pad, whatever the file says.
    inner.no_truncation()
    inner.no_padding()
    # "<end>" that occurs in a text is text, not the end of a document.
    inner.encode_special_tokens = True
    vocabulary = inner.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise ConfigError("the tokenizer has no tokens")
    self._inner = inner
    self._is_checked = False  # whether it was seen to find tokens in texts
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
    if self.vocab_size > _MAX_IDS:
      raise ConfigError(
        f"the tokenizer has an id {self.vocab_size - 1:,}, and the last may be "
        f"{_MAX_IDS - 1:,}"
      )
    self.plain_size = self.vocab_size
    begin = _begin_ids(inner, ["a", *itertools.islice(vocabulary, 1000)])
    self.begin_ids = np.array(begin, np.int32)
    self._end_of_piece = pieces.find_end(inner)
    self.special = special or SpecialTokens()
    ends, self.pad_id = self.special.ids(vocabulary, begin)
    self.end_ids = np.array(ends, np.int32)

  @property
  def dtype(self) -> type[np.integer]:
    """Type that holds each id in few bytes."""
    return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

  @property
  def end_id(self) -> int:
    """Id that ends a document of a stream."""
    return int(self.end_ids[0])

  @property
  def ends_with_pad(self) -> bool:
    """Whether the tokenizer ends a text with its pad token."""
    framed = self.encode_batch(
      [""], self._inner.num_special_tokens_to_add(False) + 1
    )[0]
    return self.pad_id in framed[self.begin_ids.size :]

  def stream(
    self, texts: Iterable[str | Iterable[str]]
  ) -> Iterator[np.ndarray]:
    """Yields the ids of documents in a row, each with its begin and its end.

    Without `begin_ids`, the first document follows an end token, as the others
    do.
    """
    end, last = np.array([self.end_id], np.int32), -1
    yield self.prompt(end[:0])
    for index, ids in self._encode_pieces(texts):
      if index > max(last, 0):
        yield end
        yield self.begin_ids
      last = index
      yield ids
    if last >= 0:
      yield end

  def prompt(self, ids: np.ndarray) -> np.ndarray:
    """Returns the ids of a prompt with `begin_ids`, at least one id.

    Args:
      ids: int32 ids of the text; may be empty.
    """
    found = np.concatenate([self.begin_ids, ids])
    return found if found.size else np.array([self.end_id], np.int32)

  def encode_batch(
    self, texts: Sequence[str], max_length: int | None = None
  ) -> list[np.ndarray]:
    """Returns int32 ids of each text; `encode_rows` is for pairs.

    Args:
      texts: Any strings.
      max_length: None: the ids of the text, as a stream needs them. A number:
        ids with the special tokens that the tokenizer adds ("[CLS]", "[SEP]";
        ours adds none); the text between them is truncated to this length.

    Raises:
      ConfigError: the tokenizer cannot encode a text, or `max_length` has no
        room for one.
    """
    if max_length is not None:
      return self.encode_rows(texts, max_length).ids
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    for index, found in self._encode_pieces(texts):
      ids[index].append(found)
    return [np.concatenate(parts) for parts in ids]

  def _encode_pieces(
    self, texts: Iterable[str | Iterable[str]]
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of text, ids of its next piece), at least one per text."""
    for group in pieces.groups(texts, self._end_of_piece):
      texts_of_group = [piece for _, piece in group]
      found = [
        np.array(encoding.ids, np.int32)
        for encoding in self._encode(texts_of_group)
      ]
      for (index, _), ids in zip(group, found, strict=True):
        yield index, ids

  def encode_rows(self, texts: Sequence[Text], max_length: int) -> Encoded:
    """Returns texts or pairs with the special tokens of the tokenizer.

    Rows have at most `max_length` tokens, special ones included. A pair that is
    too long loses tokens of its longer text first, as in `transformers`.

    Raises:
      ConfigError: as `encode_batch`; or the tokenizer has other segments than 0
        followed by 1.
    """
    is_pair = bool(texts) and not isinstance(texts[0], str)
    frame = self._inner.num_special_tokens_to_add(is_pair=is_pair)
    if max_length <= frame:
      raise ConfigError(
        f"data.length {max_length} has no room for a text beside the {frame} "
        "special tokens that the tokenizer puts around it"
      )
    ids, seconds = [], []
    # In groups: the library keeps the truncated ids too.
    for start in range(0, len(texts), _GROUP):
      encodings = self._encode(texts[start : start + _GROUP], max_length)
      ids += [np.array(e.ids, np.int32) for e in encodings]
      if is_pair:
        seconds += [_second_segment(e.type_ids) for e in encodings]
    return Encoded(ids, np.array(seconds) if is_pair else None)

  def _encode(
    self, texts: Sequence[Text], max_length: int | None = None
  ) -> list[tokenizers.Encoding]:
    """Returns the encodings. `max_length` truncates and adds special tokens."""
    is_row = max_length is not None
    with _ENCODING:
      try:
        if is_row:
          self._inner.enable_truncation(max_length)
        found = self._inner.encode_batch_fast(
          list(texts), add_special_tokens=is_row
        )
      except Exception as error:  # the library raises plain Exception
        raise ConfigError(
          f"the tokenizer cannot read a text: {error}"
        ) from error
      finally:
        self._inner.no_truncation()
    if not self._is_checked:
      self._warn_of_unknown(texts, found)
    return found

  def _warn_of_unknown(
    self, texts: Sequence[Text], found: Sequence[tokenizers.Encoding]
  ) -> None:
    """Warns once if no text has a known token, special ones aside."""
    if not any(map(str.strip, flat(texts))):
      return
    unknown = getattr(self._inner.model, "unk_token", None)
    unknown_id = None if unknown is None else self._inner.token_to_id(unknown)
    self._is_checked = True
    for encoding in found:
      pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
      if any(not special and i != unknown_id for i, special in pairs):
        return
    _log.warning(
      "the tokenizer finds no known token in any of %d texts; is it the tokenizer "
      "of this model and language?",
      len(texts),
    )

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, without special tokens."""
    return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

  def to_json(self) -> str:
    """Returns the tokenizer.json."""
    return self._inner.to_str()

  def save(self, path: str) -> None:
    """Writes a tokenizer.json and the names of its special tokens."""
    files.write_file(path, self._inner.to_str(pretty=True))
    self.special.save(pathlib.Path(path))
    pathlib.Path(path).with_name(TOKEN_MAP).unlink(missing_ok=True)


class MappedTokenizer(Tokenizer):
  """A tokenizer whose ids are mapped to the rows of a smaller embedding.

  Attributes:
    token_map: int[plain_size], the new id of each old id; -1: removed.
    plain_ids: int[vocab_size], an old id of each new id.
  """

  def __init__(self, plain: Tokenizer, token_map: np.ndarray):
    """Maps the ids of a tokenizer; two maps are composed into one.

    Args:
      plain: The tokenizer; its ids may be mapped already.
      token_map: int[V], the new id of each of its ids.

    Raises:
      ConfigError: the map does not cover all tokens.
    """
    if len(token_map) < plain.vocab_size:
      raise ConfigError(
        f"a map of {len(token_map)} tokens does not fit a tokenizer of "
        f"{plain.vocab_size}"
      )
    inner = tokenizers.Tokenizer.from_str(plain.to_json())
    super().__init__(inner, plain.special)
    self.plain_size = len(token_map)
    if isinstance(plain, MappedTokenizer):
      self.plain_size = plain.plain_size
      before = plain.token_map
      token_map = np.where(before < 0, -1, token_map[before])
    made = np.fromiter(self._inner.get_vocab().values(), np.int64)
    if (token_map[made] < 0).any():
      raise ConfigError("the map of tokens has no id for one of the tokenizer")
    self.token_map = token_map
    self.vocab_size = int(token_map.max()) + 1
    self.pad_id = int(token_map[self.pad_id])
    self.end_ids = self._mapped(self.end_ids)
    self.begin_ids = self._mapped(self.begin_ids)
    # An id that several tokens share is not decoded.
    new, old, count = np.unique(
      token_map, return_index=True, return_counts=True
    )
    self.plain_ids = old[new >= 0]
    single = (count == 1) & (new >= 0)
    self._old_ids = dict(
      zip(new[single].tolist(), old[single].tolist(), strict=True)
    )

  def _encode_pieces(
    self, texts: Iterable[str | Iterable[str]]
  ) -> Iterator[tuple[int, np.ndarray]]:
    for index, ids in super()._encode_pieces(texts):
      yield index, self._mapped(ids)

  def encode_rows(self, texts: Sequence[Text], max_length: int) -> Encoded:
    found = super().encode_rows(texts, max_length)
    return found._replace(ids=[self._mapped(ids) for ids in found.ids])

  def _mapped(self, ids: np.ndarray) -> np.ndarray:
    return self.token_map[ids].astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, without those that several tokens share."""
    old_ids = self._old_ids
    return super().decode([old_ids[int(i)] for i in ids if int(i) in old_ids])

  def save(self, path: str) -> None:
    """Writes the unmapped tokenizer.json and the map beside it."""
    super().save(path)
    map_path = pathlib.Path(path).with_name(TOKEN_MAP)
    files.write_file(str(map_path), json.dumps(self.token_map.tolist()))


def _second_segment(type_ids: list[int]) -> int:
  """Returns the index of the first token of segment 1; the length without one."""
  second = type_ids.count(0)
  if type_ids != [0] * second + [1] * (len(type_ids) - second):
    raise ConfigError(
      "the tokenizer numbers the segments of a pair otherwise than 0 and then 1"
    )
  return second


def train_tokenizer(
  data: DataConfig, texts: Iterable[Text | Iterable[str]]
) -> Tokenizer:
  """Trains or loads a tokenizer.

  "bytes" has the 256 bytes and two special tokens. "bpe" merges frequent pairs
  until there are `data.vocab_size` tokens or no pair occurs twice. Any other
  value is the path of a tokenizer.json, and the texts are unused. If the texts
  are pairs, a new tokenizer puts an end token between the two.

  Args:
    data: Only `tokenizer` and `vocab_size` are read.
    texts: The training split: strings, texts in slices, or a sequence of pairs.

  Raises:
    ConfigError: the vocabulary cannot hold the bytes, or the file is missing or
      damaged.
  """
  if data.tokenizer not in BUILT_IN:
    return load_tokenizer(data.tokenizer)
  # Special tokens, then bytes by code point: the same on every machine.
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([PAD, END, *alphabet])}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  inner.add_special_tokens([PAD, END])
  inner.decoder = decoders.ByteLevel()
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  inner.pre_tokenizer = to_bytes
  if data.tokenizer == "bpe":
    if data.vocab_size < len(vocabulary):
      raise ConfigError(
        f"data.vocab_size {data.vocab_size} cannot hold the {NUM_BYTES} bytes "
        f"and 2 special tokens; use {len(vocabulary)} or more, or "
        "data.tokenizer='bytes'"
      )
    split = pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    # The time of training grows with the square of a word's length.
    cut = pre_tokenizers.Split(tokenizers.Regex(_PART_OF_WORD), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes, cut])
    trainer = trainers.BpeTrainer(
      vocab_size=data.vocab_size,
      min_frequency=2,
      special_tokens=[PAD, END],
      initial_alphabet=alphabet,
      show_progress=False,
    )
    inner.train_from_iterator(pieces.for_training(flat(texts)), trainer)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
  first = texts[0] if isinstance(texts, Sequence) and texts else ""
  if not isinstance(first, str):
    inner.post_processor = processors.TemplateProcessing(
      single="$A",
      pair=f"$A {END} $B:1",
      special_tokens=[(END, vocabulary[END])],
    )
  return Tokenizer(inner)


def vocab_size(data: DataConfig) -> int:
  """Returns the number of ids of a tokenizer, before it is trained.

  Raises:
    ConfigError: see `load_tokenizer`.
  """
  if data.tokenizer == "bytes":
    return NUM_BYTES + 2
  if data.tokenizer == "bpe":
    return data.vocab_size
  return load_tokenizer(data.tokenizer).vocab_size


def flat(texts: Iterable[_Single | tuple[str, str]]) -> Iterator[_Single | str]:
  """Yields all texts, the two of a pair one after the other."""
  for text in texts:
    if isinstance(text, tuple):
      yield from text
    else:
      yield text


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
  """Reads a tokenizer.json, the names of its special tokens and its map.

  Raises:
    ConfigError: the file is missing or is not a tokenizer, or a file beside it
      is damaged or does not fit it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(
      f"there is no tokenizer file {path}; data.tokenizer is 'bytes', 'bpe' or "
      "the path of a tokenizer.json"
    )
  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  # The library raises plain Exception for every kind of broken file.
  except Exception as error:
    raise ConfigError(
      f"{path} is not a tokenizer.json of the `tokenizers` library ({error})"
    ) from error
  plain = Tokenizer(inner, special_tokens.find(path, inner))
  map_path = path.with_name(TOKEN_MAP)
  if not map_path.exists():
    return plain
  new_ids = files.read_json(str(map_path), list)
  if not new_ids or not all(
    type(i) is int and -1 <= i < _MAX_IDS for i in new_ids
  ):
    raise ConfigError(f"{map_path} is not a list of token ids")
  return MappedTokenizer(plain, np.array(new_ids, np.int32))


def _begin_ids(inner: tokenizers.Tokenizer, words: Sequence[str]) -> list[int]:
  """Returns the ids that a tokenizer puts before a text, found by trying words."""
  for word in words:
    with contextlib.suppress(Exception):  # the tokenizer cannot encode it
      framed = inner.encode(word)
      if 0 in framed.special_tokens_mask:
        return framed.ids[: framed.special_tokens_mask.index(0)]
  return []
