"""Shrinking: removes units that are zero as a whole from the arrays.

`shrink_layers` works on attention and feed-forward layers with the parameter
names of `folding`; `folding.shrink` calls it for a configured model.
`remove_neurons` works on any tree: rules say which arrays share neurons.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from folding import paths
from folding.compression import checks
from folding.compression.fpp import FPPState
from folding.compression.nnx_sizes import set_sizes
from folding.compression.sites import (
  Rule,
  Site,
  as_rules,
  make_sites,
  pack,
  unpack,
)

Kept = dict[str, dict[int, np.ndarray]]  # {path: {axis: indices that stay}}
Zeros = Mapping[str, Any]  # {path: bool array, True at zero}

_EMBEDDING = "embed/embedding"


@dataclasses.dataclass(frozen=True)
class Cut:
  """A selection of indices, for any tree of the parameters' structure.

  Attributes:
    kept: {path: {axis: indices that stay, increasing}}. Other axes stay whole.
    dropped: Paths of removed subtrees.
    token_map: int32[V], old token -> new token; removed tokens share one. Empty
      without an embedding.
    structure: Tree structure of the parameters.
  """

  kept: Mapping[str, Mapping[int, np.ndarray]]
  dropped: frozenset[str]
  token_map: np.ndarray
  structure: Any

  @property
  def is_empty(self) -> bool:
    """True if everything stays."""
    return not self.kept and not self.dropped

  def __call__(self, tree: Any) -> Any:
    """Returns the tree with each copy of the parameters' structure cut.

    Args:
      tree: Parameters, gradients, or the state of an optimizer with moments.
        Leaves outside copies of the structure, such as counts, stay.

    Raises:
      ValueError: a leaf has another shape than its parameter (Adafactor).
    """

    def is_masked(x):  # `optax.masked` leaves parameters out
      return isinstance(x, optax.MaskedNode)

    def is_copy(x):
      return jax.tree.structure(x, is_leaf=is_masked) == self.structure

    def take(name, w):
      kept = self.kept.get(name, {}) if np.ndim(w) else {}
      for axis, indices in kept.items():
        if axis >= w.ndim or indices.max(initial=-1) >= w.shape[axis]:
          raise ValueError(
            f"a state of {name} has the shape {np.shape(w)}, not that of the "
            "parameter, so it cannot be cut; start with a new optimizer state"
          )
      return _take(w, kept)

    def cut(x):
      if is_copy(x):
        return _without(paths.map_named(take, x), self.dropped)
      return x

    return jax.tree.map(cut, tree, is_leaf=is_copy)

  def fpp_state(self, state: FPPState, sites: Sequence[Site]) -> FPPState:
    """Returns the state of `folding.fpp`, cut the same way.

    The remaining units keep their mask bits, averages and moments, so the same
    units stay frozen or zero. If mask updates follow, pass the number of removed
    units to `folding.fpp` (`removed`).

    Args:
      state: State of the parameters before.
      sites: From `make_sites` on the parameters before.
    """
    suspected, zeroed = {}, state.zeroed
    for site in sites:
      kept = self.kept.get(site.name, {})
      axis = site.members[site.name]
      if axis is not None:  # one bit per unit: the bits have one axis
        kept = {0: kept[axis]} if axis in kept else {}
      units = unpack(state.suspected[site.name], site.shape[-1])
      planes = {axis + 1: indices for axis, indices in kept.items()}
      taken = _take(units, planes)
      suspected[site.name] = pack(taken)
      # Removed units with a mask bit were zero, so they leave the count.
      zeroed += jnp.sum(taken[0], dtype=jnp.int32)
      zeroed -= jnp.sum(units[0], dtype=jnp.int32)
    return state._replace(
      suspected=suspected,
      zeroed=zeroed,
      # Averages of statistics lack the last axis of their parameter.
      averages={
        n: _take(x, self.kept.get(n, {})) for n, x in state.averages.items()
      },
      inner=self(state.inner),
    )


def dead_units(zeros: Zeros) -> dict[str, Any]:
  """Returns {array: bools, True at the units without effect}.

  Units are the neurons of a feed-forward layer, under its W_down, and the heads
  of an attention layer, under its W_O: one bool for all heads that share a key.

  Args:
    zeros: {path: bools, True at elements that are and stay 0}; NumPy or JAX
      arrays.
  """
  dead = {}
  for name in zeros:
    if name.endswith("/down/kernel"):
      dead[name] = _dead_neurons(name.removesuffix("/down/kernel"), zeros)
    elif name.endswith("/o/kernel"):
      dead[name] = _dead_heads(name.removesuffix("/o/kernel"), zeros)
  return dead


def make_cut(
  params: Any, dead: Mapping[str, Any], *, neurons: int = 1, heads: int = 1
) -> Cut:
  """Returns the cut that removes units.

  Args:
    params: Tree of parameters, or of their shapes.
    dead: From `dead_units`, perhaps with removable tokens of the embedding.
    neurons: The number of neurons of a layer is rounded up to a multiple of this,
      but never above what it was.
    heads: The same for the heads of a layer. Heads that share a key count as one.
  """
  leaves = paths.flatten(params)
  kept: Kept = {}
  token_map = np.zeros(0, np.int32)
  for name, is_dead in dead.items():
    if name == _EMBEDDING:
      token_map, stays = _keep_tokens(np.asarray(is_dead))
      found = {name: {0: stays}}
    elif name.endswith("/down/kernel"):
      stays = _stays(is_dead, neurons)
      found = _keep_neurons(name.removesuffix("/down/kernel"), stays)
    else:
      stays, shape = _stays(is_dead, heads), leaves[name].shape
      attn = name.removesuffix("/o/kernel")
      found = _keep_heads(attn, stays, shape, len(is_dead))
    if len(stays) < len(is_dead):
      kept |= {name: axes for name, axes in found.items() if name in leaves}
  return Cut(kept, frozenset(), token_map, jax.tree.structure(params))


def shrink_layers(
  params: Mapping[str, Any],
  *,
  multiple: int = 1,
  absorb: bool = True,
  tokens: bool = True,
  is_zero: Any = None,
) -> tuple[dict[str, Any], Cut]:
  """Returns parameters without the units that are zero, and the cut.

  The function stays the same up to float rounding:
  - A neuron is removed if its row of W_down is zero, or its column and bias of
    W_up or of the gate: every activation of ours maps 0 to 0.
  - Heads are removed by whole groups that share a key, if their rows of W_O or
    their values (bias included) are zero. One group per layer stays.
  - Tokens with a zero row of the embedding share one such row.
  - A diagonal W_V scales the rows of W_O and is removed (`absorb`).

  Args:
    params: Concrete arrays. Attention layers have q, k, v and o, feed-forward
      layers up, down and perhaps gate; the embedding is "embed/embedding".
    multiple: Widths of feed-forward layers are rounded up to a multiple of this
      (never above what they were) by keeping some zero neurons.
    absorb: Whether W_O absorbs diagonals. The moments of an optimizer do not
      follow that.
    tokens: Whether rows of the embedding may be removed; False if it is the
      output layer, too.
    is_zero: Bools shaped like params, True at elements that may be removed. None:
      True at zeros.

  Raises:
    ValueError: an option is out of range, `params` has no arrays, or `is_zero`
      has another structure.

  Example:
    >>> mlp = {"up": {"kernel": np.ones((2, 3))},
    ...        "down": {"kernel": np.array([[1.0], [0.0], [2.0]])}}
    >>> small, cut = shrink_layers({"mlp": mlp})
    >>> small["mlp"]["down"]["kernel"].tolist(), cut.kept["mlp/up/kernel"][1]
    ([[1.0], [2.0]], array([0, 2]))
  """
  is_count = checks.is_whole(multiple, 1)
  what = "a whole number of at least 1"
  checks.check("shrink_layers", [("multiple", multiple, is_count, what)])
  leaves = paths.flatten(params)
  if not leaves:
    raise ValueError("shrink: params has no arrays")
  zeros = {name: np.asarray(w) == 0 for name, w in leaves.items()}
  if is_zero is not None:
    try:
      chex.assert_trees_all_equal_shapes(is_zero, params)
    except AssertionError as error:
      raise ValueError("is_zero and params do not have one shape") from error
    zeros = {name: np.asarray(z) for name, z in paths.flatten(is_zero).items()}
  dead = dead_units(zeros)
  if _EMBEDDING in leaves:
    dead[_EMBEDDING] = np.logical_and(zeros[_EMBEDDING].all(1), tokens)
  scale = {
    name.replace("/v/diagonal", "/o/kernel"): w
    for name, w in leaves.items()
    if absorb and name.endswith("/v/diagonal")
  }
  cut = make_cut(params, dead, neurons=multiple)
  dropped = frozenset(name.replace("/o/kernel", "/v") for name in scale)
  cut = dataclasses.replace(cut, dropped=dropped)

  def absorbed(name, w):
    if name not in scale:
      return w
    return w * scale[name].reshape(*w.shape[:2], 1)

  return cut(paths.map_named(absorbed, params)), cut


def remove_neurons(
  rules: Rule | Sequence[Rule], params: Any
) -> tuple[Any, dict[str, np.ndarray]]:
  """Returns parameters of any model without the neurons that are zero.

  A rule of granularity "neuron" ties the parameters of a neuron together: its
  columns and biases, and the rows that read it. If all of them are 0, the
  function stays the same up to float rounding, except under a norm over the
  neurons. Build the smaller model with the widths of the arrays. Of an NNX
  module, the layers of Flax get the new widths as well.

  Args:
    rules: As given to `folding.fpp`; other granularities are ignored.
    params: Any tree of concrete arrays, or an NNX module.

  Returns:
    (tree of the same structure or new module, {parameter that a rule matches:
    neurons that stay, increasing}). One neuron always stays. Of stacked layers
    (`Rule.layers`) the neurons are int[layers, n], and each layer keeps as many
    as the one with the most.

  Raises:
    ValueError: a rule does not fit the parameters, or does not tie the rows
      that read its neurons.

  Example:
    >>> rule = Rule("up", 0.5, "neuron", {"down": 0})
    >>> params = {"up": np.array([[1.0, 0.0, 2.0]]), "down": np.array([5.0, 0, 6])}
    >>> small, kept = remove_neurons([rule], params)
    >>> small["up"].tolist(), small["down"].tolist(), kept["up"].tolist()
    ([[1.0, 2.0]], [5.0, 6.0], [0, 2])
  """
  if not isinstance(params, nnx.Module):
    small, kept, _ = _remove_neurons(rules, params, {})
    return paths.map_named(lambda name, _: small[name], params), kept
  graphdef, state, others = nnx.split(params, nnx.Param, ...)
  small, kept, shapes = _remove_neurons(rules, state, paths.flatten(others))
  state, others = (
    paths.map_named(lambda name, _: small[name], tree)
    for tree in (state, others)
  )
  module = nnx.merge(graphdef, state, others)
  set_sizes(module, shapes)
  return module, kept


def _remove_neurons(
  rules: Rule | Sequence[Rule], params: Any, others: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
  """Returns ({path: smaller array}, kept neurons, {path: shape of one layer}).

  Args:
    rules: See `remove_neurons`.
    params: The tree that the rules select from.
    others: {path: array}. The mean and the variance of a batch norm follow its
      scale and its bias.
  """
  leaves = paths.flatten(params)
  small, kept, shapes = {**leaves, **others}, {}, {}
  rules = as_rules(rules)
  for site in make_sites(rules, params):
    if rules[site.rule].granularity != "neuron":
      continue
    if not any(
      _reads(site, n, leaves[n].ndim - (site.layers is not None))
      for n in site.members
      if n != site.name
    ):
      raise ValueError(
        f"the rule for {site.name!r} ties no array that reads its neurons; name "
        "those rows in `tied`, so that they are removed with the neuron"
      )
    own = jax.tree.map(jnp.asarray, site.pick(leaves))
    is_zero = site.per_layer(site.is_zero, own)
    is_zero = np.asarray(site.layers_first(is_zero))
    count = max(int((~is_zero).sum(-1).max()), 1)
    # Neurons that are not zero come first, in their own order.
    order = np.argsort(is_zero, axis=-1, kind="stable")
    stays = kept[site.name] = np.sort(order[..., :count], axis=-1)
    members = dict(site.members)
    for name in site.members:
      beside = (
        re.sub("/(scale|bias)$", f"/{x}", name) for x in ("mean", "var")
      )
      members |= dict.fromkeys(others.keys() & set(beside), 0)
    for name, axis in members.items():
      small[name] = site.per_layer(
        lambda w, stays, axis=axis: w.take(stays, axis=axis),
        small[name],
        site.layers_placed(stays),
      )
      first = jax.eval_shape(site.layers_first, small[name]).shape
      shapes[name] = first if site.layers is None else first[1:]
  return small, kept, shapes


def _reads(site: Site, name: str, ndim: int) -> bool:
  """Returns whether a tied array reads the neurons, as its inputs.

  A gate writes them, as its last axis. A vector reads them unless it is a bias or
  a scale, by its name or beside the kernel that writes them.
  """
  if ndim == 1:
    module = name.rpartition("/")[0]
    is_own = bool(module) and module == site.name.rpartition("/")[0]
    return not is_own and not name.endswith(("bias", "scale"))
  axis = site.members[name] or 0
  if site.inputs is None:
    return axis != ndim - 1
  return axis == site.inputs % ndim


def _dead_neurons(mlp: str, zeros: Zeros) -> Any:
  """Returns bool[F], True at neurons of a feed-forward layer without effect."""
  is_dead_F = zeros[f"{mlp}/down/kernel"].all(1)
  for side in ("up", "gate"):
    if f"{mlp}/{side}/kernel" in zeros:
      is_silent_F = zeros[f"{mlp}/{side}/kernel"].all(0)
      is_dead_F = is_dead_F | is_silent_F & zeros.get(
        f"{mlp}/{side}/bias", True
      )
  return is_dead_F


def _dead_heads(attn: str, zeros: Zeros) -> Any:
  """Returns bool[J], True at keys all of whose heads have no effect."""
  H, K, _ = zeros[f"{attn}/o/kernel"].shape
  shared = H // zeros[f"{attn}/k/kernel"].shape[1]
  is_dead_H = zeros[f"{attn}/o/kernel"].all((1, 2))
  if f"{attn}/v/diagonal" in zeros:
    is_dead_H = is_dead_H | zeros[f"{attn}/v/diagonal"].reshape(H, K).all(1)
  elif f"{attn}/v/kernel" in zeros:
    is_silent_J = zeros[f"{attn}/v/kernel"].all((0, 2))
    if f"{attn}/v/bias" in zeros:
      is_silent_J = is_silent_J & zeros[f"{attn}/v/bias"].all(1)
    is_dead_H = is_dead_H | is_silent_J.repeat(shared)
  return is_dead_H.reshape(-1, shared).all(1)


def _stays(is_dead: Any, multiple: int) -> np.ndarray:
  """Returns the indices of the units that stay, at least one.

  Dead units fill their number up to a multiple.
  """
  is_dead = np.asarray(is_dead)
  alive = np.flatnonzero(~is_dead)
  size = -(-max(len(alive), 1) // multiple) * multiple
  filling = np.flatnonzero(is_dead)[: size - len(alive)]
  return np.sort(np.concatenate([alive, filling]))


def _keep_neurons(mlp: str, neurons: np.ndarray) -> Kept:
  kept = {f"{mlp}/down/kernel": {0: neurons}}
  for side in ("up", "gate"):
    kept |= {
      f"{mlp}/{side}/kernel": {1: neurons},
      f"{mlp}/{side}/bias": {0: neurons},
    }
  return kept


def _keep_heads(attn: str, key_heads: np.ndarray, shape: tuple, J: int) -> Kept:
  """Returns the indices that stay in each array of an attention layer.

  Args:
    attn: Path of the layer.
    key_heads: The key heads that stay.
    shape: Shape of W_O.
    J: Number of key heads before.
  """
  H, K, _ = shape
  heads = _members(key_heads, H // J)
  return {
    f"{attn}/q/kernel": {1: heads},
    f"{attn}/q/bias": {0: heads},
    f"{attn}/k/kernel": {1: key_heads},
    f"{attn}/k/bias": {0: key_heads},
    f"{attn}/v/kernel": {1: key_heads},
    f"{attn}/v/bias": {0: key_heads},
    f"{attn}/v/diagonal": {0: _members(heads, K)},
    f"{attn}/o/kernel": {0: heads},
    f"{attn}/log_slopes": {0: heads},
    f"{attn}/relative_bias": {1: heads},
    f"{attn}/frequency": {0: key_heads},
  }


def _keep_tokens(is_removable_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the map of tokens, int32[V], and the rows that stay."""
  stays_V = ~is_removable_V
  shared = np.argmax(is_removable_V)  # the first one, for all of them
  stays_V[shared] = True
  token_map_V = np.cumsum(stays_V, dtype=np.int32) - np.int32(1)
  token_map_V[~stays_V] = token_map_V[shared]
  return token_map_V, np.flatnonzero(stays_V)


def _members(groups: np.ndarray, size: int) -> np.ndarray:
  """Returns the indices of the members of groups of one size."""
  return (groups[:, None] * size + np.arange(size)).reshape(-1)


def _take(x: Any, kept: Mapping[int, np.ndarray]) -> Any:
  for axis, indices in kept.items():
    if axis < x.ndim:
      x = x.take(indices, axis=axis)
  return x


def _without(tree: Any, dropped: frozenset[str], prefix: str = "") -> Any:
  if not dropped or not isinstance(tree, Mapping):
    return tree
  return {
    key: _without(value, dropped, f"{prefix}{key}/")
    for key, value in tree.items()
    if prefix + key not in dropped
  }
