"""Tokens whose embedding is zero: which ids and rows stand for them.

`row` FPP zeroes the embeddings of tokens that it suspects. Then there is a
choice, for classification (what a language model cannot read, it can predict):

- A `MappedTokenizer` cuts a text as before and maps the ids. `folding.shrink`
  lets the removed tokens share one row of zeros: the same function, bit for
  bit. `read_as_unknown` lets them share the row of the unknown token.
- `trim` gives a tokenizer that knows the other tokens only: it cuts words with
  removed tokens into others, or reads them as unknown.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from folding.data.tokenizers import MappedTokenizer, Tokenizer
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
  require(
    not isinstance(tokenizer, MappedTokenizer),
    "a tokenizer with mapped ids cannot be trimmed; export the run itself",
  )
  keep_V = _is_used(params)
  text, kept = trim_tokenizer(tokenizer.to_json(), keep_V)
  trimmed = Tokenizer(tokenizers.Tokenizer.from_str(text))
  return _cut(params, np.array(kept)), trimmed


def trim_tokenizer(
  tokenizer_json: str, keep_V: Sequence[bool] | np.ndarray
) -> tuple[str, list[int]]:
  """Returns a tokenizer.json without some tokens, and the ids that are left.

  The new id of a token is its place among the ids that are left. Special
  tokens stay in any case, and in a BPE the bytes or characters that all else
  is merged from, and the parts of every token that stays.

  Args:
    tokenizer_json: Its text.
    keep_V: Whether each id is to stay; ids beyond its end are not.

  Raises:
    ConfigError: the model is none of WordPiece, WordLevel and BPE.
  """
  values = json.loads(tokenizer_json)
  model = values["model"]
  kind = model.get("type")
  require(
    kind in ("WordPiece", "WordLevel", "BPE"),
    f"tokens of a {kind} tokenizer cannot be removed from it",
  )
  vocab: dict[str, int] = model["vocab"]
  keep = {token for token, i in vocab.items() if i < len(keep_V) and keep_V[i]}
  keep |= {model.get("unk_token")} & set(vocab)
  if kind == "BPE":
    model["merges"] = _close_merges(model, keep)
  ids = {vocab[token] for token in keep}
  ids |= {added["id"] for added in values["added_tokens"]}
  processor = values.get("post_processor")
  _map_ids(processor, lambda i: ids.add(i) or i)
  old_ids = sorted(ids)
  new_id = {old: new for new, old in enumerate(old_ids)}
  model["vocab"] = {t: new_id[i] for t, i in vocab.items() if i in new_id}
  for added in values["added_tokens"]:
    added["id"] = new_id[added["id"]]
  _map_ids(processor, new_id.__getitem__)
  values["padding"] = None  # its pad_id is of the old ids, and unused here
  return json.dumps(values, ensure_ascii=False), old_ids


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


def _close_merges(model: dict[str, Any], keep: set[str]) -> list[Any]:
  """Adds to `keep` what its tokens are merged from; returns merges of those."""
  prefix = model.get("continuing_subword_prefix") or ""
  made = {}  # by the place of the merge
  for place, merge in enumerate(model["merges"]):
    a, b = merge.split(" ", 1) if isinstance(merge, str) else merge
    made[place] = (a, b, a + b.removeprefix(prefix))
  keep |= set(model["vocab"]) - {whole for _, _, whole in made.values()}
  size = 0
  while size < len(keep):  # a second pass is rare: parts are merged first
    size = len(keep)
    for a, b, whole in reversed(made.values()):
      if whole in keep:
        keep |= {a, b}
  return [model["merges"][i] for i, merge in made.items() if merge[2] in keep]


def _map_ids(processor: Any, function: Callable[[int], int]) -> None:
  """Applies a function to the ids that a post-processor adds, in place."""
  if not processor:
    return
  for inner in processor.get("processors", ()):  # of a Sequence
    _map_ids(inner, function)
  for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
    if name in processor:
      token, old = processor[name]
      processor[name] = [token, function(old)]
  if processor.get("type") == "TemplateProcessing":
    for special in processor["special_tokens"].values():
      special["ids"] = [function(old) for old in special["ids"]]
