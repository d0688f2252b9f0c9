"""The tokens that end a text and pad a batch.

Files beside a tokenizer.json name them: our own `special_tokens.json`, or the
configs of a checkpoint.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from folding import files, typed

PAD, END = "<pad>", "<end>"  # of our own tokenizers
SPECIAL_TOKENS = "special_tokens.json"  # ours
OPTIONS = "tokenizer_config.json"  # of a checkpoint, as the next two
GENERATION = "generation_config.json"  # overrides its config
CHAT = "chat_template.jinja"  # or a field of OPTIONS

# Usual names, best first, if no file names the token.
_PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|endoftext|>")
_END_NAMES = (
  END, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>",
  "<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Special tokens by name, as far as files name them.

  Attributes:
    ends: Each ends a text; the first also a document of a stream.
    pad: The pad token; None: unknown.
    chat_template: Jinja, kept for `transformers`; None: there is none.
  """

  ends: tuple[str, ...] = ()
  pad: str | None = None
  chat_template: str | None = None

  def ids(
    self, vocabulary: Mapping[str, int], begin: Sequence[int]
  ) -> tuple[list[int], int]:
    """Returns the ids of the end tokens, at least one, and of the pad token.

    An unknown token is the first usual name in the vocabulary. Without one, a
    text ends with the token that begins a text (or id 0), and the end token is
    the pad token.
    """
    ends = [vocabulary[token] for token in self.ends if token in vocabulary]
    if not ends:
      names = [n for n in _END_NAMES + _PAD_NAMES if n in vocabulary]
      ends = [*(vocabulary[n] for n in names), *begin, 0][:1]
    names = [] if self.pad is None else [self.pad]
    pads = [vocabulary[n] for n in (*names, *_PAD_NAMES) if n in vocabulary]
    return ends, [*pads, ends[0]][0]

  def save(self, tokenizer_path: pathlib.Path) -> None:
    """Writes the file beside a tokenizer.json; none if nothing is known."""
    path = tokenizer_path.with_name(SPECIAL_TOKENS)
    if self == SpecialTokens():
      path.unlink(missing_ok=True)
    else:
      text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
      files.write_file(str(path), text + "\n")


def find(
  tokenizer_path: pathlib.Path, inner: tokenizers.Tokenizer
) -> SpecialTokens:
  """Returns the special tokens that files beside a tokenizer.json name.

  An id in a checkpoint's config counts only if it is an added token of the
  tokenizer: the config may have the defaults of its class. The tokenizer's own
  options name what the config does not.

  Raises:
    ConfigError: a file is damaged.
  """
  path = tokenizer_path.with_name(SPECIAL_TOKENS)
  if path.is_file():
    values = files.read_json(str(path), dict)
    return typed.build(SpecialTokens, values, str(path))
  added = {i: t.content for i, t in inner.get_added_tokens_decoder().items()}
  given: dict[str, Any] = {}
  for name in ("config.json", GENERATION):
    given |= _read_options(tokenizer_path.with_name(name))
  ends, pad = given.get("eos_token_id", ()), given.get("pad_token_id")
  ends = ends if isinstance(ends, list | tuple) else [ends]
  ends = [added[i] for i in ends if type(i) is int and i in added]
  options = _read_options(tokenizer_path.with_name(OPTIONS))
  named = {}
  for role in ("eos", "pad"):
    token = options.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and inner.token_to_id(token) is not None:
      named[role] = token
  if not ends and "eos" in named:
    ends = [named["eos"]]
  template = options.get("chat_template")  # or a list of several
  with contextlib.suppress(OSError, ValueError):
    template = tokenizer_path.with_name(CHAT).read_text("utf-8")
  return SpecialTokens(
    ends=tuple(ends),
    pad=added[pad] if type(pad) is int and pad in added else named.get("pad"),
    chat_template=template if template and isinstance(template, str) else None,
  )


def _read_options(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a JSON file that are not null; {} if there is none."""
  values = files.read_json(str(path), dict) if path.is_file() else {}
  return {k: v for k, v in values.items() if v is not None}
