"""Hugging Face checkpoints <-> our parameters.

A `Layout` names the modules of each family. The axes of our arrays are in
`params.TABLE`. Theirs follow from these: they store kernels as [out, in], with
the heads and channels of an axis joined. Letters as in `params`, and t for the
number of our arrays in one of their tensors.

Rotary positions pair channel i of a head with i + K/2 on both sides, so queries
and keys need no reordering unless some channels do not rotate (`_channels`).

A folder holds config.json, tokenizer.json, and model.safetensors or its shards
with an index. Pickles are never opened.
"""

import collections
import dataclasses
import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from folding import errors, files, paths
from folding.errors import ConfigError
from folding.models import hf_config
from folding.models import params as params_lib
from folding.models.families import FAMILIES
from folding.models.hf_config import Description
from folding.tasks import TASKS

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"  # of peft
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
_HINT = (
  "load it with transformers and write it again by save_pretrained(), model and "
  "tokenizer"
)

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(@\w[\w./-]*)?")
_QUERY_OR_KEY = re.compile("/attn/[qk]/")
# Buffers, and heads for other tasks, without the prefix of a layout.
_UNUSED = re.compile(
  r"embeddings\.position_ids|(.*\.)?rotary_emb\.inv_freq"
  r"|.*\.(attn|attention)\.(masked_)?bias"
  r"|(pooler|cls|(pre_)?classifier|score|qa_outputs|lm_head|embed_out|head"
  r"|vocab_\w+|discriminator_predictions|generator_\w+|sequence_summary"
  r"|multiple_choice_head)\..*|decoder\.(weight|bias)"
)


class Tensor(NamedTuple):
  """One of their tensors, and our arrays in it."""

  name: str
  paths: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[int, ...]  # sizes of theirs before axes were joined
  order: tuple[int, ...]  # of `axes` in ours; the first one stacks the arrays
  is_shared: bool = False  # each of our arrays is a copy
  shift: float = 0.0  # added to theirs
  skip: int = 0  # rows that theirs has before ours
  plus: str = ""  # another tensor of theirs, whose first row ours includes


def tensors(
  described: Description, head: str, has_pooler: bool
) -> list[Tensor]:
  """Returns the tensors of a checkpoint; each of our paths occurs once.

  Args:
    described: Its family and sizes.
    head: "lm", "classify", or "none" for hidden states alone.
    has_pooler: Whether a checkpoint without head has the pooler of BERT.
  """
  layout, config = FAMILIES[described.family].layout, described.config
  has = {
    "segment_embed": config.segments,
    "embed_project": config.embed_width,
    "pooler": has_pooler or head == "classify",
  }
  modules = {
    ours: layout.prefix + theirs
    for ours, theirs in layout.outer.items()
    if has.get(ours, True)
  }
  for n in range(config.num_layers):
    for names, theirs in layout.block.items():
      if n == 0 and names == "norm_attn" and config.embed_norm:
        continue  # an identity
      ours = " ".join(f"blocks_{n}/{name}" for name in names.split())
      modules[ours] = f"{layout.prefix}{layout.blocks}.{n}.{theirs}"
  if head == "classify":
    modules |= layout.classifier
  elif head == "lm" and not config.tie_embeddings:
    modules["head"] = layout.lm_head
  table = []
  for ours, theirs in modules.items():
    names = ours.split()
    for leaf in ("embedding", "kernel", "scale", "bias"):
      row = params_lib.find(f"{names[0]}/{leaf}")
      if row and (leaf != "bias" or _has_bias(described, names[0])):
        held = tuple(f"{name}/{leaf}" for name in names)
        end = "bias" if leaf == "bias" else "weight"
        axes = row.axes
        if names == ["norm_embed"] and config.project_first:
          axes = "D"
        table.append(_tensor(described, f"{theirs}.{end}", held, axes))
  if config.relative_buckets:
    shape = (config.relative_buckets, config.num_heads)
    held = [f"blocks_{n}/attn/relative_bias" for n in range(config.num_layers)]
    table.append(
      Tensor(
        f"{layout.prefix}{layout.relative}.weight",
        tuple(held),
        shape=shape,
        axes=(1, *shape),
        order=(0, 1, 2),
        is_shared=True,
      )
    )
  return table


def _has_bias(described: Description, module: str) -> bool:
  """Returns whether one of our modules has a bias in transformers."""
  config, name = described.config, module.rpartition("/")[2]
  if name == "head":
    return not config.causal
  if name == "embed_project":
    return not config.project_first
  if FAMILIES[described.family].layout.has_biases:
    return True
  if name in ("q", "k", "v"):
    return bool(config.qkv_bias)
  return config.use_bias and not name.startswith("norm_")


def _tensor(
  described: Description, name: str, paths: tuple[str, ...], axes: str
) -> Tensor:
  """Returns their tensor that stacks our arrays.

  A kernel [D, J, K] of keys, for example, is [JK, D] in theirs. The sizes of J,
  K and D are then `Tensor.axes`. The letters `axes` are as in `params.TABLE`.
  """
  layout, config = FAMILIES[described.family].layout, described.config
  path, leaf, ours = paths[0], paths[0].rpartition("/")[2], axes.split()
  # Ours are [in, out]. W_O reads heads and channels; norms and biases read none.
  count = 1 if leaf in ("kernel", "embedding") else 0
  if path.endswith("attn/o/kernel"):
    count = 2
  inputs, outputs = ours[:count], ours[count:]
  outputs.insert(1 if layout.is_stacked_by_head else 0, "t")
  is_in_block = path.startswith("blocks_")
  if leaf == "embedding" or (layout.is_transposed and is_in_block):
    theirs = [inputs, outputs]
  else:
    theirs = [outputs, inputs]
  sizes = _sizes(described) | {"t": len(paths)}
  first, *rest = [math.prod(sizes[x] for x in y) for y in theirs if y]
  skip, plus = 0, ""
  if path == "position_embed/embedding":
    skip = described.position_offset
    if described.token_types and not config.segments:
      plus = f"{layout.prefix}{layout.outer['segment_embed']}.weight"
  letters = [x for joined in theirs for x in joined]
  return Tensor(
    name,
    paths,
    shape=(first + skip, *rest),
    axes=tuple(sizes[x] for x in letters),
    order=tuple(letters.index(x) for x in ("t", *ours)),
    shift=layout.norm_shift if leaf == "scale" else 0.0,
    skip=skip,
    plus=plus,
  )


def _sizes(described: Description) -> dict[str, int]:
  """Returns {letter of an axis: its size}."""
  c = described.config
  width = c.mlp_width[0] if isinstance(c.mlp_width, tuple) else c.mlp_width
  return {
    "C": described.num_classes or described.vocab_size,
    "D": c.width,
    "E": c.width,
    "F": width,
    "H": c.num_heads,
    "J": c.num_kv_heads,
    "K": c.head_dim,
    "P": described.max_length,
    "S": c.segments,
    "V": described.vocab_size,
    "e": c.embed_width or c.width,
  }


def _split(theirs: np.ndarray, tensor: Tensor) -> list[np.ndarray]:
  """Returns our arrays in one of theirs, as views."""
  ours = list(theirs.reshape(tensor.axes).transpose(tensor.order))
  return ours * len(tensor.paths) if tensor.is_shared else ours


def _join(ours: list[np.ndarray], tensor: Tensor) -> np.ndarray:
  """The inverse of `_split`; rows that ours lacks are zero."""
  if tensor.is_shared:
    if any(not np.array_equal(x, ours[0]) for x in ours):
      raise ConfigError(
        f"the layers share {tensor.name}, and {tensor.paths[0]} is not that of "
        "each other layer"
      )
    ours = ours[:1]
  theirs = np.zeros(tensor.shape, np.float32)
  rows = theirs[tensor.skip :]
  rows[...] = (
    np.stack(ours).transpose(np.argsort(tensor.order)).reshape(rows.shape)
  )
  rows -= np.float32(tensor.shift)
  return theirs


def _channels(described: Description) -> np.ndarray | None:
  """Returns their channel for each of ours in a query or key.

  The R of theirs that rotate come first, and i is paired with i + R/2. Of our
  pairs, i and i + K/2, those that rotate come first. None: the order is equal.
  """
  c = described.config
  if c.rope_share == 1:
    return None
  R = int(c.head_dim * c.rope_share)
  pairs_2 = np.arange(R).reshape(2, -1), np.arange(R, c.head_dim).reshape(2, -1)
  return np.concatenate(pairs_2, axis=1).reshape(-1)


def import_params(
  described: Description,
  head: str,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
  """Returns our parameters, without tensors that our model does not need.

  They are views of the tensors wherever that is possible. Names and shapes are
  checked before the first tensor is read. Each tensor is read once. Without
  `config.segments`, BERT's segment 0 is added to every position. A score layer
  without a bias gets one of zeros if the model has biases.

  Args:
    described: From config.json.
    head: As for `tensors`.
    shapes: Name and shape of each tensor of the checkpoint, named with or
      without the layout's prefix.
    read: Returns a tensor by its name, of any float type.

  Raises:
    ConfigError: a tensor is missing, left over, or of another shape; names it.
  """
  prefix = FAMILIES[described.family].layout.prefix
  has_prefix = any(name.startswith(prefix) for name in shapes)

  def find(name: str) -> str:
    name = name if has_prefix else name.removeprefix(prefix)
    older = re.sub(r"(?<=LayerNorm\.)weight$", "gamma", name)
    older = re.sub(r"(?<=LayerNorm\.)bias$", "beta", older)
    return older if older in shapes else name

  has_pooler = find(f"{prefix}pooler.dense.weight") in shapes
  table = tensors(described, head, has_pooler)
  needed = {find(t.name): t.shape for t in table}
  needed |= {
    find(t.plus): (described.token_types, t.shape[1]) for t in table if t.plus
  }
  _check_tensors(described, shapes, needed)
  if head == "lm" and described.config.tie_embeddings:
    output = f"{FAMILIES[described.family].layout.lm_head}.weight"
    _check_tied(output, find(table[0].name), shapes, read)
  flat, channels = {}, _channels(described)
  for tensor in table:
    theirs = read(find(tensor.name))[tensor.skip :]
    if tensor.plus:
      theirs = theirs.astype(np.float32) + read(find(tensor.plus))[:1]
    if tensor.shift:
      theirs = theirs.astype(np.float32) + np.float32(tensor.shift)
    for path, ours in zip(tensor.paths, _split(theirs, tensor), strict=True):
      if channels is not None and _QUERY_OR_KEY.search(path):
        ours = ours[..., channels]
      flat[path] = ours
  is_bare = head == "classify" and "head/bias" not in flat
  if is_bare and described.config.use_bias:
    flat["head/bias"] = np.zeros(described.num_classes, np.float32)
  return traverse_util.unflatten_dict(flat, sep="/")


def _check_tensors(
  described: Description,
  shapes: Mapping[str, tuple[int, ...]],
  needed: Mapping[str, tuple[int, ...]],
) -> None:
  """Refuses tensors that are missing, unknown, or of another shape."""
  missing = [name for name in needed if name not in shapes]
  if missing:
    raise ConfigError(f"tensor {_first(missing)} is missing")
  for name, shape in needed.items():
    if tuple(shapes[name]) != shape:
      raise ConfigError(
        f"tensor {name} is of shape {list(shapes[name])}; config.json asks for "
        f"{list(shape)}"
      )
  prefix = FAMILIES[described.family].layout.prefix
  left = [
    name
    for name in shapes
    if name not in needed and not _UNUSED.fullmatch(name.removeprefix(prefix))
  ]
  if left:
    raise ConfigError(
      f"tensor {_first(left)} has no place in a {described.family} model with "
      "this config.json"
    )


def _check_tied(
  name: str,
  embedding: str,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Refuses an output layer that differs from the embedding that it shares."""
  if name in shapes and not np.array_equal(read(name), read(embedding)):
    raise ConfigError(
      f"tensor {name} is not {embedding}, which config.json says it is; set "
      "tie_word_embeddings to false there"
    )


def _first(names: list[str]) -> str:
  more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
  return f"{names[0]}{more}"


def export_tensors(
  described: Description, head: str, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint, the inverse of `import_params`.

  Biases that the family has and the model lacks are zero, and so is a segment
  embedding. Classifiers of causal models have no bias; ours moves into the bias of
  the last norm, which nothing else reads.

  `params` are dense (see `folding.unfold`), and `head` is that of `tensors`.

  Raises:
    ConfigError: a parameter is missing, left over, or of another shape; names
      it. Or the head has a bias that the family cannot express.
  """
  # The model without a head is saved without the prefix.
  prefix = FAMILIES[described.family].layout.prefix if head == "none" else ""
  arrays = {
    path: np.asarray(leaf, np.float32)
    for path, leaf in paths.flatten(params).items()
  }
  if head == "classify" and described.config.causal:
    _move_head_bias(arrays, described)
  theirs: dict[str, np.ndarray] = {}
  channels = _channels(described)
  for tensor in tensors(described, head, "pooler/kernel" in arrays):
    shape = tuple(tensor.axes[i] for i in tensor.order[1:])
    ours = []
    for path in tensor.paths:
      array = arrays.pop(path, None)
      if array is None and path.endswith("/bias"):
        array = np.zeros(shape, np.float32)
      if array is None:
        raise ConfigError(
          f"parameter {path} is missing; a dense {described.family} has it"
        )
      if array.shape != shape:
        raise ConfigError(
          f"parameter {path} is of shape {list(array.shape)}; a dense "
          f"{described.family} has {list(shape)}"
        )
      if channels is not None and _QUERY_OR_KEY.search(path):
        array = array[..., np.argsort(channels)]
      ours.append(array)
    theirs[tensor.name.removeprefix(prefix)] = _join(ours, tensor)
    if tensor.plus:
      segments = np.zeros((described.token_types, shape[1]), np.float32)
      theirs[tensor.plus.removeprefix(prefix)] = segments
  if arrays:
    raise ConfigError(
      f"parameter {_first(list(arrays))} has no place in a dense "
      f"{described.family}"
    )
  return theirs


def idle_pooler(described: Description) -> dict[str, np.ndarray]:
  """Returns tensors that transformers would draw at random; {}: there are none.

  They are a pooler that computes tanh of the first hidden state.
  """
  name = FAMILIES[described.family].layout.idle_pooler
  if described.head != "none" or not name:
    return {}
  D = described.config.width
  kernel_DD = np.eye(D, dtype=np.float32)
  return {f"{name}.weight": kernel_DD, f"{name}.bias": np.zeros(D, np.float32)}


def _move_head_bias(
  arrays: dict[str, np.ndarray], described: Description
) -> None:
  """Moves the head's bias c into that of the norm before: W^T delta = c."""
  bias_C = arrays.pop("head/bias", np.zeros(1))
  if not bias_C.any():
    return
  kernel_DC = arrays["head/kernel"].astype(np.float64)
  delta_D = np.linalg.lstsq(kernel_DC.T, bias_C.astype(np.float64))[0]
  is_solved = np.allclose(kernel_DC.T @ delta_D, bias_C, rtol=1e-6, atol=1e-9)
  if described.config.norm != "layernorm" or not is_solved:
    raise ConfigError(
      f"no export as {described.family}: its sequence classifier has no bias, "
      "and head/bias is not zero"
    )
  norm_D = arrays.get("norm_final/bias", np.zeros_like(delta_D))
  arrays["norm_final/bias"] = (norm_D + delta_D).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Description):
  """A checkpoint with its arrays.

  Attributes:
    params: Our parameters, NumPy float32 or mapped from the files. A checkpoint
      without a classifier has no "head" and may have no "pooler".
    tokenizer_path: Its tokenizer.json.
    dtype: Type of most of the numbers in its files.
  """

  params: dict[str, Any]
  tokenizer_path: pathlib.Path
  dtype: str = "float32"


def load_pretrained(
  path_or_hub_id: str | pathlib.Path,
  *,
  task: str | None = None,
  segments: bool = False,
  mapped: bool = False,
) -> Pretrained:
  """Returns a checkpoint as our configuration and parameters.

  Tensors are read one at a time, so there is one copy of the weights.

  Args:
    path_or_hub_id: A folder, or a name on the Hugging Face hub.
    task: Name of a task. "lm" reads the output layer, "embed" no head, another
      task the head of a sequence classifier if there is one for it. None: the
      head that the checkpoint has.
    segments: Whether to keep a segment embedding of two rows apart, for pairs.
    mapped: Whether parameters stay in the files, as views of mapped memory in the
      types of the files. Only the queries and keys of heads that rotate in part
      are copied.

  Raises:
    ConfigError: the folder or a file in it is missing, damaged, a pickle, or
      of an unsupported kind; names it.
  """
  folder = find_pretrained(path_or_hub_id)
  files.require_as_exported(str(folder))
  described = describe_pretrained(folder)
  row = TASKS[task] if task else None
  if row and row.predicts_tokens and not described.config.causal:
    raise ConfigError(
      f"{folder}: a {described.family} model does not predict the next token; "
      "use task 'classify'"
    )
  if row and row.labels is None:
    problem = row.name if row.makes_vectors else described.problem
    described = dataclasses.replace(described, label_names=(), problem=problem)
  if segments and described.token_types == 2:
    model = dataclasses.replace(described.config, segments=2)
    described = dataclasses.replace(described, config=model)
  head = described.head if task in (None, described.task) else "none"
  tokenizer_path = find_tokenizer(folder)
  where = _open_weights(folder)
  shapes = {name: stored.shape for name, stored in where.items()}
  try:
    params = import_params(
      described, head, shapes, lambda name: _read(where[name], name)
    )
  except ConfigError as error:
    raise ConfigError(f"{folder}: {error}") from None
  if not mapped:
    params = paths.map_named(
      lambda _, w: np.array(w, np.float32, order="C"), params
    )
  return Pretrained(
    **vars(described),
    params=params,
    tokenizer_path=tokenizer_path,
    dtype=_dtype_of(where),
  )


def _dtype_of(where: Mapping[str, "_Stored"]) -> str:
  """Returns the type of most of the stored numbers."""
  sizes = collections.Counter()
  for stored in where.values():
    sizes[stored.kind] += math.prod(stored.shape)
  [(kind, _)] = sizes.most_common(1)
  return np.dtype(_FLOATS.get(kind, "float32")).name


def find_pretrained(path_or_hub_id: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder of a checkpoint, downloaded if it is a hub id.

  Raises:
    ConfigError: there is no such folder, or it cannot be downloaded.
  """
  name, folder = str(path_or_hub_id), pathlib.Path(path_or_hub_id).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise ConfigError(f"{folder} is a file; name the folder that holds it")
  # "runs/tuned" is a folder that is missing if there is a folder "runs".
  is_path = folder.parent != pathlib.Path() and folder.parent.exists()
  if is_path or not _HUB_ID.fullmatch(name):
    raise ConfigError(
      f"there is no folder {name}, and a model on the Hugging Face hub is named "
      "ORG/MODEL or ORG/MODEL@REVISION"
    )
  import huggingface_hub  # only needed for a download

  patterns = [
    "*.json",
    "*.jinja",
    "model*.safetensors",
    "README.md",
    "LICENSE*",
  ]
  hub_id, _, revision = name.partition("@")
  try:
    found = huggingface_hub.snapshot_download(
      hub_id, revision=revision or None, allow_patterns=patterns
    )
  # Offline, no such name, no permission: each raises another exception.
  except Exception as error:
    raise ConfigError(
      f"there is no folder {name}, and the Hugging Face hub did not send it "
      f"({errors.first_line(error)}); a folder with config.json, "
      f"model.safetensors and {TOKENIZER} needs no download"
    ) from error
  return pathlib.Path(found)


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """Returns the tokenizer.json of a checkpoint, or raises `ConfigError`."""
  path = folder / TOKENIZER
  if not path.is_file():
    raise ConfigError(f"{folder} has no {TOKENIZER}; {_HINT}")
  return path


def describe_pretrained(folder: pathlib.Path) -> Description:
  """Returns the description of the config.json in a folder.

  Raises:
    ConfigError: it is missing, damaged, or of an unsupported model.
  """
  path = folder / CONFIG
  if not path.is_file():
    raise ConfigError(f"there is no {path}")
  values = files.read_json(str(path), dict)
  if (folder / _ADAPTER).exists():
    raise ConfigError(
      f"{folder} has an {_ADAPTER}: a LoRA adapter that is not part of the weights; "
      "merge it with merge_and_unload() of peft, and save the result"
    )
  if "model_type" not in values:
    raise ConfigError(
      f"{folder} is not a Hugging Face checkpoint (its {CONFIG} has no "
      "model_type); give one or a dense run, not an export in folding's own format"
    )
  try:
    return hf_config.describe(values)
  except ConfigError as error:
    raise ConfigError(f"{folder}: {error}") from None
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
  ) as error:
    # Some value is of another type or range than in transformers.
    raise ConfigError(
      f"{folder}: {CONFIG} is broken: {errors.reason(error)}"
    ) from error


class _Stored(NamedTuple):
  """A tensor in a mapped safetensors file.

  Attributes:
    kind: Name of its type there.
    shape: Its shape.
    begin: Its first byte.
    data: The file.
  """

  kind: str
  shape: tuple[int, ...]
  begin: int
  data: mmap.mmap


def _open_weights(folder: pathlib.Path) -> dict[str, _Stored]:
  """Returns the tensors of a folder by their names."""
  if (folder / WEIGHTS).is_file():
    return _open_file(folder / WEIGHTS)
  index = folder / INDEX
  if not index.is_file():
    raise ConfigError(
      f"{folder} has no {WEIGHTS} and no {INDEX}, and pickles are not read; "
      f"{_HINT}"
    )
  where = files.read_json(str(index), dict).get("weight_map")
  if not isinstance(where, dict) or not all(
    isinstance(name, str) and not files.leads_out(name)
    for name in where.values()
  ):
    raise ConfigError(
      f"{index} must have a weight_map of tensors to files in its folder"
    )
  found: dict[str, _Stored] = {}
  for name in sorted({*where.values()}):
    found |= _open_file(folder / name)
  return found


def _open_file(path: pathlib.Path) -> dict[str, _Stored]:
  if not path.is_file():
    raise ConfigError(f"there is no {path}, which {INDEX} names")
  try:
    with safetensors.safe_open(path, "numpy"):
      pass  # it checks the header
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f"{path} is truncated or not a safetensors file ({error})"
    ) from None
  with open(path, "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  begin = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:begin])
  header.pop("__metadata__", None)
  return {
    name: _Stored(
      tensor["dtype"],
      tuple(tensor["shape"]),
      begin + tensor["data_offsets"][0],
      data,
    )
    for name, tensor in header.items()
  }


def _read(stored: _Stored, name: str) -> np.ndarray:
  """Returns a tensor as a view of its file."""
  kind, shape, begin, data = stored
  if kind not in _FLOATS:
    raise ConfigError(
      f"tensor {name} is stored as {kind}; only {', '.join(_FLOATS)} are read"
    )
  flat = np.frombuffer(data, _FLOATS[kind], math.prod(shape), begin)
  return flat.reshape(shape)


def save_pretrained(
  path: str | os.PathLike,
  params: Mapping[str, Any],
  described: Description,
  *,
  dtype: str = "float32",
  more: Mapping[str, np.ndarray] | None = None,
  **fields: Any,
) -> None:
  """Writes config.json and model.safetensors of a checkpoint.

  Args:
    path: The folder; created if it does not exist.
    params: Dense parameters (see `folding.unfold`).
    described: Its family and sizes. The head is a sequence classifier if it
      has classes, else the output layer of a causal model.
    dtype: Type of the stored arrays.
    more: Further tensors by their names, such as those of `idle_pooler`.
    **fields: More fields of config.json.

  Raises:
    ConfigError: the family does not compute this model, or the parameters do
      not fit; nothing is written.
    OSError: a file cannot be written.
  """
  values = hf_config.to_hf(described) | fields | {"torch_dtype": dtype}
  theirs = export_tensors(described, described.head, params)
  arrays = {
    name: array.astype(dtype, copy=False)
    for name, array in (theirs | dict(more or {})).items()
  }
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  save_tensors(folder / WEIGHTS, arrays, {"format": "pt"})
  files.write_json(str(folder / CONFIG), values)


def save_tensors(
  path: str | os.PathLike, arrays: dict[str, Any], metadata: dict[str, str]
) -> None:
  """Writes a safetensors file with the permissions of an ordinary new file.

  Raises:
    OSError: it cannot be written.
  """
  with open(path, "wb") as file:
    mode = os.fstat(file.fileno()).st_mode
  try:
    safetensors.numpy.save_file(arrays, path, metadata)
  except safetensors.SafetensorError as error:  # such as a full disk
    raise OSError(f"cannot write {path} ({error})") from error
  os.chmod(path, mode)  # the library makes it readable by its owner alone
