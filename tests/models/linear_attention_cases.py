"""Cases of linear attention, and softmax attention of them in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding.models import linear_attention as la

B, L, H, K = 2, 75, 4, 8
SLOPES = jnp.array([1.5, 0.3, 0.05, 0.004])
ULP = 2.0**-23


class Case(NamedTuple):
  """Arguments of `attend_linear` by position, and what it is told by name."""

  q: Any
  k: Any
  v: Any
  slopes: Any = None
  keep: Any = None


def make_case(
  seed=0, s=2.0, t=1.0, shape=(B, L, H, K), heads=None, **given
) -> Case:
  """Returns s uniform in [-s, s], t normal of deviation t."""
  rng = np.random.default_rng(seed)
  b, length, h, size = shape
  num_keys, num_values = heads or (h, h)
  q = rng.uniform(-s, s, (b, length, h)) / size**0.5
  k = t * rng.standard_normal((b, length, num_keys))
  v = rng.standard_normal((b, length, num_values, size))
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  return Case(*arrays, *(given.get(n) for n in Case._fields[3:]))


def make_keep(seed=1, shape=(B, L)):
  keep = np.random.default_rng(seed).random(shape) > 0.3
  keep[:, 0] = True  # so that every causal row sees a key
  return keep


class Dense:
  """Softmax attention and its derivatives, all pairs, in float64."""

  def __init__(self, case: Case, causal: bool):
    wide = [np.asarray(x, np.float64) for x in case[:3]]
    self.heads = [x.shape[2] for x in wide]
    h, self.size = self.heads[0], wide[2].shape[3]
    self.q, self.k, self.v = (np.repeat(x, h // x.shape[2], 2) for x in wide)
    length = self.q.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)
    self.distance = np.abs(distance)
    self.logits = self.size**0.5 * np.einsum("blh,bmh->bhlm", self.q, self.k)
    if case.slopes is not None:
      slopes = np.float64(case.slopes)
      self.logits -= slopes[:, None, None] * self.distance
    seen = np.full((len(self.q), 1, length, length), True)
    if causal:
      seen &= distance >= 0
    if case.keep is not None:
      seen &= case.keep[:, None, None]
    weight = np.where(seen, self.logits, -np.inf)
    top = weight.max(-1, keepdims=True)
    weight = np.exp(weight - np.where(np.isfinite(top), top, 0))
    total = weight.sum(-1, keepdims=True)
    self.weight = weight / np.where(total > 0, total, 1)
    self.out = np.einsum("bhlm,bmhk->blhk", self.weight, self.v)

  def gradients(self, d_out):
    """Returns those of sum(d_out * out) wrt q, k, v and the slopes."""
    d_weight = np.einsum("blhk,bmhk->bhlm", d_out, self.v)
    mean = (self.weight * d_weight).sum(-1, keepdims=True)
    d_logits = self.weight * (d_weight - mean)
    d_q = self.size**0.5 * np.einsum("bhlm,bmh->blh", d_logits, self.k)
    d_k = self.size**0.5 * np.einsum("bhlm,blh->bmh", d_logits, self.q)
    d_v = np.einsum("bhlm,blhk->bmhk", self.weight, d_out)
    d_slopes = -(d_logits * self.distance).sum((0, 2, 3))
    return d_q, *map(self._shared, (d_k, d_v), self.heads[1:]), d_slopes

  def _shared(self, d, heads):
    shape = d.shape
    return d.reshape(*shape[:2], heads, -1, *shape[3:]).sum(3)


def rounding(case, oracle):
  """Returns what rounding of logits and sums may do, over the range of v."""
  seen = oracle.logits[np.isfinite(oracle.logits)]
  return 8 * ULP * (4 + np.abs(seen).max())


def spread(case):
  return float(np.ptp(case.v, axis=(0, 1)).max())


def bound_of(case, num_nodes):
  case = jax.tree.map(jnp.asarray, case)
  span = la.measure_span(*case[:2], case.keep, head_dim=case.v.shape[-1])
  return float(la.span_bound(span, num_nodes).max())


def run(case, causal=True, num_nodes=32, **options):
  size = case.v.shape[-1]
  attend = functools.partial(
    la.attend_linear,
    head_dim=size,
    causal=causal,
    num_nodes=num_nodes,
    **options,
  )
  return np.asarray(jax.jit(attend)(*case))
