"""Interpolation of e^(s t) in s: nodes, weights and error bound.

The range of s is cut into P panels of equal width with X Chebyshev nodes each.
With x in [-1, 1] inside a panel and a = (half width of the panel) * max |t|,
the function to interpolate is e^(a x).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NODES = 16  # X, nodes per panel; with more, rounding dominates
_ROUNDOFF = 8 * 2.0**-24  # of one term of the interpolation sum, in float32


def nodes() -> Float[np.ndarray, " X"]:
  """Returns the zeros of T_X as float32 numbers, the largest first."""
  angle = (2 * np.arange(NODES) + 1) * np.pi / (2 * NODES)
  return np.cos(angle).astype(np.float32)


def _barycentric() -> Float[np.ndarray, " X"]:
  """Returns 1 / prod_(k != n) (x_n - x_k) / 2^(X - 1), in float64.

  The nodes are rounded. Weights of the exact nodes would be off by 1e-6.
  """
  x = nodes().astype(np.float64)
  apart = 2 * (x[:, None] - x)
  np.fill_diagonal(apart, 1.0)
  return 1 / apart.prod(1)


def derivatives() -> Float[np.ndarray, "X X"]:
  """Returns l_k'(x_n) of the Lagrange polynomials l_k, row n, column k."""
  x, w = nodes().astype(np.float64), _barycentric()
  apart = x[:, None] - x
  np.fill_diagonal(apart, 1.0)
  d = w[None] / w[:, None] / apart
  np.fill_diagonal(d, 0.0)
  np.fill_diagonal(d, -d.sum(1))
  return d.astype(np.float32)


def lagrange(x: Float[Array, "*A"]) -> Float[Array, "*A X"]:
  """Returns the Lagrange polynomials l_n(x), by the barycentric formula.

  p(x) = sum_n l_n(x) p(x_n) for any polynomial p of degree below X (Berrut and
  Trefethen 2004).
  """
  one = (1,) * x.ndim
  apart = x[..., None] - nodes().reshape(*one, NODES)
  weight = _barycentric().astype(np.float32).reshape(*one, NODES)
  # At a node, its own term exceeds the others by far more than 2^24.
  term = weight / jnp.where(apart == 0, 1e-20, apart)
  return term / term.sum(-1, keepdims=True)


def error_bound(
  s_half: Float[Array, "*A"] | float,
  t_half: Float[Array, "*A"] | float,
  num_nodes: int,
) -> Float[Array, "*A"]:
  """Returns a bound on the error of linear attention, relative to the range of v.

  Let a = s_half t_half / P. Interpolation of e^(a x) at X Chebyshev points is
  off by at most 4 sum_(n >= X) I_n(a), by aliasing of its Chebyshev
  coefficients 2 I_n(a). Relative to the smallest e^(a x) this is e^a times
  more. The sum is bounded by I_n(a) <= (a/2)^n / n! e^(a^2 / (4 (n + 1))).
  Weights are positive, so the relative error of their sums is no larger.
  Rounding adds `_ROUNDOFF` times the largest sum_n |l_n(x)| e^(a (x_n - x)). A
  relative error e of the weights moves the average of v by at most e / (1 - e)
  times the largest difference of two v.

  Args:
    s_half: Half the range of s.
    t_half: Half the range of t.
    num_nodes: N, for the whole range of s; a multiple of X.

  Returns:
    The bound; infinity if there is none.

  Example:
    >>> bool(error_bound(2.0, 4.0, 32) < 1e-4)
    True
    >>> bool(error_bound(6.0, 4.0, 32) < 1e-4)
    False

  References:
    Trefethen, Approximation Theory and Approximation Practice, 2019, chapter 4.
  """
  a = jnp.asarray(s_half) * jnp.asarray(t_half) / panels(num_nodes)
  log_term = NODES * jnp.log(a / 2) - math.lgamma(NODES + 1)
  log_sum = a**2 / (4 * (NODES + 1)) + log_term + a
  rest = 1 - a / (2 * (NODES + 1))  # of a geometric series
  off = jnp.where(rest > 0, 4 * jnp.exp(log_sum) / rest, jnp.inf)
  off += _ROUNDOFF * _amplification(a)
  return jnp.where(off < 1, off / (1 - off), jnp.inf)


def _amplification(a: Float[Array, "*A"]) -> Float[Array, "*A"]:
  """Returns max_x sum_n |l_n(x)| e^(a (x_n - x)), on a grid of 8 X points.

  It grows with a, because each x has a mirror image and a sum of exponentials is
  convex in a.
  """
  angle = np.linspace(0, np.pi, 8 * NODES + 1)
  x = np.cos(angle)
  weight = 1 / (x[:, None] - nodes()) * _barycentric()
  weight = np.abs(weight / weight.sum(1, keepdims=True)).astype(np.float32)
  apart = (nodes() - x[:, None]).astype(np.float32)
  one = (1,) * a.ndim
  power = jnp.exp(a[..., None, None] * apart.reshape(*one, *apart.shape))
  return (weight.reshape(*one, *weight.shape) * power).sum(-1).max(-1)


def panels(num_nodes: int) -> int:
  """Returns P, the number of panels.

  Raises:
    ValueError: `num_nodes` is not a multiple of the nodes of a panel.
  """
  if num_nodes < NODES or num_nodes % NODES:
    raise ValueError(
      f"num_nodes must be a multiple of {NODES}; it is {num_nodes}"
    )
  return num_nodes // NODES
