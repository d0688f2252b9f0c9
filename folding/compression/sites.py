"""Rules select the parameters to prune; sites are the units that they prune.

A site is one array of mask bits. Each bit stands for one unit: a weight, a row
of an embedding, or a neuron with all arrays that belong to it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from folding import paths
from folding.compression import checks
from folding.compression.scores import Score, get_score


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""Prunes a fraction of the parameters that a pattern matches.

  Kernels are expected as [inputs..., outputs], as JAX libraries other than
  Equinox store them. For kernels [out, in], as Equinox and PyTorch store them,
  set `inputs=1`.

  Attributes:
    pattern: Regular expression that matches whole parameter paths.
    target: Fraction of the units to zero in the end, in [0, 1).
    granularity: The unit: "weight"; "row", an index of the first axis (a token
      of an embedding [V, D]); or "neuron", an index of the last axis (of a
      kernel [D, F]), or with `inputs` of the other one. Rows and neurons
      include the arrays in `tied`.
    tied: {path of another array: its axis that indexes the same units}. Paths
      may refer to groups of the pattern, for example "\1/down/kernel".
    score: Score of these parameters: a name in `scores.SCORES` or a `Score`.
      None: the score that `fpp` is given.
    axis: Axis of the matched parameters that indexes the rows or neurons.
      Parameters of more than two axes need it: 0 for the heads of a W_O
      [H, K, D].
    layers: Axis of the matched and tied arrays that stacks layers, as `nn.scan`
      makes it: 0 for kernels [layers, D, F], 1 for [D, layers, F]. Each layer is
      pruned as an array of its own, and `axis` and `tied` count the axes of one
      layer. None: no axis is special, so stacked layers share one choice.
    inputs: Axis of the matched and tied arrays (except vectors) that indexes
      the inputs of the layer. The scores "relative" and "activation" need it
      if the statistics belong to another axis than the first. None: all axes
      but the last.

  Raises:
    ValueError: a value is out of range or of another type.

  Example:
    >>> Rule(r"(.*mlp)/up/kernel", 0.5, "neuron",
    ...      {r"\1/up/bias": 0, r"\1/down/kernel": 0}).target
    0.5
  """

  pattern: str
  target: float
  granularity: str = "weight"
  tied: Mapping[str, int] = dataclasses.field(default_factory=dict)
  score: str | Score | None = None
  axis: int | None = None
  layers: int | None = None
  inputs: int | None = None

  def __post_init__(self):
    def is_axis(value, least=-(2**31)):
      return value is None or checks.is_whole(value, least)

    is_tied = isinstance(self.tied, Mapping) and all(
      isinstance(name, str) and checks.is_whole(axis)
      for name, axis in self.tied.items()
    )
    has_units = self.granularity != "weight"
    # fmt: off
    checks.check(f"rule {self.pattern!r}", (
      ("pattern", self.pattern, isinstance(self.pattern, str),
       "a regular expression"),
      ("target", self.target, checks.is_between(self.target, 0, 1),
       "in [0, 1)"),
      ("granularity", self.granularity,
       self.granularity in ("weight", "row", "neuron"),
       "'weight', 'row' or 'neuron'"),
      ("tied", self.tied, is_tied, "a dict of {path: axis}"),
      ("tied", self.tied, has_units or not self.tied,
       "empty unless the granularity is 'row' or 'neuron'"),
      ("axis", self.axis, is_axis(self.axis), "a whole number"),
      ("axis", self.axis, has_units or self.axis is None,
       "None unless the granularity is 'row' or 'neuron'"),
      ("layers", self.layers, is_axis(self.layers, 0),
       "an axis counted from the first, at least 0"),
      ("inputs", self.inputs, is_axis(self.inputs), "a whole number"),
    ))
    # fmt: on
    if self.score is not None:
      try:
        get_score(self.score)
      except ValueError as error:
        raise ValueError(f"rule {self.pattern!r}: {error}") from None


def as_rules(rules: Any) -> tuple[Rule, ...]:
  """Returns one rule or several as a tuple.

  Raises:
    ValueError: something is not a rule.
  """
  found = tuple(rules) if isinstance(rules, Iterable) else (rules,)
  for rule in found:
    if not isinstance(rule, Rule):
      raise ValueError(
        "rules must be folding.Rule objects, such as "
        f"Rule('.*/kernel', 0.5); one is {rule!r}"
      )
  return found


@dataclasses.dataclass(frozen=True)
class Site:
  """One array of mask bits; of stacked layers, one array per layer.

  `shape`, `members`, `expand`, `reduce` and `is_zero` are of one layer's arrays.

  Attributes:
    name: Path of the parameter that the rule matched.
    rule: Index of the rule.
    shape: Shape of the bits: that of the parameter, or [units].
    members: {path: axis that the bits index}; the axis is None if there is one
      bit per element.
    layers: Axis that stacks layers, see `Rule`; None: they are not stacked.
    inputs: See `Rule`.
  """

  name: str
  rule: int
  shape: tuple[int, ...]
  members: Mapping[str, int | None]
  layers: int | None = None
  inputs: int | None = None

  def per_layer(
    self, function: Callable[..., Any], *args: Any, in_turn: bool = False
  ) -> Any:
    """Returns function(*args), computed for each layer if they are stacked.

    Args:
      function: Function of trees of arrays of one layer.
      *args: Trees of arrays. Here and in the result, the axis of the layers is
        `layers`, or the last one of an array with fewer axes.
      in_turn: Whether to compute one layer after another, to save memory.
    """
    if self.layers is None:
      return function(*args)
    axes = jax.tree.map(functools.partial(_layer_axis, self.layers), args)
    if not in_turn:
      out = jax.vmap(function, axes)(*args)
    else:

      def one(i):
        pick = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        return function(
          *jax.tree.map(lambda x, axis: pick(x, i, axis), args, axes)
        )

      x, axis = jax.tree.leaves(args)[0], jax.tree.leaves(axes)[0]
      out = jax.lax.map(one, jnp.arange(x.shape[axis]))
    return jax.tree.map(self.layers_placed, out)

  def layers_placed(self, x: Any) -> Any:
    """Moves the axis of stacked layers from the front to where it belongs."""
    if self.layers is None:
      return x
    return jnp.moveaxis(x, 0, _layer_axis(self.layers, x))

  def layers_first(self, x: Any) -> Any:
    """Moves the axis of stacked layers to the front."""
    if self.layers is None:
      return x
    return jnp.moveaxis(x, _layer_axis(self.layers, x), 0)

  def pick(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a mapping of paths that are members."""
    return {name: leaves[name] for name in self.members if name in leaves}

  def inputs_first(self, w: jax.Array) -> jax.Array:
    """Moves the axis of the inputs of a member to the front."""
    if self.inputs is None or w.ndim < 2:
      return w
    return jnp.moveaxis(w, self.inputs, 0)

  def inputs_placed(self, w: jax.Array) -> jax.Array:
    """Moves the axis of the inputs back to where it belongs."""
    if self.inputs is None or w.ndim < 2:
      return w
    return jnp.moveaxis(w, 0, self.inputs)

  @property
  def is_by_weight(self) -> bool:
    """Whether each element has a bit of its own."""
    return self.members[self.name] is None

  def expand(self, units: Any, name: str, ndim: int) -> Any:
    """Returns one value per unit in a shape that broadcasts against a member.

    Args:
      units: Array of the site's shape.
      name: Path of the member.
      ndim: Number of axes of the member.
    """
    axis = self.members[name]
    if axis is None:
      return units
    return units.reshape([-1 if a == axis else 1 for a in range(ndim)])

  def reduce(
    self,
    per_member: Mapping[str, jax.Array],
    how: Callable[..., jax.Array] = jnp.sum,
  ) -> jax.Array:
    """Returns one value per unit from arrays of the members' shapes.

    Args:
      per_member: {path: array of the member's shape}.
      how: Reduction such as `jnp.sum` or `jnp.all`; it takes `axis`.
    """
    if self.is_by_weight:
      return per_member[self.name]
    parts = []
    for name, axis in self.members.items():
      x = per_member[name]
      others = tuple(a for a in range(x.ndim) if a != (axis or 0))
      parts.append(how(x, axis=others))
    return how(jnp.stack(parts), axis=0)

  def is_zero(self, own: Mapping[str, jax.Array]) -> jax.Array:
    """Returns which units are zero as a whole, from {path: member}."""
    return self.reduce({name: w == 0 for name, w in own.items()}, jnp.all)


def _layer_axis(layers: int, x: Any) -> int:
  """Returns the axis that stacks layers; of small arrays the last one."""
  return min(layers, x.ndim - 1)


def make_sites(rules: Rule | Iterable[Rule], params: Any) -> list[Site]:
  """Returns the sites of all rules, in the order of rules and parameters.

  Args:
    rules: One rule or several.
    params: Tree of arrays, or of their shapes and dtypes.

  Raises:
    ValueError: a pattern or a tied path matches nothing, a parameter is matched
      or tied twice, or a granularity does not fit a shape.
  """
  leaves = paths.flatten(params)
  sites: list[Site] = []
  claimed: dict[str, str] = {}
  for index, rule in enumerate(as_rules(rules)):
    for name in paths.matching(rule.pattern, leaves):
      site = _make_site(rule, index, name, leaves)
      for member in site.members:
        if member in claimed:
          raise ValueError(
            f"parameter {member!r} is claimed by rules {claimed[member]!r} and "
            f"{rule.pattern!r}"
          )
        claimed[member] = rule.pattern
      sites.append(site)
  return sites


def _make_site(
  rule: Rule, index: int, name: str, leaves: Mapping[str, Any]
) -> Site:
  whole: tuple[int, ...] = tuple(leaves[name].shape)
  shape = _layer_shape(rule, name, whole)
  if 0 in whole or jnp.issubdtype(leaves[name].dtype, jnp.complexfloating):
    raise ValueError(
      f"{name!r} is {leaves[name].dtype}{list(whole)}; only nonempty arrays of "
      "real numbers can be pruned"
    )
  is_by_weight = rule.granularity == "weight"
  if len(shape) < (1 if is_by_weight else 2):
    raise ValueError(
      f"granularity {rule.granularity!r} needs "
      f"{'a vector' if is_by_weight else 'a matrix'}; {name!r} has shape {shape}"
    )
  if rule.inputs is not None and not -len(shape) <= rule.inputs < len(shape):
    raise ValueError(
      f"inputs {rule.inputs} of rule {rule.pattern!r} is not an axis of {name!r} "
      f"{shape}"
    )
  if is_by_weight:
    return Site(name, index, shape, {name: None}, rule.layers, rule.inputs)
  own = _unit_axis(rule, name, shape)
  members: dict[str, int | None] = {name: own}
  for template, axis in rule.tied.items():
    other = _tied_path(rule, template, name, leaves)
    if other in members:
      raise ValueError(
        f"rule {rule.pattern!r} ties {other!r} to itself or twice; only one axis "
        f"of an array can index {rule.granularity}s"
      )
    stack = tuple(leaves[other].shape)
    sizes = _layer_shape(rule, other, stack)
    if not -len(sizes) <= axis < len(sizes) or sizes[axis] != shape[own]:
      raise ValueError(
        f"axis {axis} of {other!r} {sizes} does not index the {shape[own]} "
        f"{rule.granularity}s of {name!r}"
      )
    if rule.layers is not None and stack[rule.layers] != whole[rule.layers]:
      raise ValueError(
        f"{other!r} {stack} and {name!r} {whole} stack different numbers of "
        f"layers along axis {rule.layers}"
      )
    members[other] = axis % len(sizes)
  return Site(name, index, (shape[own],), members, rule.layers, rule.inputs)


def stacking_axis(name: str, leaves: Mapping[str, Any]) -> int | None:
  """Returns the axis of an array that seems to stack layers; None: none does.

  The arrays around it tell: those of the innermost module that also has arrays
  of fewer axes, such as a bias or the scale of a norm. If they are stacked, all
  have the same size along that axis. The axes of a bias [H, K] are those of its
  kernel [D, H, K], so it shows nothing.

  Args:
    name: Path of the array.
    leaves: {path: parameter}.
  """
  shape, module = leaves[name].shape, name
  while module:
    module = module.rpartition("/")[0]
    start = module and f"{module}/"
    near = [x.shape for n, x in leaves.items() if n.startswith(start)]
    if any(len(other) < len(shape) for other in near):
      for axis in (0, 1):
        if all(
          len(other) > 1 and other != shape[1:] and other[axis] == shape[axis]
          for other in near
        ):
          return axis
      return None
  return None


def axes_like(
  shape: tuple[int, ...],
  owner: tuple[int, ...],
  axes: tuple[Any, ...],
  sizes: Mapping[str, int],
) -> tuple[Any, ...]:
  """Returns the mesh axes of an array that belongs to a parameter.

  Args:
    shape: Shape of the array: a moment, moving average or mask bits.
    owner: Shape of the parameter.
    axes: For each axis of the parameter the mesh axis that splits it, several,
      or None. Missing ones at the end are None.
    sizes: {mesh axis: its size}.

  Returns:
    The same for each axis of the array. All axes are named, because otherwise
    equal shardings would not compare as equal.
  """
  axes = tuple(axes) + (None,) * (len(owner) - len(axes))
  if len(shape) == len(owner):  # averages, one per unit, have axes of size 1
    both = zip(shape, owner, axes, strict=True)
    return tuple(axis if size == whole else None for size, whole, axis in both)
  if shape == owner[:-1]:  # averages, one per input
    return axes[:-1]
  size = owner[-1] if owner else 0
  if shape[1:] == (*owner[:-1], -(-size // 8)):  # bits, eight per byte
    *first, last = axes
    names = (last,) if isinstance(last, str) else last or ()
    if size % (8 * math.prod(sizes[name] for name in names)):
      last = None
    return (None, *first, last)
  return (None,) * len(shape)  # small, such as the bits of rows and neurons


def _layer_shape(
  rule: Rule, name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the shape of one layer of an array."""
  if rule.layers is None:
    return shape
  if rule.layers >= len(shape):
    raise ValueError(
      f"rule {rule.pattern!r} stacks layers along axis {rule.layers}, which "
      f"{name!r} {shape} does not have"
    )
  return shape[: rule.layers] + shape[rule.layers + 1 :]


def _unit_axis(rule: Rule, name: str, shape: tuple[int, ...]) -> int:
  """Returns the axis of a matched parameter that indexes its units."""
  ndim = len(shape)
  if rule.axis is None:
    if ndim > 2:
      raise ValueError(
        f"{name!r} has shape {shape}: name the axis of its {rule.granularity}s, "
        "as in Rule(..., axis=0), or that of stacked layers, layers=0"
      )
    if rule.granularity == "row":
      return 0
    return 1 if rule.inputs is None else 1 - rule.inputs % 2
  if not -ndim <= rule.axis < ndim:
    raise ValueError(
      f"axis {rule.axis} of rule {rule.pattern!r} is none of {name!r} {shape}"
    )
  return rule.axis % ndim


def _tied_path(
  rule: Rule, template: str, name: str, leaves: Mapping[str, Any]
) -> str:
  """Returns the path of a template of `Rule.tied`."""
  match = re.fullmatch(rule.pattern, name)
  assert match is not None  # `make_sites` has matched it
  try:
    other = match.expand(template)
  except (re.error, IndexError) as error:
    raise ValueError(
      f"rule {rule.pattern!r} ties {template!r}, which does not expand: {error}"
    ) from None
  if other not in leaves:
    raise ValueError(
      f"rule {rule.pattern!r} ties {other!r} to {name!r}, but there is no such "
      "parameter"
    )
  return other


def pack(bits: jax.Array) -> jax.Array:
  """Packs bools into uint8 along the last axis, eight to a byte."""
  return jnp.packbits(bits, axis=-1)


def unpack(packed: jax.Array, size: int) -> jax.Array:
  """Returns the bools that `pack` packed; `size` is that of their last axis."""
  return jnp.unpackbits(packed, axis=-1, count=size).astype(bool)
