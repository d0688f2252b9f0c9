"""Exact attention of long sequences, computed in blocks of logits.

The sequence is cut into N blocks of L positions. A block of queries meets one
block of keys after another with a running softmax, and the backward pass
computes the logits again. So the logits of one pair of blocks exist at a time:
memory is linear in the sequence length. Pairs that a causal mask or a window
hides are skipped.

The loops run over blocks of positions; batch and heads keep their sharding.

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

SIZE = 256  # most positions of a block


class Keys(NamedTuple):
  """Keys and values of a whole sequence, or of a block.

  Attributes:
    k_BMJG: Keys.
    v_BMIr: Values; r = K unless W_V has low rank.
    mask_BM: False at pad tokens; None: no padding.
  """

  k_BMJG: Float[Array, "*N B M J G"]
  v_BMIr: Float[Array, "*N B M I r"]
  mask_BM: Bool[Array, "*N #B M"] | None


# (q_BLHG, query_L, keys, key_M, biases) -> float32[B, H, L, M], with a large
# negative number at hidden keys.
Logits = Callable[..., Float[Array, "B H L M"]]


class _Blocks(NamedTuple):
  """The static part of the computation.

  Attributes:
    logits: Returns the logits of a block of queries and a block of keys.
    size: L, positions per block.
    number: N.
    causal: Whether a query sees no later key.
    window: A query sees keys at distances below it; None: at all distances.
  """

  logits: Logits
  size: int
  number: int
  causal: bool
  window: int | None

  def range(self, i: Array) -> tuple[Array | int, Array | int]:
    """Returns the first block of keys that block i of queries sees, and the end."""
    first, end = 0, self.number
    if self.window is not None:
      # The nearest positions of blocks d apart are (d - 1) L + 1 apart.
      far = (self.window - 2) // self.size + 1
      first, end = jnp.maximum(i - far, 0), jnp.minimum(i + far + 1, end)
    return first, (i + 1 if self.causal else end)


class _Sums(NamedTuple):
  """Softmax sums over the keys so far, divided by e^top."""

  out_BHLr: Float[Array, "B H L r"]
  norm_BHL: Float[Array, "B H L"]
  top_BHL: Float[Array, "B H L"]


def attend_by_blocks(
  logits: Logits,
  q_BLHG: Float[Array, "B L H G"],
  keys: Keys,
  biases: Any,
  *,
  causal: bool,
  window: int | None,
) -> Float[Array, "B L H r"]:
  """Returns softmax(logits) v of whole sequences.

  A query without any key gets a mean of some values.

  Args:
    logits: Returns the logits of some queries and keys at their positions.
    q_BLHG: Queries.
    keys: Keys and values, of the same positions.
    biases: A tree, passed to `logits`, which is differentiable in it.
    causal: Whether `logits` hides later keys.
    window: `logits` hides keys at this distance and beyond; None: no window.
  """
  length = q_BLHG.shape[1]
  count = -(-length // SIZE)
  size = -(-length // count)
  if count * size > length and keys.mask_BM is None and not causal:
    keys = keys._replace(mask_BM=jnp.ones((1, length), bool))
  q_NBLHG, keys = cut((q_BLHG, keys), count)
  blocks = _Blocks(logits, size, count, causal, window)
  out_NBLHr: Any = _attend(blocks, q_NBLHG, keys, biases)
  out_BNLHr = jnp.moveaxis(out_NBLHr, 0, 1)
  shape = out_BNLHr.shape
  return out_BNLHr.reshape(shape[0], -1, *shape[3:])[:, :length]


def cut(tree: Any, count: int) -> Any:
  """Returns arrays [B, L, ...] as [count, B, L / count, ...].

  A length that `count` does not divide is padded with 0 or False.
  """

  def cut_array(x):
    size = -(-x.shape[1] // count)
    width = [(0, 0)] * x.ndim
    width[1] = (0, count * size - x.shape[1])
    x = jnp.pad(x, width).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(cut_array, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: _Blocks, q_NBLHG, keys: Keys, biases):
  return _forward(blocks, q_NBLHG, keys, biases)[0]


def _forward(blocks: _Blocks, q_NBLHG, keys: Keys, biases):
  """Returns the output, and what `_backward` needs."""

  def attend_block(inputs):
    q_BLHG, i = inputs
    B, L, H, _ = q_BLHG.shape

    def add(j, sums: _Sums) -> _Sums:
      keys_j = _block(keys, j)
      logits_BHLM = _logits(blocks, q_BLHG, keys_j, biases, (i, j))
      top_BHL = jnp.maximum(sums.top_BHL, logits_BHLM.max(-1))
      scale_BHL = jnp.exp(sums.top_BHL - top_BHL)
      att_BHLM = jnp.exp(logits_BHLM - top_BHL[..., None])
      out_BHLr = _weigh(att_BHLM, keys_j.v_BMIr)
      return _Sums(
        scale_BHL[..., None] * sums.out_BHLr + out_BHLr,
        scale_BHL * sums.norm_BHL + att_BHLM.sum(-1),
        top_BHL,
      )

    r = keys.v_BMIr.shape[-1]
    none = _Sums(
      jnp.zeros((B, H, L, r), jnp.float32),
      jnp.zeros((B, H, L), jnp.float32),
      jnp.full((B, H, L), -jnp.inf, jnp.float32),
    )
    sums = jax.lax.fori_loop(*blocks.range(i), add, none)
    return sums._replace(out_BHLr=sums.out_BHLr / sums.norm_BHL[..., None])

  sums = jax.lax.map(attend_block, (q_NBLHG, jnp.arange(blocks.number)))
  out_NBLHr = sums.out_BHLr.swapaxes(2, 3).astype(keys.v_BMIr.dtype)
  return out_NBLHr, (q_NBLHG, keys, biases, sums)


def _backward(blocks: _Blocks, saved, d_out_NBLHr):
  """Returns the gradients of queries, keys, values and biases."""
  q_NBLHG, keys, biases, sums = saved
  d_out_NBHLr = d_out_NBLHr.swapaxes(2, 3).astype(jnp.float32)
  # The gradient of the logits is p (dp - mean of dp), p = softmax(logits).
  mean_NBHL = (d_out_NBHLr * sums.out_BHLr).sum(-1)

  def add_block(total, inputs):
    q_BLHG, i, sums, d_out_BHLr, mean_BHL = inputs

    def add(j, total):
      d_q, d_k, d_v, d_biases = total
      keys_j = _block(keys, j)
      logits_BHLM, pull_logits = jax.vjp(
        lambda q, k: _logits(
          blocks, q, keys_j._replace(k_BMJG=k), biases, (i, j)
        ),
        q_BLHG,
        keys_j.k_BMJG,
      )
      att_BHLM = jnp.exp(logits_BHLM - sums.top_BHL[..., None])
      att_BHLM /= sums.norm_BHL[..., None]
      _, pull_out = jax.vjp(_weigh, att_BHLM, keys_j.v_BMIr)
      d_att_BHLM, d_v_j = pull_out(d_out_BHLr)
      d_logits_BHLM = att_BHLM * (d_att_BHLM - mean_BHL[..., None])
      d_q_j, d_k_j = pull_logits(d_logits_BHLM)

      def pull_biases(d_logits_HLM):
        """Returns the gradient of the biases for one row of the batch."""
        row = keys_j._replace(k_BMJG=keys_j.k_BMJG[:1], mask_BM=None)
        _, pull = jax.vjp(
          lambda biases: _logits(blocks, q_BLHG[:1], row, biases, (i, j)),
          biases,
        )
        return pull(d_logits_HLM[None])[0]

      d_biases_j = jax.vmap(pull_biases)(d_logits_BHLM)
      return (
        d_q + d_q_j,
        d_k.at[j].add(d_k_j),
        d_v.at[j].add(d_v_j),
        jax.tree.map(jnp.add, d_biases, d_biases_j),
      )

    d_q, *total = jax.lax.fori_loop(
      *blocks.range(i), add, (_zeros(q_BLHG), *total)
    )
    return tuple(total), d_q

  # The sum over rows is left to the end: where devices hold rows, a sum in the
  # loop would move [H, L, M] numbers between them for each pair of blocks.
  rows = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (q_NBLHG.shape[1], *x.shape)), biases
  )
  zeros = _zeros((keys.k_BMJG, keys.v_BMIr, rows))
  indices_N = jnp.arange(blocks.number)
  (d_k, d_v, d_biases), d_q = jax.lax.scan(
    add_block, zeros, (q_NBLHG, indices_N, sums, d_out_NBHLr, mean_NBHL)
  )
  d_keys = Keys(
    d_k.astype(keys.k_BMJG.dtype), d_v.astype(keys.v_BMIr.dtype), None
  )
  d_biases = jax.tree.map(lambda x: x.sum(0), d_biases)
  return d_q.astype(q_NBLHG.dtype), d_keys, d_biases


_attend.defvjp(_forward, _backward)


def _zeros(tree: Any) -> Any:
  """Returns float32 zeros of the shapes of a tree."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _block(keys: Keys, j: Int[Array, ""]) -> Keys:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), keys
  )


def _logits(blocks: _Blocks, q_BLHG, keys: Keys, biases, pair) -> Array:
  """Returns the logits of block i of the queries and block j of the keys."""
  i, j = pair
  at_L = jnp.arange(blocks.size)
  query_L, key_M = i * blocks.size + at_L, j * blocks.size + at_L
  return blocks.logits(q_BLHG, query_L, keys, key_M, biases)


def _weigh(
  att_BHLM: Float[Array, "B H L M"], v_BMIr: Float[Array, "B M I r"]
) -> Float[Array, "B H L r"]:
  """Returns the sums of values with these weights, in float32."""
  B, H, L, M = att_BHLM.shape
  v_BIMr = v_BMIr.swapaxes(1, 2)
  out = jnp.matmul(
    # The queries of the heads that share values are rows of one matrix.
    att_BHLM.astype(v_BIMr.dtype).reshape(B, v_BIMr.shape[1], -1, M),
    v_BIMr,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(B, H, L, -1)
