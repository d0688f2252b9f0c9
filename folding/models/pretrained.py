"""Hugging Face checkpoints: folders and hub ids -> parameters, and back.

A folder holds config.json, tokenizer.json, and model.safetensors or its parts
with an index. Pickles are never opened.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import ml_dtypes  # noqa: F401  (tells NumPy of bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

from folding import files, schema
from folding.config import Task
from folding.data import special_tokens
from folding.data import tokenizers as tokenizers_lib
from folding.models import hf_config, hf_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS = (
  *("config.json", "tokenizer.json", "model*.safetensors", INDEX),
  *(special_tokens.GENERATION, special_tokens.CHAT, special_tokens.OPTIONS),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")


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
  tokenizer_path = _check_tokenizer(folder, described)
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
    folder = pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=list(_PATTERNS))
    )
  # Offline, no such name, no permission: each is an exception of its own.
  except Exception as error:
    raise schema.ConfigError(
      f"there is no folder {name}, and the Hugging Face hub did not send it "
      f"({schema.first_line(error)})"
    ) from error
  for names in (("tokenizer.json",), (WEIGHTS, INDEX)):
    schema.require(
      any((folder / each).is_file() for each in names),
      f"{name} has no {' and no '.join(names)} on the hub; "
      f"{_conversion(folder, name)}",
    )
  return folder


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
      f"{folder}: config.json is broken: {schema.reason(error)}"
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  schema.require(path.is_file(), f"there is no {path}")
  return files.read_json(str(path), dict)


def _refuse_pickle(path: pathlib.Path) -> None:
  schema.require(
    path.suffix not in _PICKLES,
    f"{path} is a pickle, which can run code and is not read; where you trust "
    f"it, {_conversion(path.parent, str(path.parent))}",
  )


def _conversion(folder: pathlib.Path, source: str) -> str:
  """Returns what makes a folder of the files that are read.

  Args:
    folder: With a config.json, perhaps, that names the class: others lose
      the head.
    source: Of what is there; folder or hub id.
  """
  names = None
  with contextlib.suppress(schema.ConfigError):
    names = _read_json(folder / "config.json").get("architectures")
  name = names[0] if isinstance(names, list) and names else "AutoModel"
  return (
    f"convert it once: transformers.{name} and transformers.AutoTokenizer, each "
    f".from_pretrained({source!r}).save_pretrained(OUT)"
  )


def _check_tokenizer(
  folder: pathlib.Path, described: hf_config.Description
) -> pathlib.Path:
  path = folder / "tokenizer.json"
  schema.require(
    path.is_file(),
    f"{folder} has no tokenizer.json; {_conversion(folder, str(folder))}",
  )
  tokenizer = tokenizers_lib.load_tokenizer(path)
  ids, rows = tokenizer.vocab_size, described.vocab_size
  schema.require(
    ids <= rows,
    f"{path} does not fit the model: its ids go up to {ids - 1}, and there are "
    f"{rows} embeddings",
  )
  schema.require(
    not (described.config.causal and described.num_classes)
    or not tokenizer.ends_with_pad,
    f"{path} ends each text with what fills up ({tokenizer.pad_id}), which a "
    "classifier of this kind passes over; save the tokenizer without it "
    "(add_eos_token=False), which computes the same",
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
    raise schema.ConfigError(
      f"{folder} has no {WEIGHTS} and no {INDEX}; "
      f"{_conversion(folder, str(folder))}"
    )
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
