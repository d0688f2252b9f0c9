"""Streams calibration text through the layers of a model, and measures it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folding.compression.lowrank import Moments
from folding.config import Config, dense_baseline, layers_of
from folding.data.trim import token_usage
from folding.errors import ConfigError
from folding.models.transformer import Block, Transformer
from folding.training.progress import track

# "tokens" int[B, L]; perhaps "mask" bool[B, L] and "segments" int[B, L]
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
# Modules of a block whose inputs are the residual stream.
STREAMS = ("norm_attn", "norm_mlp")
OUTPUTS = ("o", "down")  # the last modules of its branches


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


def embed_batches(
  config: Config, params: Params, batches: Sequence[Batch]
) -> Stream:
  """Returns the input of the first layer.

  Raises:
    ConfigError: there is too little text.
  """
  stem = {name: w for name, w in params.items() if "embed" in name}
  vocabulary, positions = (
    len(stem[name]["embedding"]) if name in stem else 0
    for name in ("embed", "position_embed")
  )
  model = Transformer(config.model, config.fold, vocabulary, positions)
  embed = jax.jit(functools.partial(model.apply, method="embed_tokens"))
  x = [
    embed({"params": stem}, b["tokens"], segments_BL=b.get("segments"))
    for b in batches
  ]
  stream, D = Stream(x, masks_of(batches)), config.model.width
  num_tokens, num_texts = stream.num_tokens, sum(map(len, x))
  if num_tokens <= 2 * D or num_texts < 2:
    raise ConfigError(
      f"calibration has {num_tokens:,} tokens in {num_texts:,} texts; the "
      f"moments of {D} channels need more than {2 * D:,} tokens and two texts"
    )
  return stream


def masks_of(batches: Sequence[Batch]) -> list[jax.Array]:
  """Returns bool[B, L] of each batch, True at tokens."""
  return [jnp.asarray(b.get("mask", b["tokens"] >= 0)) for b in batches]


def usage_of(batches: Sequence[Batch], size: int) -> np.ndarray:
  """Returns float32[size], `token_usage` of calibration text."""
  tokens = [
    np.asarray(batch["tokens"])[np.asarray(mask)]
    for batch, mask in zip(batches, masks_of(batches), strict=True)
  ]
  return token_usage(np.bincount(np.concatenate(tokens)), size)


def make_block(config: Config, n: int) -> Block:
  """Returns the module of layer n."""
  return Block(config.model, layers_of(config.model, config.fold)[n])


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
) -> dict[str, jax.Array]:
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
  return [
    capture(block, params, x, mask, names=names, outputs=outputs)
    for x, mask in zip(*stream, strict=True)
  ]


def some_batches(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
  """Returns every n-th batch, so that about a number of tokens is left."""
  total = sum(np.size(batch["tokens"]) for batch in batches)
  return batches[:: max(1, total // tokens)]


def dense_layers(
  config: Config, params: Params, batches: Sequence[Batch], doing: str
) -> Iterator[tuple[int, Block, Stream, list[dict[str, Any]]]]:
  """Yields the layers of the dense baseline: number, block, input, values inside.

  The values are `capture_all` with `STREAMS`, `OUTPUTS` and "out". Progress is
  shown, see `track`.

  Args:
    config: Resolved.
    params: Parameters of its dense baseline.
    batches: Calibration text.
    doing: Description of the progress bar, such as "folding".

  Raises:
    ConfigError: there is too little text.
  """
  dense = dense_baseline(config)
  stream = embed_batches(dense, params, batches)
  for n in track(range(config.model.num_layers), f"{doing} layers"):
    block, layer = make_block(dense, n), params[f"blocks_{n}"]
    seen = capture_all(block, layer, stream, STREAMS, outputs=(*OUTPUTS, "out"))
    yield n, block, stream, seen
    stream = Stream([one["out"] for one in seen], stream.masks)


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
      if len(rows[0]):
        found[half].append(rows)
  return found


def total(function: Callable[..., Any], *data: Sequence[Any]) -> Any:
  """Returns the sum of function(batch) over batches, in float64.

  Args:
    function: Returns a tree of arrays.
    data: As for `halves`.
  """
  sums = None
  for batch in zip(*data, strict=True):
    more = jax.tree.map(np.float64, function(*batch))
    sums = more if sums is None else jax.tree.map(np.add, sums, more)
  return sums


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
  sums = total(functools.partial(_input_sums, block, names, params), *stream)
  return jax.tree.map(lambda a: a / stream.num_tokens, sums)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _input_sums(block, names, params, x, mask) -> dict[str, Moments]:
  seen = capture(block, params, x, mask, names)

  def moments(a):
    a = a.astype(jnp.float32).reshape(*mask.shape, -1) * mask[..., None]
    return Moments(second_moment(a, a), a.sum((0, 1)))

  return {name: moments(seen[name]) for name in names}
