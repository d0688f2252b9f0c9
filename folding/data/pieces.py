"""Long texts in pieces, which encode as the whole would.

The `tokenizers` library keeps about 100 bytes a token while it works.
"""

import re
from collections.abc import Iterator, Sequence

import tokenizers

_CHARS = 1 << 16  # of a piece, about
# No match of our pattern, or of GPT-2's and those after it, crosses a line break
# with text on both sides.
_END = re.compile(r"\S\n(?=\S)")
# Nor does one of ours or of GPT-2's reach the last of several line breaks after a
# word, as of blank lines or of Windows. Llama 3's does.
_ENDS = re.compile(r"\S\n(?=\S)|[^\W_][\r\n]+(?=\n\S)")


def piece_end(inner: tokenizers.Tokenizer) -> re.Pattern[str] | None:
  """Returns where a tokenizer may cut a text; None: nowhere.

  A tokenizer that puts a space before a text would put one before each piece.
  """

  def ids(text: str) -> list[int]:
    return inner.encode(text, add_special_tokens=False).ids

  try:
    if ids("a\na") != ids("a\n") + ids("a"):
      return None
    several = (("a\n", "\na"), ("a\r\n\r", "\na"))
    splits = all(ids(a + b) == ids(a) + ids(b) for a, b in several)
    return _ENDS if splits else _END
  except Exception:  # it has nothing for one of these; no class of its own
    return None


def groups(
  texts: Sequence[str], end: re.Pattern[str] | None
) -> Iterator[list[tuple[int, str]]]:
  """Yields (index of text, piece) in groups of a few million characters.

  Args:
    texts: Any strings.
    end: See `piece_end`.
  """
  group, size = [], 0
  for index, text in enumerate(texts):
    for piece in _pieces(text, end) if end else (text,):
      group.append((index, piece))
      size += len(piece)
      if size > 64 * _CHARS:
        yield group
        group, size = [], 0
  yield group


def _pieces(text: str, end: re.Pattern[str]) -> Iterator[str]:
  start = 0
  while len(text) - start > _CHARS:
    match = end.search(text, start + _CHARS)
    if match is None:
      break
    yield text[start : match.end()]
    start = match.end()
  yield text[start:]
