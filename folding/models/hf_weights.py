"""Tensors of Hugging Face checkpoints <-> our parameters, both ways.

The names and layouts are the table in `hf_names`; files are in `pretrained`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from folding import paths, schema
from folding.models.hf_config import Description
from folding.models.hf_names import PREFIXES, UNUSED, Tensor, tensors
from folding.models.hf_names import sizes as letter_sizes


def _their_shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
  axes = tensor.layout.split(" -> ")[0].split()
  first, *rest = [math.prod(sizes[x] for x in letters) for letters in axes]
  return (first + tensor.skip, *rest)


def _our_shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
  letters = tensor.layout.split(" -> ")[1].split()
  return tuple(sizes[x] for x in letters if x != "t")


def import_params(
  described: Description,
  head: str,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> tuple[dict[str, Any], list[str]]:
  """Returns our parameters, and the names of the tensors left out.

  Names and shapes are checked before the first tensor is read; then each is
  read once and becomes float32. BERT's segment 0 is added to every position.
  A score layer without a bias gets one of zeros where the model has biases.

  Args:
    described: What config.json says.
    head: As for `tensors`.
    shapes: Name and shape of each tensor of the checkpoint, which may be
      named with or without the prefix of the model inside ("bert.").
    read: Returns a tensor by its name, in float32.

  Raises:
    schema.ConfigError: a tensor is missing, left over, or of another shape;
      names it.
  """
  sizes, prefix = letter_sizes(described), PREFIXES[described.layout]
  has_prefix = any(name.startswith(prefix) for name in shapes)

  def find(name: str) -> str:
    name = name if has_prefix else name.removeprefix(prefix)
    older = re.sub(r"(?<=LayerNorm\.)weight$", "gamma", name)
    older = re.sub(r"(?<=LayerNorm\.)bias$", "beta", older)
    return older if older in shapes else name

  table = tensors(described, head)
  if not any(find(t.name) in shapes for t in table if t.optional):
    table = [tensor for tensor in table if not tensor.optional]
  needed = {find(t.name): _their_shape(t, sizes) for t in table}
  for tensor in table:
    if tensor.plus:
      needed[find(tensor.plus)] = (
        described.token_types,
        described.config.width,
      )
  missing = [name for name in needed if name not in shapes]
  schema.require(not missing, f"tensor {_first(missing)} is missing")
  for name, shape in needed.items():
    schema.require(
      tuple(shapes[name]) == shape,
      f"tensor {name} is of shape {list(shapes[name])}; config.json asks for "
      f"{list(shape)}",
    )
  others = [name for name in shapes if name not in needed]
  unused = re.compile(UNUSED[described.layout])
  left = [x for x in others if not unused.fullmatch(x.removeprefix(prefix))]
  schema.require(
    not left,
    f"tensor {_first(left)} has no place in a {described.family} model with "
    "this config.json",
  )
  untied, is_tied = "lm_head.weight", described.config.tie_embeddings
  if head == "lm" and is_tied and untied in shapes:
    [tied] = [find(t.name) for t in table if t.paths == ("embed/embedding",)]
    schema.require(
      np.array_equal(read(untied), read(tied)),
      f"tensor {untied} is not {tied}, which config.json says it is; set "
      "tie_word_embeddings to false there",
    )
  params: dict[str, Any] = {}
  for tensor in table:
    theirs = read(find(tensor.name))[tensor.skip :]
    if tensor.plus:
      theirs = theirs + read(find(tensor.plus))[:1]
    for path, ours in zip(
      tensor.paths, _split(theirs, tensor, sizes), strict=True
    ):
      _put(params, path, np.ascontiguousarray(ours))
  is_bare = head == "classify" and "bias" not in params["head"]
  if is_bare and described.config.use_bias:
    _put(params, "head/bias", np.zeros(sizes["C"], np.float32))
  return params, others


def _split(
  theirs: np.ndarray, tensor: Tensor, sizes: Mapping[str, int]
) -> list[np.ndarray]:
  """Returns our arrays in one of theirs, as views."""
  left, right = tensor.layout.split(" -> ")
  letters = left.replace(" ", "")
  whole = theirs.reshape([sizes[x] for x in letters])
  ours = whole.transpose([letters.index(x) for x in right.split()])
  return list(ours) if len(tensor.paths) > 1 else [ours]


def _join(
  ours: list[np.ndarray], tensor: Tensor, sizes: Mapping[str, int]
) -> np.ndarray:
  """The inverse of `_split`, with rows of zeros where ours has none."""
  left, right = tensor.layout.split(" -> ")
  letters = right.split()
  whole = np.stack(ours) if len(ours) > 1 else ours[0]
  order = [letters.index(x) for x in left.replace(" ", "")]
  theirs = np.zeros(_their_shape(tensor, sizes), np.float32)
  rows = theirs[tensor.skip :]
  rows[...] = whole.transpose(order).reshape(rows.shape)
  return theirs


def _put(tree: dict[str, Any], path: str, leaf: np.ndarray) -> None:
  *parents, name = path.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = leaf


def _first(names: list[str]) -> str:
  more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
  return f"{names[0] if names else ''}{more}"


def export_tensors(
  described: Description, head: str, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint, the inverse of `import_params`.

  Biases that the family has and the model has not are zeros, and so is
  BERT's segment embedding. GPT-2's score layer has no bias: ours moves into
  that of the last norm, which nothing else reads.

  Args:
    described: Of which family and size.
    head: As for `tensors`.
    params: Dense parameters (see `folding.unfold`).

  Raises:
    schema.ConfigError: a parameter is missing, left over, or of another
      shape; names it. Or the head has a bias that the family cannot express.
  """
  sizes, prefix = letter_sizes(described), PREFIXES[described.layout]
  arrays = {
    path: np.asarray(leaf, np.float32)
    for path, leaf in paths.flatten(params).items()
  }
  if head == "classify" and described.layout in ("gpt2", "llama"):
    _drop_head_bias(arrays, described)
  theirs: dict[str, np.ndarray] = {}
  for tensor in tensors(described, head):
    shape, ours = _our_shape(tensor, sizes), []
    if tensor.optional and tensor.paths[0] not in arrays:
      continue
    for path in tensor.paths:
      array = arrays.pop(path, None)
      if array is None and path.endswith("/bias"):
        array = np.zeros(shape, np.float32)
      schema.require(
        array is not None,
        f"parameter {path} is missing; a dense {described.family} has it",
      )
      assert array is not None
      schema.require(
        array.shape == shape,
        f"parameter {path} is of shape {list(array.shape)}; a dense "
        f"{described.family} has {list(shape)}",
      )
      ours.append(array)
    # The model without a head is saved under the names that it knows itself.
    name = tensor.name.removeprefix(prefix if head == "none" else "")
    theirs[name] = _join(ours, tensor, sizes)
    if tensor.plus:
      segments = np.zeros((described.token_types, sizes["D"]), np.float32)
      name = tensor.plus.removeprefix(prefix if head == "none" else "")
      theirs[name] = segments
  schema.require(
    not arrays,
    f"parameter {_first(list(arrays))} has no place in a dense "
    f"{described.family}",
  )
  return theirs


def _drop_head_bias(
  arrays: dict[str, np.ndarray], described: Description
) -> None:
  """Moves the head's bias c into that of the norm before: W^T delta = c."""
  bias_C = arrays.pop("head/bias", np.zeros(1))
  if not bias_C.any():
    return
  kernel_DC = arrays["head/kernel"].astype(np.float64)
  delta_D = np.linalg.lstsq(kernel_DC.T, bias_C.astype(np.float64))[0]
  solved = np.allclose(kernel_DC.T @ delta_D, bias_C, rtol=1e-6, atol=1e-9)
  schema.require(
    described.layout == "gpt2" and solved,
    f"no export as {described.family}: its sequence classifier has no bias, "
    "and head/bias is not zero",
  )
  norm_D = arrays.get("norm_final/bias", np.zeros_like(delta_D))
  arrays["norm_final/bias"] = (norm_D + delta_D).astype(np.float32)
