"""Exact attention of long sequences, computed in blocks of logits.

The sequence is cut into N blocks of L positions. A block of queries meets one
block of keys after another with a running softmax, and the backward pass
computes the logits again. So the logits of one pair of blocks exist at a time:
memory is linear in the sequence length. Pairs that a causal mask or a window
hides are skipped.

The loops run over blocks of positions; batch and heads keep their sharding.
Blocks are small enough for the caches of a CPU, and larger elsewhere.

References: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact
  Attention with IO-Awareness", 2022; Rabe and Staats, "Self-attention Does Not
  Need O(n^2) Memory", 2021.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Most positions of a block, by platform. docs/experiments.md has times.
SIZES = {"cpu": 128, "default": 512}


class Keys(NamedTuple):
  """Keys and values of a whole sequence, or of a block.

  Attributes:
    k_BJMG: Keys.
    v_BIMr: Values; r = K unless W_V has low rank.
    mask_B1M: False at pad tokens; None: no padding. Positions are the third
      axis, as in the other arrays, which are cut alike.
  """

  k_BJMG: Float[Array, "*N B J M G"]
  v_BIMr: Float[Array, "*N B I M r"]
  mask_B1M: Bool[Array, "*N #B 1 M"] | None


# (q_BHLG, query_L, keys, key_M, biases) -> float32[B, H, L, M], with a large
# negative number at hidden keys.
Logits = Callable[..., Float[Array, "B H L M"]]


class _Options(NamedTuple):
  """The static arguments of `attend_by_blocks`."""

  logits: Logits
  causal: bool
  window: int | None


class _Blocks(NamedTuple):
  """How a sequence is cut.

  Attributes:
    options: Static arguments of the attention.
    size: L, positions per block.
    number: N.
  """

  options: _Options
  size: int
  number: int

  def range(self, i: Array) -> tuple[Array | int, Array | int]:
    """Returns the first block of keys that block i of queries sees, and the end."""
    first, end = 0, self.number
    if self.options.window is not None:
      # The nearest positions of blocks d apart are (d - 1) L + 1 apart.
      far = (self.options.window - 2) // self.size + 1
      first, end = jnp.maximum(i - far, 0), jnp.minimum(i + far + 1, end)
    return first, (i + 1 if self.options.causal else end)


class _Sums(NamedTuple):
  """Results of a softmax over all keys.

  Attributes:
    out_BHLr: Means of the values, weighted by attention.
    top_BHL: Largest logits.
    share_BHL: 1 / the sums of e^(logit - top).
  """

  out_BHLr: Float[Array, "*N B H L r"]
  top_BHL: Float[Array, "*N B H L"]
  share_BHL: Float[Array, "*N B H L"]


def attend_by_blocks(
  logits: Logits,
  q_BHLG: Float[Array, "B H L G"],
  keys: Keys,
  biases: Any,
  *,
  causal: bool,
  window: int | None,
) -> Float[Array, "B H L r"]:
  """Returns softmax(logits) v of whole sequences.

  A query without any key gets a mean of some values.

  Args:
    logits: Returns the logits of some queries and keys at their positions.
    q_BHLG: Queries.
    keys: Keys and values, of the same positions.
    biases: A tree, passed to `logits`, which is differentiable in it.
    causal: Whether `logits` hides later keys.
    window: `logits` hides keys at this distance and beyond; None: no window.
  """
  return _attend(_Options(logits, causal, window), q_BHLG, keys, biases)


def in_blocks(tree: Any, count: int, axis: int = 1) -> Any:
  """Returns arrays with an axis of size L as [count, ..., L / count, ...].

  A length that `count` does not divide is padded with 0 or False.
  """

  def cut_array(x):
    size = -(-x.shape[axis] // count)
    width = [(0, 0)] * x.ndim
    width[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, width)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  return jax.tree.map(cut_array, tree)


def _whole(tree: Any, length: int) -> Any:
  """Returns arrays [N, B, H, L, ...] as [B, H, length, ...], without padding."""

  def join(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]

  return jax.tree.map(join, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q_BHLG, keys: Keys, biases):
  return _forward(options, q_BHLG, keys, biases)[0]


def _forward(options: _Options, q_BHLG, keys: Keys, biases):
  """Returns the output, and what `_backward` needs."""
  sums: Any = _by_platform(_sums, options, q_BHLG, keys, biases)
  out_BHLr = sums.out_BHLr.astype(keys.v_BIMr.dtype)
  return out_BHLr, (q_BHLG, keys, biases, sums)


def _backward(options: _Options, saved, d_out_BHLr):
  """Returns the gradients of queries, keys, values and biases."""
  return _by_platform(_gradients, options, *saved, d_out_BHLr)


def _by_platform(function, options: _Options, q_BHLG, keys: Keys, *args):
  """Calls a function with blocks of the size that suits the platform."""

  def sized(most):
    length = q_BHLG.shape[2]
    count = -(-length // most)
    size = -(-length // count)

    def call(q_BHLG, keys, *args):
      # Padded keys have to be hidden, which a causal mask does already.
      if count * size > length and keys.mask_B1M is None and not options.causal:
        keys = keys._replace(mask_B1M=jnp.ones((1, 1, length), bool))
      return function(_Blocks(options, size, count), q_BHLG, keys, *args)

    return call

  return jax.lax.platform_dependent(
    q_BHLG, keys, *args, **{name: sized(n) for name, n in SIZES.items()}
  )


def _sums(blocks: _Blocks, q_BHLG, keys: Keys, biases) -> _Sums:
  """Returns the sums over all keys."""
  length = q_BHLG.shape[2]
  q_NBHLG, keys = in_blocks((q_BHLG, keys), blocks.number, axis=2)

  def attend_block(inputs):
    q_BHLG, i = inputs
    B, H, L, _ = q_BHLG.shape
    r = keys.v_BIMr.shape[-1]

    def add(j, sums):
      """Adds block j of the keys to sums of values and 1, divided by e^top."""
      sum_BHLr, top_BHL = sums
      keys_j = _block(keys, j)
      logits_BHLM = _logits(blocks, q_BHLG, keys_j, biases, (i, j))
      new_BHL = jnp.maximum(top_BHL, logits_BHLM.max(-1))
      att_BHLM = jnp.exp(logits_BHLM - new_BHL[..., None])
      # A value of 1 gives the norm. TPUs sum over keys slowly, and multiply
      # matrices fast.
      one = [(0, 0)] * (keys_j.v_BIMr.ndim - 1) + [(0, 1)]
      v_BIMr = jnp.pad(keys_j.v_BIMr, one, constant_values=1)
      scale_BHL1 = jnp.exp(top_BHL - new_BHL)[..., None]
      return scale_BHL1 * sum_BHLr + _weigh(att_BHLM, v_BIMr), new_BHL

    none = (
      jnp.zeros((B, H, L, r + 1), jnp.float32),
      jnp.full((B, H, L), -jnp.inf, jnp.float32),
    )
    sum_BHLr, top_BHL = jax.lax.fori_loop(*blocks.range(i), add, none)
    share_BHL1 = 1 / sum_BHLr[..., r:]
    return _Sums(share_BHL1 * sum_BHLr[..., :r], top_BHL, share_BHL1[..., 0])

  sums = jax.lax.map(attend_block, (q_NBHLG, jnp.arange(blocks.number)))
  return _whole(sums, length)


class _Queries(NamedTuple):
  """Queries, all or of a block, and what their gradients need.

  Attributes:
    q_BHLG: Queries.
    sums: Results of their softmax.
    d_out_BHLr: Gradient of the output.
    mean_BHL: Mean of the gradient of the weights, weighted by attention.
  """

  q_BHLG: Float[Array, "*N B H L G"]
  sums: _Sums
  d_out_BHLr: Float[Array, "*N B H L r"]
  mean_BHL: Float[Array, "*N B H L"]


def _gradients(
  blocks: _Blocks, q_BHLG, keys: Keys, biases, sums: _Sums, d_out_BHLr
):
  """Returns the gradients of queries, keys, values and biases."""
  length = q_BHLG.shape[2]
  d_out_BHLr = d_out_BHLr.astype(jnp.float32)
  mean_BHL = (d_out_BHLr * sums.out_BHLr).sum(-1)
  # Padded queries have a share of 0.
  queries_N, keys = in_blocks(
    (_Queries(q_BHLG, sums, d_out_BHLr, mean_BHL), keys), blocks.number, axis=2
  )

  def add_block(total, inputs):
    queries, i = inputs

    def add(j, total):
      d_q, d_k, d_v, d_biases = total
      d_q_j, d_k_j, d_v_j, d_biases_j = _pair_gradients(
        blocks, queries, _block(keys, j), biases, (i, j)
      )
      return (
        d_q + d_q_j,
        d_k.at[j].add(d_k_j),
        d_v.at[j].add(d_v_j),
        jax.tree.map(jnp.add, d_biases, d_biases_j),
      )

    d_q, *total = jax.lax.fori_loop(
      *blocks.range(i), add, (_zeros(queries.q_BHLG), *total)
    )
    return tuple(total), d_q

  # The sum over rows is left to the end. If rows are on several devices, a sum in
  # the loop would move [H, L, M] numbers between them for each pair of blocks.
  rows = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (q_BHLG.shape[0], *x.shape)), biases
  )
  zeros = _zeros((keys.k_BJMG, keys.v_BIMr, rows))
  indices_N = jnp.arange(blocks.number)
  (d_k, d_v, d_biases), d_q = jax.lax.scan(
    add_block, zeros, (queries_N, indices_N)
  )
  d_q, d_k, d_v = _whole((d_q, d_k, d_v), length)
  d_keys = Keys(
    d_k.astype(keys.k_BJMG.dtype), d_v.astype(keys.v_BIMr.dtype), None
  )
  d_biases = jax.tree.map(lambda x: x.sum(0), d_biases)
  return d_q.astype(q_BHLG.dtype), d_keys, d_biases


def _pair_gradients(
  blocks: _Blocks, queries: _Queries, keys: Keys, biases, pair
):
  """Returns what block j of the keys adds to the gradients of block i.

  The gradient of the logits is p (dp - mean of dp), p = softmax(logits). Gradients
  of the biases are those of each row of the batch.
  """
  q_BHLG, sums, d_out_BHLr, mean_BHL = queries
  logits_BHLM, pull_logits = jax.vjp(
    lambda q, k: _logits(blocks, q, keys._replace(k_BJMG=k), biases, pair),
    q_BHLG,
    keys.k_BJMG,
  )
  att_BHLM = sums.share_BHL[..., None] * jnp.exp(
    logits_BHLM - sums.top_BHL[..., None]
  )
  _, pull_out = jax.vjp(_weigh, att_BHLM, keys.v_BIMr)
  d_att_BHLM, d_v = pull_out(d_out_BHLr)
  d_logits_BHLM = att_BHLM * (d_att_BHLM - mean_BHL[..., None])
  d_q, d_k = pull_logits(d_logits_BHLM)

  def pull_biases(d_logits_HLM):
    """Returns the gradient of the biases for one row of the batch."""
    row = keys._replace(k_BJMG=keys.k_BJMG[:1], mask_B1M=None)
    _, pull = jax.vjp(
      lambda biases: _logits(blocks, q_BHLG[:1], row, biases, pair), biases
    )
    return pull(d_logits_HLM[None])[0]

  return d_q, d_k, d_v, jax.vmap(pull_biases)(d_logits_BHLM)


_attend.defvjp(_forward, _backward)


def _zeros(tree: Any) -> Any:
  """Returns float32 zeros of the shapes of a tree."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _block(keys: Keys, j: Int[Array, ""]) -> Keys:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), keys
  )


def _logits(blocks: _Blocks, q_BHLG, keys: Keys, biases, pair) -> Array:
  """Returns the logits of block i of the queries and block j of the keys."""
  i, j = pair
  at_L = jnp.arange(blocks.size)
  query_L, key_M = i * blocks.size + at_L, j * blocks.size + at_L
  return blocks.options.logits(q_BHLG, query_L, keys, key_M, biases)


def _weigh(
  att_BHLM: Float[Array, "B H L M"], v_BIMr: Float[Array, "B I M r"]
) -> Float[Array, "B H L r"]:
  """Returns the sums of values with these weights, in float32."""
  B, H, L, M = att_BHLM.shape
  out = jnp.matmul(
    # The queries of the heads that share values are rows of one matrix.
    att_BHLM.astype(v_BIMr.dtype).reshape(B, v_BIMr.shape[1], -1, M),
    v_BIMr,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(B, H, L, -1)
