"""Hugging Face checkpoints: dense arrays, with zeros as removed weights."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from folding import files, paths
from folding.config import ModelConfig
from folding.data.special_tokens import OPTIONS
from folding.data.tokenizers import Tokenizer
from folding.data.trim import plain_tokenizer
from folding.errors import ConfigError
from folding.model import Model
from folding.models import hf_config, hf_weights, sentence
from folding.models.dense_form import filled
from folding.models.families import FAMILIES
from folding.models.hf_weights import TOKENIZER
from folding.models.shape import model_of
from folding.serving.loaded import require_exportable, require_float
from folding.tasks import task_of

# Special tokens of BERT and of RoBERTa, by their names in transformers.
_ENCODER_TOKENS = {
  "cls": ("[CLS]", "<s>"),
  "sep": ("[SEP]", "</s>"),
  "mask": ("[MASK]", "<mask>"),
  "unk": ("[UNK]", "<unk>"),
}


def export_hf(
  path: str | os.PathLike,
  loaded: Model,
  dtype: str = "float32",
  *,
  report: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
  """Writes a Hugging Face checkpoint to a new folder.

  The Auto classes of `transformers` load it. Folded projections are written
  dense. If layers differ, removed heads are written as zeros, and every MLP is
  padded to the widest one. Trimmed tokens stay removed.

  Args:
    path: Created if it does not exist; must be empty.
    loaded: From `folding.load`.
    dtype: Type of the stored arrays.
    report: Called with the size of the arrays before they are written.

  Returns:
    {"parameters": bytes of the arrays, "files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty, a parameter is NaN, no family computes
      this model, its classifier would ignore the end of a text, or the dtype is
      not a floating-point one.
    OSError: it cannot be written.
  """
  path = require_exportable(path, loaded.params)
  require_float(dtype)
  loaded = _projected(loaded)
  params, described, tokenizer = _dense(loaded)
  count, before = (
    sum(w.size for w in paths.flatten(tree).values())
    for tree in (params, loaded.params)
  )
  grown = (
    f"; {count - before:,} of {count:,} parameters undo folding, or are zeros in "
    "place of removed heads and neurons, so that all layers have one shape; a "
    "plan of folding compress --uniform needs none"
  )
  pooler = hf_weights.idle_pooler(described)
  size = count + sum(w.size for w in pooler.values())
  size *= jnp.dtype(dtype).itemsize
  report(
    f"About {size:,} bytes of arrays will be written in {dtype}"
    f"{grown if count > before else ''}"
  )
  begins, ends = tokenizer.begin_ids.tolist(), tokenizer.end_ids.tolist()
  # A decoder generates from the end of a text.
  if described.config.causal and not begins:
    begins = ends
  hf_weights.save_pretrained(
    path,
    params,
    described,
    dtype=dtype,
    more=pooler,
    eos_token_id=ends[0] if len(ends) == 1 else ends,
    bos_token_id=begins[0] if begins else None,
  )
  options = tokenizer_options(tokenizer, described)
  files.write_file(os.path.join(path, TOKENIZER), tokenizer.to_json())
  files.write_json(os.path.join(path, OPTIONS), options)
  if task_of(loaded).makes_vectors:
    sentence.write(path, loaded.shape, loaded.shape.max_length)
  files.write_checksums(path, files.all_files(path))
  return {"parameters": size, "files": files.folder_bytes(path)}


def _dense(
  loaded: Model,
) -> tuple[dict[str, Any], hf_config.Description, Tokenizer]:
  """Returns the dense parameters of a model, their description and tokenizer.

  Raises:
    ConfigError: no family computes it, or see `filled` and `_hf_pad_id`.
  """
  m = _uniform(loaded)
  family = hf_config.family_of(m, len(loaded.labels))
  widths = [int(np.max(m.mlp_width))] * len(loaded.shape.layers)
  params = filled(loaded.shape, loaded.params, m.num_heads, widths)
  # Heads that share keys have values of their own beside a diagonal W_V; the
  # dense form then repeats the keys.
  m = dataclasses.replace(
    model_of(loaded.shape.dense()),
    mlp_width=m.mlp_width,
    num_heads=m.num_heads,
    num_kv_heads=params["blocks_0"]["attn"]["k"]["kernel"].shape[1],
  )
  tokenizer, token_map = plain_tokenizer(loaded.tokenizer)
  if token_map is not None:
    params["embed"] = {"embedding": params["embed"]["embedding"][token_map]}
  described = hf_config.Description(
    family=family,
    config=m,
    vocab_size=params["embed"]["embedding"].shape[0],
    max_length=loaded.shape.max_length,
    pad_id=_hf_pad_id(tokenizer, m.causal and bool(loaded.labels)),
    token_types=max(
      m.segments, FAMILIES[family].defaults.get("type_vocab_size", 0)
    ),
    problem=loaded.task,
    label_names=loaded.labels,
  )
  return params, described, tokenizer


def _projected(loaded: Model) -> Model:
  """Returns a model whose embeddings of one low rank are those of DeBERTa-v2.

  A model that no family computes this way is returned as it is.
  """
  shape = loaded.shape
  if not shape.shared_rank:
    return loaded
  params = dict(loaded.params)
  params["embed_project"] = params.pop("embed_expand")
  shape = dataclasses.replace(
    shape,
    embed_width=shape.shared_rank,
    project_first=True,
    embedding_rank=0,
    embedding_shared=False,
  )
  low = dataclasses.replace(loaded, shape=shape, params=params)
  is_known = hf_config.is_known(_uniform(low), len(low.labels))
  return low if is_known else loaded


def _uniform(loaded: Model) -> ModelConfig:
  """Returns the shape that all layers get: the widest MLP, and all heads.

  If as many heads are left in every layer, and a family has heads of their size, the
  others are left out.
  """
  m = model_of(loaded.shape)
  whole = dataclasses.replace(m, mlp_width=int(np.max(m.mlp_width)), heads=None)
  counts = {len(heads) for heads in m.heads or ()}
  if len(counts) != 1:
    return whole
  [H] = counts
  J = H * m.num_kv_heads // m.num_heads
  small = dataclasses.replace(whole, num_heads=H, num_kv_heads=J)
  return small if hf_config.is_known(small, len(loaded.labels)) else whole


def _hf_pad_id(tokenizer: Tokenizer, is_causal_classifier: bool) -> int:
  """Returns a pad id that ends no text.

  A causal classifier of transformers pools at the last token that is not the
  pad token.
  """
  if not is_causal_classifier or not tokenizer.ends_with_pad:
    return tokenizer.pad_id
  if not tokenizer.begin_ids.size:
    raise ConfigError(
      f"the tokenizer ends each text with the pad token ({tokenizer.pad_id}), "
      "which this kind of classifier ignores in transformers"
    )
  return int(tokenizer.begin_ids[0])


def tokenizer_options(
  tokenizer: Tokenizer, described: hf_config.Description
) -> dict[str, Any]:
  """Returns a tokenizer_config.json that gives the same ids in transformers."""
  inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  begin = tokenizer.begin_ids
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": described.max_length,
    "pad_token": inner.id_to_token(described.pad_id),
    "eos_token": inner.id_to_token(tokenizer.end_id),
    "bos_token": inner.id_to_token(int(begin[0])) if begin.size else None,
    "clean_up_tokenization_spaces": False,
    # As in `folding.data.tokenizers`: "<end>" in a text is text.
    "split_special_tokens": True,
    # GPT-2 would add token_type_ids to the embedding.
    "model_input_names": ["input_ids", "attention_mask"],
  }
  if described.config.segments:
    options["model_input_names"].append("token_type_ids")
  if not described.config.causal:
    known = inner.get_vocab()
    for kind, names in _ENCODER_TOKENS.items():
      found = (name for name in names if name in known)
      options[f"{kind}_token"] = next(found, None)
  elif described.head == "lm" and tokenizer.special.chat_template is not None:
    # It contains special tokens, which then have to be read as such.
    options["split_special_tokens"] = False
    options["chat_template"] = tokenizer.special.chat_template
  return options
