"""Attention layers of four heads of four channels, with random parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding.models.attention import Attention
from folding.models.shape import shape_of

H, K = 4, 4
D = H * K


def normal(seed, *shape):
  """Returns float32 normal numbers."""
  return jnp.asarray(_normal(seed, *shape))


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_layer(fold=None, **fields):
  """Returns an attention layer of width D and its config."""
  shape = {"num_layers": 1, "width": D, "num_heads": H} | fields
  config = config_lib.resolve(
    config_lib.Config(
      task="classify",
      preset="none",
      model=config_lib.ModelConfig(**shape),
      fold=config_lib.FoldConfig(**(fold or {})),
    )
  )
  shape = shape_of(config)
  init = nn.initializers.lecun_normal()
  return Attention(shape, shape.layers[0], init), config


def randomized(module, scale=1.0):
  """Returns parameters none of which is 0, normal times `scale`."""
  x = jnp.zeros((1, 6, D))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  values = [scale * _normal(n, *leaf.shape) for n, leaf in enumerate(leaves)]
  return jax.tree.unflatten(tree, list(map(jnp.asarray, values)))
