"""Long texts in pieces, whose ids are those of the whole text.

The tokenizers library keeps about 100 bytes per token of a text while it
encodes it. Where a text may be cut depends on the tokenizer; see `find_end`.
"""

import re
from collections.abc import Iterable, Iterator

import tokenizers

_PIECE = 1 << 16  # characters, about
_TRAINING_PIECE = 1 << 13  # training keeps the tokens of 256 pieces at once
# Most characters of a piece of a text in slices. See `of_text`.
_LONGEST = 1 << 21
_GROUP = 1 << 22  # characters that are encoded together, about
# No match of our pattern, of GPT-2's or of a later one crosses a line break
# between two texts.
_END_OF_LINE = re.compile(r"\S\n(?=\S)")
# After a word, no match of ours or of GPT-2's contains the last of several line
# breaks, as of blank lines or of Windows. A match of Llama 3's does.
_END_OF_LINES = re.compile(r"\S\n(?=\S)|[^\W_][\r\n]+(?=\n\S)")
# Nor does a match of ours contain the end of a word and the space after it.
_END_IN_TRAINING = re.compile(r"\S\n(?=\S)|[A-Za-z](?= [A-Za-z])")


def find_end(inner: tokenizers.Tokenizer) -> re.Pattern[str] | None:
  """Returns the pattern of ends of pieces; None: texts cannot be cut.

  A tokenizer that puts a space before a text would put one before each piece.
  """

  def ids(text: str) -> list[int]:
    return inner.encode(text, add_special_tokens=False).ids

  try:
    if ids("a\na") != ids("a\n") + ids("a"):
      return None
    several = (("a\n", "\na"), ("a\r\n\r", "\na"))
    if all(ids(a + b) == ids(a) + ids(b) for a, b in several):
      return _END_OF_LINES
    return _END_OF_LINE
  except Exception:  # it cannot encode one of these; no class of its own
    return None


def for_training(texts: Iterable[str | Iterable[str]]) -> Iterator[str]:
  """Yields the pieces of texts that our tokenizers are trained on."""
  for text in texts:
    yield from of_text(text, _END_IN_TRAINING, _TRAINING_PIECE)


def groups(
  texts: Iterable[str | Iterable[str]], end: re.Pattern[str] | None
) -> Iterator[list[tuple[int, str]]]:
  """Yields (index of text, piece) in groups that are encoded together."""
  group, size = [], 0
  for index, text in enumerate(texts):
    for piece in of_text(text, end, _PIECE):
      group.append((index, piece))
      size += len(piece)
      if size > _GROUP:
        yield group
        group, size = [], 0
  yield group


def of_text(
  text: str | Iterable[str], end: re.Pattern[str] | None, size: int
) -> Iterator[str]:
  """Yields pieces of a text of about `size` characters.

  A text in slices is not held in memory. If more than `_LONGEST` characters of it
  have no end of a piece, it is cut at a line end, or else at the end of a slice,
  where a token might have crossed.
  """
  if isinstance(text, str):
    yield from _cut(text, end, size)
    return
  left = ""
  for part in text:
    *whole, left = _cut(left + part, end, size)
    yield from whole
    if end is not None and len(left) > _LONGEST:
      stop = left.rfind("\n") + 1 or len(left)
      yield left[:stop]
      left = left[stop:]
  yield left


def _cut(text: str, end: re.Pattern[str] | None, size: int) -> Iterator[str]:
  start = 0
  while end is not None and len(text) - start > size:
    match = end.search(text, start + size)
    if match is None:
      break
    yield text[start : match.end()]
    start = match.end()
  yield text[start:]
