"""Tokens whose embedding is zero: which ids and rows stand for them.

`row` FPP zeroes the embeddings of tokens that it suspects. Then there is a
choice, for classification (what a language model cannot read, it can predict):

- A `MappedTokenizer` cuts a text as its tokenizer does and maps the ids. `folding.shrink`
  lets the removed tokens share one row of zeros: the same function, bit for
  bit. `read_as_unknown` lets them share the row of the unknown token.
- `trim` gives a tokenizer that knows the other tokens only: it cuts words with
  removed tokens into others, or reads them as unknown. Better do so before
  training: `folding.training.trim`.
"""

import json
from typing import Any

import numpy as np
import tokenizers

from folding.data.tokenizers import MappedTokenizer, Tokenizer
from folding.data.trimming import trim_tokenizer
from folding.schema import ConfigError, require


def read_as_unknown(
  params: dict[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, Any], Tokenizer]:
  """Returns parameters without rows of zeros, whose tokens become unknown.

  Args:
    params: Of a classifier.
    tokenizer: Of the same vocabulary.

  Raises:
    ConfigError: the tokenizer has no unknown token.
  """
  keep_V = _is_used(params)
  unknown = _unknown_id(json.loads(tokenizer.to_json()))
  if isinstance(tokenizer, MappedTokenizer):
    unknown = int(tokenizer.token_map[unknown])
  keep_V[unknown] = True
  row_V = np.cumsum(keep_V, dtype=np.int32) - np.int32(1)
  token_map = np.where(keep_V, row_V, row_V[unknown])
  return _cut(params, keep_V), MappedTokenizer(tokenizer, token_map)


def trim(
  params: dict[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, Any], Tokenizer]:
  """Returns parameters and tokenizer without tokens that are embedded as zero.

  Raises:
    ConfigError: tokens of this kind of tokenizer cannot be removed.
  """
  is_used = _is_used(params)
  row_V = np.arange(len(is_used))
  if isinstance(tokenizer, MappedTokenizer):
    row_V = tokenizer.token_map
  rows = row_V[row_V >= 0]
  require(
    len(rows) == len(np.unique(rows)),
    "a tokenizer whose tokens share rows cannot be trimmed; export the run itself",
  )
  keep_V = (row_V >= 0) & is_used[row_V]
  text, kept = trim_tokenizer(tokenizer.to_json(), keep_V)
  inner = tokenizers.Tokenizer.from_str(text)
  return _cut(params, row_V[kept]), Tokenizer(inner, tokenizer.special)


def _is_used(params: dict[str, Any]) -> np.ndarray:
  return (np.asarray(params["embed"]["embedding"]) != 0).any(axis=1)


def _cut(params: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
  embedding_VD = np.asarray(params["embed"]["embedding"])
  return {**params, "embed": {"embedding": embedding_VD[rows]}}


def _unknown_id(values: dict[str, Any]) -> int:
  model = values["model"]
  if isinstance(model.get("unk_id"), int):  # Unigram
    return model["unk_id"]
  added = {token["content"]: token["id"] for token in values["added_tokens"]}
  found = (added | dict(model["vocab"])).get(model.get("unk_token"))
  if not isinstance(found, int):
    raise ConfigError(
      "this tokenizer has no unknown token that removed tokens could be read as"
    )
  return found
