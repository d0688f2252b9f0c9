"""How often tokens are used, and tokenizers without those used least."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from folding.data.tokenizers import MappedTokenizer, Tokenizer
from folding.errors import ConfigError

_KINDS = ("WordPiece", "WordLevel", "BPE")


def token_usage(found_V: np.ndarray, size: int) -> np.ndarray:
  """Returns float32[size], the share of each token in the training text.

  All shares are positive. Unused tokens rank by their ids: vocabularies run from
  frequent to rare, so the last token is the least likely to occur.

  Args:
    found_V: Uses of each token; may be shorter than V.
    size: V, rows of the embedding.
  """
  count_V = 0.5 * (1 - np.arange(size) / size)  # less than a single use
  count_V[: len(found_V)] += found_V
  return (count_V / count_V.sum()).astype(np.float32)


def trim_tokenizer(
  tokenizer_json: str, keep_V: Sequence[bool] | np.ndarray
) -> tuple[str, list[int]]:
  """Returns a tokenizer.json without some tokens, and the old ids that remain.

  The new id of a token is its index among the remaining old ids. Special tokens
  always remain. So do, in a BPE, its bytes or characters, and the parts that a
  remaining token is merged from.

  Args:
    tokenizer_json: The text of a tokenizer.json.
    keep_V: bool[V], whether to keep each id; False beyond its end.

  Raises:
    ConfigError: the model is not a WordPiece, WordLevel or BPE.
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


def plain_tokenizer(
  tokenizer: Tokenizer,
) -> tuple[Tokenizer, np.ndarray | None]:
  """Returns a tokenizer without a map, and its map: the row of each id.

  Trimmed tokens are left out. None instead of a map: ids are rows.
  """
  if not isinstance(tokenizer, MappedTokenizer):
    return tokenizer, None
  text, token_map = tokenizer.to_json(), tokenizer.token_map
  if (token_map < 0).any():  # tokens that were trimmed need no row
    text, ids = trim_tokenizer(text, token_map >= 0)
    token_map = token_map[ids]
  inner = tokenizers.Tokenizer.from_str(text)
  return Tokenizer(inner, tokenizer.special), token_map


def trimmed(
  tokenizer: Tokenizer, keep_V: Sequence[bool] | np.ndarray
) -> MappedTokenizer:
  """Returns a tokenizer without some tokens, with a map from the old ids.

  The tokens of `trim_tokenizer` remain, and those that pad and end. Removed
  tokens are -1 in its `token_map`.

  Args:
    tokenizer: A tokenizer whose ids are not mapped.
    keep_V: bool[V], whether to keep each id; False beyond its end.

  Raises:
    ConfigError: see `trim_tokenizer`; or the ids are mapped already.
  """
  if isinstance(tokenizer, MappedTokenizer):
    raise ConfigError(
      "this tokenizer is trimmed already; start from the dense run before that"
    )
  stays_V = np.zeros(tokenizer.vocab_size, bool)
  stays_V[: len(keep_V)] = keep_V[: len(stays_V)]
  special = [tokenizer.pad_id, *tokenizer.end_ids]
  stays_V[special] = True
  values = json.loads(tokenizer.to_json())
  ids = _remove(values, stays_V)
  token_map = np.full(tokenizer.vocab_size, -1, np.int32)
  token_map[ids] = np.arange(len(ids))
  text = json.dumps(values, ensure_ascii=False)
  inner = tokenizers.Tokenizer.from_str(text)
  return MappedTokenizer(Tokenizer(inner, tokenizer.special), token_map)


def most_used(
  tokenizer: Tokenizer, count_V: np.ndarray, number: int
) -> MappedTokenizer:
  """Returns a tokenizer with the tokens that a text uses most, see `trimmed`.

  A token of a BPE counts as used as often as any that is merged from it.

  Args:
    tokenizer: A tokenizer whose ids are not mapped.
    count_V: Uses of each token; may be shorter than V.
    number: Tokens to keep, as long as fewer have to stay.

  Raises:
    ConfigError: see `trimmed`.
  """
  size = tokenizer.vocab_size
  usage_V = token_usage(count_V, size)
  model = json.loads(tokenizer.to_json())["model"]
  if model.get("type") == "BPE":
    ids = model["vocab"]
    for a, b, whole in reversed(_merges(model)):
      for part in (a, b):
        usage_V[ids[part]] = max(usage_V[ids[part]], usage_V[ids[whole]])
  # Tokens that have to stay rank first, so that the right number leaves.
  stays_V = trimmed(tokenizer, np.zeros(size, bool)).token_map >= 0
  order = np.argsort(-(usage_V + stays_V), kind="stable")
  keep_V = np.zeros(size, bool)
  keep_V[order[:number]] = True
  return trimmed(tokenizer, keep_V)


def _remove(values: dict[str, Any], keep_V) -> list[int]:
  """Removes tokens from a tokenizer.json; returns the remaining ids, sorted."""
  model = values["model"]
  kind = model.get("type")
  if kind not in _KINDS:
    raise ConfigError(
      f"tokens of a {kind} tokenizer cannot be removed; use "
      "fpp.embedding_granularity='row' or 'weight'"
    )
  vocab: dict[str, int] = model["vocab"]
  for added in values["added_tokens"]:  # to keep their ids
    vocab.setdefault(added["content"], added["id"])
  if kind != "BPE" and model.get("unk_token") not in vocab:
    raise ConfigError(
      "tokens cannot be removed from a tokenizer without an unknown token"
    )
  keep = {token for token, i in vocab.items() if i < len(keep_V) and keep_V[i]}
  keep |= {model.get("unk_token")} & set(vocab)
  if kind == "BPE":
    model["merges"] = _close_merges(model, keep)
  ids = {vocab[token] for token in keep}
  ids |= {added["id"] for added in values["added_tokens"]}

  def keep_id(token_id: int) -> int:
    ids.add(token_id)
    return token_id

  _map_ids(values.get("post_processor"), keep_id)
  model["vocab"] = {token: i for token, i in vocab.items() if i in ids}
  values["padding"] = None  # unused, and its pad_id is an old one
  return sorted(ids)


def _close_merges(model: dict[str, Any], keep: set[str]) -> list[Any]:
  """Adds to `keep` the parts of its tokens; returns the merges of `keep`."""
  made = _merges(model)
  keep |= set(model["vocab"]) - {whole for _, _, whole in made}
  size = 0
  while size < len(keep):  # again if a part is merged after its whole
    size = len(keep)
    for a, b, whole in reversed(made):
      if whole in keep:
        keep |= {a, b}
  pairs = zip(model["merges"], made, strict=True)
  return [merge for merge, (_, _, whole) in pairs if whole in keep]


def _merges(model: dict[str, Any]) -> list[tuple[str, str, str]]:
  """Returns the merges of a BPE in order: two parts and their whole."""
  prefix = model.get("continuing_subword_prefix") or ""
  made = []
  for merge in model["merges"]:
    a, b = merge.split(" ", 1) if isinstance(merge, str) else merge
    made.append((a, b, a + b.removeprefix(prefix)))
  return made


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
