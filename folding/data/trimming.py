"""Tokenizers without some of their tokens: words that had them are cut anew."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from folding.data.tokenizers import MappedTokenizer, Tokenizer
from folding.schema import require

_KINDS = ("WordPiece", "WordLevel", "BPE")


def can_trim(tokenizer: Tokenizer) -> bool:
  """Returns whether tokens can be removed from a tokenizer."""
  kind = json.loads(tokenizer.to_json())["model"].get("type")
  return kind in _KINDS and not isinstance(tokenizer, MappedTokenizer)


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
  old_ids = _remove(values, keep_V)
  new_id = {old: new for new, old in enumerate(old_ids)}
  model = values["model"]
  model["vocab"] = {t: new_id[i] for t, i in model["vocab"].items()}
  for added in values["added_tokens"]:
    added["id"] = new_id[added["id"]]
  _map_ids(values.get("post_processor"), new_id.__getitem__)
  return json.dumps(values, ensure_ascii=False), old_ids


def trimmed(
  tokenizer: Tokenizer, keep_V: Sequence[bool] | np.ndarray
) -> MappedTokenizer:
  """Returns a tokenizer without some tokens, that knows which ids those had.

  What stays is as in `trim_tokenizer`, and the tokens that pad and end. In its
  `token_map` those that went are -1, and `plain_size` is that of all.

  Args:
    tokenizer: Its ids are not mapped.
    keep_V: Whether each id is to stay; ids beyond its end are not.

  Raises:
    ConfigError: see `trim_tokenizer`; or its ids are mapped already.
  """
  require(
    not isinstance(tokenizer, MappedTokenizer),
    "tokens have left this tokenizer already, so it cannot be trimmed; start from "
    "the dense run before that",
  )
  stays_V = np.zeros(tokenizer.vocab_size, bool)
  stays_V[: len(keep_V)] = keep_V[: len(stays_V)]
  special = [tokenizer.pad_id, *tokenizer.end_ids, *tokenizer.begin_ids]
  stays_V[special] = True
  values = json.loads(tokenizer.to_json())
  ids = _remove(values, stays_V)
  token_map = np.full(tokenizer.vocab_size, -1, np.int32)
  token_map[ids] = np.arange(len(ids))
  text = json.dumps(values, ensure_ascii=False)
  inner = tokenizers.Tokenizer.from_str(text)
  return MappedTokenizer(Tokenizer(inner, tokenizer.special), token_map)


def _remove(values: dict[str, Any], keep_V) -> list[int]:
  """Removes tokens from a tokenizer.json, and returns the ids left, sorted."""
  model = values["model"]
  kind = model.get("type")
  require(
    kind in _KINDS,
    f"tokens of a {kind} tokenizer cannot be removed from it; use "
    "fpp.embedding_granularity='row' or 'weight'",
  )
  vocab: dict[str, int] = model["vocab"]
  for added in values["added_tokens"]:  # elsewhere they would lose their ids
    vocab.setdefault(added["content"], added["id"])
  require(
    kind == "BPE" or model.get("unk_token") in vocab,
    "tokens cannot be removed from a tokenizer that has none for unknown words",
  )
  keep = {token for token, i in vocab.items() if i < len(keep_V) and keep_V[i]}
  keep |= {model.get("unk_token")} & set(vocab)
  if kind == "BPE":
    model["merges"] = _close_merges(model, keep)
  ids = {vocab[token] for token in keep}
  ids |= {added["id"] for added in values["added_tokens"]}
  _map_ids(values.get("post_processor"), lambda i: ids.add(i) or i)
  model["vocab"] = {token: i for token, i in vocab.items() if i in ids}
  values["padding"] = None  # its pad_id is of the old ids, and unused here
  return sorted(ids)


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
