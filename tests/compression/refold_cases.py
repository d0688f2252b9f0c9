"""Random heads and inputs, and their products, for the tests of refold."""

import numpy as np

D, K = 10, 4


def _projection(rng, heads, bias, K=K):
  parts = {"kernel": rng.normal(size=(D, heads, K)).astype(np.float32)}
  if bias:
    parts["bias"] = rng.normal(size=(heads, K)).astype(np.float32)
  return parts


def make_inputs(rng, bias, count=200):
  """Returns correlated inputs of unequal scale and mean, 1 behind them."""
  x = rng.normal(size=(count, D)) @ rng.normal(size=(D, D))
  x = x * np.geomspace(1, 0.1, D) + rng.normal(size=D)
  return np.concatenate([x, np.ones((count, 1))], 1) if bias else x


def make_case(seed, H, J, bias, K=K):
  """Returns q, k, inputs of queries and of keys."""
  rng = np.random.default_rng(seed)
  q, k = _projection(rng, H, bias, K), _projection(rng, J, bias, K)
  return q, k, make_inputs(rng, bias), make_inputs(rng, bias)


def moment_of(x):
  return x.T @ x / len(x)


def project_heads(x, projection, H):
  """Returns [H, n, K] of inputs; heads that are shared are repeated."""
  w = np.asarray(projection["kernel"], np.float64)
  out = np.einsum("nd,dhk->hnk", x[:, :D], w)
  if "bias" in projection:
    out = out + np.float64(projection["bias"])[:, None]
  return np.repeat(out, H // len(out), axis=0)
