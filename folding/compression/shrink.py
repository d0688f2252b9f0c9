"""Shrinking: zeros that fill whole units leave the arrays for good.

A unit is a feed-forward neuron, a group of heads that share a key, or a token
of a classifier. The parameters are those of `folding.models.transformer`,
known here by their paths alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from folding import paths
from folding.compression import removable
from folding.compression.fpp import FPPState
from folding.compression.sites import Site, pack, unpack
from folding.config import Config, layers_of, unshrunk
from folding.schema import require


@dataclasses.dataclass(frozen=True)
class Cut:
  """What a shrink leaves of anything that is shaped like the parameters.

  Attributes:
    kept: {path: {axis: indices that stay, rising}}; other axes stay whole.
    dropped: Paths of subtrees that are gone.
    token_map: int32[V], old token -> new token; removed tokens share one.
    structure: Of the parameters before.
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

    Parameters, gradients, or the state of an optimizer with moments in it;
    what is not shaped like the parameters (counts) stays.

    Raises:
      ConfigError: a state has another shape than its parameter, as that of
        Adafactor, or is of some parameters alone, as in `optax.partition`.
    """

    def is_copy(x):
      return jax.tree.structure(x) == self.structure

    def take(name, w):
      kept = self.kept.get(name, {}) if np.ndim(w) else {}
      require(
        all(
          axis < w.ndim and indices.max(initial=-1) < w.shape[axis]
          for axis, indices in kept.items()
        ),
        f"a state of {name} has the shape {np.shape(w)}, not that of the "
        "parameter, and cannot be cut; begin the optimizer's state anew",
      )
      return _take(w, kept)

    def cut(key_path, x):
      if is_copy(x):
        return _without(paths.map_named(take, x), self.dropped)
      name = f"/{paths.path_name(key_path)}"
      require(
        not np.ndim(x) or not any(name.endswith(f"/{n}") for n in self.kept),
        f"{name[1:]} is of some of the parameters, as in optax.partition, and "
        "cannot be cut; begin the optimizer's state anew",
      )
      return x

    return jax.tree_util.tree_map_with_path(cut, tree, is_leaf=is_copy)

  def fpp_state(self, state: FPPState, sites: Sequence[Site]) -> FPPState:
    """Returns the state of `folding.fpp`, cut the same way.

    What stays keeps its bits, averages and moments, so that the same units go
    on being frozen or zero. Give `folding.fpp` the units that are gone
    (`removed`) if it has checks to come.

    Args:
      state: Of the parameters before.
      sites: From `make_sites` on the parameters before.
    """
    suspected = {}
    for site in sites:
      kept = self.kept.get(site.name, {})
      axis = site.members[site.name]
      if axis is not None:  # a bit a unit: the units are the bits' one axis
        kept = {0: kept[axis]} if axis in kept else {}
      units = unpack(state.suspected[site.name], site.shape[-1])
      planes = {axis + 1: indices for axis, indices in kept.items()}
      suspected[site.name] = pack(_take(units, planes))
    return state._replace(
      suspected=suspected,
      # Some averages lack the last axis of their parameter.
      averages={
        n: _take(x, self.kept.get(n)) for n, x in state.averages.items()
      },
      inner=self(state.inner),
    )


class Shrunk(NamedTuple):
  """What `shrink` returns.

  Attributes:
    config: Of the smaller model: `model.mlp_width` and `model.heads` by layer,
      `fold.values`; the twin's width is in `model.dense_mlp_width`.
    params: Of the smaller model; its vocabulary is the rows of its embedding.
    cut: From old shapes to new, and the map of tokens.
  """

  config: Config
  params: dict[str, Any]
  cut: Cut


def shrink(
  config: Config,
  params: Mapping[str, Any],
  *,
  multiple: int = 1,
  absorb: bool = True,
  is_zero: Any = None,
) -> Shrunk:
  """Removes what is zero as a whole, so that the arrays become smaller.

  The function stays the same, to float rounding (sums have fewer terms):
  - A neuron goes if its row of W_down is zero, or its column and bias of W_up
    or of the gate, as every activation here maps 0 to 0. A neuron with a bias
    and a row is a constant, and stays.
  - Heads go, by whole groups that share a key, if their rows of W_O or their
    values (bias included) are zero. One group of a layer always stays, and so
    do all heads of a layer whose blocks of W_V join heads.
  - Tokens of a classifier with a zero row of the embedding share one such row;
    `cut.token_map` says which. A next-token model keeps its rows: a token
    without one has the logit 0 and so a share of the probability, which a
    smaller vocabulary could not give it.
  - Diagonals of W_V scale the rows of W_O and are gone (`absorb`), if W_V is
    diagonal in some layer. Moments of an optimizer do not follow that, so
    leave it out where training goes on.
  To shrink again changes nothing.

  Args:
    config: Resolved.
    params: Its parameters, concrete.
    multiple: Widths of feed-forward layers are rounded up to a multiple of
      this (never above what they were) by keeping some of the zero neurons.
    absorb: Whether W_O absorbs diagonals.
    is_zero: Bools shaped like params, True where a parameter is and stays 0;
      None: where it is 0 now. In training, only what is held at 0 may go.

  Raises:
    ValueError: the parameters are not of the config, or an option is out of
      range.

  Example:
    >>> import jax.numpy as jnp
    >>> from folding import config, make_model
    >>> c = config.resolve(config.Config(model=config.ModelConfig(num_layers=1)))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> variables = make_model(c, 100).init(jax.random.key(0), tokens)
    >>> down = variables["params"]["blocks_0"]["mlp"]["down"]
    >>> down["kernel"] = down["kernel"].at[100:].set(0)
    >>> small = shrink(c, variables["params"], multiple=64)
    >>> small.config.model.mlp_width, small.config.fold.values
    (128, 'identity')
    >>> make_model(small.config, 100).apply({"params": small.params}, tokens).shape
    (1, 8, 100)
  """
  if multiple < 1:
    raise ValueError(f"multiple must be at least 1; it is {multiple}")
  leaves = paths.flatten(params)
  _check_fit(config, leaves)
  if is_zero is None:
    zeros = {name: np.asarray(w) == 0 for name, w in leaves.items()}
  else:
    zeros = {name: np.asarray(z) for name, z in paths.flatten(is_zero).items()}
  if zeros.keys() != leaves.keys():
    raise ValueError("is_zero and params are trees of different structure")
  widths, heads = [], []
  kept: removable.Kept = {}
  for n, layer in enumerate(layers_of(config.model, config.fold)):
    attn, mlp = f"blocks_{n}/attn", f"blocks_{n}/mlp"
    widths.append(removable.keep_neurons(mlp, zeros, multiple, kept))
    heads.append(removable.keep_heads(attn, zeros, layer, kept))
  token_map = removable.keep_tokens(config, zeros, kept)
  absorbed = [
    name.removesuffix("/v/diagonal")
    for name, w in leaves.items()
    if absorb and name.endswith("/v/diagonal") and w.shape[-1] == 1
  ]
  cut = Cut(
    {name: axes for name, axes in kept.items() if name in leaves},
    frozenset(f"{attn}/v" for attn in absorbed),
    token_map,
    jax.tree.structure(params),
  )
  scale = {f"{a}/o/kernel": leaves[f"{a}/v/diagonal"] for a in absorbed}

  def scaled(name, w):
    if name not in scale:
      return w
    return w * scale[name].reshape(*w.shape[:2], 1)

  small = cut(paths.map_named(scaled, params))
  return Shrunk(_config(config, widths, heads, absorbed), small, cut)


def _config(
  config: Config,
  widths: list[int],
  heads: list[tuple[int, ...]],
  absorbed: list[str],
) -> Config:
  """Returns the config of what stays; what did not change stays as it is."""
  m, fold = config.model, config.fold
  layers = layers_of(m, fold)
  if widths != [layer.mlp_width for layer in layers]:
    width = widths[0] if len(set(widths)) == 1 else tuple(widths)
    before = unshrunk(config).model.mlp_width
    m = dataclasses.replace(m, mlp_width=width, dense_mlp_width=before)
  if heads != [layer.heads for layer in layers]:
    m = dataclasses.replace(m, heads=tuple(heads))
  if absorbed:
    values = tuple(
      "identity" if f"blocks_{n}/attn" in absorbed else layer.values
      for n, layer in enumerate(layers)
    )
    fold = dataclasses.replace(
      fold, values=values[0] if len(set(values)) == 1 else values
    )
  return dataclasses.replace(config, model=m, fold=fold)


def _check_fit(config: Config, leaves: Mapping[str, Any]) -> None:
  m = config.model
  expected: dict[str, Any] = {}
  for n, layer in enumerate(layers_of(m, config.fold)):
    heads = len(layer.heads)
    name, diagonal = f"blocks_{n}", f"blocks_{n}/attn/v/diagonal"
    expected |= {
      f"{name}/mlp/up/kernel": (m.width, layer.mlp_width),
      f"{name}/mlp/down/kernel": (layer.mlp_width, m.width),
      f"{name}/attn/o/kernel": (heads, m.head_dim, m.width),
      diagonal: None,
    }
    if layer.values == "diagonal":
      expected[diagonal] = (heads * m.head_dim, 1, 1)
  expected[f"blocks_{m.num_layers}/attn/o/kernel"] = None
  for name, shape in expected.items():
    found = tuple(leaves[name].shape) if name in leaves else None
    if found != shape:
      raise ValueError(
        f"the parameters are not of this config: {name} is {found}, not {shape}"
      )
  if "embed/embedding" not in leaves:
    raise ValueError("the parameters have no embed/embedding")


def _take(x: Any, kept: Mapping[int, np.ndarray] | None) -> Any:
  for axis, indices in (kept or {}).items():
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
