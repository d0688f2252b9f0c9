"""Rules select the parameters to prune; sites are the units that they prune.

A site is one array of mask bits. Each bit stands for one unit: a weight, a row
of an embedding, or a neuron with all arrays that belong to it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from folding import paths
from folding.compression.scores import Score


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""Prunes a fraction of the parameters that a pattern matches.

  Attributes:
    pattern: Regular expression that matches whole parameter paths.
    target: Fraction of the units to zero in the end, in [0, 1).
    granularity: The unit: "weight"; "row", an index of the first axis (a token
      of an embedding [V, D]); or "neuron", an index of the last axis (of a
      kernel [D, F]). Rows and neurons include the arrays in `tied`.
    tied: {path of another array: its axis that indexes the same units}. Paths
      may refer to groups of the pattern, for example "\1/down/kernel".
    score: Score of these parameters: a name in `scores.SCORES` or a `Score`.
      None: the score that `fpp` is given.
    axis: Axis of the matched parameters that indexes the rows or neurons.
      Parameters of more than two axes need it: 0 for the heads of a W_O
      [H, K, D]. Layers that `nn.scan` or `nn.vmap` stack share their units.

  Raises:
    ValueError: a value is out of range.

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

  def __post_init__(self):
    if not 0 <= self.target < 1:
      raise ValueError(
        f"target of rule {self.pattern!r} must be in [0, 1); it is "
        f"{self.target}"
      )
    if self.granularity not in ("weight", "row", "neuron"):
      raise ValueError(
        f"granularity of rule {self.pattern!r} must be 'weight', 'row' or "
        f"'neuron'; it is {self.granularity!r}"
      )
    has_units = self.tied or self.axis is not None
    if has_units and self.granularity == "weight":
      raise ValueError(
        f"rule {self.pattern!r} ties other arrays or names an axis; this needs "
        "granularity 'row' or 'neuron'"
      )


@dataclasses.dataclass(frozen=True)
class Site:
  """One array of mask bits.

  Attributes:
    name: Path of the parameter that the rule matched.
    rule: Index of the rule.
    shape: Shape of the bits: that of the parameter, or [units].
    members: {path: axis that the bits index}; the axis is None if there is one
      bit per element.
  """

  name: str
  rule: int
  shape: tuple[int, ...]
  members: Mapping[str, int | None]

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
    return units.reshape([-1 if a == axis % ndim else 1 for a in range(ndim)])

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
      others = tuple(a for a in range(x.ndim) if a != (axis or 0) % x.ndim)
      parts.append(how(x, axis=others))
    return how(jnp.stack(parts), axis=0)


def make_sites(rules: Sequence[Rule], params: Any) -> list[Site]:
  """Returns the sites of all rules, in the order of rules and parameters.

  Args:
    rules: The rules.
    params: Tree of arrays, or of their shapes and dtypes.

  Raises:
    ValueError: a pattern or a tied path matches nothing, two rules match one
      parameter, or a granularity does not fit a shape.
  """
  leaves = paths.flatten(params)
  sites: list[Site] = []
  claimed: dict[str, str] = {}
  for index, rule in enumerate(rules):
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
  shape: tuple[int, ...] = tuple(leaves[name].shape)
  if 0 in shape or jnp.issubdtype(leaves[name].dtype, jnp.complexfloating):
    raise ValueError(
      f"{name!r} is {leaves[name].dtype}{list(shape)}; only nonempty arrays of "
      "real numbers can be pruned"
    )
  is_by_weight = rule.granularity == "weight"
  if len(shape) < (1 if is_by_weight else 2):
    raise ValueError(
      f"granularity {rule.granularity!r} needs "
      f"{'a vector' if is_by_weight else 'a matrix'}; {name!r} has shape {shape}"
    )
  if is_by_weight:
    return Site(name, index, shape, {name: None})
  own = _unit_axis(rule, name, shape)
  members: dict[str, int | None] = {name: own}
  for template, axis in rule.tied.items():
    other = _tied_path(rule, template, name, leaves)
    sizes = tuple(leaves[other].shape)
    if not -len(sizes) <= axis < len(sizes) or sizes[axis] != shape[own]:
      raise ValueError(
        f"axis {axis} of {other!r} {sizes} does not index the {shape[own]} "
        f"{rule.granularity}s of {name!r}"
      )
    members[other] = axis
  return Site(name, index, (shape[own],), members)


def _unit_axis(rule: Rule, name: str, shape: tuple[int, ...]) -> int:
  """Returns the axis of a matched parameter that indexes its units."""
  ndim = len(shape)
  if rule.axis is None:
    if ndim > 2:
      raise ValueError(
        f"{name!r} has shape {shape}: name the axis of its {rule.granularity}s, "
        "as in Rule(..., axis=0); stacked layers, as of nn.scan, then share them"
      )
    return 0 if rule.granularity == "row" else 1
  if not -ndim <= rule.axis < ndim:
    raise ValueError(
      f"axis {rule.axis} of rule {rule.pattern!r} is none of {name!r} {shape}"
    )
  return rule.axis % ndim


def _tied_path(
  rule: Rule, template: str, name: str, leaves: Mapping[str, Any]
) -> str:
  """Returns the path that a template of `Rule.tied` stands for."""
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
