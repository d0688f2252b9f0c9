"""Hugging Face checkpoints: folders and hub ids -> parameters, and back.

A folder holds config.json, tokenizer.json, and model.safetensors or its parts
with an index. Pickles are never opened.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (tells NumPy of bfloat16)
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from folding import schema
from folding.config import ModelConfig, Task
from folding.data import special_tokens
from folding.data import tokenizers as tokenizers_lib
from folding.models import hf_config, hf_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS = (
  *("config.json", "tokenizer.json", "model*.safetensors", INDEX),
  special_tokens.GENERATION,
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Of BERT and of RoBERTa, by what transformers calls them.
_ENCODER_TOKENS = {
  "cls": ("[CLS]", "<s>"),
  "sep": ("[SEP]", "</s>"),
  "mask": ("[MASK]", "<mask>"),
  "unk": ("[UNK]", "<unk>"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(hf_config.Description):
  """A checkpoint with its arrays.

  Attributes:
    params: Our parameters, NumPy float32. Those of a classifier ("head",
      "pooler") are absent where the checkpoint has none.
    tokenizer_path: Its tokenizer.json.
    left_out: Names of tensors that a model of ours has no use for.
  """

  params: dict[str, Any]
  tokenizer_path: pathlib.Path
  left_out: tuple[str, ...] = ()


def load_pretrained(
  path_or_hub_id: str | pathlib.Path, *, task: Task | None = None
) -> Pretrained:
  """Returns a checkpoint as our configuration and parameters.

  Tensors are read one at a time, so there is one copy of the weights.

  Args:
    path_or_hub_id: A folder, or a name on the Hugging Face hub.
    task: What for: "lm" reads the output layer, "classify" the head of a
      sequence classifier if there is one. None: whichever there is.

  Raises:
    schema.ConfigError: the folder or a file in it is missing, broken, a
      pickle, or of a kind that this library does not have; says which.
  """
  folder = find_pretrained(path_or_hub_id)
  described = describe_pretrained(folder)
  if task == "lm":
    schema.require(
      described.config.causal,
      f"{folder}: a {described.family} model does not predict the next token; "
      "use task 'classify'",
    )
    described = dataclasses.replace(described, num_classes=0, label_names=())
  head = hf_config.head_of(described)
  if task == "classify" and head == "lm":
    head = "none"
  tokenizer_path = _check_tokenizer(folder, described.vocab_size)
  with contextlib.ExitStack() as stack:
    where = _open(folder, stack)
    shapes = {
      name: tuple(file.get_slice(name).get_shape())
      for name, file in where.items()
    }
    try:
      params, left_out = hf_weights.import_params(
        described, head, shapes, lambda name: _read(where[name], name)
      )
    except schema.ConfigError as error:
      raise schema.ConfigError(f"{folder}: {error}") from None
  fields = {
    field.name: getattr(described, field.name)
    for field in dataclasses.fields(described)
  }
  return Pretrained(
    **fields,
    params=params,
    tokenizer_path=tokenizer_path,
    left_out=tuple(left_out),
  )


def find_pretrained(path_or_hub_id: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder of a checkpoint, downloaded if it is a hub id.

  Raises:
    schema.ConfigError: there is no such folder, or no way to download.
  """
  name, folder = str(path_or_hub_id), pathlib.Path(path_or_hub_id).expanduser()
  if folder.is_dir():
    return folder
  _refuse_pickle(folder)
  schema.require(
    not folder.exists(), f"{folder} is a file; name the folder that holds it"
  )
  schema.require(
    not name.startswith((".", "/", "~")), f"there is no folder {name}"
  )
  try:
    import huggingface_hub  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise schema.ConfigError(
      f"there is no folder {name}; to look for it on the Hugging Face hub, "
      "install the extra: pip install -e '.[hub]'"
    ) from None
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=list(_PATTERNS))
    )
  # Offline, no such name, no permission: each is an exception of its own.
  except Exception as error:
    reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
    raise schema.ConfigError(
      f"there is no folder {name}, and the Hugging Face hub did not send it "
      f"({reason[0]})"
    ) from error


def describe_pretrained(folder: pathlib.Path) -> hf_config.Description:
  """Returns what the config.json of a folder says.

  Raises:
    schema.ConfigError: it is missing, broken, or of an unsupported model.
  """
  values = _read_json(folder / "config.json")
  try:
    return hf_config.describe(values)
  except schema.ConfigError as error:
    raise schema.ConfigError(f"{folder}: {error}") from None
  except (AttributeError, KeyError, TypeError) as error:
    # A value of another type than theirs, somewhere.
    raise schema.ConfigError(
      f"{folder}: config.json is broken: {type(error).__name__}: {error}"
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  schema.require(path.is_file(), f"there is no {path}")
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise schema.ConfigError(f"{path} is no JSON ({error})") from None
  schema.require(isinstance(values, dict), f"{path} is no JSON object")
  return values


def _refuse_pickle(path: pathlib.Path) -> None:
  schema.require(
    path.suffix not in _PICKLES,
    f"{path} is a pickle, which can run code and is not read; convert it once, "
    "where you trust it: transformers.AutoModel.from_pretrained(FOLDER)"
    ".save_pretrained(OUT) writes model.safetensors",
  )


def _check_tokenizer(folder: pathlib.Path, vocab_size: int) -> pathlib.Path:
  path = folder / "tokenizer.json"
  schema.require(
    path.is_file(),
    f"{folder} has no tokenizer.json; transformers.AutoTokenizer"
    ".from_pretrained(FOLDER).save_pretrained(FOLDER) writes one",
  )
  ids = tokenizers_lib.load_tokenizer(path).vocab_size
  schema.require(
    ids <= vocab_size,
    f"{path} does not fit the model: its ids go up to {ids - 1}, and there are "
    f"{vocab_size} embeddings",
  )
  return path


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Returns {name of a tensor: open file that holds it}."""
  single, index = folder / WEIGHTS, folder / INDEX
  if single.is_file():
    file = _open_file(single, stack)
    return dict.fromkeys(file.keys(), file)
  if not index.is_file():
    for path in sorted(folder.iterdir()):
      _refuse_pickle(path)
    raise schema.ConfigError(f"{folder} has no {WEIGHTS} and no {INDEX}")
  where = _read_json(index).get("weight_map")
  is_map = isinstance(where, dict) and all(
    isinstance(file, str) and "/" not in file for file in where.values()
  )
  schema.require(is_map, f"{index} has no weight_map of names and files")
  assert isinstance(where, dict)
  files = {x: _open_file(folder / x, stack) for x in sorted({*where.values()})}
  for name, file in where.items():
    schema.require(
      name in files[file].keys(),
      f"{folder / file} has no tensor {name}, which {INDEX} says",
    )
  return {name: files[file] for name, file in where.items()}


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  schema.require(path.is_file(), f"there is no {path}, which {INDEX} names")
  _refuse_pickle(path)
  try:
    return stack.enter_context(safetensors.safe_open(path, "numpy"))
  except safetensors.SafetensorError as error:
    raise schema.ConfigError(
      f"{path} is truncated or no safetensors file ({error})"
    ) from None


def _read(file: Any, name: str) -> np.ndarray:
  kind = file.get_slice(name).get_dtype()
  schema.require(
    kind in _FLOATS,
    f"tensor {name} is stored as {kind}; only {', '.join(_FLOATS)} are read",
  )
  return file.get_tensor(name).astype(np.float32, copy=False)


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
      classifier has another head, or the parameters do not fit; says why.
  """
  tokenizer = tokenizers_lib.load_tokenizer(tokenizer_path)
  described = hf_config.Description(
    family=family,
    config=config,
    vocab_size=params["embed"]["embedding"].shape[0],
    max_length=max_length,
    pad_id=tokenizer.pad_id,
    token_types=2 if family in ("bert", "roberta", "xlm-roberta") else 0,
    num_classes=num_classes,
    label_names=tuple(label_names),
  )
  begin = tokenizer.begin_ids[0].item() if tokenizer.begin_ids.size else None
  ends = tokenizer.end_ids.tolist()
  values = hf_config.to_hf(described) | {
    "eos_token_id": ends[0] if len(ends) == 1 else ends,
    "bos_token_id": begin,
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
    "pad_token": names.id_to_token(tokenizer.pad_id),
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
  _write_json(folder / "tokenizer_config.json", options)


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
