"""How much smaller a run will be, by the shapes of its model and its rules."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from folding import config as c
from folding import paths
from folding.compression.sites import make_sites
from folding.models.transformer import make_model
from folding.training.optimizer import make_rules


def shapes(config: c.Config) -> Any:
  """Returns the shapes of the parameters of a resolved config."""
  model = make_model(config, config.data.vocab_size, num_classes=2)
  tokens = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def count(tree: Any) -> int:
  """Returns the number of parameters."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def smaller(config: c.Config) -> float:
  """Returns the fraction of the dense twin that a resolved config saves."""
  found, dense = shapes(config), shapes(c.dense_twin(config))
  rules, leaves = make_rules(config, found, dense), paths.flatten(found)
  zeros = 0
  for site in make_sites(rules, found):
    units = math.prod(site.shape)
    size = sum(math.prod(leaves[name].shape) for name in site.members)
    zeros += int(rules[site.rule].target * units + 1e-6) * size // units
  return 1 - (count(found) - zeros) / count(dense)
