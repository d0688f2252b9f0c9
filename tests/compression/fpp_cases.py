"""Small parameters, gradients and statistics for the tests of fpp."""

import jax
import jax.numpy as jnp
import numpy as np

from folding.compression.sites import Rule

WEIGHTS = [Rule("up|embed", 0.7)]
NEURONS = [Rule("up", 0.5, "neuron", {"bias": 0, "gate": 1, "down": 0})]


def random_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = {
    "up": (8, 6),
    "gate": (8, 6),
    "bias": (6,),
    "down": (6, 4),
    "embed": (12, 5),
    "scale": (8,),
  }
  return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


def gradient(step, name, shape):
  rng = np.random.default_rng([step, *name.encode()])
  return rng.normal(size=shape).astype(np.float32)


def statistics(step):
  rng = np.random.default_rng([step, 99])
  sizes = {"up": 8, "gate": 8, "down": 6, "embed": 12}
  return {
    n: rng.uniform(0.01, 4, size=k).astype(np.float32) for n, k in sizes.items()
  }


def separable(params, step):
  """Gradients of each element by itself: w - sin(step + position)."""
  return jax.tree.map(
    lambda p: p - jnp.sin(step + jnp.arange(p.size)).reshape(p.shape), params
  )
