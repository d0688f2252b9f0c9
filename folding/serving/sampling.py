"""Logits -> next token: greedy, or drawn with temperature, top-k and top-p."""

import dataclasses
import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from folding.compression.checks import is_between, is_whole
from folding.errors import ConfigError

# Selects the compiled program; it takes the arrays of a `Draw`.
Kind: TypeAlias = Literal["greedy", "free", "restricted"]


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: Divides the logits, from 1e-6 to below 1e6; 0:
      greedy.
    top_k: Draw among the k most likely tokens; None: among all.
    top_p: Then draw among the fewest most likely tokens whose probabilities sum
      to at least this, in (0, 1]; None: among all.
    seed: A draw depends only on the seed, the row and the number of the new
      token.

  Raises:
    ConfigError: a value is out of range.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  seed: int = 0

  def __post_init__(self):
    # Logits divided by less would exceed float32, by more become equal.
    if self.temperature != 0 and not is_between(self.temperature, 1e-6, 1e6):
      raise ConfigError(
        "the temperature must be 0 (always the likeliest token), or from 1e-6 to "
        f"below 1e6; it is {self.temperature!r}"
      )
    if self.top_k is not None and not is_whole(self.top_k, 1, math.inf):
      raise ConfigError(
        f"top-k must be a whole number, at least 1; it is {self.top_k!r}"
      )
    is_number = is_between(self.top_p, 0, math.inf)
    if self.top_p is not None and not (is_number and 0 < self.top_p <= 1):
      raise ConfigError(f"top-p must be in (0, 1]; it is {self.top_p!r}")
    if not is_whole(self.seed, 0, 2**32):  # JAX would truncate it
      raise ConfigError(
        f"the seed must be a whole number in [0, 2^32); it is {self.seed!r}"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
  """A `Sampling` as arrays, so that other numbers share a compiled program."""

  key: PRNGKeyArray
  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]
  kind: Kind = dataclasses.field(metadata={"static": True})


def make_draw(sampling: Sampling, vocab_size: int) -> Draw:
  """Returns the arrays of a `Sampling` over V tokens."""
  kind: Kind = "restricted"
  if sampling.temperature == 0:
    kind = "greedy"
  elif sampling.top_k is None and sampling.top_p in (None, 1):
    kind = "free"
  top_k = vocab_size if sampling.top_k is None else sampling.top_k
  # As float32, a smaller top-p is 0, which would keep no token.
  top_p = 1.0 if sampling.top_p is None else max(sampling.top_p, 1e-30)
  return Draw(
    jax.random.key(sampling.seed),
    jnp.float32(sampling.temperature),
    jnp.int32(min(top_k, vocab_size)),
    jnp.float32(top_p),
    kind,
  )


def noise(
  key: PRNGKeyArray, step: Int[Array, ""], batch_size: int, vocab_size: int
) -> Float[Array, "B V"]:
  """Returns Gumbel noise for the new token number `step` of each row."""

  def of_row(row):
    row_key = jax.random.fold_in(jax.random.fold_in(key, row), step)
    return jax.random.gumbel(row_key, (vocab_size,), jnp.float32)

  return jax.vmap(of_row)(jnp.arange(batch_size))


def kept(
  logits_BV: Float[Array, "B V"],
  top_k: Int[Array, ""],
  top_p: Float[Array, ""],
) -> Bool[Array, "B V"]:
  """Returns which tokens top-k and top-p keep, with all ties of the last one."""
  sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
  is_kept_BV = (jnp.arange(logits_BV.shape[-1]) < top_k)[None]
  p_BV = jax.nn.softmax(jnp.where(is_kept_BV, sorted_BV, -jnp.inf), axis=-1)
  # Sum over more likely tokens; a top-p of 1 keeps all, however it is rounded.
  before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
  is_kept_BV &= (before_BV < top_p) | (top_p >= 1)
  least_B1 = jnp.min(
    jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
  )
  return logits_BV >= least_B1


def choose(
  draw: Draw,
  logits_BV: Float[Array, "B V"],
  step: Int[Array, ""],
) -> Int[Array, " B"]:
  """Returns the new token number `step` of each row; -1 if a logit is NaN.

  argmax(logits / temperature + Gumbel noise) is a draw from the softmax
  (Gumbel 1954).
  """
  is_nan_B = jnp.isnan(logits_BV).any(axis=-1)
  if draw.kind != "greedy":
    logits_BV /= draw.temperature
    noise_BV = noise(draw.key, step, *logits_BV.shape)
    if draw.kind == "restricted":
      is_kept_BV = kept(logits_BV, draw.top_k, draw.top_p)
      logits_BV = jnp.where(is_kept_BV, logits_BV, -jnp.inf)
    logits_BV += noise_BV
  token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jnp.where(is_nan_B, -1, token_B)
