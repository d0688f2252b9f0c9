"""FPP under the three names that loops made for jaxpruner call."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from folding.compression.fpp import fpp
from folding.compression.rules import Rule


@dataclasses.dataclass(frozen=True)
class Hooks:
  """A pruner with the hooks of jaxpruner, as EasyDeL's trainers call them too.

  All the work is in `wrap_optax`: the updates of `folding.fpp` leave frozen
  parameters as they are and zero ones at exactly 0, so the other two hooks have
  nothing to add and return the parameters that they are given. Call them or
  not. Such loops hand no statistics to `update`; for the scores "relative" and
  "activation" all inputs count alike then.

  Attributes:
    rules: See `folding.fpp`.
    options: Its other arguments: "begin", "end" and "every" at least.

  Example:
    >>> import jax.numpy as jnp
    >>> pruner = Hooks([Rule("w", 0.5)], {"begin": 0, "end": 0, "every": 1})
    >>> tx = pruner.wrap_optax(optax.sgd(1.0))
    >>> params = {"w": jnp.array([[1.0, -3.0]])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> pruner.post_gradient_update(params, state)["w"].tolist()
    [[0.0, -4.0]]

  References: Lee et al., JaxPruner, 2023, https://github.com/google-research/jaxpruner.
  """

  rules: Sequence[Rule]
  options: Mapping[str, Any]

  def wrap_optax(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with FPP around it."""
    return fpp(inner, self.rules, **self.options)

  def pre_forward_update(self, params: Any, opt_state: Any) -> Any:
    """Returns the parameters for a forward pass: as they are."""
    del opt_state
    return params

  def post_gradient_update(self, params: Any, opt_state: Any) -> Any:
    """Returns the parameters after an update was applied: as they are."""
    del opt_state
    return params
