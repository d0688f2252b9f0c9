"""What is compiled to generate: a pass over the prompts, then steps of a token.

Rows are filled up at their beginning, so that all end at the same place.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from folding.models import cache as cache_lib
from folding.models.transformer import Transformer
from folding.schema import require
from folding.serving import sampling
from folding.serving.sampling import Draw, Kind


class State(NamedTuple):
  """What a step changes.

  Attributes:
    cache: What the model keeps of the tokens so far.
    token_B: The newest tokens; they are not in the cache yet.
    step: int32[], new tokens so far.
  """

  cache: Any
  token_B: Int[Array, " B"]
  step: Int[Array, ""]


def fill_up(
  prompts: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts at the end of rows, int32[B, L], and where each starts.

  Example:
    >>> fill_up([np.array([5, 6]), np.array([7, 8, 9])], 4)[0].tolist()
    [[0, 0, 5, 6], [0, 7, 8, 9]]
  """
  tokens_BL = np.zeros((len(prompts), length), np.int32)
  start_B = np.array([length - len(ids) for ids in prompts], np.int32)
  for row, ids in enumerate(prompts):
    tokens_BL[row, start_B[row] :] = ids
  return tokens_BL, start_B


def require_room(state: State, num_new: int) -> None:
  """Raises `ConfigError` for a cache that this machine cannot hold.

  XLA does not say so on a CPU, but waits for ever.

  Args:
    state: Shapes of what `prefill` returns.
    num_new: New tokens that are asked for.
  """
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache)]
  room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  if room is None and hasattr(os, "sysconf"):
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  require(
    room is None or sum(sizes) < room,
    f"{num_new:,} new tokens would need {sum(sizes) / 2**30:,.1f} GiB of keys and "
    "values; ask for fewer",
  )


def prefill(
  model: Transformer,
  variables: Mapping[str, Any],
  tokens_BL: Int[Array, "B L"],
  start_B: Int[Array, " B"],
  draw: Draw,
  *,
  kind: Kind,
  num_slots: int,
) -> State:
  """Returns the state with the first new token.

  Args:
    model: A next-token model.
    variables: "params", and "spans" where the model has nodes.
    tokens_BL: Prompts, filled up at their beginning.
    start_B: Places at the beginning that hold no token.
    draw: From `sampling.make_draw`.
    kind: Of the `Sampling`.
    num_slots: Of the cache: all places to come, or the window of the model.
  """
  logits_BV, written = model.apply(
    variables, tokens_BL, start_B, method="prefill", mutable=["cache"]
  )
  token_B = sampling.choose(kind, draw, logits_BV, jnp.int32(0))
  cache = cache_lib.resize(written["cache"], num_slots)
  return State(cache, token_B, jnp.int32(1))


def decode(
  model: Transformer,
  count: int,
  variables: Mapping[str, Any],
  state: State,
  start_B: Int[Array, " B"],
  length: Int[Array, ""],
  draw: Draw,
  *,
  kind: Kind,
) -> tuple[State, Int[Array, "B T"]]:
  """Returns the state after a few more tokens, and those.

  Args:
    model: A next-token model.
    count: T, new tokens.
    variables: As in `prefill`.
    state: From `prefill`, or from here.
    start_B: As in `prefill`.
    length: L, places of the prompts.
    draw: As in `prefill`.
    kind: As in `prefill`.
  """

  def step(state: State, _):
    place = cache_lib.Step(length + state.step - 1, start_B)
    logits_BV, written = model.apply(
      {**variables, "cache": state.cache},
      state.token_B,
      place,
      method="decode",
      mutable=["cache"],
    )
    token_B = sampling.choose(kind, draw, logits_BV, state.step)
    return State(written["cache"], token_B, state.step + 1), token_B

  state, tokens_TB = jax.lax.scan(step, state, None, length=count)
  return state, tokens_TB.T
