"""Sizes, random arrays and biases for the tests of attention."""

import jax.numpy as jnp
import numpy as np

B, L, H, K = 2, 6, 4, 4

# Sums of a few dozen float32 products of unit numbers.
TOLERANCE = 1e-5


def normal(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def alibi_bias(slopes, causal, length=L):
  bias = np.zeros((len(slopes), length, length))
  for h, i, j in np.ndindex(bias.shape):
    hidden = causal and j > i
    bias[h, i, j] = -np.inf if hidden else -slopes[h] * abs(i - j)
  return bias
