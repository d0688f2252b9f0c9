"""Exact conversion of parameters between the folded and the dense form.

An attention layer is a dict with entries q, k, v and o. The shape of o/kernel is
[H, r, D]; r = K unless W_V has low rank. The form of q, k and v follows from K and
their shapes; `folding.models.projections` has the table. Layers may be anywhere in
a tree of dicts and lists.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from folding.compression import checks

Params = Mapping[str, Any]


def unfold(
  params: Params,
  frequencies: np.ndarray | Mapping[str, np.ndarray] | None = None,
  head_dim: int | None = None,
) -> dict[str, Any]:
  """Returns the dense parameters that compute the same function.

  - Output axis: each of the G columns of a head is repeated K/G times, and the
    bias too.
  - Input axis: each of the G rows is repeated D/G times.
  - Diagonal W_V: a matrix with zeros off the diagonal, split into heads. If the
    queries have a bias, the values get a bias of zeros. A layer without v has
    the identity.
  - Low-rank values: K - r columns of zeros are added to each head of W_V, and
    rows of zeros to W_O.
  - Embedding of low rank: the product with its matrix "embed_expand".
  - Rotary pairs: the channels of a pair, times (K/G)^(1/2), become the channels
    of the dense head that rotate by the same angle. The others are zero.

  Dense layers stay as they are. Heads that share keys have separate values in a
  diagonal W_V. The dense model then has separate keys, too, so keys and values
  are repeated per head in all layers.

  Args:
    params: Tree with attention layers.
    frequencies: [K/2], radians per token of the pairs of the dense model, or
      {path of an attention layer: [K/2]}. Needed if a layer has a `frequency` of
      its own.
    head_dim: K, on which the scale of the logits depends; None: D / H, the size
      of the heads of W_O.

  Raises:
    ValueError: there is no attention layer, the shapes of a layer do not fit
      each other or K, or the dense model does not have a layer's frequencies.

  Example:
    >>> layer = {"q": {"kernel": jnp.ones((4, 2, 1))},
    ...          "k": {"kernel": jnp.ones((4, 2, 1))},
    ...          "v": {"diagonal": jnp.ones((4, 1, 1))},
    ...          "o": {"kernel": jnp.ones((2, 2, 4))}}
    >>> dense = unfold({"attn": layer})["attn"]
    >>> dense["q"]["kernel"].shape, dense["v"]["kernel"].shape
    ((4, 2, 2), (4, 2, 2))
  """
  is_size = head_dim is None or checks.is_whole(head_dim, 1)
  what = "None or a whole number of at least 1"
  checks.check("unfold", [("head_dim", head_dim, is_size, what)])
  has_separate_values = False

  def unfold_layer(layer, name):
    nonlocal has_separate_values
    given = frequencies
    if isinstance(given, Mapping):
      given = given.get(name)
    dense = _unfold_layer(layer, name, given, head_dim)
    heads_k, heads_v = (dense[role]["kernel"].shape[1] for role in ("k", "v"))
    has_separate_values |= heads_k != heads_v
    return dense

  dense = _map_layers(unfold_layer, params)
  if isinstance(dense, dict) and (expand := dense.pop("embed_expand", None)):
    names = {"embed"}
    if "bias" not in expand:  # all share it
      names |= dense.keys() & {"position_embed", "segment_embed"}
    for name in names:
      rows = dense[name]["embedding"] @ expand["kernel"]
      if "bias" in expand:
        rows += expand["bias"][None]
      dense[name] = {"embedding": rows}
  if not has_separate_values:
    return dense
  return _map_layers(lambda layer, _: _separate_keys(layer), dense)


def fold(
  params: Params,
  *,
  groups: int = 1,
  axis: Literal["output", "input"] = "output",
  values: Literal["dense", "diagonal", "identity"] = "diagonal",
) -> dict[str, Any]:
  """Returns the folded form of dense parameters that have its structure.

  This is the inverse of `unfold`, bit for bit, except for rotary pairs and for
  keys that `unfold` had to repeat. The rows of a group must be identical, and
  W_V exactly diagonal. Folded layers stay as they are, or are folded further on
  the same axis.

  Args:
    params: Tree with attention layers.
    groups: G, row groups of W_Q and W_K, in all layers. 0 leaves them dense.
    axis: The axis that the groups run over.
    values: Form of W_V, in all layers. "identity" removes it.

  Raises:
    ValueError: an argument is out of range, there is no attention layer, or a
      kernel does not have the structure.
  """
  # fmt: off
  checks.check("fold", (
    ("groups", groups, checks.is_whole(groups, 0),
     "a whole number of at least 0"),
    ("axis", axis, axis in ("output", "input"), "'output' or 'input'"),
    ("values", values, values in ("dense", "diagonal", "identity"),
     "'dense', 'diagonal' or 'identity'"),
  ))
  # fmt: on

  def fold_layer(layer, name):
    folded = dict(layer)
    _, K, D = _sizes(layer, name)
    for role in ("q", "k") if groups else ():
      rows, _, columns = layer[role]["kernel"].shape
      other, whole = (rows, D) if axis == "output" else (columns, K)
      if other < whole:
        raise ValueError(
          f"{name}/{role} is already folded on the other axis: it has {rows} "
          f"by {columns} numbers per head"
        )
      folded[role] = _fold_rows(layer[role], groups, axis, f"{name}/{role}")
    if values != "dense" and "v" in layer:
      folded["v"] = _fold_values(layer["v"], f"{name}/v")
      if values == "identity":
        if not bool(jnp.all(folded["v"]["diagonal"] == 1)):
          raise ValueError(f"{name}/v is not the identity")
        del folded["v"]
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

  mapped = walk(params, "")
  if not count:
    names = params if isinstance(params, Mapping) else ()
    raise ValueError(
      "there is no attention layer (a dict with q, k and o) among "
      f"{', '.join(map(str, names)) or 'no parameters'}"
    )
  return mapped


def _sizes(layer: Params, name: str) -> tuple[int, int, int]:
  """Returns (H, K, D), after a check of what a layer holds."""
  for role in [role for role in "oqkv" if role in layer]:
    held = layer[role] if isinstance(layer[role], Mapping) else {}
    found = {n: jnp.shape(x) for n, x in held.items()}
    kind = "diagonal" if role == "v" and "diagonal" in found else "kernel"
    if len(found.get(kind, ())) != 3:
      raise ValueError(
        f"{name}/{role} must have a {kind} of three axes; it has "
        f"{found or type(layer[role]).__name__}. Split layers that nn.scan has "
        "stacked first"
      )
  return layer["o"]["kernel"].shape


def _separate_keys(layer: Params) -> dict[str, Any]:
  """Returns a layer whose heads share neither keys nor values."""
  H = layer["o"]["kernel"].shape[0]

  def repeat(projection):
    copies = H // projection["kernel"].shape[1]
    return {n: jnp.repeat(w, copies, axis=-2) for n, w in projection.items()}

  return {**layer, "k": repeat(layer["k"]), "v": repeat(layer["v"])}


def _unfold_layer(
  layer: Params,
  name: str,
  frequencies: np.ndarray | None,
  head_dim: int | None,
) -> dict[str, Any]:
  H, r, D = _sizes(layer, name)
  if head_dim is None and H * r != D:
    raise ValueError(
      f"{name}/o/kernel {(H, r, D)} may have heads of any size; give head_dim"
    )
  K = head_dim or r
  dense = dict(layer)
  own = dense.pop("frequency", None)
  for role in ("q", "k"):
    if own is None:
      dense[role] = _unfold_rows(layer[role], D, K, f"{name}/{role}")
    else:
      channels = _channels(np.asarray(own), frequencies, f"{name}/frequency")
      dense[role] = _unfold_pairs(layer[role], channels, K)
  if "v" in layer and "diagonal" not in layer["v"]:
    if not layer["v"]["kernel"].shape[-1] == r <= K:
      raise ValueError(
        f"{name}/v/kernel {layer['v']['kernel'].shape} does not fit "
        f"{name}/o/kernel {(H, r, D)} and heads of {K}"
      )
    if r < K:
      dense["v"] = {n: _padded(w, -1, K - r) for n, w in layer["v"].items()}
      kernel = _padded(layer["o"]["kernel"], 1, K - r)
      dense["o"] = {**layer["o"], "kernel": kernel}
    return dense
  diagonal = jnp.ones((D, 1, 1), layer["o"]["kernel"].dtype)
  if "v" in layer:
    diagonal = layer["v"]["diagonal"]
  if diagonal.shape != (D, 1, 1) or H * K != D:
    raise ValueError(
      f"{name}/v/diagonal {diagonal.shape} does not fit {name}/o/kernel "
      f"{(H, K, D)}"
    )
  dense["v"] = {"kernel": jnp.diag(diagonal.reshape(D)).reshape(D, H, K)}
  if "bias" in layer["q"]:
    dense["v"]["bias"] = jnp.zeros((H, K), layer["q"]["bias"].dtype)
  return dense


def _padded(w: jax.Array | np.ndarray, axis: int, count: int) -> jax.Array:
  widths = [(0, 0)] * w.ndim
  widths[axis] = (0, count)
  return jnp.pad(w, widths)


def _unfold_rows(projection: Params, D: int, K: int, name: str) -> Params:
  w = projection["kernel"]
  rows, _, columns = w.shape
  if (rows, columns) == (D, K):
    return projection
  if rows == D and K % columns == 0:
    return {
      n: jnp.repeat(x, K // columns, axis=-1) for n, x in projection.items()
    }
  if columns == K and D % rows == 0:
    return {**projection, "kernel": jnp.repeat(w, D // rows, axis=0)}
  raise ValueError(
    f"{name}/kernel {w.shape} does not fold a projection from {D} channels to "
    f"heads of {K}"
  )


def _channels(
  own_Jp: np.ndarray, frequencies: np.ndarray | None, name: str
) -> np.ndarray:
  """Returns [J, G], the dense channel of each of a key head's G channels."""
  if frequencies is None:
    raise ValueError(f"{name}: give the frequencies of the dense model")
  pair_Jp = np.zeros(own_Jp.shape, int)
  for j, own_p in enumerate(own_Jp):
    free = np.array(frequencies, np.float64)  # each is taken once
    for p, frequency in enumerate(own_p):
      error = np.abs(free - frequency)
      pair = pair_Jp[j, p] = error.argmin()
      if error[pair] > 1e-5 * frequency:
        raise ValueError(
          f"{name}: the dense model does not have these frequencies"
        )
      free[pair] = np.inf
  return np.concatenate([pair_Jp, pair_Jp + len(frequencies)], axis=1)


def _unfold_pairs(
  projection: Params, channels_JG: np.ndarray, K: int
) -> Params:
  """Spreads G channels per head over K, like those of the shared key head."""

  def spread(w):
    heads, G = w.shape[-2:]
    channels = np.repeat(channels_JG, heads // len(channels_JG), axis=0)
    full = jnp.zeros((*w.shape[:-1], K), w.dtype)
    scaled = w * jnp.asarray((K / G) ** 0.5, w.dtype)
    return full.at[..., np.arange(heads)[:, None], channels].set(scaled)

  return {name: spread(w) for name, w in projection.items()}


def _fold_rows(projection: Params, groups: int, axis: str, name: str) -> Params:
  kernel_axis = 2 if axis == "output" else 0
  kernel = _first_of(projection["kernel"], groups, kernel_axis, name)
  folded = {**projection, "kernel": kernel}
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


def _fold_values(projection: Params, name: str) -> Params:
  if "diagonal" in projection:
    return projection
  w = projection["kernel"]
  D, H, K = w.shape
  if H * K != D:
    raise ValueError(f"{name}: a kernel of shape {w.shape} has no diagonal")
  diagonal = jnp.diagonal(w.reshape(D, D))
  if int(jnp.count_nonzero(w)) != int(jnp.count_nonzero(diagonal)):
    raise ValueError(f"{name}: there are values off the diagonal")
  bias = projection.get("bias")
  if bias is not None and bool(jnp.any(bias != 0)):
    raise ValueError(f"{name}: a folded value projection has no bias")
  return {"diagonal": diagonal.reshape(D, 1, 1)}
