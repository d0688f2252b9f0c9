"""Folding and unfolding attention layers of a parameter tree, exactly.

An attention layer is a dict with entries q, k, v and o, where o/kernel is
[H, K, D]; its shape tells D, H and K, so the kind of q, k and v can be read
off their own shapes (the table is in `folding.models.projections`). Any tree
that has such dicts will do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Mapping[str, Any]


def unfold(
  params: Params,
  frequencies: np.ndarray | None = None,
) -> dict[str, Any]:
  """Returns the dense parameters that compute the same function.

  Output axis: each of the G columns of a head is repeated K/G times, biases
  too. Input axis: each of the G rows is repeated D/G times. Block-diagonal
  W_V: its blocks, with zeros elsewhere, split into heads; where the queries
  have a bias, the dense twin has one for values too, and it is zero. A layer
  without v has the identity for it. Layers that are dense already are left as
  they are. Repeating is exact.

  Heads that share keys have values of their own in block-diagonal W_V. A dense
  model with as many keys as values is meant then: keys, and in other layers
  values, are repeated for each head, in all layers.

  Rotary positions by pairs: the channels of a pair go where the dense model
  turns by the same angle, times (K/G)^(1/2), and all others are zero.

  Args:
    params: A tree of dicts and lists with attention layers anywhere in it.
    frequencies: Radians a token of the K/2 pairs of the dense model; needed
      where a layer has a `frequency` of its own.

  Raises:
    ValueError: there is no attention layer, a layer's shapes do not fit each
      other, or it turns by angles that the dense model does not have.

  Example:
    >>> layer = {"q": {"kernel": jnp.ones((4, 2, 1))},
    ...          "k": {"kernel": jnp.ones((4, 2, 1))},
    ...          "v": {"diagonal": jnp.ones((4, 1, 1))},
    ...          "o": {"kernel": jnp.ones((2, 2, 4))}}
    >>> dense = unfold({"attn": layer})["attn"]
    >>> dense["q"]["kernel"].shape, dense["v"]["kernel"].shape
    ((4, 2, 2), (4, 2, 2))
  """
  is_shared = False

  def unfold_layer(layer, name):
    nonlocal is_shared
    dense = _unfold_layer(layer, name, frequencies)
    heads_k, heads_v = (dense[role]["kernel"].shape[1] for role in ("k", "v"))
    is_shared |= heads_k != heads_v
    return dense

  dense = _map_layers(unfold_layer, params)
  if not is_shared:
    return dense
  return _map_layers(lambda layer, _: _with_own_keys(layer), dense)


def fold(
  params: Params, *, groups: int = 1, axis: str = "output", v_block: int = 1
) -> dict[str, Any]:
  """Returns the stored form of parameters that are already folded in value.

  The inverse of `unfold`, bit for bit, but for pairs of rotary positions, keys
  that it had to repeat, and a W_V that was left out as it is the identity. Rows
  of a group must be identical and W_V exactly block-diagonal. (Zero groups or a
  zero block leave W_Q and W_K, or W_V, dense.) What is folded already stays so,
  or is folded further on the same axis.

  Args:
    params: A tree of dicts and lists with dense attention layers anywhere in it.
    groups: G, row groups of W_Q and W_K, of all layers.
    axis: "output" or "input", the axis that the groups run over.
    v_block: Block size of W_V, of all layers.

  Raises:
    ValueError: an argument is out of range, there is no attention layer, or a
      kernel does not have the asked structure; names it.
  """
  for name, size in (("groups", groups), ("v_block", v_block)):
    if not isinstance(size, int | np.integer) or size < 0:
      raise ValueError(
        f"{name} is one number for all layers, 0 or more; it is {size!r}"
      )
  if axis not in ("output", "input"):
    raise ValueError(f"axis must be 'output' or 'input'; it is {axis!r}")

  def fold_layer(layer, name):
    folded = dict(layer)
    _, K, D = _sizes(layer, name)
    for role in ("q", "k") if groups else ():
      rows, _, columns = layer[role]["kernel"].shape
      other, whole = (rows, D) if axis == "output" else (columns, K)
      if other < whole:
        raise ValueError(
          f"{name}/{role}: it is folded already, and not on the {axis} axis: "
          f"{rows} by {columns} numbers a head"
        )
      folded[role] = _fold_rows(layer[role], groups, axis, f"{name}/{role}")
    if v_block and "v" in layer:
      folded["v"] = _fold_value(layer["v"], v_block, f"{name}/v")
    return folded

  return _map_layers(fold_layer, params)


def _map_layers(
  function: Callable[[Params, str], Params], params: Params
) -> dict[str, Any]:
  """Applies a function to each attention layer; copies no other array."""
  count = 0

  def walk(tree: Any, name: str) -> Any:
    nonlocal count
    if isinstance(tree, Mapping):
      if {"q", "k", "o"} <= set(tree):
        count += 1
        return dict(function(tree, name))
      return {k: walk(v, f"{name}/{k}" if name else k) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
      return [walk(value, f"{name}/{n}") for n, value in enumerate(tree)]
    return tree

  found = walk(params, "")
  if not count:
    raise ValueError(
      "there is no attention layer, which is a dict with q, k and o, among "
      f"{', '.join(map(str, params)) or 'no parameters'}"
    )
  return found


def _with_own_keys(layer: Params) -> dict[str, Any]:
  """Returns a layer where each head has keys and values of its own."""
  H = layer["o"]["kernel"].shape[0]

  def repeated(projection):
    copies = H // projection["kernel"].shape[1]
    return {n: jnp.repeat(w, copies, axis=-2) for n, w in projection.items()}

  return {**layer, "k": repeated(layer["k"]), "v": repeated(layer["v"])}


def _sizes(layer: Params, name: str) -> tuple[int, int, int]:
  shape = layer["o"]["kernel"].shape
  if len(shape) != 3:
    raise ValueError(
      f"{name}/o/kernel has the shape {shape} and not [H, K, D]; layers that "
      "are stacked, as nn.scan does, have to be parted first"
    )
  return shape


def _unfold_layer(
  layer: Params,
  name: str,
  frequencies: np.ndarray | None,
) -> dict[str, Any]:
  H, K, D = _sizes(layer, name)
  dense = dict(layer)
  own = dense.pop("frequency", None)
  for role in ("q", "k"):
    if own is None:
      dense[role] = _unfold_rows(layer[role], D, K, f"{name}/{role}")
    else:
      places = _places(np.asarray(own), frequencies, f"{name}/frequency")
      dense[role] = _unfold_pairs(layer[role], places, K)
  w = layer.get("v", {}).get("diagonal")
  if "v" not in layer:
    w = jnp.ones((D, 1, 1), layer["o"]["kernel"].dtype)
  if w is not None:
    n, b, _ = w.shape
    if n * b != D or H * K != D:
      raise ValueError(
        f"{name}/v/diagonal {w.shape} does not fit {name}/o/kernel {(H, K, D)}"
      )
    full = jnp.zeros((n, b, n, b), w.dtype)
    full = full.at[jnp.arange(n), :, jnp.arange(n), :].set(w)
    dense["v"] = {"kernel": full.reshape(D, H, K)}
    if "bias" in layer["q"]:
      dense["v"]["bias"] = jnp.zeros((H, K), layer["q"]["bias"].dtype)
  return dense


def _places(
  own_Jp: np.ndarray, frequencies: np.ndarray | None, name: str
) -> np.ndarray:
  """Returns [J, G], the dense channels of each head's G channels."""
  if frequencies is None:
    raise ValueError(f"{name}: give the frequencies of the dense model")
  error = np.abs(own_Jp[:, :, None] - np.asarray(frequencies))
  pair_Jp = error.argmin(-1)
  if (error.min(-1) > 1e-5 * own_Jp).any() or any(
    len(set(pairs)) < len(pairs) for pairs in pair_Jp.tolist()
  ):
    raise ValueError(f"{name}: the dense model has no such frequencies")
  return np.concatenate([pair_Jp, pair_Jp + len(frequencies)], axis=1)


def _unfold_pairs(projection: Params, places_JG: np.ndarray, K: int) -> Params:
  """Spreads G channels a head over K; query heads share a key head's places."""

  def spread(w):
    heads, G = w.shape[-2:]
    places = np.repeat(places_JG, heads // len(places_JG), axis=0)
    full = jnp.zeros((*w.shape[:-1], K), w.dtype)
    scaled = w * jnp.asarray((K / G) ** 0.5, w.dtype)
    return full.at[..., np.arange(heads)[:, None], places].set(scaled)

  return {name: spread(w) for name, w in projection.items()}


def _unfold_rows(projection: Params, D: int, K: int, name: str) -> Params:
  w = projection["kernel"]
  rows, _, columns = w.shape
  if (rows, columns) == (D, K):
    return projection
  if rows == D and K % columns == 0:
    repeated = {"kernel": jnp.repeat(w, K // columns, axis=-1)}
    if "bias" in projection:
      repeated["bias"] = jnp.repeat(projection["bias"], K // columns, axis=-1)
    return {**projection, **repeated}
  if columns == K and D % rows == 0:
    return {**projection, "kernel": jnp.repeat(w, D // rows, axis=0)}
  raise ValueError(
    f"{name}/kernel {w.shape} is no folding of a projection from {D} channels "
    f"to heads of {K}"
  )


def _fold_rows(projection: Params, groups: int, axis: str, name: str) -> Params:
  w = projection["kernel"]
  kernel_axis = 2 if axis == "output" else 0
  folded = {**projection, "kernel": _first_of(w, groups, kernel_axis, name)}
  if axis == "output" and "bias" in projection:
    folded["bias"] = _first_of(projection["bias"], groups, 1, name)
  return folded


def _first_of(w: jax.Array, groups: int, axis: int, name: str) -> jax.Array:
  """Returns one slice of each group of identical ones."""
  size = w.shape[axis]
  if size % groups:
    raise ValueError(
      f"{name}: {groups} groups do not divide an axis of {size} (shape "
      f"{w.shape})"
    )
  copies = size // groups
  first = jax.lax.slice_in_dim(w, 0, size, copies, axis)
  if not bool(jnp.array_equal(jnp.repeat(first, copies, axis), w)):
    raise ValueError(
      f"{name}: rows of a group differ, so folding to {groups} groups would "
      "change the function"
    )
  return first


def _fold_value(projection: Params, block: int, name: str) -> Params:
  if "diagonal" in projection:
    w = projection["diagonal"]
    if w.shape[-1] != block:
      raise ValueError(
        f"{name}: it is folded already, to blocks of {w.shape[-1]}, not {block}"
      )
    return projection
  w = projection["kernel"]
  D, H, K = w.shape
  if H * K != D or D % block:
    raise ValueError(
      f"{name}: a kernel of shape {w.shape} has no blocks of {block} on its "
      "diagonal"
    )
  n = D // block
  blocks = w.reshape(n, block, n, block)
  diagonal = blocks[jnp.arange(n), :, jnp.arange(n), :]
  if int(jnp.count_nonzero(w)) != int(jnp.count_nonzero(diagonal)):
    raise ValueError(f"{name}: there are values off the blocks of {block}")
  bias = projection.get("bias")
  if bias is not None and bool(jnp.any(bias != 0)):
    raise ValueError(f"{name}: a folded value projection has no bias")
  return {"diagonal": diagonal}
