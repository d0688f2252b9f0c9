"""Our models as folders that `transformers` loads.

The other way is `pretrained`, of whose `describe` this is the inverse.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.numpy
import tokenizers

from folding import schema
from folding.config import ModelConfig
from folding.data import special_tokens
from folding.data import tokenizers as tokenizers_lib
from folding.models import hf_config, hf_weights
from folding.models import hf_families as families
from folding.models.hf_config import Description
from folding.models.pretrained import WEIGHTS

# Of BERT and of RoBERTa, by what transformers calls them.
_ENCODER_TOKENS = {
  "cls": ("[CLS]", "<s>"),
  "sep": ("[SEP]", "</s>"),
  "mask": ("[MASK]", "<mask>"),
  "unk": ("[UNK]", "<unk>"),
}


def save_pretrained(
  params: Mapping[str, Any],
  config: ModelConfig,
  family: str,
  path: str | pathlib.Path,
  *,
  tokenizer_path: str | pathlib.Path,
  max_length: int,
  num_classes: int = 0,
  label_names: tuple[str, ...] = (),
) -> None:
  """Writes a folder that the Auto classes of `transformers` load as it is.

  A sequence classifier where there are classes, else a next-token model where
  it is causal, else the encoder alone (without a pooler if it has none).

  Args:
    params: Dense parameters (see `folding.unfold`), with a "head" for classes.
    config: Resolved; of the dense model.
    family: See `hf_config.family_of`.
    path: The folder; made if need be.
    tokenizer_path: The tokenizer.json that goes with it.
    max_length: Positions.
    num_classes: C.
    label_names: One a class; (): "LABEL_0" and so on.

  Raises:
    schema.ConfigError: the family does not compute this model, its standard
      classifier has another head or would not see the end of a text, or the
      parameters do not fit; says why.
  """
  tokenizer = tokenizers_lib.load_tokenizer(tokenizer_path)
  begin = tokenizer.begin_ids[0].item() if tokenizer.begin_ids.size else None
  pad = tokenizer.pad_id
  if config.causal and num_classes and tokenizer.ends_with_pad:
    # transformers reads the logits at the last token that is not this one.
    schema.require(
      begin is not None,
      f"{tokenizer_path} ends each text with what fills up ({pad}), which a "
      "classifier of this kind passes over; no standard folder does as it should",
    )
    assert begin is not None
    pad = begin
  described = Description(
    family=family,
    config=config,
    vocab_size=params["embed"]["embedding"].shape[0],
    max_length=max_length,
    pad_id=pad,
    token_types=2 if family in ("bert", "roberta", "xlm-roberta") else 0,
    num_classes=num_classes,
    label_names=tuple(label_names),
  )
  ends = tokenizer.end_ids.tolist()
  values = to_hf(described) | {
    "eos_token_id": ends[0] if len(ends) == 1 else ends,
    # A decoder without one generates from the end of a text before.
    "bos_token_id": ends[0] if config.causal and begin is None else begin,
    "torch_dtype": "float32",
  }
  tensors = hf_weights.export_tensors(
    described, hf_config.head_of(described), params
  )
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
  _write_json(folder / "config.json", values)
  text = pathlib.Path(tokenizer_path).read_bytes()  # may be the very file
  (folder / "tokenizer.json").write_bytes(text)
  names = tokenizers.Tokenizer.from_file(str(tokenizer_path))
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_length,
    "pad_token": names.id_to_token(pad),
    "eos_token": names.id_to_token(tokenizer.end_id),
    "bos_token": None if begin is None else names.id_to_token(begin),
    "clean_up_tokenization_spaces": False,
    # As in `folding.data.tokenizers`: "<end>" in a text is text.
    "split_special_tokens": True,
    # GPT-2 would add token_type_ids to the embedding.
    "model_input_names": ["input_ids", "attention_mask"],
  }
  if not config.causal:
    known = names.get_vocab()
    options |= {
      f"{kind}_token": next((x for x in found if x in known), None)
      for kind, found in _ENCODER_TOKENS.items()
    }
  elif not num_classes and tokenizer.special.chat_template is not None:
    # It is written with special tokens, which then have to be read as such.
    options["split_special_tokens"] = False
    options["chat_template"] = tokenizer.special.chat_template
  _write_json(folder / special_tokens.OPTIONS, options)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_tensors(
  path: str | os.PathLike, tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
  """Writes a safetensors file that others may read, as other files are.

  Raises:
    OSError: it cannot be written.
  """
  with open(path, "wb") as file:
    mode = os.fstat(file.fileno()).st_mode
  try:
    safetensors.numpy.save_file(tensors, path, metadata)
  except safetensors.SafetensorError as error:  # such as a full disk
    raise OSError(f"cannot write {path} ({error})") from error
  os.chmod(path, mode)  # it makes one for its owner alone


def to_hf(described: Description) -> dict[str, Any]:
  """Returns the config.json of a description, the inverse of `describe`.

  Raises:
    schema.ConfigError: the family does not compute this model, or its
      sequence classifier has another head; says what would do.
  """
  family, config = described.family, described.config
  reason = hf_config.misfit(config, family, described.num_classes)
  schema.require(reason is None, f"no export as {family}: {reason}")
  layout = described.layout
  values: dict[str, Any] = {"model_type": family}
  # The first of several names for one function is the usual one.
  activations = {v: k for k, v in reversed(families.ACTIVATIONS.items())}
  for ours, name in families.FIELD_NAMES[layout].items():
    values[name] = getattr(config, ours)
  values[families.FIELD_NAMES[layout]["activation"]] = activations[
    config.activation
  ]
  widths = config.mlp_width
  values[families.FIELD_NAMES[layout]["mlp_width"]] = (
    widths[0] if isinstance(widths, tuple) else widths
  )
  values["vocab_size"] = described.vocab_size
  values[families.POSITION_NAMES[layout]] = (
    described.max_length + described.position_offset
  )
  values["pad_token_id"] = described.pad_id
  if layout in ("bert", "roberta"):
    values["type_vocab_size"] = described.token_types
    values["attention_probs_dropout_prob"] = 0.0
  elif layout == "distilbert":
    values["attention_dropout"] = 0.0
  elif layout == "gpt2":
    values["embd_pdrop"] = config.dropout
    values["attn_pdrop"] = 0.0
  else:
    values |= _llama_options(config, family)
  return values | _architecture(described)


def _llama_options(config: ModelConfig, family: str) -> dict[str, Any]:
  options: dict[str, Any] = {"rope_theta": config.rope_base}
  if config.rope_scaling:
    kinds = {len(names): kind for kind, names in families.ROPE_SCALINGS.items()}
    kind = kinds[len(config.rope_scaling)]
    names = families.ROPE_SCALINGS[kind]
    scaling = dict(zip(names, config.rope_scaling, strict=True))
    length = {n: int(x) for n, x in scaling.items() if n.startswith("orig")}
    options["rope_scaling"] = {"rope_type": kind, **scaling, **length}
  if family == "llama":
    biases = ("attention_bias", "mlp_bias")
    return options | dict.fromkeys(biases, config.use_bias)
  options["sliding_window"] = config.window
  if family == "qwen2":
    options["use_sliding_window"] = config.window is not None
    options["max_window_layers"] = 0
  return options


def _architecture(described: Description) -> dict[str, Any]:
  family, name = described.family, families.FAMILIES[described.family]
  if not described.num_classes:
    kind = "Model"
    if described.config.causal:
      kind = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    return {"architectures": [name + kind]}
  labels = described.label_names or tuple(
    f"LABEL_{i}" for i in range(described.num_classes)
  )
  return {
    "architectures": [f"{name}ForSequenceClassification"],
    "id2label": {str(i): label for i, label in enumerate(labels)},
    "label2id": {label: i for i, label in enumerate(labels)},
  }
