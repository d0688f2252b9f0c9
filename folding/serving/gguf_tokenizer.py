"""The tokenizer of a GGUF file, from a tokenizer.json.

llama.cpp has two kinds of BPE. "gpt2" merges bytes by rank, after a pre-tokenizer
that it knows by name. "llama" (SentencePiece) merges characters: any two neighbours
that make a token, the highest score first.
"""

import json
from typing import Any

import tokenizers

from folding.data.tokenizers import Tokenizer
from folding.errors import ConfigError

_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
# {(how text is split, whether words that are tokens skip the merges): name in
# llama.cpp}.
_PRE_TOKENIZERS = {
  (("words",), False): "gpt-2",
  (("digits", "words"), False): "smollm",
  ((_LLAMA_3,), True): "llama-bpe",
  ((_LLAMA_3,), False): "smaug-bpe",
  ((_QWEN_2,), False): "qwen2",
}
_SPACE = "▁"  # SentencePiece's
# Kinds of tokens in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, num_rows: int) -> None:
  """Adds the fields of a tokenizer to a `gguf.GGUFWriter`.

  Ids are rows of the embedding. Rows without a token get an unused one.

  Raises:
    ConfigError: llama.cpp has no such tokenizer.
  """
  values = json.loads(tokenizer.to_json())
  model = values["model"]
  if model["type"] != "BPE":
    raise ConfigError(
      f"--format=gguf writes tokenizers of kind BPE; this one is {model['type']}"
    )
  if tokenizer.begin_ids.size > 1:
    raise ConfigError(
      "llama.cpp puts one token before a text; this tokenizer puts "
      f"{tokenizer.begin_ids.size}"
    )
  vocabulary = tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab()
  tokens = [f"[UNUSED_{i}]" for i in range(num_rows)]
  kinds = [_UNUSED] * num_rows
  for token, i in vocabulary.items():
    is_byte = model["byte_fallback"] and token in _BYTES
    tokens[i], kinds[i] = token, _BYTE if is_byte else _NORMAL
  for added in values["added_tokens"]:
    kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
  unknown = vocabulary.get(model["unk_token"] or "")
  if unknown is not None:
    kinds[unknown] = _UNKNOWN
    writer.add_unk_token_id(unknown)
  merges = [
    tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
    for merge in model["merges"]
  ]
  if model["byte_fallback"]:
    writer.add_tokenizer_model("llama")
    writer.add_add_space_prefix(_has_space_prefix(values))
    writer.add_token_scores(_scores(tokens, kinds, merges))
  else:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(values))
    writer.add_token_merges([" ".join(merge) for merge in merges])
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  ends = tokenizer.end_ids.tolist()
  begins = tokenizer.begin_ids.tolist()
  writer.add_add_bos_token(bool(begins))
  writer.add_bos_token_id([*begins, ends[0]][0])
  writer.add_eos_token_id(ends[0])
  if len(ends) > 1:
    writer.add_eot_token_id(ends[1])
  writer.add_pad_token_id(tokenizer.pad_id)
  if tokenizer.special.chat_template is not None:
    writer.add_chat_template(tokenizer.special.chat_template)


_BYTES = {f"<0x{i:02X}>" for i in range(256)}


def _pre_tokenizer(values: dict[str, Any]) -> str:
  """Returns the name in llama.cpp of what splits text before the merges."""
  splits = []
  for step in _steps(values["pre_tokenizer"], "pretokenizers"):
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
      splits += ["words"] * step["use_regex"]
    elif step["type"] == "Digits" and step["individual_digits"]:
      splits.append("digits")
    elif step["type"] == "Split" and step["behavior"] == "Isolated":
      splits.append(pattern)
    else:
      splits.append(step["type"])
  normalizers = [s["type"] for s in _steps(values["normalizer"], "normalizers")]
  key = tuple(splits), values["model"]["ignore_merges"]
  # llama.cpp does not compose characters (NFC), not even for Qwen's own files.
  if key not in _PRE_TOKENIZERS or normalizers not in ([], ["NFC"]):
    raise ConfigError(
      "llama.cpp has no name for the pre-tokenizer of this tokenizer.json; "
      f"known ones are {', '.join(_PRE_TOKENIZERS.values())}"
    )
  return _PRE_TOKENIZERS[key]


def _has_space_prefix(values: dict[str, Any]) -> bool:
  """Returns whether a tokenizer like SentencePiece puts a space before a text."""
  steps = _steps(values["normalizer"], "normalizers")
  kinds = [
    (step["type"], step.get("prepend") or step.get("content")) for step in steps
  ]
  before = values["pre_tokenizer"] or {}
  is_whole = not before or before.get("pattern") == {"String": " "}
  has_prefix = kinds[:1] == [("Prepend", _SPACE)]
  if not is_whole or kinds[has_prefix:] != [("Replace", _SPACE)]:
    raise ConfigError(
      "llama.cpp reads a BPE with byte fallback only if spaces are replaced by "
      f"{_SPACE} and text is not split before the merges"
    )
  return has_prefix


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
  """Returns the steps of a normalizer or pre-tokenizer in order."""
  return [] if step is None else step.get(name) or [step]


def _scores(
  tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]
) -> list[float]:
  """Returns the scores by which SentencePiece merges in the same order.

  `merges` are best first.

  Raises:
    ConfigError: there are none, because the merges do not rank tokens, or leave
      out two parts of a token.
  """
  made = ["".join(merge) for merge in merges]
  rank = {token: i for i, token in reversed([*enumerate(made)])}
  known, parts = set(tokens), set(merges)
  is_ranked = all(
    rank[token] == i or made[i - 1] == token for i, token in enumerate(made)
  )
  is_complete = all(
    (token[:i], token[i:]) in parts
    for token, kind in zip(tokens, kinds, strict=True)
    if kind == _NORMAL
    for i in range(1, len(token))
    if token[:i] in known and token[i:] in known
  )
  if not is_ranked or not is_complete:
    raise ConfigError(
      "llama.cpp has no such tokenizer: the merges of this BPE with byte fallback "
      "have no order by tokens, as SentencePiece needs"
    )
  return [-float(rank.get(token, len(made))) for token in tokens]
