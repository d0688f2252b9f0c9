"""Generation in text: prompts to ids, and new ids to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from folding.data.tokenizers import Tokenizer
from folding.serving.export import Loaded
from folding.serving.generate import Cache, Generator
from folding.serving.sampling import Sampling

_UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


def continue_texts(
  loaded: Loaded,
  texts: Sequence[str],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  cache: Cache = "keys",
) -> Iterator[str]:
  """Yields what to print, piece by piece: the texts and what follows them.

  One text goes on as its tokens come; several are generated together and given
  out in order, each under a line with its number.

  Args:
    loaded: A next-token model, from `folding.load`.
    texts: Prompts; an empty one begins a new document.
    max_new_tokens: Of each text, at most.
    sampling: How they are chosen.
    cache: What is kept of the tokens so far, see `folding.serving.generate`.

  Raises:
    ConfigError: the model predicts no next token, or see `Generator.stream`.
  """
  tokenizer = loaded.tokenizer
  prompts = [tokenizer.prompt(x) for x in tokenizer.encode_batch(list(texts))]
  parts = Generator(loaded.model, cache).stream(
    jax.device_put(loaded.params),
    prompts,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    # A new document begins where one has ended.
    end_id=[*tokenizer.end_ids.tolist(), *tokenizer.begin_ids.tolist()],
  )
  return _printed(tokenizer, texts, prompts, parts)


def _printed(
  tokenizer: Tokenizer,
  texts: Sequence[str],
  prompts: Sequence[np.ndarray],
  parts: Iterator[list[np.ndarray]],
) -> Iterator[str]:
  if len(texts) == 1:
    yield texts[0]
    yield from decode_parts(tokenizer, prompts[0], (ids for [ids] in parts))
    yield "\n"
    return
  rows = [np.concatenate(ids) for ids in zip(*parts, strict=True)]
  for number, (text, prompt, ids) in enumerate(
    zip(texts, prompts, rows, strict=True), 1
  ):
    new = "".join(decode_parts(tokenizer, prompt, [ids]))
    yield f"== {number} of {len(texts)} ==\n{text}{new}\n"


def decode_parts(
  tokenizer: Tokenizer, prompt: np.ndarray, parts: Iterable[np.ndarray]
) -> Iterator[str]:
  """Yields the text of new tokens as it becomes certain.

  What a token stands for may depend on those before it, and a character may
  take several tokens: so ids are decoded from the prompt on, and an unfinished
  end is held back.

  Args:
    tokenizer: Of the model.
    prompt: Ids of the prompt.
    parts: New ids, as they come.

  Example:
    >>> from folding.config import DataConfig
    >>> from folding.data.tokenizers import train_tokenizer
    >>> tokenizer = train_tokenizer(DataConfig(tokenizer="bytes"), [])
    >>> [prompt, new] = tokenizer.encode_batch(["caf", "é!"])
    >>> list(decode_parts(tokenizer, prompt, [new[:1], new[1:]]))
    ['é!']
  """
  ids = [int(i) for i in prompt]
  text = tokenizer.decode(ids)
  shown = len(text)
  for part in parts:
    ids += [int(i) for i in part]
    text = tokenizer.decode(ids)
    certain = len(text.rstrip(_UNFINISHED))
    if certain > shown:
      yield text[shown:certain]
      shown = certain
  if len(text) > shown:
    yield text[shown:]
