"""The number of nodes of linear attention, and the bound on its error."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from folding.models import chebyshev
from folding.models import linear_attention as la
from tests.models.linear_attention_cases import (
  SLOPES,
  Dense,
  K,
  bound_of,
  make_case,
  make_keep,
  rounding,
  run,
  spread,
)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
  s=st.floats(0.01, 12),
  t=st.floats(0.01, 6),
  places=st.integers(1, 3),
  offset=st.floats(-3, 3),
  seed=st.integers(0, 99),
)
def test_the_bound_bounds(s, t, places, offset, seed):
  # Keys at few places with a far-off majority: the hardest to interpolate.
  case = make_case(seed, s, shape=(1, 96, 2, 4), slopes=SLOPES[2:])
  rng = np.random.default_rng(seed)
  k = rng.choice(np.linspace(-t, t, places), case.k.shape) + offset
  k[:, 0], k[:, 1] = offset - t, offset + t
  case = case._replace(
    q=case.q + np.float32(offset / 2),
    k=np.float32(k),
    v=np.sign(case.v),
  )
  num_nodes = 64
  bound = bound_of(case, num_nodes)
  hypothesis.assume(bound < 0.1)
  oracle = Dense(case, True)
  error = np.abs(_compiled(num_nodes)(*case) - oracle.out).max()
  assert error <= (bound + rounding(case, oracle)) * spread(case)


@functools.cache
def _compiled(num_nodes):
  return jax.jit(
    functools.partial(
      la.attend_linear, head_dim=4, causal=True, num_nodes=num_nodes, chunk=16
    )
  )


def test_queries_that_hardly_vary_far_from_0_are_no_narrow_range():
  # Panels have a least width, in which e^(s t) changes by more than its range
  # in these queries tells.
  case = make_case(s=0.01, t=100.0)
  case = case._replace(q=case.q + np.float32(50), v=np.sign(case.v))
  oracle = Dense(case, True)
  off = np.abs(run(case, num_nodes=64) - oracle.out).max() / spread(case)
  assert off > 0.1
  assert bound_of(case, 64) > off
  np.testing.assert_allclose(
    _checked(case, True),
    oracle.out,
    rtol=0,
    atol=rounding(case, oracle) * spread(case),
  )


def test_where_the_bound_does_not_hold_the_error_is_large():
  case = make_case(s=16.0, t=1.5)
  assert bound_of(case, 32) == np.inf
  assert np.abs(run(case) - Dense(case, True).out).max() > 0.1


@pytest.mark.parametrize("a", [0.1, 1.0, 2.5, 4.0, 5.0, 7.0])
def test_the_bound_holds_for_one_exponential(a):
  x = np.linspace(-1, 1, 2001)
  nodes = chebyshev.nodes().astype(np.float64)
  weights = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, 15))
  basis = np.polynomial.chebyshev.chebvander(x, 15) @ weights  # l_n(x)
  error = np.abs(basis @ np.exp(a * nodes) * np.exp(-a * x) - 1).max()
  bound = float(chebyshev.error_bound(a, 1.0, 16))
  share = error / (1 - error) if error < 1 else np.inf
  rounding_only = 8 * 2.0**-24 * (np.abs(basis) @ np.exp(a * nodes)).max()
  assert share <= bound <= 10 * share + 10 * np.exp(a) * rounding_only
  got = chebyshev.lagrange(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, basis, rtol=0, atol=3e-6)


def test_derivatives_are_those_of_the_polynomials():
  nodes = chebyshev.nodes().astype(np.float64)
  for degree in range(16):
    want = degree * nodes ** max(degree - 1, 0)
    got = chebyshev.derivatives().astype(np.float64) @ nodes**degree
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
  ("s", "t", "tolerance"),
  [(2.0, 4.0, 1e-4), (12.0, 4.0, 1e-4), (0.0, 0.0, 1e-5), (1e6, 9.0, 1e-4)],
)
def test_nodes_for_takes_no_more_than_it_needs(s, t, tolerance):
  num_nodes = chebyshev.nodes_for(s, t, tolerance)
  assert chebyshev.error_bound(s, t, num_nodes) <= tolerance
  assert (
    num_nodes == 16 or chebyshev.error_bound(s, t, num_nodes - 16) > tolerance
  )


def test_impossible_requests_are_refused():
  with pytest.raises(ValueError, match="below the rounding of float32"):
    chebyshev.nodes_for(1.0, 1.0, 1e-8)
  for size in (np.inf, np.nan):
    with pytest.raises(ValueError, match="is not finite"):
      chebyshev.nodes_for(size, 1.0, 1e-4)
  with pytest.raises(ValueError, match="multiple of 16; it is 40"):
    chebyshev.error_bound(1.0, 1.0, 40)


def _checked(case, causal, tolerance=1e-4, **options):
  attend = functools.partial(
    la.attend_checked, head_dim=K, causal=causal, tolerance=tolerance, **options
  )
  return jax.jit(attend)(*case)


@pytest.mark.parametrize("causal", [True, False])
def test_checked_falls_back_to_dense_attention(causal):
  case = make_case(s=60.0, t=1.5, slopes=SLOPES, keep=make_keep())
  assert bound_of(case, 256) > 1e-4
  oracle = Dense(case, causal)
  limit = rounding(case, oracle) * spread(case)
  out = _checked(case, causal, num_nodes=(32,))
  np.testing.assert_allclose(out, oracle.out, rtol=0, atol=limit)
  d_out = np.random.default_rng(2).standard_normal(oracle.out.shape)

  def loss(*arrays):
    out = la.attend_checked(
      *arrays, head_dim=K, causal=causal, tolerance=1e-4, num_nodes=(32,)
    )
    return (out * np.float32(d_out)).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*case)
  for got, want in zip(grads, oracle.gradients(d_out), strict=True):
    np.testing.assert_allclose(
      got, want, rtol=0, atol=3e-5 * np.abs(want).max()
    )


def test_checked_takes_the_first_number_of_nodes_that_is_enough():
  small, large = make_case(s=2.0), make_case(s=8.0)
  for case, num_nodes in ((small, 64), (large, 256)):
    assert bound_of(case, num_nodes) < 1e-4
    np.testing.assert_array_equal(
      _checked(case, True), run(case, num_nodes=num_nodes)
    )
  assert bound_of(large, 64) > 1e-4
  exact = Dense(small, True).out
  out = _checked(small, True, tolerance=1e-9)  # never enough
  np.testing.assert_allclose(out, exact, rtol=0, atol=2e-6)
