"""What a traced program computes, without compiling it."""

import math
from collections.abc import Iterator

from jax.extend import core


def sizes(jaxpr) -> Iterator[int]:
  """Yields the number of elements of each array that a program computes."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield math.prod(variable.aval.shape)
    for inner in core.jaxprs_in_params(equation.params):
      yield from sizes(inner)
