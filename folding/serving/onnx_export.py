"""ONNX programs, written operator by operator from the parameters.

All operators are standard ones of opset 17, the first with `LayerNormalization`.
Programs with `Attention`, `RMSNormalization` and `Gelu` of later opsets take as
long in onnxruntime on CPUs, and fewer runtimes read them. This form is also
faster there than its fused operators of the domain com.microsoft:
`SkipLayerNormalization` alone took a quarter of the time of a small encoder. So
tokens are rows of one matrix [N, D], N = B L, which `Gemm`, `Add` and
`LayerNormalization` read, and which no fusion matches.

In float16, matrices and embeddings are stored so, and computed with in float32:
onnxruntime converts matrices while it loads a program, and embeddings row by row.
In int8, matrices have one scale per output, embeddings one per token. The
inputs of a product are quantised while it runs ("dynamic"), and onnxruntime
fuses the operators of a product into one. x86 processors without VNNI add two
products at a time in 16 bits. Integers of "int7" are so small that these sums
fit: 2 x 255 x 64 < 2^15. Others call this `reduce_range`.

The program of a language model has a KV cache: inputs and outputs that hold the
arrays of `models.decode.KVCache`, named and laid out as by `optimum`. Layers
with a window keep all positions.

Letters as in `folding.models`, and N for the tokens of a batch, r for the size
of a value head, M for past and new tokens. Without a KV cache, M is L.
"""

import contextlib
import math
import os
from typing import Any, Literal, get_args

import numpy as np

from folding import config as config_lib
from folding import files, paths
from folding.data.special_tokens import OPTIONS
from folding.data.tokenizers import Tokenizer
from folding.data.trim import plain_tokenizer
from folding.errors import ConfigError, require_package
from folding.model import Model
from folding.models import hf_config, sentence
from folding.models.attention import layer_frequencies
from folding.models.exact_attention import MASKED, relative_buckets
from folding.models.hf_weights import CONFIG, TOKENIZER
from folding.models.shape import Layer, Shape, model_of
from folding.serving.hf_export import tokenizer_options
from folding.serving.loaded import require_exportable
from folding.tasks import task_of
from folding.version import __version__

MODEL = "model.onnx"
OPSET, IR_VERSION = 17, 8
# As transformers names them.
TOKENS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
PAST, PRESENT = "past_key_values", "present"
Dtype = Literal["float32", "float16", "int8", "int7"]
_INTEGERS = {"int8": 127, "int7": 64}  # the largest stored integer

_LIMIT = 1 << 31  # bytes of a protobuf


def export_onnx(
  path: str | os.PathLike, loaded: Model, dtype: Dtype = "float32"
) -> dict[str, int]:
  """Writes an ONNX program and its tokenizer to a new folder.

  model.onnx maps (input_ids int64[b, l], attention_mask int64[b, l]), of any
  batch and length, to float32 "logits" [b, C] of a text. A model with a segment
  embedding has a third input, token_type_ids int64[b, l]. A model of task
  "embed" has the outputs "last_hidden_state" [b, l, D] and "sentence_embedding"
  [b, D]; its folder can be read by sentence-transformers. Ids are those of
  tokenizer.json in the folder, and padding comes last.

  A next-token model has the output "logits" [b, l, V], and per layer the inputs
  "past_key_values.N.key" [b, J, p, G] and ".value" [b, I, p, r], p = 0 at first.
  Its outputs "present.N.key" and ".value" of p + l positions are the next past.
  Its attention_mask has p + l columns, with padding anywhere.

  Args:
    path: Created if it does not exist; must be empty.
    loaded: From `folding.load`.
    dtype: Type of the stored matrices and embeddings. Vectors are float32.

  Returns:
    {"parameters": bytes of the arrays, "files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty, a parameter is NaN or too large for
      float16, the package onnx is missing, the dtype is another one, or the
      arrays exceed 2 GiB.
    OSError: it cannot be written.
  """
  path = require_exportable(path, loaded.params)
  require_package("onnx")
  if dtype not in get_args(Dtype):
    raise ConfigError(
      f"an ONNX program has dtype {', '.join(get_args(Dtype))}, not {dtype}"
    )
  size = sum(x.size for x in paths.flatten(loaded.params).values())
  stored = "int8" if dtype in _INTEGERS else dtype
  if size * np.dtype(stored).itemsize >= _LIMIT:
    raise ConfigError(
      f"an ONNX file holds less than 2 GiB; these are {size:,} parameters"
    )
  tokenizer, token_map = plain_tokenizer(loaded.tokenizer)
  if token_map is not None and np.array_equal(
    token_map, np.arange(loaded.num_rows)
  ):
    token_map = None
  graph = _make_graph(loaded, token_map, dtype)
  program = graph.model().SerializeToString()
  os.makedirs(path, exist_ok=True)
  files.write_file(os.path.join(path, MODEL), program)
  files.write_file(os.path.join(path, TOKENIZER), tokenizer.to_json())
  described = _description(loaded, tokenizer)
  options = tokenizer_options(tokenizer, described)
  values = _config(described) | {
    "folding": {
      "format": "onnx",
      "version": __version__,
      "dtype": dtype,
      "config": config_lib.to_dict(loaded.config),
    }
  }
  for name, content in ((OPTIONS, options), (CONFIG, values)):
    files.write_json(os.path.join(path, name), content)
  if task_of(loaded).makes_vectors:
    sentence.write(path, loaded.shape, loaded.shape.max_length)
  files.write_checksums(path, files.all_files(path))
  return {"parameters": graph.num_bytes, "files": files.folder_bytes(path)}


def _description(loaded: Model, tokenizer: Tokenizer) -> hf_config.Description:
  """Returns the content of config.json, with sizes of the dense baseline."""
  m = model_of(loaded.shape.dense())
  try:
    family = hf_config.family_of(m, len(loaded.labels))
  except ConfigError:
    family = ""
  return hf_config.Description(
    family=family,
    config=m,
    vocab_size=tokenizer.vocab_size,
    max_length=loaded.shape.max_length,
    pad_id=tokenizer.pad_id,
    token_types=m.segments,
    label_names=loaded.labels,
    problem=loaded.task,
  )


def _config(described: hf_config.Description) -> dict[str, Any]:
  """Returns the config.json, for readers of sizes and labels such as optimum.

  The architecture is that of the dense baseline. If transformers has none, the
  file has no model_type and is only informative.
  """
  if described.family:
    with contextlib.suppress(ConfigError):  # a pad token that does not fit it
      return hf_config.to_hf(described)
  labels = described.label_names
  return {
    "hidden_size": described.config.width,
    "vocab_size": described.vocab_size,
    "max_position_embeddings": described.max_length,
    "pad_token_id": described.pad_id,
    "id2label": {str(i): label for i, label in enumerate(labels)},
  }


class _Graph:
  """Nodes and arrays of a program; values are referred to by name.

  Equal nodes are one, so layers share their masks and rotations.

  Attributes:
    config: Shape of the model.
    has_cache: Whether keys and values are inputs and outputs.
    largest: Largest integer of matrices and embeddings; None: they are floats.
    params: {path: float32 array}.
    shape: int64[2], B and L.
  """

  def __init__(self, config: Shape, params: Any, dtype: Dtype):
    self.config, self.dtype = config, dtype
    self.has_cache = config.output == "tokens"
    self.largest = _INTEGERS.get(dtype)
    self.params = {
      path: np.asarray(leaf, np.float32)
      for path, leaf in paths.flatten(params).items()
    }
    # {name: shape}, the last two of the KV cache
    self._outputs: dict[str, list[str | int]] = {}
    self._past: dict[str, list[str | int]] = {}
    self._present: dict[str, list[str | int]] = {}
    self._nodes: list[Any] = []
    self._known: dict[Any, list[str]] = {}  # outputs of a node
    self._arrays: dict[str, np.ndarray] = {}
    self._constants: dict[Any, str] = {}
    self.shape = self.add("Shape", TOKENS)

  @property
  def num_bytes(self) -> int:
    """Bytes of the arrays of the program."""
    return sum(array.nbytes for array in self._used().values())

  def _used(self) -> dict[str, np.ndarray]:
    """Returns the arrays without, say, the shape of a reshape that was left out."""
    used = {name for node in self._nodes for name in node.input}
    return {name: x for name, x in self._arrays.items() if name in used}

  def array(self, name: str, array: np.ndarray) -> str:
    """Adds an array (an initializer), and returns its name."""
    self._arrays[name] = array
    return name

  def weights(self, name: str, array: np.ndarray) -> str:
    """Adds a matrix or an embedding in the dtype of the program.

    Raises:
      ConfigError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
      stored = array.astype(self.dtype)
    if not np.isfinite(stored).all():
      raise ConfigError(
        f"{name} has values up to {np.abs(array).max():.3g}, and {self.dtype} "
        f"ends at {np.finfo(stored.dtype).max:.0f}; write float32"
      )
    return self.array(name, stored)

  def const(self, value: Any, dtype: Any) -> str:
    """Returns the name of a small constant; equal constants share one array."""
    array = np.asarray(value, dtype)
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in self._constants:
      name = f"constant_{len(self._constants)}"
      self._constants[key] = self.array(name, array)
    return self._constants[key]

  def ints(self, *values: int) -> str:
    """Returns the name of a constant int64 vector."""
    return self.const(values, np.int64)

  def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node with one output, and returns the name of the output."""
    return self.add_many(kind, 1, *inputs, **attributes)[0]

  def add_many(
    self, kind: str, count: int, *inputs: str, **attributes: Any
  ) -> list[str]:
    """Adds a node unless there is an equal one; returns its outputs."""
    from onnx import helper

    key = (kind, inputs, *sorted(attributes.items()))
    if key not in self._known:
      name = f"{kind}_{len(self._nodes)}"
      outputs = [f"{name}_{i}" if i else name for i in range(count)]
      node = helper.make_node(kind, inputs, outputs, name, **attributes)
      self._nodes.append(node)
      self._known[key] = outputs
    return self._known[key]

  def cast(self, x: str) -> str:
    """Returns x as float32."""
    from onnx import TensorProto

    stored = self._arrays.get(x)
    if stored is not None and stored.dtype == np.float32:
      return x
    return self.add("Cast", x, to=TensorProto.FLOAT)

  def unflatten(self, x: str, *axes: int) -> str:
    """Returns x, [N, ...], as [B, L, *axes]."""
    shape = self.add("Concat", self.shape, self.ints(*axes), axis=0)
    return self.add("Reshape", x, shape)

  def output(self, name: str, value: str, shape: list[str | int]) -> None:
    """Names an output of the program."""
    from onnx import helper

    self._nodes.append(helper.make_node("Identity", [value], [name], name))
    self._outputs[name] = shape

  def remember(self, name: str, new: str, heads: int, size: int) -> str:
    """Returns all keys or values: those of the KV cache, if any, and new ones.

    Args:
      name: Layer and role, as in "0.key".
      new: [B, heads, L, size].
      heads: J or I.
      size: Numbers per head.
    """
    if not self.has_cache:
      return new
    from onnx import helper

    past, present = f"{PAST}.{name}", f"{PRESENT}.{name}"
    self._past[past] = ["batch", heads, "past_length", size]
    self._present[present] = ["batch", heads, "total_length", size]
    # Not by `output`, whose node would copy them.
    node = helper.make_node("Concat", [past, new], [present], present, axis=2)
    self._nodes.append(node)
    return present

  def dense(self, x: str, *names: str, num_inputs: int = 1) -> str:
    """Returns x @ kernel + bias of several modules, side by side.

    Args:
      x: [N, in].
      *names: Paths of the modules, all with or all without a bias.
      num_inputs: Number of input axes of their kernels.
    """
    kernels = [self.params[f"{name}/kernel"] for name in names]
    kernels = [k.reshape(math.prod(k.shape[:num_inputs]), -1) for k in kernels]
    kernel, name = np.concatenate(kernels, axis=1), "+".join(names)
    biases = [f"{name}/bias" for name in names]
    bias = [self.params[x].ravel() for x in biases if x in self.params]
    add = [self.array(f"{name}/bias", np.concatenate(bias))] if bias else []
    if self.largest is None:
      kernel_name = self.cast(self.weights(f"{name}/kernel", kernel))
      return self.add("Gemm", x, kernel_name, *add)
    values, scale = _quantise(kernel, 0, self.largest)
    weights = self.array(f"{name}/kernel", values)
    scale = self.array(f"{name}/scale", scale)
    return self._int8_product(x, weights, scale, *add)

  def unembed(self, x: str, name: str) -> str:
    """Returns x @ embedding^T with the embedding that `embed` added."""
    if self.largest is None:
      return self.add("Gemm", x, self.cast(name), transB=1)
    kernel = self.add("Transpose", name)
    scale = self.add("Reshape", f"{name}/scale", self.ints(-1))
    return self._int8_product(x, kernel, scale)

  def _int8_product(self, x: str, kernel: str, scale: str, *bias: str) -> str:
    # onnxruntime fuses the operators in this order.
    values, x_scale, zero = self.add_many("DynamicQuantizeLinear", 3, x)
    sums = self.cast(self.add("MatMulInteger", values, kernel, zero))
    out = self.add("Mul", sums, self.add("Mul", x_scale, scale))
    return self.add("Add", out, *bias) if bias else out

  def embed(self, name: str, ids: str) -> str:
    """Returns the rows of these ids, [..., D]."""
    rows = self.params[name]
    if self.largest is None:
      found = self.add("Gather", self.weights(name, rows), ids)
      return found if self.dtype == "float32" else self.cast(found)
    values, scale = _quantise(rows, 1, self.largest)
    found = self.cast(self.add("Gather", self.array(name, values), ids))
    scale = self.array(f"{name}/scale", scale[:, None])
    return self.add("Mul", found, self.add("Gather", scale, ids))

  def norm(self, x: str, name: str, kind: str = "") -> str:
    """Returns the last axis of x normed, as by `Design.norm`."""
    leaves = [f"{name}/{leaf}" for leaf in ("scale", "bias")]
    arrays = [self.array(y, self.params[y]) for y in leaves if y in self.params]
    epsilon = self.config.norm_epsilon
    if (kind or self.config.norm) == "layernorm":
      return self.add(
        "LayerNormalization", x, *arrays, axis=-1, epsilon=epsilon
      )
    square = self.add("ReduceMean", self.add("Mul", x, x), axes=(-1,))
    size = self.add("Sqrt", self.add("Add", square, self.number(epsilon)))
    return self.add("Mul", self.add("Div", x, size), *arrays)

  def number(self, value: float) -> str:
    """Returns the name of a constant float32."""
    return self.const(value, np.float32)

  def capped(self, x: str, cap: float | None) -> str:
    """Returns cap tanh(x / cap); x if there is no cap."""
    if not cap:
      return x
    cap_name = self.number(cap)
    x = self.add("Tanh", self.add("Div", x, cap_name))
    return self.add("Mul", x, cap_name)

  def model(self) -> Any:
    """Returns the ModelProto."""
    from onnx import TensorProto, helper, numpy_helper

    total = "total_length" if self.has_cache else "length"
    integers = {TOKENS: ["batch", "length"], MASK: ["batch", total]}
    if self.config.segments:
      integers[SEGMENTS] = ["batch", "length"]

    def infos(dtype: int, shapes: dict[str, list[Any]]) -> list[Any]:
      return [
        helper.make_tensor_value_info(name, dtype, shape)
        for name, shape in shapes.items()
      ]

    inputs = infos(TensorProto.INT64, integers)
    inputs += infos(TensorProto.FLOAT, self._past)
    outputs = infos(TensorProto.FLOAT, self._outputs | self._present)
    arrays = [
      numpy_helper.from_array(np.asarray(array, order="C"), name)
      for name, array in self._used().items()
    ]
    graph = helper.make_graph(self._nodes, "folding", inputs, outputs, arrays)
    return helper.make_model(
      graph,
      opset_imports=[helper.make_opsetid("", OPSET)],
      ir_version=IR_VERSION,
      producer_name="folding",
      producer_version=__version__,
    )


def _quantise(
  w: np.ndarray, axis: int, largest: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int8 values and float32 scales, one per slice across an axis."""
  size = np.abs(w).max(axis=axis, initial=0.0)
  scale = (np.where(size == 0, 1, size) / largest).astype(np.float32)
  return np.rint(w / np.expand_dims(scale, axis)).astype(np.int8), scale


def _make_graph(
  loaded: Model, token_map: np.ndarray | None, dtype: Dtype
) -> _Graph:
  """Returns the graph of a model.

  `token_map` has the row of each id of the tokenizer; None: ids are rows.
  """
  m = loaded.shape
  g = _Graph(m, loaded.params, dtype)
  width, ids = m.embed_width or m.width, TOKENS
  if token_map is not None:
    ids = g.add("Gather", g.array("token_map", token_map.astype(np.int32)), ids)
  x = g.embed("embed/embedding", ids)
  if (rank := m.embedding_rank) and not m.shared_rank:
    x = g.add("Reshape", x, g.ints(-1, rank))
    x = g.unflatten(g.dense(x, "embed_expand"), width)
  if m.scale_embeddings:
    x = g.add("Mul", x, g.number(m.width**0.5))
  if m.positions == "learned":
    at_BL, _ = _positions(g)
    x = g.add("Add", x, g.embed("position_embed/embedding", at_BL))
  if m.segments:
    x = g.add("Add", x, g.embed("segment_embed/embedding", SEGMENTS))
  x = g.add("Reshape", x, g.ints(-1, m.shared_rank or width))
  if m.shared_rank:
    x = g.dense(x, "embed_expand")
  if m.embed_width and m.project_first:
    x = g.dense(x, "embed_project")
  if m.norm_position == "post" or m.embed_norm:
    x = g.norm(x, "norm_embed")
  if m.embed_width and not m.project_first:
    x = g.dense(x, "embed_project")
  is_both = m.norm_position == "both"
  for n, layer in enumerate(m.layers):
    name = f"blocks_{n}"
    block = _Block(g, layer, n)
    if m.norm_position == "post":
      x = g.norm(g.add("Add", block.attend(x), x), f"{name}/norm_attn")
      x = g.norm(g.add("Add", block.mlp(x), x), f"{name}/norm_mlp")
      continue
    y = g.norm(x, f"{name}/norm_attn") if layer.has_norm_attn else x
    y, before = block.attend(y), x
    x = g.add("Add", x, g.norm(y, f"{name}/norm_attn_out") if is_both else y)
    y = block.mlp(g.norm(before if m.parallel else x, f"{name}/norm_mlp"))
    x = g.add("Add", x, g.norm(y, f"{name}/norm_mlp_out") if is_both else y)
  if m.norm_position != "post":
    x = g.norm(x, "norm_final")
  _read_out(g, loaded, x)
  return g


def _positions(g: _Graph) -> tuple[str, str]:
  """Returns int64 positions of queries, [B, L], and of keys, [B, M].

  With a KV cache a position is the number of earlier tokens in the mask, so
  that padding may be anywhere. Otherwise padding comes last, and B is 1.
  """
  zero, one = (g.const(i, np.int64) for i in (0, 1))
  if not g.has_cache:
    at_L = g.add("Range", zero, g.add("Gather", g.shape, one), one)
    at_1L = g.add("Unsqueeze", at_L, g.ints(0))
    return at_1L, at_1L
  key_BM = g.add("Sub", g.add("CumSum", MASK, one), one)
  key_BM = g.add("Max", key_BM, zero)
  first = g.add("Neg", _length(g, TOKENS))
  end = g.ints(np.iinfo(np.int64).max)
  return g.add("Slice", key_BM, first, end, g.ints(1)), key_BM


def _length(g: _Graph, x: str) -> str:
  """Returns int64[1], the size of the second axis."""
  return g.add("Gather", g.add("Shape", x), g.ints(1))


def _offsets(g: _Graph) -> str:
  """Returns int64[B, L, M], the position of the query less that of the key."""
  query_BL, key_BM = _positions(g)
  query_BL1 = g.add("Unsqueeze", query_BL, g.ints(2))
  return g.add("Sub", query_BL1, g.add("Unsqueeze", key_BM, g.ints(1)))


def _mask(g: _Graph, window: int | None) -> str:
  """Returns float [B, 1, 1 or L, M], 0 or -1e30, to add to the logits."""
  from onnx import TensorProto

  seen = g.add("Cast", MASK, to=TensorProto.BOOL)
  seen = g.add("Unsqueeze", seen, g.ints(1))  # [B, 1, M]
  if g.config.causal:
    past_BLM = g.add("GreaterOrEqual", _offsets(g), g.const(0, np.int64))
    seen = g.add("And", seen, past_BLM)
  if window is not None:
    distance_BLM = g.add("Abs", _offsets(g))
    near_BLM = g.add("Less", distance_BLM, g.const(window, np.int64))
    seen = g.add("And", seen, near_BLM)
  mask = g.add("Where", seen, g.number(0.0), g.number(MASKED))
  return g.add("Unsqueeze", mask, g.ints(1))


def _relative_bias(g: _Graph, table_RH: np.ndarray) -> str:
  """Returns [B, H, L, M], the bias of each distance."""
  bucket_of = relative_buckets(g.config.relative_buckets)
  farthest = len(bucket_of) // 2
  low, high = (g.const(x, np.int64) for x in (-farthest, farthest))
  offset_BLM = g.add("Clip", _offsets(g), low, high)
  index_BLM = g.add("Add", offset_BLM, high)
  bucket_BLM = g.add("Gather", g.const(bucket_of, np.int64), index_BLM)
  # A constant: layers that share a table share the bias.
  bias_BLMH = g.add("Gather", g.const(table_RH, np.float32), bucket_BLM)
  return g.add("Transpose", bias_BLMH, perm=(0, 3, 1, 2))


class _Block:
  """One layer. Sizes are read from its arrays, kinds from the config."""

  def __init__(self, g: _Graph, layer: Layer, number: int):
    self._g, self._layer, self._number = g, layer, number
    self._name = name = f"blocks_{number}"
    self._params = {
      path.removeprefix(f"{name}/"): w
      for path, w in g.params.items()
      if path.startswith(f"{name}/")
    }

  def attend(self, x: str) -> str:
    """Returns the output of attention, [N, D]."""
    g, m, w, layer = self._g, self._g.config, self._params, self._layer
    H, r, _ = w["attn/o/kernel"].shape
    J, size = w["attn/k/kernel"].shape[1:]
    v_kernel = w.get("attn/v/kernel")
    I = len(layer.heads) if v_kernel is None else v_kernel.shape[1]  # noqa: E741
    q, k, v = self._project(x)
    if m.qk_norm:
      q, k = self._norm_heads(q, "q", H), self._norm_heads(k, "k", J)
    if m.positions == "rope":
      # Pairs are rotated as they are, other groups after copying to K.
      copies = 1 if "attn/frequency" in w else layer.head_dim // size
      q = self._rotate(self._repeat(q, H * size, copies), H)
      k = self._rotate(self._repeat(k, J * size, copies), J)
      size *= copies
    scale = layer.head_dim**0.5 / size  # = (K / G) / sqrt(K)
    q = g.add("Mul", q, g.number(scale))
    q = self._split(q, H, size)
    k = g.remember(f"{self._number}.key", self._split(k, J, size), J, size)
    v = g.remember(f"{self._number}.value", self._split(v, I, r), I, r)
    k_BJsM = g.add("Transpose", k, perm=(0, 1, 3, 2))
    logits = g.add("MatMul", self._regroup(q, H, J, g.ints(size)), k_BJsM)
    total = _length(g, MASK)  # M; a mask of another length is an error here
    shape = g.add("Concat", g.ints(0, H), _length(g, TOKENS), total, axis=0)
    logits_BHLM = g.capped(g.add("Reshape", logits, shape), m.attention_cap)
    logits_BHLM = g.add("Add", logits_BHLM, self._biased_mask())
    weights_BHLM = g.add("Softmax", logits_BHLM, axis=-1)
    weights = self._regroup(weights_BHLM, H, I, total)
    out = self._regroup(g.add("MatMul", weights, v), I, H, g.ints(r))
    out = g.add("Transpose", out, perm=(0, 2, 1, 3))
    out = g.add("Reshape", out, g.ints(-1, H * r))
    return g.dense(out, f"{self._name}/attn/o", num_inputs=2)

  def mlp(self, x: str) -> str:
    """Returns the output of the feed-forward layer, [N, D]."""
    g, m = self._g, self._g.config
    h = g.dense(x, f"{self._name}/mlp/up")
    if m.gated:
      gate = g.dense(x, f"{self._name}/mlp/gate")
      h = g.add("Mul", _activate(g, gate, m.activation), h)
    else:
      h = _activate(g, h, m.activation)
    return g.dense(h, f"{self._name}/mlp/down")

  def _project(self, x: str) -> list[str]:
    """Returns queries, keys and values, [B, L, ...]."""
    layer, grouped = self._layer, x
    if layer.groups and layer.axis == "input":
      grouped = self._sum_groups(x)
    if "attn/v/kernel" not in self._params:
      return [*self._products(grouped, "q", "k"), self._diagonal(x)]
    if grouped != x:
      return [*self._products(grouped, "q", "k"), *self._products(x, "v")]
    return self._products(x, "q", "k", "v")

  def _products(self, x: str, *roles: str) -> list[str]:
    """Returns queries, keys or values, [B, L, ...], by one product."""
    g = self._g
    sizes = [self._params[f"attn/{role}/kernel"][0].size for role in roles]
    names = [f"{self._name}/attn/{role}" for role in roles]
    out = g.dense(x, *names)
    out = g.unflatten(out, sum(sizes))
    return g.add_many("Split", len(roles), out, g.ints(*sizes), axis=-1)

  def _sum_groups(self, x: str) -> str:
    """Returns the sums over the channels of each group, [N, G]."""
    g, groups = self._g, self._layer.groups
    x = g.add("Reshape", x, g.ints(-1, groups, g.config.width // groups))
    return g.add("ReduceSum", x, g.ints(2), keepdims=0)

  def _diagonal(self, x: str) -> str:
    """Returns the values of a diagonal W_V, [B, L, H K]."""
    g, layer, name = self._g, self._layer, "attn/v/diagonal"
    K = layer.head_dim
    channels = [h * K + i for h in layer.heads for i in range(K)]
    if len(channels) < g.config.width:
      x = g.add("Gather", x, g.ints(*channels), axis=1)
    if name in self._params:  # otherwise W_O has absorbed it
      diagonal = self._params[name].ravel()
      x = g.add("Mul", x, g.array(f"{self._name}/{name}", diagonal))
    return g.unflatten(x, len(channels))

  def _split(self, x: str, heads: int, size: int) -> str:
    """Returns [B, L, heads size] as [B, heads, L, size]."""
    g = self._g
    return g.add("Transpose", g.unflatten(x, heads, size), perm=(0, 2, 1, 3))

  def _regroup(self, x: str, heads: int, new: int, size: str) -> str:
    """Returns [B, heads, n, size] as [B, new, n heads / new, size].

    So the queries of heads that share keys are rows of one matrix.
    """
    if new == heads:
      return x
    g = self._g
    shape = g.add("Concat", g.ints(0, new, -1), size, axis=0)
    return g.add("Reshape", x, shape)

  def _norm_heads(self, x: str, role: str, heads: int) -> str:
    """Returns queries or keys, [B, L, heads K], normed per head."""
    g, K = self._g, self._layer.head_dim
    x = g.add("Reshape", x, g.ints(-1, K))
    x = g.norm(x, f"{self._name}/attn/{role}_norm", "rmsnorm")
    return g.unflatten(x, heads * K)

  def _repeat(self, x: str, count: int, copies: int) -> str:
    """Returns [B, L, count] with copies of each number side by side."""
    if copies == 1:
      return x
    g = self._g
    x = g.add("Reshape", x, g.ints(-1, count, 1))
    x = g.add("Tile", x, g.ints(1, 1, copies))
    return g.unflatten(x, count * copies)

  def _rotate(self, x: str, heads: int) -> str:
    """Returns queries or keys, [B, L, heads K], with rotary positions."""
    g = self._g
    frequency_Jk = self._params.get("attn/frequency")
    if frequency_Jk is None:
      frequency_Jk = layer_frequencies(g.config, self._layer)[None]
    J, half = frequency_Jk.shape
    if J > 1:
      frequency_Jk = np.repeat(frequency_Jk, heads // J, axis=0)
    at_BL, _ = _positions(g)
    at_BL11 = g.add("Unsqueeze", g.cast(at_BL), g.ints(2, 3))
    angle_BLHk = g.add("Mul", at_BL11, g.const(frequency_Jk, np.float32))
    cos, sin = g.add("Cos", angle_BLHk), g.add("Sin", angle_BLHk)
    x = g.unflatten(x, heads, 2 * half)
    a, b = g.add_many("Split", 2, x, g.ints(half, half), axis=-1)
    turned = (
      g.add("Sub", g.add("Mul", a, cos), g.add("Mul", b, sin)),
      g.add("Add", g.add("Mul", b, cos), g.add("Mul", a, sin)),
    )
    return g.unflatten(g.add("Concat", *turned, axis=-1), heads * 2 * half)

  def _biased_mask(self) -> str:
    """Returns the mask and biases that are added to the logits."""
    g, mask = self._g, _mask(self._g, self._layer.window)
    if g.config.relative_buckets:
      table_RH = self._params["attn/relative_bias"]
      return g.add("Add", mask, _relative_bias(g, table_RH))
    if g.config.positions != "alibi":
      return mask
    slopes_H = -np.exp(self._params["attn/log_slopes"])
    slopes = g.array(f"{self._name}/attn/slopes", slopes_H[:, None, None])
    distance_BLM = g.cast(g.add("Abs", _offsets(g)))
    distance_B1LM = g.add("Unsqueeze", distance_BLM, g.ints(1))
    return g.add("Add", mask, g.add("Mul", slopes, distance_B1LM))


def _activate(g: _Graph, x: str, name: str) -> str:
  if name == "silu":
    return g.add("Mul", x, g.add("Sigmoid", x))
  if name == "gelu_tanh":
    cube = g.add("Mul", g.add("Mul", x, x), x)
    y = g.add("Add", x, g.add("Mul", cube, g.number(0.044715)))
    y = g.add("Tanh", g.add("Mul", y, g.number((2 / math.pi) ** 0.5)))
    return _halved(g, x, y)
  if name == "gelu":
    return _halved(g, x, g.add("Erf", g.add("Div", x, g.number(2**0.5))))
  return g.add({"relu": "Relu", "tanh": "Tanh"}[name], x)


def _halved(g: _Graph, x: str, gate: str) -> str:
  """Returns x (gate + 1) / 2, in the order in which onnxruntime fuses Gelu."""
  y = g.add("Mul", x, g.add("Add", gate, g.number(1.0)))
  return g.add("Mul", y, g.number(0.5))


def _read_out(g: _Graph, loaded: Model, x: str) -> None:
  """Adds the outputs of the program, from the last block's [N, D]."""
  m, task = g.config, task_of(loaded)
  if task.predicts_tokens:
    rows = loaded.num_rows
    if m.tie_embeddings:
      x = g.unembed(x, "embed/embedding")
    else:
      x = g.dense(x, "head")
    x = g.unflatten(g.capped(x, m.logit_cap), rows)
    g.output("logits", x, ["batch", "length", rows])
    return
  x = g.unflatten(x, m.width)
  pooled = _pool(g, x, m.pooling)
  if task.makes_vectors:
    g.output("last_hidden_state", x, ["batch", "length", m.width])
    if m.normalize:
      pooled = g.add("LpNormalization", pooled, axis=1, p=2)
    g.output("sentence_embedding", pooled, ["batch", m.width])
    return
  if m.pooler:
    pooled = _activate(g, g.dense(pooled, "pooler"), m.pooler_activation)
    if m.pooler_norm:
      pooled = g.norm(pooled, "norm_pooler")
  g.output("logits", g.dense(pooled, "head"), ["batch", len(loaded.labels)])


def _pool(g: _Graph, x_BLD: str, pooling: str) -> str:
  """Returns the vector of the first or last token, or the mean over tokens."""
  if pooling == "first":
    return g.add("Gather", x_BLD, g.const(0, np.int64), axis=1)
  if pooling == "last":
    count = g.add("ReduceSum", MASK, g.ints(1))
    last = g.add("Sub", count, g.const(1, np.int64))
    last = g.add("Max", last, g.const(0, np.int64))  # [B, 1]
    return g.add("GatherND", x_BLD, last, batch_dims=1)
  mask = g.add("Unsqueeze", g.cast(MASK), g.ints(2))
  sums = g.add("ReduceSum", g.add("Mul", x_BLD, mask), g.ints(1), keepdims=0)
  count = g.add("ReduceSum", mask, g.ints(1), keepdims=0)
  return g.add("Div", sums, g.add("Max", count, g.number(1.0)))
