"""Long texts in pieces, which encode as the whole would.

The `tokenizers` library keeps about 100 bytes a token while it works.
"""

import re
from collections.abc import Iterator, Sequence

import tokenizers

_CHARS = 1 << 16
# No match of our pattern, or of GPT-2's and those after it, crosses a line break
# with text on both sides.
_END = re.compile(r"\S\n(?=\S)")


def max_piece(inner: tokenizers.Tokenizer) -> int | None:
  """Returns how many characters a piece has, about; None: all, as it may not cut.

  A tokenizer that puts a space before a text would put one before each piece.
  """

  def ids(text: str) -> list[int]:
    return inner.encode(text, add_special_tokens=False).ids

  try:
    return _CHARS if ids("a\na") == ids("a\n") + ids("a") else None
  except Exception:  # it has nothing for one of these; no class of its own
    return None


def groups(
  texts: Sequence[str], max_chars: int | None
) -> Iterator[list[tuple[int, str]]]:
  """Yields (index of text, piece) in groups of a few million characters.

  Args:
    texts: Any strings.
    max_chars: See `max_piece`.
  """
  group, size = [], 0
  for index, text in enumerate(texts):
    for piece in _pieces(text, len(text) if max_chars is None else max_chars):
      group.append((index, piece))
      size += len(piece)
      if size > 64 * _CHARS:
        yield group
        group, size = [], 0
  yield group


def _pieces(text: str, max_chars: int) -> Iterator[str]:
  start = 0
  while len(text) - start > max_chars:
    match = _END.search(text, start + max_chars)
    if match is None:
      break
    yield text[start : match.end()]
    start = match.end()
  yield text[start:]
