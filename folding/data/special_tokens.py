"""Which tokens end a text, which fills up a batch, and how a chat is written.

A tokenizer.json does not say. The config of a checkpoint beside it may, by
their ids; what a run or an export holds has a file of its own, by their names,
as ids change where tokens are removed.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from folding import files, schema

FILE = "special_tokens.json"  # beside tokenizer.json
GENERATION = "generation_config.json"  # of a checkpoint; goes before its config
CHAT = "chat_template.jinja"  # of a checkpoint, or a field of
OPTIONS = "tokenizer_config.json"
PAD, END = "<pad>", "<end>"  # of our own tokenizers
# Names of other people's, best first, where no file says which.
_PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|endoftext|>")
_END_NAMES = (
  END,
  "<|endoftext|>",
  "</s>",
  "<eos>",
  "<|end_of_text|>",
  "<｜end▁of▁sentence｜>",
  "<|im_end|>",
  "[SEP]",
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """What a file says of a tokenizer, by name.

  Attributes:
    ends: Each ends a text, and the first a document of a stream; (): unknown.
    pad: Fills up; None: unknown.
    chat_template: Jinja, kept for `transformers`; None: there is none.
  """

  ends: tuple[str, ...] = ()
  pad: str | None = None
  chat_template: str | None = None

  def ids(
    self, vocabulary: Mapping[str, int], begin: Sequence[int]
  ) -> tuple[list[int], int]:
    """Returns ids of what ends a text, at least one, and of what fills up.

    What is unknown is the first usual name that the vocabulary has. Without one
    a text ends where another begins (with id 0 where nothing does that), and is
    filled up with what ends it.

    Args:
      vocabulary: {token: id}, special tokens included.
      begin: Ids that the tokenizer puts before a text.
    """
    ends = [vocabulary[token] for token in self.ends if token in vocabulary]
    if not ends:
      named = [
        vocabulary[n] for n in _END_NAMES + _PAD_NAMES if n in vocabulary
      ]
      ends = [*named, *begin, 0][:1]
    names = [] if self.pad is None else [self.pad]
    pads = [vocabulary[n] for n in (*names, *_PAD_NAMES) if n in vocabulary]
    return ends, [*pads, ends[0]][0]

  def save(self, tokenizer_path: pathlib.Path) -> None:
    """Writes the file beside a tokenizer.json, none where nothing is known."""
    path = tokenizer_path.with_name(FILE)
    if self == UNKNOWN:
      path.unlink(missing_ok=True)
    else:
      text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
      files.write_file(str(path), text + "\n")


UNKNOWN = SpecialTokens()


def find(
  tokenizer_path: pathlib.Path, inner: tokenizers.Tokenizer
) -> SpecialTokens:
  """Returns what the files beside a tokenizer.json say of it.

  Of a checkpoint's config only ids are believed that are added tokens of the
  tokenizer: it may hold the defaults of its class, of whatever tokenizer. What
  it leaves open the tokenizer's own options may name.

  Args:
    tokenizer_path: Of the tokenizer.json.
    inner: What it holds.

  Raises:
    schema.ConfigError: our own file is damaged.
  """
  path = tokenizer_path.with_name(FILE)
  if path.is_file():
    values = files.read_json(str(path), dict)
    return schema.build(SpecialTokens, values, str(path))
  added = {i: t.content for i, t in inner.get_added_tokens_decoder().items()}
  given: dict[str, Any] = {}
  for name in ("config.json", GENERATION):
    given |= _read(tokenizer_path.with_name(name))
  ends, pad = given.get("eos_token_id", ()), given.get("pad_token_id")
  ends = ends if isinstance(ends, list | tuple) else [ends]
  ends = [added[i] for i in ends if type(i) is int and i in added]
  options = _read(tokenizer_path.with_name(OPTIONS))
  named = {
    name: _name(options.get(f"{name}_token"), inner) for name in ("eos", "pad")
  }
  if not ends and named["eos"] is not None:
    ends = [named["eos"]]
  return SpecialTokens(
    ends=tuple(ends),
    pad=added.get(pad) if type(pad) is int and pad in added else named["pad"],
    chat_template=_chat_template(tokenizer_path, options),
  )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a file that say something.

  There may be none, or one of another program.
  """
  with contextlib.suppress(OSError, ValueError, AttributeError):
    values = json.loads(path.read_text("utf-8"))
    return {k: v for k, v in values.items() if v is not None}
  return {}


def _name(token: Any, inner: tokenizers.Tokenizer) -> str | None:
  """Returns a token as its options name it, if the tokenizer has it."""
  name = token.get("content") if isinstance(token, dict) else token
  is_there = isinstance(name, str) and inner.token_to_id(name) is not None
  return name if is_there else None


def _chat_template(
  tokenizer_path: pathlib.Path, options: dict[str, Any]
) -> str | None:
  with contextlib.suppress(OSError, ValueError):
    return tokenizer_path.with_name(CHAT).read_text("utf-8")
  found = options.get("chat_template")  # or a list of several
  return found if isinstance(found, str) else None
