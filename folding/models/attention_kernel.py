"""Exact attention by kernels: splash attention on TPUs, cuDNN's on NVIDIA's GPUs.

The logits of a block stay in the memory of the chip's cores, where XLA writes
those of `blocks` to the main memory.

The mesh is that of the context (`jax.set_mesh`); outside such a context attention
runs in blocks. The compiler for TPUs cannot split a kernel over devices, so
`shard_map` does. It splits heads over the mesh axis "tensor" and rows over the others.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

SIZE = 1024  # most positions of a block
_LANES = 128  # a block is a multiple of this
# Sides of the blocks of queries and of keys, forward and in both backward kernels.
_BLOCKS = (
  "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq",
)  # fmt: skip

# Fewest channels of a head that splash attention is used for. It takes as long for
# fewer, because TPUs multiply 128 at once, and blocks take less.
_FEWEST = 64
_ALIBI = 10  # channels, see `alibi_channels`
_MOST_CUDNN = 128  # channels, on GPUs before Hopper

# Products with the size of the logits: of queries and keys or their gradients, and
# of values or their gradients.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
_CALL = re.compile(
  r'custom_call_target="tpu_custom_call".*\bop_name="[^"]*\bproducts_(\d+)_(\d+)\b'
  r'[^"]*\bsplash_mha_([a-z]+)_'
)


def attend(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  mask_BL: Bool[Array, "B L"] | None,
  slopes_H: Float[Array, " H"] | None = None,
  *,
  causal: bool,
  window: int | None = None,
  head_dim: int,
  cap: float | None = None,
) -> Float[Array, "B L H r"] | None:
  """Returns attention by a kernel for the devices of the mesh.

  None: no kernel can do it. The arguments are those of
  `exact_attention.attend_whole`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if set(mesh.axis_types) != {AxisType.Auto}:
    return None
  # Kernels have ALiBi's bias of earlier keys, and cap logits with their bias.
  if slopes_H is not None and (cap is not None or not causal):
    return None
  heads = (q_BLHG, k_BLJG, v_BLIr)
  options: dict[str, Any] = {"causal": causal, "head_dim": head_dim}
  device = getattr(mesh.abstract_device, "device_kind", "")
  is_wide = max(q_BLHG.shape[3], v_BLIr.shape[3]) >= _FEWEST
  if device.startswith("TPU") and is_wide:
    options |= {"window": window, "cap": cap, "mesh": mesh}
    return by_splash(*heads, mask_BL, slopes_H, **options)
  is_plain = mask_BL is None and window is None and cap is None
  if device.startswith("NVIDIA") and is_plain and fits_cudnn(*heads, slopes_H):
    return by_cudnn(*heads, slopes_H, **options)
  return None


def by_splash(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  mask_BL: Bool[Array, "B L"] | None,
  slopes_H: Float[Array, " H"] | None = None,
  *,
  causal: bool,
  window: int | None = None,
  head_dim: int,
  cap: float | None = None,
  mesh: Mesh | AbstractMesh,
  interpret: bool = False,
) -> Float[Array, "B L H r"]:
  """Returns `attend` on TPUs.

  The outputs of pad tokens differ, because these attend to other pad tokens.

  The devices of `mesh` share the work. `interpret` runs the kernel on a CPU,
  slowly.
  """
  B, L, *_ = q_BLHG.shape
  value_heads = v_BLIr.shape[2]
  count = -(-L // SIZE)
  size = -(-L // (count * _LANES)) * _LANES
  padding = count * size - L
  if padding and mask_BL is None and not causal:
    mask_BL = jnp.ones((B, L), bool)  # hides the keys that are added below
  heads = [
    jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
    for x in _inputs(q_BLHG, k_BLJG, v_BLIr, slopes_H, head_dim=head_dim)
  ]
  if mask_BL is not None:
    mask_BL = jnp.pad(mask_BL.astype(jnp.int32), ((0, 0), (0, padding)))

  def attend_shard(mask_BL, q_BHLG, *keys):
    call = _kernel(
      q_BHLG.shape[1],
      (count, size),
      causal=causal,
      window=window,
      attn_logits_soft_cap=cap,
      interpret=interpret,
    )
    # `flops_of` reads the scope.
    blocks_LM = _seen_blocks(count, size, causal=causal, window=window)
    logits = 2 * math.prod(q_BHLG.shape[:2]) * size**2 * int(blocks_LM.sum())
    key, value = (logits * -(-x.shape[3] // _LANES) * _LANES for x in keys)
    with jax.named_scope(f"products_{key}_{value}"):
      return jax.vmap(call)(mask_BL, q_BHLG, *keys)

  rows, tensor = _split(mesh, B, value_heads)
  spec = PartitionSpec(rows, tensor)
  out_BHLr = jax.shard_map(
    attend_shard,
    mesh=mesh,
    in_specs=(PartitionSpec(rows), *[spec] * 3),
    out_specs=spec,
    check_vma=False,
  )(mask_BL, *heads)
  return out_BHLr[:, :, :L].swapaxes(1, 2)


def fits_cudnn(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  slopes_H: Float[Array, " H"] | None = None,
) -> bool:
  """Returns whether `by_cudnn` takes such numbers, in heads of this size."""
  channels = q_BLHG.shape[3] + (0 if slopes_H is None else _ALIBI)
  is_small = max(channels, v_BLIr.shape[3]) <= _MOST_CUDNN
  return is_small and all(
    x.dtype == jnp.bfloat16 for x in (q_BLHG, k_BLJG, v_BLIr)
  )


def by_cudnn(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  slopes_H: Float[Array, " H"] | None = None,
  *,
  causal: bool,
  head_dim: int,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B L H r"]:
  """Returns `attend` without padding on GPUs; "xla" runs anywhere."""
  heads = _inputs(q_BLHG, k_BLJG, v_BLIr, slopes_H, head_dim=head_dim)
  # One size of queries, keys and values, a multiple of 8.
  size = -(-max(x.shape[3] for x in heads) // 8) * 8
  same = (
    jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3]))) for x in heads
  )
  out_BLHC = jax.nn.dot_product_attention(
    *same, scale=1.0, is_causal=causal, implementation=implementation
  )
  return out_BLHC[..., : v_BLIr.shape[3]]


def _inputs(
  q_BLHG: Float[Array, "B L H G"],
  k_BLJG: Float[Array, "B L J G"],
  v_BLIr: Float[Array, "B L I r"],
  slopes_H: Float[Array, " H"] | None,
  *,
  head_dim: int,
) -> tuple[Array, Array, Array]:
  """Returns heads whose products are the logits, with as many keys as values."""
  G = q_BLHG.shape[3]
  q_BLHG *= jnp.asarray(head_dim**0.5 / G, q_BLHG.dtype)  # = (K / G) / sqrt(K)
  if slopes_H is not None:
    for_q_LHC, for_k_LC = alibi_channels(slopes_H, q_BLHG.shape[1])
    q_BLHG = _joined(q_BLHG, for_q_LHC)
    k_BLJG = _joined(k_BLJG, for_k_LC[:, None])
  repeats = v_BLIr.shape[2] // k_BLJG.shape[2]
  return q_BLHG, jnp.repeat(k_BLJG, repeats, axis=2), v_BLIr


def alibi_channels(
  slopes_H: Float[Array, " H"], length: int
) -> tuple[Float[Array, "L H C"], Float[Array, "L C"]]:
  """Returns channels of queries and keys whose products are ALiBi's bias.

  A causal bias slope (j - i) is slope j, apart from a constant per query i that the
  softmax removes. Each number of a product is bfloat16, so slopes and positions
  are sums of three such numbers.

  The last channel has that constant, rounded, for the gradients of slopes. Kernels
  round the gradients of logits. So their sum over keys is not zero, and the sum of
  their products with j has an error that grows with i.
  """
  position_L = jnp.arange(length, dtype=jnp.float32)
  slopes_H3, positions_L3 = _parts(slopes_H), _parts(position_L)
  H, parts = slopes_H3.shape
  each_LHC = jnp.broadcast_to(
    jnp.repeat(slopes_H3, parts, axis=1), (length, H, parts**2)
  )
  row_LH1 = -jnp.outer(position_L, slopes_H)[..., None]
  each_LC = jnp.tile(positions_L3, parts)
  return (
    jnp.concatenate([each_LHC, row_LH1], axis=-1),
    jnp.pad(each_LC, ((0, 0), (0, 1)), constant_values=1),
  )


def _parts(x: Float[Array, " *N"]) -> Float[Array, " *N 3"]:
  """Returns three numbers of bfloat16's precision whose sum is x.

  The gradient of the first is that of x.
  """
  parts, rest = [], jax.lax.stop_gradient(x)
  for _ in range(3):
    # Compilers may remove a cast to bfloat16 and back, but not this.
    parts.append(jax.lax.reduce_precision(rest, 8, 7))
    rest -= parts[-1]
  parts[0] += x - jax.lax.stop_gradient(x)
  return jnp.stack(parts, axis=-1)


def _joined(x_BLHG: Array, channels: Array) -> Array:
  """Returns heads with more channels, which are the same for all rows."""
  shape = (*x_BLHG.shape[:-1], channels.shape[-1])
  more = jnp.broadcast_to(channels, shape).astype(x_BLHG.dtype)
  return jnp.concatenate([x_BLHG, more], axis=-1)


def flops_of(instruction: str) -> int:
  """Returns the FLOP of a line of HLO; 0 if it is not the kernel.

  Hidden keys in the blocks that it computes count, and heads of fewer channels than
  the 128 that a TPU multiplies.
  """
  found = _CALL.search(instruction)
  if not found:
    return 0
  keys, values = _PRODUCTS[found[3]]
  return keys * int(found[1]) + values * int(found[2])


def _seen_blocks(
  count: int, size: int, *, causal: bool, window: int | None
) -> Bool[np.ndarray, "N N"]:
  """Returns which blocks of keys each block of queries meets."""
  apart = np.arange(count)[:, None] - np.arange(count)
  # The nearest positions of blocks d apart are (d - 1) L + 1 apart.
  far = count if window is None else (window - 2) // size + 1
  return (apart <= far) & (apart >= (0 if causal else -far))


def _split(
  mesh: Mesh | AbstractMesh, rows: int, heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
  """Returns the mesh axes that split the rows and the heads, None: none do."""
  tensor = "tensor" if heads % mesh.shape.get("tensor", 1) == 0 else None
  others = tuple(name for name in mesh.axis_names if name != "tensor")
  is_split = rows % math.prod(mesh.shape[name] for name in others) == 0
  return others if is_split else None, tensor


def _kernel(
  num_heads: int,
  blocks: tuple[int, int],
  *,
  causal: bool,
  window: int | None,
  **options: Any,
) -> Callable[..., Array]:
  """Returns a function of one row's heads.

  It maps (is_token_L, q_HLG, k_IMG, v_IMr) to the output; `is_token_L` is 1, or 0
  at pad tokens, or None.

  `blocks` has the number of blocks and the positions of each.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow

  count, size = blocks
  square = (count * size, count * size)
  mask = splash.FullMask(square)
  if causal or window is not None:
    far = None if window is None else window - 1
    mask = splash.LocalMask(square, (far, 0 if causal else far), offset=0)
  sizes: dict[str, Any] = dict.fromkeys(_BLOCKS, size)
  call = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * num_heads),
    block_sizes=splash.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    **options,
  )

  def attend(is_token_L: Any, *heads: Any) -> Any:
    segments = None
    if is_token_L is not None:
      segments = splash.SegmentIds(is_token_L, is_token_L)
    return call(*heads, segments)

  return attend
