"""Rules: which parameters are pruned, by how much, and in which units.

A rule becomes sites. A site is one array of decisions, a bool for each unit:
a weight, a row of an embedding, a neuron (with all the arrays it is made of).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from folding import paths


@dataclasses.dataclass(frozen=True)
class Rule:
  r"""Prunes a fraction of the parameters that a pattern matches.

  Attributes:
    pattern: Regular expression that matches whole parameter paths.
    target: Fraction of units to zero in the end, in [0, 1).
    granularity: "weight"; "row" (index of the first axis: a token of an
      embedding [V, D], a head of W_O [H, K, D]); or "neuron" (index of the last
      axis of a kernel [D, F]), both together with `tied`.
    tied: For "row" and "neuron", what else belongs to unit i: {path of an array:
      axis that i indexes}. Paths may use groups of the pattern, as
      "\1/down/kernel".
    score: Of these parameters; None: that of `fpp`. A forward pass says of an
      embedding how common its tokens are; by "magnitude" rare ones do not lose
      all they have.

  Example:
    >>> Rule(r"(.*mlp)/up/kernel", 0.5, "neuron",
    ...      {r"\1/up/bias": 0, r"\1/down/kernel": 0}).target
    0.5
  """

  pattern: str
  target: float
  granularity: str = "weight"
  tied: Mapping[str, int] = dataclasses.field(default_factory=dict)
  score: str | None = None

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
    if self.tied and self.granularity not in ("row", "neuron"):
      raise ValueError(
        f"rule {self.pattern!r} ties other arrays, which only the "
        "granularities 'row' and 'neuron' do"
      )


@dataclasses.dataclass(frozen=True)
class Site:
  """One array of decisions.

  Attributes:
    name: Path of the parameter that the rule matched.
    rule: Index of the rule.
    shape: Of the decisions: the parameter's own, or [units].
    members: {path: axis that the decisions index; None: every element}.
  """

  name: str
  rule: int
  shape: tuple[int, ...]
  members: Mapping[str, int | None]

  def expand(self, units: Any, name: str, ndim: int) -> Any:
    """Returns decisions in a shape that broadcasts against a member."""
    axis = self.members[name]
    if axis is None:
      return units
    return units.reshape([-1 if a == axis % ndim else 1 for a in range(ndim)])

  def reduce(
    self, per_member: Mapping[str, jax.Array], how: Any = jnp.sum
  ) -> jax.Array:
    """Returns one number a unit from arrays shaped like the members."""
    total = None
    for name, axis in self.members.items():
      x = per_member[name]
      if axis is None:
        return x
      x = how(x, axis=tuple(a for a in range(x.ndim) if a != axis % x.ndim))
      total = x if total is None else how(jnp.stack([total, x]), axis=0)
    assert total is not None
    return total


def make_sites(rules: Sequence[Rule], params: Any) -> list[Site]:
  """Returns the sites of all rules, in the order of rules and parameters.

  Raises:
    ValueError: a pattern or a tied path matches nothing, two rules claim one
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
  ndim = len(shape)
  if 0 in shape or jnp.issubdtype(leaves[name].dtype, jnp.complexfloating):
    raise ValueError(
      f"{name!r} is {leaves[name].dtype}{list(shape)}; what is pruned are arrays "
      "of real numbers that are not empty"
    )
  if ndim < (1 if rule.granularity == "weight" else 2):
    raise ValueError(
      f"granularity {rule.granularity!r} needs "
      f"{'a vector' if rule.granularity == 'weight' else 'a matrix'}; {name!r} "
      f"has shape {shape}"
    )
  if rule.granularity in ("row", "neuron"):
    own = 0 if rule.granularity == "row" else ndim - 1
    members: dict[str, int | None] = {name: own}
    match = re.fullmatch(rule.pattern, name)
    assert match is not None
    for template, axis in rule.tied.items():
      try:
        other = match.expand(template)
      except (re.error, IndexError) as error:
        raise ValueError(
          f"rule {rule.pattern!r} ties {template!r}, which does not expand: "
          f"{error}"
        ) from None
      if other not in leaves:
        raise ValueError(
          f"rule {rule.pattern!r} ties {other!r} to {name!r}, but there is no "
          "such parameter"
        )
      sizes = tuple(leaves[other].shape)
      if not -len(sizes) <= axis < len(sizes) or sizes[axis] != shape[own]:
        raise ValueError(
          f"axis {axis} of {other!r} {sizes} does not index the {shape[own]} "
          f"{rule.granularity}s of {name!r}"
        )
      members[other] = axis
    return Site(name, index, (shape[own],), members)
  return Site(name, index, shape, {name: None})


def pack(bits: jax.Array) -> jax.Array:
  """Packs bools into uint8 along the last axis, eight to a byte."""
  return jnp.packbits(bits, axis=-1)


def unpack(packed: jax.Array, size: int) -> jax.Array:
  """Returns the bools that `pack` packed; `size` is their last axis."""
  return jnp.unpackbits(packed, axis=-1, count=size).astype(bool)
