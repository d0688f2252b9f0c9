"""Streams calibration text through the layers of a model, and measures it."""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folding.compression.lowrank import Moments, Tables
from folding.data.trim import token_usage
from folding.errors import ConfigError
from folding.models.shape import Shape
from folding.models.transformer import Block, Transformer
from folding.training.distributed import host_copy, to_host
from folding.training.sharding import put_whole

# "tokens" int[B, L]; perhaps "mask" bool[B, L] and "segments" int[B, L]. NumPy
# arrays, or on a mesh, see `put_rows`; all arrays of a layer then follow them.
Batch = Mapping[str, Any]
Params = Mapping[str, Any]

# {kernel of a block: module whose input it reads}; v and gate may be missing.
READS = {
  "attn/q": "q",
  "attn/k": "q",
  "attn/v": "q",
  "attn/o": "o",
  "mlp/up": "up",
  "mlp/gate": "up",
  "mlp/down": "down",
}


class Stream(NamedTuple):
  """The input of a layer on calibration text, in batches.

  Attributes:
    x: float[B, L, D] each, the residual stream.
    masks: bool[B, L] each, True at tokens and False at padding.
  """

  x: Sequence[jax.Array]
  masks: Sequence[jax.Array]

  @property
  def num_tokens(self) -> int:
    """Number of tokens, without padding."""
    return sum(int(mask.sum()) for mask in self.masks)

  def put(self, tree: Any) -> Any:
    """Returns arrays, whole on each device of the stream."""
    return put_whole(tree, self.x[0])


def embed_batches(
  shape: Shape, params: Params, batches: Sequence[Batch]
) -> Stream:
  """Returns the input of the first layer."""
  stem = {name: w for name, w in params.items() if "embed" in name}
  vocabulary, positions = (
    len(stem[name]["embedding"]) if name in stem else 0
    for name in ("embed", "position_embed")
  )
  model = Transformer(
    dataclasses.replace(shape, max_length=positions), vocabulary
  )
  masks = masks_of(batches)
  stem = put_whole(stem, masks[0])
  x = [_embed(model, stem, b["tokens"], b.get("segments")) for b in batches]
  return Stream(x, masks)


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, tokens, segments):
  return model.apply(
    {"params": params}, tokens, segments_BL=segments, method="embed_tokens"
  )


def require_text(shape: Shape, batches: Sequence[Batch]) -> None:
  """Raises `ConfigError` if a model cannot be measured on these texts."""
  batches = to_host(list(batches))
  D, masks = shape.width, masks_of(batches)
  num_tokens, num_texts = sum(int(m.sum()) for m in masks), sum(map(len, masks))
  if num_tokens <= 2 * D or num_texts < 2:
    raise ConfigError(
      f"calibration has {num_tokens:,} tokens in {num_texts:,} texts; the "
      f"moments of {D} channels need more than {2 * D:,} tokens and two texts"
    )
  texts = {
    tokens[mask].tobytes()
    for batch, mask in zip(batches, map(np.asarray, masks), strict=True)
    for tokens, mask in zip(np.asarray(batch["tokens"]), mask, strict=True)
    if mask.any()
  }
  if len(texts) < 2:
    raise ConfigError(
      "the calibration texts are all equal; give different ones"
    )
  if max(int(mask.sum(1).max()) for mask in masks) < 2:
    raise ConfigError(
      "each calibration text is a single token, on which attention cannot be "
      "measured; give longer texts"
    )


def masks_of(batches: Sequence[Batch]) -> list[jax.Array]:
  """Returns bool[B, L] of each batch, True at tokens."""
  return [jnp.asarray(b.get("mask", b["tokens"] >= 0)) for b in batches]


def usage_of(batches: Sequence[Batch], size: int) -> np.ndarray:
  """Returns float32[size], `token_usage` of calibration text."""
  batches = to_host(list(batches))
  tokens = [
    np.asarray(batch["tokens"])[np.asarray(mask)]
    for batch, mask in zip(batches, masks_of(batches), strict=True)
  ]
  return token_usage(np.bincount(np.concatenate(tokens)), size)


def embedding_tables(
  asked: Shape,
  params: Params,
  batches: Sequence[Batch],
  usage_V: np.ndarray | None = None,
) -> Tables:
  """Returns {module: (embedding, frequency of each row)} of one low rank.

  These are tokens, and with `embedding_shared` segments and positions too.
  Half of the frequency of a position is that of all positions, so that texts longer
  than these keep their order.

  Args:
    asked: Has `embedding_shared`.
    params: Dense.
    batches: Texts.
    usage_V: Frequency of each token; None: as in the batches.
  """
  embedding_VD = host_copy(params["embed"]["embedding"])
  if usage_V is None:
    usage_V = usage_of(batches, len(embedding_VD))
  tables = {"embed": (embedding_VD, usage_V)}
  if asked.embedding_shared:
    if "segment_embed" in params:
      rows = host_copy(params["segment_embed"]["embedding"])
      tables["segment_embed"] = rows, np.ones(len(rows))
    rows = host_copy(params["position_embed"]["embedding"])
    usage_P = np.zeros(len(rows))
    for mask in map(np.asarray, masks_of(to_host(list(batches)))):
      usage_P[: mask.shape[1]] += mask.sum(axis=0)
    tables["position_embed"] = rows, usage_P / usage_P.sum() + 1 / len(rows)
  return tables


def make_block(shape: Shape, n: int) -> Block:
  """Returns the module of layer n."""
  return Block(shape, shape.layers[n])


@contextlib.contextmanager
def changed_outputs(change: Callable[[Any, str], Any]) -> Iterator[None]:
  """Replaces the output of each module that is called by change(output, name)."""

  def call(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    is_call = context.method_name == "__call__"
    return change(out, context.module.name) if is_call else out

  with nn.intercept_methods(call):
    yield


@functools.partial(jax.jit, static_argnames=("block", "names", "outputs"))
def capture(
  block: Block,
  params: Params,
  x: jax.Array,
  mask: jax.Array,
  names: tuple[str, ...] = (),
  outputs: tuple[str, ...] = (),
  given: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
  """Returns inputs and outputs of modules of a block.

  Args:
    block: The layer.
    params: Its parameters.
    x: float[B, L, D], its input.
    mask: bool[B, L], False at padding.
    names: Modules whose input is returned.
    outputs: Modules whose output is returned; "out" is that of the block.
    given: Outputs of modules that are not computed again, such as "attn".
  """
  seen, given = {}, given or {}

  def watch(next_fun, args, kwargs, context):
    name = context.module.name
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if name in names:
      seen[name] = args[0]
    out = given[name] if name in given else next_fun(*args, **kwargs)
    if name in outputs:
      seen[name] = out
    return out

  with nn.intercept_methods(watch):
    out = block.apply({"params": params}, x, mask, True)
  return {**seen, "out": out} if "out" in outputs else seen


def capture_all(
  block: Block,
  params: Params,
  stream: Stream,
  names: tuple[str, ...] = (),
  outputs: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
  """Returns `capture` of each batch."""
  params = stream.put(params)  # once, not for each batch
  return [
    capture(block, params, x, mask, names=names, outputs=outputs)
    for x, mask in zip(*stream, strict=True)
  ]


def spread(items: Sequence[Any], sizes: Sequence[int], most: int) -> list[Any]:
  """Returns every n-th item, so that the sum of their sizes is about `most`."""
  return list(items)[:: max(1, sum(sizes) // most)]


def advance(block: Block, params: Params, stream: Stream) -> Stream:
  """Returns the stream after a layer."""
  seen = capture_all(block, params, stream, outputs=("out",))
  return Stream([one["out"] for one in seen], stream.masks)


def halves(*data: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
  """Returns two halves of the texts of batches, each a list of batches.

  Texts alternate between the halves. Texts of one length share a batch, so each
  half has all lengths. A batch without a text for a half is left out of it.

  Args:
    data: Lists of one array per batch, with texts as rows.
  """
  found: list[list[tuple[Any, ...]]] = [[], []]
  for number, batch in enumerate(zip(*data, strict=True)):
    for half in range(2):
      rows = tuple(a[(half + number) % 2 :: 2] for a in batch)
      # Two processes once stood still with many such small programs in flight.
      jax.block_until_ready(rows)
      if len(rows[0]):
        found[half].append(rows)
  return found


def total(function: Callable[..., Any], *data: Iterable[Any]) -> Any:
  """Returns the sum of function(batch) over batches, in float64.

  Args:
    function: Returns a tree of arrays.
    data: As for `halves`.
  """
  sums = None
  for batch in zip(*data, strict=True):
    sums = added(sums, function(*batch))
  return sums


def added(sums: Any, more: Any) -> Any:
  """Adds to a tree in float64, in place, and returns it; None is 0."""
  if sums is None:
    return jax.tree.map(lambda a: np.array(a, np.float64), more)
  return jax.tree.map(lambda a, b: np.add(a, b, out=a), sums, more)


class Gram(NamedTuple):
  """Sums over tokens: of a a', of a, and the number of tokens."""

  square_FF: Any
  sum_F: Any
  count: Any

  @property
  def moments(self) -> Moments:
    """The means of a a' and a."""
    return Moments(self.square_FF / self.count, self.sum_F / self.count)

  def only(self, stays_F: np.ndarray) -> "Gram":
    """Returns the sums of inputs of which the others are always 0."""
    square_FF = self.square_FF * np.outer(stays_F, stays_F)
    return Gram(square_FF, self.sum_F * stays_F, self.count)


class Reading(NamedTuple):
  """What a module reads on calibration text.

  Attributes:
    a: float[B, L, ...] of each batch.
    masks: Masks of the batches, see `Stream`.
    halves: The `Gram` of each half of the texts, see `halves`.
  """

  a: Sequence[jax.Array]
  masks: Sequence[jax.Array]
  halves: Sequence[Gram]

  @property
  def moments(self) -> Moments:
    """The moments over all texts."""
    return Gram(*map(np.add, *self.halves)).moments


def reading(a: Sequence[jax.Array], masks: Sequence[jax.Array]) -> Reading:
  """Returns inputs of a module with their sums."""
  return Reading(a, masks, half_totals(grams, None, a, masks))


def half_totals(
  function: Callable[..., Any], shared: Any, *data: Iterable[Any]
) -> list[Any]:
  """Returns the sums over each half of the texts, in float64, see `halves`.

  Args:
    function: (shared, *rows of a half) -> a tree of sums. Not a new one each time,
      as it is compiled.
    shared: A tree of arrays.
    data: As for `halves`.
  """
  sums: list[Any] = [None, None]
  for number, batch in enumerate(zip(*data, strict=True)):
    sums = add_halves(sums, function, shared, number, batch)
  return sums


def add_halves(
  sums: Sequence[Any],
  function: Callable[..., Any],
  shared: Any,
  number: int,
  batch: Any,
) -> list[Any]:
  """Returns the sums of `half_totals` after a batch of that number."""
  found = _of_both(function, shared, batch)
  return [added(sums[half], found[(half + number) % 2]) for half in range(2)]


@functools.partial(jax.jit, static_argnums=0)
def _of_both(function, shared, batch):
  """Returns function(shared, *rows) for the even rows and the odd ones."""
  return [
    function(
      shared, *jax.tree.map(operator.itemgetter(slice(n, None, 2)), batch)
    )
    for n in range(2)
  ]


def grams(_: None, tree: Any, mask: jax.Array) -> Any:
  """Returns the `Gram` of each array [B, L, ...] of a tree."""
  return jax.tree.map(lambda a: _gram(a, mask), tree)


def lowered_grams(
  block: Block, params: Any, x: Any, mask: Any
) -> jax.stages.Lowered:
  """Returns the program of the largest moments of a layer, that of W_down.

  Args:
    block: The layer.
    params: Shapes and shardings of its parameters.
    x: Shape and sharding of a batch of its input.
    mask: Shape and sharding of its mask.
  """

  def run(params, x, mask):
    seen = capture(block, params, x, mask, ("down",), ("out",))
    return seen, _of_both(grams, None, (seen["down"], mask))

  return jax.jit(run).lower(params, x, mask)


def flat(a: jax.Array) -> jax.Array:
  """Returns an array [B, L, ...] as float32[B, L, F]; it may have no rows."""
  size = math.prod(a.shape[2:])
  return a.astype(jnp.float32).reshape(*a.shape[:2], size)


def _gram(a, mask) -> Gram:
  a = flat(a) * mask[..., None]
  return Gram(second_moment(a, a), a.sum((0, 1)), mask.sum())


def second_moment(a_BLF: jax.Array, b_BLE: jax.Array) -> jax.Array:
  """Returns the sum of a b' over tokens, [F, E]."""
  # By default an accelerator rounds the factors to half of their digits.
  return jnp.einsum("BLF,BLE->FE", a_BLF, b_BLE, precision="highest")


def input_moments(
  block: Block,
  params: Params,
  stream: Stream,
  names: tuple[str, ...] = ("down", "o", "q", "up"),
) -> dict[str, Moments]:
  """Returns {module of a block: moments of its input}."""
  part = functools.partial(_input_sums, block, names, stream.put(params))
  return {name: gram.moments for name, gram in total(part, *stream).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _input_sums(block, names, params, x, mask) -> dict[str, Gram]:
  seen = capture(block, params, x, mask, names)
  return {name: _gram(seen[name], mask) for name in names}
