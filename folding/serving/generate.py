"""Prompts -> new tokens, with a cache of keys and values or a constant state."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from folding.config import layers_of
from folding.models import past
from folding.models.attention import has_rank_1
from folding.models.transformer import Transformer
from folding.schema import ConfigError, require
from folding.serving import sampling as sampling_lib
from folding.serving import steps
from folding.serving.predict import require_numbers
from folding.serving.sampling import Sampling

# "keys": keys and values of all tokens. "linear": where logits have rank 1, a
# state that does not grow (see `folding.models.past`).
Cache: TypeAlias = Literal["keys", "linear"]

# Lengths are rounded up to a multiple, so that a few programs serve them all.
_ROUND = 32
_SAMPLING = Sampling()
_NO_ID = -1  # of no token

_TOLERANCE = 1e-4  # of a layer's attention, over the range of its values
_CALIBRATION = 1024  # random tokens that tell the ranges of queries and keys
_GROWTH = 1.25  # of a margin that was too small
_MOST_NODES = 4096


class _Programs(NamedTuple):
  """The compiled functions of `steps`."""

  prefill: Any
  decode: Any


class Generator:
  """Generates with one model, and keeps its compiled programs.

  Args:
    model: A next-token model.
    cache: What is kept of the tokens so far.
    chunk: Steps of one call of the compiled program, after each of which new
      tokens are given out.
    margin: For cache "linear": ranges of queries and keys that a state serves
      over those of random tokens. 4,096 tokens of Python source needed 1.1 to
      1.6; if it is too small, time is lost, and nothing else.

  Raises:
    ConfigError: the model does not predict next tokens, or has no layer for
      cache "linear".

  Example:
    >>> from folding.config import Config, ModelConfig, resolve
    >>> from folding.models.transformer import make_model
    >>> shape = ModelConfig(num_layers=1, width=16, num_heads=2)
    >>> model = make_model(resolve(Config(model=shape)), vocab_size=9)
    >>> tokens = jnp.zeros((1, 4), jnp.int32)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
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
    require(
      not model.num_classes,
      "this model is a classifier and predicts no next token",
    )
    require(
      model.config.causal, "a model that sees later tokens cannot predict them"
    )
    require(
      cache == "keys"
      or any(
        has_rank_1(model.config, layer)
        for layer in layers_of(model.config, model.fold)
      ),
      "no layer has a constant state: that takes one number a key "
      "(fold.groups=1) and neither rotary positions nor a window",
    )
    self.model, self._cache = model, cache
    self._chunk, self._margin = chunk, margin
    self._programs = functools.cache(self._compile)
    self._calibrate = jax.jit(
      lambda params, tokens_BL: model.apply(
        {"params": params}, tokens_BL, mutable=["spans"]
      )[1]
    )

  def _compile(self, num_nodes: int) -> _Programs:
    model = self.model.clone(num_nodes=num_nodes)
    return _Programs(
      jax.jit(
        functools.partial(steps.prefill, model),
        static_argnames=("kind", "num_slots"),
      ),
      jax.jit(
        functools.partial(steps.decode, model, self._chunk),
        static_argnames="kind",
        donate_argnames="state",
      ),
    )

  def __call__(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = _SAMPLING,
    end_id: int | Sequence[int] | None = None,
  ) -> list[np.ndarray]:
    """Returns int32 ids of the new tokens of each prompt, as `stream` does."""
    parts = self.stream(
      params,
      prompts,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      end_id=end_id,
    )
    return [np.concatenate(ids) for ids in zip(*parts, strict=True)]

  def stream(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling = _SAMPLING,
    end_id: int | Sequence[int] | None = None,
  ) -> Iterator[list[np.ndarray]]:
    """Yields int32 ids of some more new tokens of each prompt.

    A row ends with `end_id`, or after `max_new_tokens`; then its arrays are
    empty, and after the last row there are no more.

    Args:
      params: Of the model.
      prompts: Token ids, at least one each.
      max_new_tokens: Of each prompt, at most.
      sampling: How they are chosen.
      end_id: The token that ends a text, or several; None: none does.

    Raises:
      ConfigError: there is no prompt, one is empty or has an id that the model
        does not know, the positions of the model or the memory do not suffice,
        or the logits are not numbers.
    """
    self._check(prompts, max_new_tokens)
    end_id = _NO_ID if end_id is None else end_id
    blocks = self._blocks(params, prompts, max_new_tokens, sampling)
    return _until_end(blocks, end_id, len(prompts), max_new_tokens)

  def _check(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
    V = self.model.vocab_size
    require(len(prompts) > 0, "there is no prompt")
    require(
      max_new_tokens >= 1,
      f"the number of new tokens must be at least 1; it is {max_new_tokens}",
    )
    for number, ids in enumerate(prompts, 1):
      require(
        len(ids) > 0,
        f"prompt {number} is empty; begin with the token that ends a text",
      )
      low, high = int(np.min(ids)), int(np.max(ids))
      require(
        0 <= low and high < V,
        f"prompt {number} has the token id {low if low < 0 else high}; the "
        f"model knows 0 to {V - 1}",
      )
      most = self.model.max_length - len(ids)
      require(
        self.model.config.positions != "learned" or max_new_tokens <= most,
        f"prompt {number} has {len(ids)} tokens, which with {max_new_tokens} "
        f"new ones pass the {self.model.max_length} positions of the model; "
        + (f"ask for {most} or fewer" if most > 0 else "shorten it"),
      )

  def _blocks(
    self,
    params: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
  ) -> Iterator[np.ndarray]:
    """Yields int32[B, T] of new tokens, whether or not their row has ended.

    If a query or key leaves the range that a constant state serves, the state
    is made anew from all tokens but the newest, and serves a wider range.
    """
    draw = sampling_lib.make_draw(sampling, self.model.vocab_size)
    new_BT = np.zeros((len(prompts), 0), np.int32)
    margin = self._margin
    spans = self._spans(params) if self._cache == "linear" else {}
    while True:
      variables, num_nodes = {"params": params}, 0
      if spans:
        variables |= past.widen(spans, margin)
        num_nodes = self._num_nodes(variables["spans"])
      programs = self._programs(num_nodes)
      count = new_BT.shape[1]
      read = [
        np.concatenate([ids, new[:-1]])
        for ids, new in zip(prompts, new_BT, strict=True)
      ]
      length = _rounded(max(len(ids) for ids in read))
      tokens_BL, start_B = steps.fill_up(read, length)
      num_new = max_new_tokens - max(count - 1, 0)
      prefill = functools.partial(
        programs.prefill,
        kind=sampling.kind,
        num_slots=self._num_slots(length, num_new),
      )
      given = (variables, tokens_BL, start_B, draw)
      steps.require_room(jax.eval_shape(prefill, *given), num_new)
      state = prefill(*given)
      is_good = not past.is_outside(state.cache)
      if is_good and count:
        newest_B = jnp.asarray(new_BT[:, -1])
        state = steps.State(state.cache, newest_B, jnp.int32(count))
        length -= count - 1  # as if they had come one by one
      elif is_good:
        # A copy: the next call takes the state's memory.
        new_BT = np.array(state.token_B)[:, None]
        require_numbers(new_BT >= 0, self.model.config.dtype)
        yield new_BT
      while is_good:
        state, tokens_BT = programs.decode(
          variables, state, start_B, np.int32(length), draw, kind=sampling.kind
        )
        is_good = not past.is_outside(state.cache)
        if is_good:
          tokens_BT = np.asarray(tokens_BT)
          require_numbers(tokens_BT >= 0, self.model.config.dtype)
          new_BT = np.concatenate([new_BT, tokens_BT], axis=1)
          yield tokens_BT
      margin *= _GROWTH

  def _num_slots(self, length: int, num_new: int) -> int:
    num_steps = -(-(num_new - 1) // self._chunk) * self._chunk
    num_slots = _rounded(length + num_steps)
    window = self.model.config.window
    return num_slots if window is None else min(num_slots, window)

  def _spans(self, params: Any) -> Any:
    """Returns the ranges of queries and keys over random tokens."""
    length = self.model.max_length
    if self.model.config.positions != "learned":
      length = min(length, 128)
    size = max(1, _CALIBRATION // length), length
    tokens_BL = np.random.default_rng(0).integers(
      0, self.model.vocab_size, size
    )
    return self._calibrate(params, jnp.asarray(tokens_BL, jnp.int32))

  def _num_nodes(self, spans: Any) -> int:
    try:
      num_nodes = past.nodes_for(spans, _TOLERANCE)
    except ValueError as error:
      raise ConfigError(f"no constant state: {error}") from None
    require(
      num_nodes <= _MOST_NODES,
      "the queries and keys of this model range too far for a constant state",
    )
    return num_nodes


def _rounded(length: int) -> int:
  return -(-length // _ROUND) * _ROUND


def _until_end(
  blocks: Iterator[np.ndarray],
  end_id: int | Sequence[int],
  batch_size: int,
  left: int,
) -> Iterator[list[np.ndarray]]:
  """Yields the rows of blocks up to their end, `left` tokens at most."""
  is_done_B = np.zeros(batch_size, bool)
  for block_BT in blocks:
    block_BT = block_BT[:, :left]
    rows = []
    for row, ids in enumerate(block_BT):
      ends = np.flatnonzero(np.isin(ids, end_id))
      stop = ends[0] + 1 if ends.size else ids.size
      rows.append(ids[: 0 if is_done_B[row] else stop])
      is_done_B[row] |= ends.size > 0
    yield rows
    left -= block_BT.shape[1]
    if left == 0 or is_done_B.all():
      return
