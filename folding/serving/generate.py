"""Prompts -> new tokens or text, with a KV cache or a constant-size state."""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from folding.compression.checks import is_whole
from folding.data.tokenizers import Tokenizer
from folding.errors import ConfigError
from folding.model import Model
from folding.models import constant_state
from folding.models import decode as decode_lib
from folding.models.linear_attention import PastState
from folding.models.transformer import Transformer
from folding.serving import sampling as sampling_lib
from folding.serving.batched import require_finite, require_several
from folding.serving.sampling import Draw, Sampling

# "keys": a KV cache. "linear": layers whose logits have rank 1 keep a state of
# constant size instead (`linear_attention.PastState`).
Cache: TypeAlias = Literal["keys", "linear"]

_ROUND = 32  # prompts and caches are padded to its multiples: fewer programs
_GREEDY = Sampling()
_GROWTH = 1.25  # factor of the margin after a query or key left the range
_UNFINISHED = "\ufffd"  # the first bytes of a character decode to it


class State(NamedTuple):
  """State of decoding.

  Attributes:
    caches: One per layer.
    token_B: The newest tokens, which are not in the caches yet.
    position: int32[], their position in the padded rows.
    num_new: int32[], new tokens so far.
  """

  caches: list[decode_lib.Cache]
  token_B: Int[Array, " B"]
  position: Int[Array, ""]
  num_new: Int[Array, ""]

  def is_outside(self) -> bool:
    """Returns whether a constant state has left its range. Blocks."""
    flags = [x.is_outside_B for x in self.caches if isinstance(x, PastState)]
    return any(bool(x.any()) for x in jax.device_get(flags))


def prefill(
  model: Transformer,
  params: Any,
  tokens_BL: Int[Array, "B L"],
  start_B: Int[Array, " B"],
  *,
  states: Sequence[PastState | None] | None,
  draw: Draw,
  num_new: Int[Array, ""],
  num_slots: int,
) -> State:
  """Returns the state after the prompts, with the next new tokens.

  `num_new` counts the new tokens at the end of each prompt. The KV cache of a
  layer with a window has no more slots than the window. For `states` see
  `Transformer.prefill`.
  """
  found: Any = model.apply(
    {"params": params}, tokens_BL, start_B, states, method="prefill"
  )
  logits_BV, caches = found
  token_B = sampling_lib.choose(draw, logits_BV, num_new)
  caches = [
    x
    if isinstance(x, PastState)
    else decode_lib.resize(x, min(num_slots, layer.window or num_slots))
    for x, layer in zip(caches, model.shape.layers, strict=True)
  ]
  return State(caches, token_B, jnp.int32(tokens_BL.shape[1]), num_new + 1)


def decode(
  model: Transformer,
  params: Any,
  state: State,
  start_B: Int[Array, " B"],
  *,
  draw: Draw,
  num_tokens: int,
) -> tuple[State, Int[Array, "B T"]]:
  """Returns the state after T more tokens per row, and these tokens."""

  def step(state: State, _):
    found: Any = model.apply(
      {"params": params},
      state.token_B,
      state.caches,
      decode_lib.Step(state.position, start_B),
      method="decode",
    )
    logits_BV, caches = found
    token_B = sampling_lib.choose(draw, logits_BV, state.num_new)
    state = State(caches, token_B, state.position + 1, state.num_new + 1)
    return state, token_B

  state, tokens_TB = jax.lax.scan(step, state, None, length=num_tokens)
  return state, tokens_TB.T


class Generator:
  """Generates tokens with one model, and keeps its compiled programs.

  Args:
    model: A next-token model.
    cache: What is kept of earlier tokens: "keys" or "linear".
    chunk: Tokens per call of the compiled decoding loop, and so per piece of a
      stream.
    margin: For cache "linear": the range of queries and keys that a state
      covers, relative to that of random tokens. 4,096 tokens of Python source
      needed 1.1 to 1.6. A smaller margin costs time, not accuracy.

  Raises:
    ConfigError: the model does not predict next tokens, or has no layer for
      cache "linear"; the cache is neither of the two; or the margin is not
      above 0.

  Example:
    >>> from folding.config import Config, ModelConfig
    >>> from folding.models.shape import shape_of
    >>> from folding.models.transformer import make_model
    >>> small = ModelConfig(num_layers=1, width=16, num_heads=2)
    >>> model = make_model(shape_of(Config(model=small)), vocab_size=9)
    >>> tokens = jnp.zeros((1, 4), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> prompts = [np.array([1, 2, 3]), np.array([4])]
    >>> generator = Generator(model)
    >>> [len(ids) for ids in generator(params, prompts, max_new_tokens=5)]
    [5, 5]
  """

  def __init__(
    self,
    model: Transformer,
    cache: Cache = "keys",
    *,
    chunk: int = 8,
    margin: float = 1.6,
  ):
    if model.num_classes:
      raise ConfigError(
        "this model is a classifier and predicts no next token; use folding predict"
      )
    if model.shape.output != "tokens" or not model.shape.causal:
      raise ConfigError(
        "this model makes vectors of texts and predicts no next token; use "
        "folding encode"
      )
    if cache not in (names := get_args(Cache)):
      raise ConfigError(f"cache is {' or '.join(names)}; it is {cache!r}")
    if cache == "linear" and not constant_state.layers(model):
      raise ConfigError(
        "no layer has a constant state: that takes fold.groups=1, and neither "
        "rotary positions nor a window"
      )
    if not (isinstance(chunk, int) and chunk >= 1):
      raise ConfigError(
        f"chunk must be a whole number, at least 1; it is {chunk!r}"
      )
    if not margin > 0:  # widening would never end
      raise ConfigError(f"the margin must be above 0; it is {margin}")
    self.model = model
    self._cache, self._chunk, self._margin = cache, chunk, margin
    self._measure = jax.jit(
      functools.partial(constant_state.measure_spans, model)
    )
    self._prefill = jax.jit(
      functools.partial(prefill, model), static_argnames="num_slots"
    )
    self._decode = jax.jit(
      functools.partial(decode, model, num_tokens=chunk),
      donate_argnames="state",
    )

  def __call__(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    end_id: int | Sequence[int] | None = None,
  ) -> list[np.ndarray]:
    """Returns int32 ids of the new tokens of each prompt.

    The arguments are those of `stream`.
    """
    parts = self.stream(
      params,
      prompts,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      end_id=end_id,
    )
    return _joined(parts)

  def stream(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    end_id: int | Sequence[int] | None = None,
  ) -> Iterator[list[np.ndarray]]:
    """Yields int32 ids of the next new tokens of each prompt.

    A row ends with `end_id` or after `max_new_tokens`. After that its arrays
    are empty. The stream ends with its last row.

    Args:
      params: Parameters of the model.
      prompts: Token ids, at least one each.
      max_new_tokens: Per prompt, at most.
      sampling: How tokens are chosen.
      end_id: The token, or tokens, that end a text; None: none does.

    Raises:
      ConfigError: there is no prompt, a prompt is empty or has an unknown id,
        positions or memory do not suffice, or logits are not finite.
    """
    self._check(prompts, max_new_tokens)
    draw = sampling_lib.make_draw(sampling, self.model.vocab_size)
    blocks = self._blocks(params, prompts, draw, max_new_tokens)
    end_ids = np.atleast_1d(np.array(() if end_id is None else end_id))
    if end_ids.size and not np.issubdtype(end_ids.dtype, np.integer):
      raise ConfigError(
        f"end_id is the id of a token, or several; it is {end_id!r}"
      )
    return _until_end(blocks, end_ids, max_new_tokens)

  def _check(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
    V = self.model.vocab_size
    if not len(prompts):
      raise ConfigError("there is no prompt")
    if not is_whole(max_new_tokens, 1, math.inf):
      raise ConfigError(
        "the number of new tokens must be a whole number, at least 1; it is "
        f"{max_new_tokens!r}"
      )
    for number, ids in enumerate(prompts, 1):
      if not len(ids):
        raise ConfigError(
          f"prompt {number} is empty; begin with the token that ends a text"
        )
      if not np.issubdtype(np.asarray(ids).dtype, np.integer):
        raise ConfigError(
          f"prompt {number} is not an array of token ids; encode texts with the "
          "tokenizer"
        )
      low, high = int(np.min(ids)), int(np.max(ids))
      if low < 0 or high >= V:
        raise ConfigError(
          f"prompt {number} has the token id {low if low < 0 else high}; "
          f"those of the model are 0 to {V - 1}"
        )
      most = self.model.shape.max_length - len(ids)
      if self.model.shape.positions == "learned" and max_new_tokens > most:
        advice = f"ask for {most} or fewer" if most > 0 else "shorten it"
        raise ConfigError(
          f"prompt {number} has {len(ids)} tokens, which with {max_new_tokens} "
          f"new ones exceed the {self.model.shape.max_length} positions of the "
          f"model; {advice}"
        )

  def _blocks(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    draw: Draw,
    max_new_tokens: int,
  ) -> Iterator[np.ndarray]:
    """Yields int32[B, T] of new tokens, also of rows that have ended.

    If a query or key leaves the range of a constant state, the prompts and the
    new tokens are prefilled again, into a state with a wider range.
    """
    new_BT = np.zeros((len(prompts), 0), np.int32)
    for states in self._states(params, len(prompts)):
      pairs = zip(prompts, new_BT, strict=True)
      read = [np.concatenate([ids, new]) for ids, new in pairs]
      length = _round_up(max(len(ids) for ids in read), _ROUND)
      tokens_BL, start_B = pad_left(read, length)
      num_new = new_BT.shape[1]
      num_steps = _round_up(max_new_tokens - num_new - 1, self._chunk)
      begin = functools.partial(
        self._prefill,
        params,
        tokens_BL,
        start_B,
        states=states,
        draw=draw,
        num_new=jnp.int32(num_new),
        num_slots=_round_up(length + num_steps, _ROUND),
      )
      _require_memory(jax.eval_shape(begin), max_new_tokens)
      state = begin()
      block_BT = state.token_B[:, None]
      while not state.is_outside():
        # A copy, because the next call donates the memory of the state.
        block_BT = np.array(block_BT)
        require_finite(block_BT >= 0, self.model.shape.dtype)
        new_BT = np.concatenate([new_BT, block_BT], axis=1)
        yield block_BT
        state, block_BT = self._decode(params, state, start_B, draw=draw)

  def _states(
    self, params: Any, batch_size: int
  ) -> Iterator[list[PastState | None] | None]:
    """Yields the empty states to begin with, then wider ones; None: no state.

    Raises:
      ConfigError: the ranges need too many nodes.
    """
    if self._cache == "keys":
      yield None
      return
    spans = self._measure(params)
    margin = self._margin
    while True:
      yield constant_state.empty_states(self.model, spans, batch_size, margin)
      margin *= _GROWTH


def pad_left(
  prompts: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns left-padded rows, int32[B, L], and the pad tokens of each, [B].

  Example:
    >>> pad_left([np.array([5, 6]), np.array([7, 8, 9])], 4)[0].tolist()
    [[0, 0, 5, 6], [0, 7, 8, 9]]
  """
  tokens_BL = np.zeros((len(prompts), length), np.int32)
  start_B = np.array([length - len(ids) for ids in prompts], np.int32)
  for row, ids in enumerate(prompts):
    tokens_BL[row, start_B[row] :] = ids
  return tokens_BL, start_B


def _until_end(
  blocks: Iterator[np.ndarray], end_ids: np.ndarray, left: int
) -> Iterator[list[np.ndarray]]:
  """Yields the rows of blocks up to their end, `left` tokens at most."""
  is_done: set[int] = set()
  for block_BT in blocks:
    block_BT = block_BT[:, :left]
    rows = []
    for row, ids in enumerate(block_BT):
      ends = np.flatnonzero(np.isin(ids, end_ids))
      stop = ends[0] + 1 if ends.size else ids.size
      rows.append(ids[: 0 if row in is_done else stop])
      if ends.size:
        is_done.add(row)
    yield rows
    left -= block_BT.shape[1]
    if left == 0 or len(is_done) == len(block_BT):
      return


def _require_memory(state: State, num_new: int) -> None:
  """Raises `ConfigError` if the caches would exceed the memory of the device.

  XLA for CPUs would not fail but swap.
  """
  needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches))
  room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  if room is None:
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed >= room:
    raise ConfigError(
      f"{num_new:,} new tokens would need {needed / 2**30:,.1f} GiB of keys "
      "and values; ask for fewer"
    )


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def generate(
  loaded: Model,
  texts: Sequence[str],
  *,
  max_new_tokens: int,
  sampling: Sampling = _GREEDY,
) -> list[str]:
  """Returns the continuation of each text, generated as one batch.

  Arguments and errors are those of `continue_texts`.
  """
  prompts, parts = _generated(loaded, texts, max_new_tokens, sampling, "keys")
  return _continuations(loaded.tokenizer, prompts, parts)


def continue_texts(
  loaded: Model,
  texts: Sequence[str],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  cache: Cache = "keys",
) -> Iterator[str]:
  """Yields the texts and their continuations, in pieces to print.

  A single text is streamed. Several are generated as one batch and printed in
  order, each below a line with its number.

  Args:
    loaded: A next-token model, from `folding.load`.
    texts: Prompts; an empty one begins a new document.
    max_new_tokens: Per text, at most.
    sampling: How tokens are chosen.
    cache: Kind of cache, see `Generator`.

  Raises:
    ConfigError: see `Generator` and `Generator.stream`, or one text is given in
      place of several.
  """
  prompts, parts = _generated(loaded, texts, max_new_tokens, sampling, cache)
  return _printed(loaded.tokenizer, texts, prompts, parts)


def _generated(
  loaded: Model,
  texts: Sequence[str],
  max_new_tokens: int,
  sampling: Sampling,
  cache: Cache,
) -> tuple[list[np.ndarray], Iterator[list[np.ndarray]]]:
  """Returns the ids of prompts, and a stream of new ids."""
  require_several(texts)
  tokenizer = loaded.tokenizer
  prompts = [tokenizer.prompt(x) for x in tokenizer.encode_batch(list(texts))]
  parts = Generator(loaded.module, cache).stream(
    jax.device_put(loaded.params),
    prompts,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    # The beginning of a new document ends this one.
    end_id=[*tokenizer.end_ids.tolist(), *tokenizer.begin_ids.tolist()],
  )
  return prompts, parts


def _continuations(
  tokenizer: Tokenizer,
  prompts: Sequence[np.ndarray],
  parts: Iterator[list[np.ndarray]],
) -> list[str]:
  return [
    "".join(decode_parts(tokenizer, prompt, [ids]))
    for prompt, ids in zip(prompts, _joined(parts), strict=True)
  ]


def _joined(parts: Iterator[list[np.ndarray]]) -> list[np.ndarray]:
  """Returns all new ids of each prompt, of what `Generator.stream` yields."""
  return [np.concatenate(ids) for ids in zip(*parts, strict=True)]


def _printed(
  tokenizer: Tokenizer,
  texts: Sequence[str],
  prompts: Sequence[np.ndarray],
  parts: Iterator[list[np.ndarray]],
) -> Iterator[str]:
  if len(texts) == 1:
    first = next(parts)  # an error comes before the text
    yield texts[0]
    rest = itertools.chain([first], parts)
    yield from decode_parts(tokenizer, prompts[0], (ids for [ids] in rest))
    yield "\n"
    return
  found = _continuations(tokenizer, prompts, parts)
  for number, (text, new) in enumerate(zip(texts, found, strict=True), 1):
    yield f"== {number} of {len(texts)} ==\n{text}{new}\n"


def decode_parts(
  tokenizer: Tokenizer, prompt: np.ndarray, parts: Iterable[np.ndarray]
) -> Iterator[str]:
  """Yields the text of new tokens as soon as it is certain.

  The text of a token may depend on earlier tokens, and a character may take
  several. So all ids from the prompt on are decoded, and an incomplete
  character at the end is held back.

  Example:
    >>> from folding.config import DataConfig
    >>> from folding.data.tokenizers import train_tokenizer
    >>> tokenizer = train_tokenizer(DataConfig(tokenizer="bytes"), [])
    >>> [prompt, new] = tokenizer.encode_batch(["caf", "é!"])
    >>> list(decode_parts(tokenizer, prompt, [new[:1], new[1:]]))
    ['é!']
  """
  ids, text = prompt, tokenizer.decode(prompt)
  shown = len(text)
  for part in parts:
    ids = np.concatenate([ids, part])
    text = tokenizer.decode(ids)
    certain = len(text.rstrip(_UNFINISHED))
    if certain > shown:
      yield text[shown:certain]
      shown = certain
  if len(text) > shown:
    yield text[shown:]
