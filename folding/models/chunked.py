"""Rank-1 attention chunk by chunk: exact inside a chunk, by nodes before it.

The loops of `linear_attention`, over s_BHL (queries, scaled), t_BHL (keys,
around 0) and v_BHLK in float32; letters are those of `nodal`, and I and J are
chunks where sums are read and come from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from folding.models import nodal
from folding.models.nodal import Grid, Part

_BLOCK = 4096  # positions times heads at once: what a processor's cache holds
_EXACT = 2**21  # logits at once, where all are computed


@jax.checkpoint
def attend_all(s_BHL, t_BHL, v_BHLK, keep_BL, grid: Grid) -> Array:
  """Returns attention of all to all without positions: one sum at the nodes."""
  t_BHCM, v_BHCMK = t_BHL[:, :, None], v_BHLK[:, :, None]
  seen_BHCM = None if keep_BL is None else keep_BL[:, None, None]
  part = nodal.summarise(
    t_BHCM, v_BHCMK, jnp.zeros_like(t_BHCM), seen_BHCM, grid
  )
  _, weight_BHCLN = nodal.read_weights(s_BHL[:, :, None], grid)
  # Tops differ by panel: a query has the same in its sum and its normaliser.
  return nodal.divide(nodal.weigh(weight_BHCLN, part))[:, :, 0]


def attend_exact(
  s_BHL, t_BHL, v_BHLK, slopes_H, keep_BL, *, causal: bool
) -> Array:
  """Returns dense attention, a chunk of queries at a time: O(L) memory."""
  B, H, M = t_BHL.shape
  chunk = min(M, max(1, _EXACT // (B * H * M)))
  num_chunks = -(-M // chunk)
  t_BHCM, v_BHCMK = t_BHL[:, :, None], v_BHLK[:, :, None]
  slopes_BHC = jnp.broadcast_to(slopes_H[None, :, None], (B, H, 1))

  @jax.checkpoint
  def attend(queries):
    s_BHL, at_L = queries
    distance_LM = at_L[:, None] - jnp.arange(M, dtype=jnp.float32)[None]
    is_seen = (distance_LM >= 0 if causal else distance_LM < M)[
      None, None, None
    ]
    if keep_BL is not None:
      is_seen = is_seen & keep_BL[:, None, None, None]
    near = _attend_near(
      s_BHL[:, :, None], t_BHCM, v_BHCMK, slopes_BHC, distance_LM, is_seen
    )
    return nodal.divide(near)[:, :, 0]

  queries = (
    _cut(s_BHL, 2, num_chunks, 1, chunk)[:, :, :, 0],
    jnp.arange(num_chunks * chunk, dtype=jnp.float32).reshape(-1, chunk),
  )
  out_NBHLK = jax.lax.map(attend, queries)
  return _whole(out_NBHLK[:, :, :, None], M)


def _accumulate(parts: Part, slopes_H, step) -> Part:
  """Returns the sum of what came before each chunk, and at last of it all.

  Args:
    parts: What comes in with the first chunk, and what each chunk adds.
    slopes_H: A position.
    step: Positions of a chunk.
  """
  B, H, C, P = parts.top.shape
  lag_IJ = np.arange(C)[:, None] - np.arange(C)
  ages_IJ = jnp.asarray(step * np.maximum(lag_IJ, 0), jnp.float32)
  decay_HIJ = jnp.einsum("H,IJ->HIJ", slopes_H, ages_IJ)
  is_seen = jnp.asarray(lag_IJ >= 0)[None, None, None]
  top_BHPJ = parts.top.swapaxes(2, 3)
  log_BHPIJ = top_BHPJ[..., None, :] - decay_HIJ[None, :, None]
  log_BHPIJ = jnp.where(is_seen, log_BHPIJ, nodal.MASKED)
  top_BHPI = jax.lax.stop_gradient(log_BHPIJ.max(-1))
  share_BHPIJ = jnp.exp(log_BHPIJ - top_BHPI[..., None])
  sum_BHJPY = parts.sum_K.reshape(B, H, C, P, -1)
  sum_BHIPY = jnp.einsum("BHPIJ,BHJPY->BHIPY", share_BHPIJ, sum_BHJPY)
  norm_BHJPX = parts.norm.reshape(B, H, C, P, -1)
  norm_BHIPX = jnp.einsum("BHPIJ,BHJPX->BHIPX", share_BHPIJ, norm_BHJPX)
  return Part(
    sum_BHIPY.reshape(parts.sum_K.shape),
    norm_BHIPX.reshape(parts.norm.shape),
    top_BHPI.swapaxes(2, 3),
  )


def _attend_near(
  s_BHCL, t_BHCM, v_BHCMK, slopes_BHC, distance_LM, is_seen
) -> Part:
  """Returns exact attention inside each chunk."""
  logits_BHCLM = jnp.einsum("BHCL,BHCM->BHCLM", s_BHCL, t_BHCM)
  logits_BHCLM -= jnp.einsum("BHC,LM->BHCLM", slopes_BHC, jnp.abs(distance_LM))
  logits_BHCLM = jnp.where(is_seen, logits_BHCLM, nodal.MASKED)
  top_BHCL = jax.lax.stop_gradient(
    jnp.maximum(logits_BHCLM.max(-1), nodal.FLOOR)
  )
  att_BHCLM = jnp.exp(logits_BHCLM - top_BHCL[..., None])
  sum_BHCLK = jnp.einsum("BHCLM,BHCMK->BHCLK", att_BHCLM, v_BHCMK)
  return Part(sum_BHCLK, att_BHCLM.sum(-1), top_BHCL)


@functools.partial(jax.checkpoint, static_argnums=(4,))
def _block(past, block, slopes_H, grid, is_strict):
  """Returns the state after some chunks, and attention of their queries."""
  s_BHCL, t_BHCM, v_BHCMK, keep_BCM = block
  L = s_BHCL.shape[3]
  slopes_BHC = jnp.broadcast_to(slopes_H[None, :, None], s_BHCL.shape[:3])

  at_L = jnp.arange(L, dtype=jnp.float32)
  distance_LM = at_L[:, None] - at_L[None]
  is_seen = distance_LM > 0 if is_strict else distance_LM >= 0
  is_seen = is_seen[None, None, None]
  added = None
  if keep_BCM is not None:
    is_seen = is_seen & keep_BCM[:, None, :, None]
    added = keep_BCM[:, None]
  near = _attend_near(s_BHCL, t_BHCM, v_BHCMK, slopes_BHC, distance_LM, is_seen)

  bias_BHCM = jnp.einsum("BHC,M->BHCM", slopes_BHC, at_L - L)  # to the end
  parts = nodal.summarise(t_BHCM, v_BHCMK, bias_BHCM, added, grid)
  parts = jax.tree.map(
    lambda x, y: jnp.concatenate([x[:, :, None], y], 2), past, parts
  )
  pasts = _accumulate(parts, slopes_H, L)
  past = jax.tree.map(lambda x: x[:, :, -1], pasts)
  pasts = jax.tree.map(lambda x: x[:, :, :-1], pasts)

  hot_BHCLP, weight_BHCLN = nodal.read_weights(s_BHCL, grid)
  top_BHCL = jnp.einsum("BHCLP,BHCP->BHCL", hot_BHCLP, pasts.top)
  top_BHCL -= jnp.einsum("BHC,L->BHCL", slopes_BHC, at_L)  # from the start
  far = nodal.weigh(weight_BHCLN, pasts)._replace(top=top_BHCL)
  return past, nodal.join(near, far)


def scan(
  past: Part,
  arrays: tuple[Array, Array, Array],
  slopes_H: Array,
  keep_BL: Array | None,
  grid: Grid,
  chunk: int,
  is_strict: bool = False,
) -> tuple[Part, Part]:
  """Returns what the past becomes, and causal attention of all positions.

  Where the length is not of whole chunks, positions are added at the end. What
  the past becomes is right only if `keep_BL` is given: it hides them.

  Args:
    past: Sums at the nodes, [B, H, N]; its tops are [B, H, P].
    arrays: s_BHL, t_BHL and v_BHLK.
    slopes_H: Of ALiBi.
    keep_BL: As in `attend_linear`.
    grid: The nodes.
    chunk: Positions between which attention is exact.
    is_strict: Whether a position does not see itself.
  """
  B, H, length = arrays[0].shape
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)
  num_blocks = -(-num_chunks // max(1, _BLOCK // (B * H * chunk)))
  C = -(-num_chunks // num_blocks)
  blocks = (
    # Queries added are inside the nodes' range, as gradients are computed there.
    _cut(arrays[0], 2, num_blocks, C, chunk, mode="edge"),
    *(_cut(x, 2, num_blocks, C, chunk) for x in arrays[1:]),
    None if keep_BL is None else _cut(keep_BL, 1, num_blocks, C, chunk),
  )
  past, parts = jax.lax.scan(
    lambda past, block: _block(past, block, slopes_H, grid, is_strict),
    past,
    blocks,
  )
  # Positions added have moved the past away from the end of the text.
  added = num_blocks * C * chunk - length
  past = past._replace(top=past.top + (added * slopes_H)[None, :, None])
  return past, Part(*(_whole(x, length) for x in parts))


def _cut(
  x: Array,
  axis: int,
  num_blocks: int,
  num_chunks: int,
  chunk: int,
  mode: str = "constant",
) -> Array:
  """Returns [blocks, ..., C, L, ...] of [..., length, ...], filled up at its end.

  By `mode` of `jnp.pad`: with 0, or "edge".
  """
  width = [(0, 0)] * x.ndim
  width[axis] = (0, num_blocks * num_chunks * chunk - x.shape[axis])
  shape = (*x.shape[:axis], num_blocks, num_chunks, chunk, *x.shape[axis + 1 :])
  return jnp.moveaxis(jnp.pad(x, width, mode=mode).reshape(shape), axis, 0)


def _whole(x: Array, length: int) -> Array:
  """Returns [B, H, length, ...] of [blocks, B, H, C, L, ...]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[5:])[:, :, :length]
