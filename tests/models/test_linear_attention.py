"""Linear attention against softmax attention in float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from folding.models import chebyshev
from folding.models import linear_attention as la
from folding.models.linear_attention import Inputs

B, L, H, K = 2, 75, 4, 8
SLOPES = jnp.array([1.5, 0.3, 0.05, 0.004])
ULP = 2.0**-23


def make_case(
  seed=0, s=2.0, t=1.0, shape=(B, L, H, K), heads=None, **given
) -> Inputs:
  """Returns s uniform in [-s, s], t normal of deviation t."""
  rng = np.random.default_rng(seed)
  b, length, h, size = shape
  num_keys, num_values = heads or (h, h)
  q = rng.uniform(-s, s, (b, length, h)) / size**0.5
  k = t * rng.standard_normal((b, length, num_keys))
  v = rng.standard_normal((b, length, num_values, size))
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  return Inputs(*arrays, given.get("slopes"), given.get("keep"))


def make_keep(seed=1, shape=(B, L)):
  keep = np.random.default_rng(seed).random(shape) > 0.3
  keep[:, 0] = True  # so that every causal row sees a key
  return keep


class Dense:
  """Softmax attention and its derivatives, all pairs, in float64."""

  def __init__(self, case: Inputs, causal: bool):
    wide = [np.asarray(x, np.float64) for x in case[:3]]
    self.heads = [x.shape[2] for x in wide]
    h, self.size = self.heads[0], wide[2].shape[3]
    self.q, self.k, self.v = (np.repeat(x, h // x.shape[2], 2) for x in wide)
    length = self.q.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)
    self.distance = np.abs(distance)
    self.logits = self.size**0.5 * np.einsum("blh,bmh->bhlm", self.q, self.k)
    if case.slopes_H is not None:
      slopes = np.float64(case.slopes_H)
      self.logits -= slopes[:, None, None] * self.distance
    seen = np.full((len(self.q), 1, length, length), True)
    if causal:
      seen &= distance >= 0
    if case.mask_BL is not None:
      seen &= case.mask_BL[:, None, None]
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
  return float(np.ptp(case.v_BLIK, axis=(0, 1)).max())


@functools.partial(jax.jit, static_argnums=1)
def _bound_of(case, num_nodes):
  return la.span_bound(la.measure_span(case), num_nodes).max()


def bound_of(case, num_nodes):
  return float(_bound_of(case, num_nodes))


def run(case, causal=True, num_nodes=32, **options):
  attend = functools.partial(
    la.attend_linear, causal=causal, num_nodes=num_nodes, **options
  )
  return np.asarray(jax.jit(attend)(case))


def make_span(*ends):
  return la.Span(*(jnp.full((1, 1), x) for x in ends))


@pytest.mark.parametrize(
  "kind",
  [
    "causal",
    "causal alibi",
    "causal alibi padded",
    "both",
    "both padded",
    "both alibi padded",
  ],
)
def test_attend_linear_equals_dense_attention_and_its_gradients(kind):
  causal, is_padded = "causal" in kind, "padded" in kind
  case = make_case(
    heads=(2, 1) if is_padded else (4, 4),
    slopes=SLOPES if "alibi" in kind else None,
    keep=make_keep() if is_padded else None,
  )
  oracle = Dense(case, causal)
  out, grads, expected = _gradients(case, oracle, causal=causal)
  np.testing.assert_allclose(out, oracle.out, rtol=0, atol=5e-6)
  for got, want in zip(grads, expected, strict=False):
    # Derivatives of the polynomials are X^2 times as large as they.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=5e-5 * np.abs(want).max()
    )


LINEAR = functools.partial(la.attend_linear, num_nodes=32, chunk=16)


def _gradients(case, oracle, causal=True, attend=LINEAR):
  """Returns the output, its gradients, and the oracle's gradients."""
  d_out = np.random.default_rng(2).standard_normal(oracle.out.shape)
  floats, keep = case[: 3 + (case.slopes_H is not None)], case.mask_BL

  def loss(floats):
    out = attend(Inputs(*floats)._replace(mask_BL=keep), causal=causal)
    return (out * np.float32(d_out)).sum(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(floats)
  return out, grads, oracle.gradients(d_out)


def test_gradients_with_queries_far_from_0():
  # 75 positions are not of whole chunks of 16: some are added at the end.
  case = make_case()
  case = case._replace(q_BLH=case.q_BLH + 3 / K**0.5)
  _, grads, expected = _gradients(case, Dense(case, True))
  for got, want in zip(grads, expected, strict=False):
    # Queries are larger here, and rounding is 1.0e-4 on some machines.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=2e-4 * np.abs(want).max()
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 0.0])
def test_gradients_with_equal_queries(scale, causal):
  case = make_case()
  case = case._replace(q_BLH=scale * case.q_BLH)
  _, grads, expected = _gradients(case, Dense(case, causal), causal)
  for got, want in zip(grads, expected, strict=False):
    # That of keys is as small as the queries; no more than rounding is off.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=2e-4 * max(np.abs(want).max(), 0.05)
    )


def test_gradients_beside_float64():
  case = make_case(slopes=SLOPES)
  oracle = Dense(case, True)
  _, expected, _ = _gradients(case, oracle)
  with jax.enable_x64(True):
    for got, want in zip(_gradients(case, oracle)[1], expected, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 75, 200])
def test_attend_linear_with_any_chunk_size(chunk):
  case = make_case(slopes=SLOPES, keep=make_keep())
  out = run(case, causal=False, chunk=chunk)
  np.testing.assert_allclose(out, Dense(case, False).out, rtol=0, atol=5e-6)


def test_attend_linear_with_many_blocks_of_chunks():
  # 700 positions times 8 heads of 2 texts: several steps of the scan.
  case = make_case(shape=(2, 700, 8, 2), slopes=np.repeat(SLOPES, 2))
  out = run(case, chunk=32)
  np.testing.assert_allclose(out, Dense(case, True).out, rtol=0, atol=5e-6)


def test_large_logits_neither_overflow_nor_vanish():
  # Logits from -150 to 150, all of one sign in a row, and steep slopes.
  case = make_case(slopes=np.array([5, 2, 0.1, 1e-3], np.float32))
  case = case._replace(
    q_BLH=np.float32(50 + case.q_BLH),
    k_BLJ=np.float32(np.clip(case.k_BLJ, -1, 1)),
  )
  assert bound_of(case, 64) < 1e-4
  for causal in (True, False):
    oracle = Dense(case, causal)
    limit = rounding(case, oracle) * spread(case)
    out = run(case, causal=causal, num_nodes=64, chunk=16)
    np.testing.assert_allclose(out, oracle.out, rtol=0, atol=limit)


def test_equal_queries_equal_keys_and_only_padding():
  case = make_case(keep=make_keep())
  keep = case.mask_BL.copy()
  keep[1] = False
  case = case._replace(
    q_BLH=np.full_like(case.q_BLH, 7.3),
    k_BLJ=np.full_like(case.k_BLJ, 1.1),
    mask_BL=keep,
  )
  for causal in (True, False):
    out = run(case, causal=causal)
    np.testing.assert_allclose(out, Dense(case, causal).out, rtol=0, atol=5e-6)
    assert not out[1].any()


def test_given_span_makes_attention_strictly_causal():
  span = make_span(-3.0, 3.0, -4.0, 4.0)
  case = make_case(slopes=SLOPES)
  other = make_case(seed=9, slopes=SLOPES)
  at = 40
  pairs = zip(case[:3], other[:3], strict=True)
  mixed = [np.concatenate([a[:, :at], b[:, at:]], 1) for a, b in pairs]
  mixed = Inputs(*mixed, SLOPES)
  a, b = (run(c, span=span, num_nodes=48, chunk=16) for c in (case, mixed))
  np.testing.assert_array_equal(a[:, :at], b[:, :at])
  assert (a[:, at:] != b[:, at:]).any((2, 3)).all()

  def early(k, v):
    x = Inputs(case.q_BLH, k, v)
    out = la.attend_linear(x, causal=True, num_nodes=48, span=span, chunk=16)
    return out[:, :at].sum()

  for grad in jax.jit(jax.grad(early, argnums=(0, 1)))(case.k_BLJ, case.v_BLIK):
    assert grad[:, :at].any()
    assert not grad[:, at:].any()


@pytest.mark.parametrize("is_padded", [True, False])
def test_extend_in_pieces_equals_dense_attention(is_padded):
  keep = make_keep() if is_padded else None
  case = make_case(slopes=SLOPES, heads=(2, 1), keep=keep)
  span = make_span(-2.0, 2.0, -4.0, 4.0)
  extend = jax.jit(functools.partial(la.extend, chunk=16))
  state = la.init_state(span, B, H, K, num_nodes=48)
  arrays = [np.asarray(x) for x in case[:3]]  # whose slices compile nothing
  outs, at = [], 0
  # Two chunks and a bit, another such piece, then one position at a time.
  for stop in (35, 70, *range(71, L + 1)):
    part = [x[:, at:stop] for x in arrays]
    part_keep = keep[:, at:stop] if is_padded else None
    state, out = extend(state, Inputs(*part, case.slopes_H, part_keep))
    outs, at = [*outs, out], stop
  assert sum(x.size for x in state.sums) == B * H * (3 + 48 * (K + 1))
  out = np.concatenate(outs, 1)
  np.testing.assert_allclose(out, Dense(case, True).out, rtol=0, atol=1e-5)


def test_extend_watches_each_end_of_the_span():
  rng = np.random.default_rng(0)
  q_BLH, k_BLH = jnp.asarray(rng.normal(size=(2, 2, 1, 3)), jnp.float32)
  v_BLHK = jnp.ones((2, 1, 3, 4))
  span = make_span(-1.0, 3.0, 2.0, 2.5)
  empty = la.init_state(span, 2, 3, 4, num_nodes=32)
  extend = jax.jit(la.extend)
  inside = np.zeros((2, 2, 1, 3), np.float32)  # q and k
  inside[0], inside[1] = 1.0 / 2, 2.25  # s = sqrt(K) q

  def is_outside(state, change, keep=None):
    q, k = jnp.asarray(inside + change)
    state, _ = extend(state, Inputs(q, k, v_BLHK, mask_BL=keep))
    return state, state.is_outside_B.tolist()

  for axis, sign in np.ndindex(2, 2):
    half = (1.0, 0.25)[axis]
    for factor, expected in ((0.99, False), (1.01, True)):
      change = np.zeros_like(inside)
      change[axis, 1, 0, 2] = (2 * sign - 1) * factor * half
      state, found = is_outside(empty, change)
      assert found == [False, expected]
  # The flag stays after positions inside, and pad tokens do not raise it.
  _, found = is_outside(state, np.zeros_like(inside))
  assert found == [False, True]
  keep = np.array([[True], [False]])
  _, found = is_outside(empty, 9 * np.ones_like(inside), keep)
  assert found == [True, False]


def test_result_has_the_dtype_of_the_values():
  case = make_case()
  low = case._replace(v_BLIK=jnp.asarray(case.v_BLIK, jnp.bfloat16))
  out = jax.jit(functools.partial(LINEAR, causal=True))(low)
  assert out.dtype == jnp.bfloat16
  want = Dense(case, True).out
  np.testing.assert_allclose(np.float64(out), want, rtol=0, atol=0.03)


def test_training_memory_is_linear_in_the_length():
  def loss(*arrays):
    return CHECKED(Inputs(*arrays), causal=True).sum()

  length = 8192
  shapes = [(1, length, 8)] * 2 + [(1, length, 8, K), (8,)]
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
  memory = grad.lower(*arrays).compile().memory_analysis()
  # One byte per pair of positions and head would be eight times as much.
  assert memory.temp_size_in_bytes < length**2


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
  s=st.floats(0.01, 12),
  t=st.floats(0.01, 6),
  places=st.integers(1, 3),
  offset=st.floats(-3, 3),
  seed=st.integers(0, 99),
)
def test_error_is_within_the_bound(s, t, places, offset, seed):
  # Keys at few places with a far-off majority: the hardest to interpolate.
  case = make_case(seed, s, shape=(1, 96, 2, 4), slopes=SLOPES[2:])
  rng = np.random.default_rng(seed)
  k = rng.choice(np.linspace(-t, t, places), case.k_BLJ.shape) + offset
  k[:, 0], k[:, 1] = offset - t, offset + t
  case = case._replace(
    q_BLH=case.q_BLH + np.float32(offset / 2),
    k_BLJ=np.float32(k),
    v_BLIK=np.sign(case.v_BLIK),
  )
  num_nodes = 64
  bound = bound_of(case, num_nodes)
  hypothesis.assume(bound < 0.1)
  oracle = Dense(case, True)
  error = np.abs(_compiled(case) - oracle.out).max()
  assert error <= (bound + rounding(case, oracle)) * spread(case)


_compiled = jax.jit(functools.partial(LINEAR, causal=True, num_nodes=64))


def test_narrow_range_far_from_0_is_not_underestimated():
  # Panels have a least width, in which e^(s t) changes by more than its range
  # in these queries tells.
  case = make_case(s=0.01, t=100.0)
  case = case._replace(
    q_BLH=case.q_BLH + np.float32(50), v_BLIK=np.sign(case.v_BLIK)
  )
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


def test_error_is_large_if_the_bound_is_infinite():
  case = make_case(s=16.0, t=1.5)
  assert bound_of(case, 32) == np.inf
  assert np.abs(run(case) - Dense(case, True).out).max() > 0.1


_error_bound = jax.jit(chebyshev.error_bound, static_argnums=2)


@pytest.mark.parametrize("a", [0.1, 1.0, 2.5, 4.0, 5.0, 7.0])
def test_bound_holds_for_one_exponential(a):
  x = np.linspace(-1, 1, 2001)
  nodes = chebyshev.nodes().astype(np.float64)
  weights = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, 15))
  basis = np.polynomial.chebyshev.chebvander(x, 15) @ weights  # l_n(x)
  error = np.abs(basis @ np.exp(a * nodes) * np.exp(-a * x) - 1).max()
  bound = float(_error_bound(a, 1.0, 16))
  share = error / (1 - error) if error < 1 else np.inf
  rounding_only = 8 * 2.0**-24 * (np.abs(basis) @ np.exp(a * nodes)).max()
  assert share <= bound <= 10 * share + 10 * np.exp(a) * rounding_only
  got = chebyshev.lagrange(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, basis, rtol=0, atol=3e-6)


def test_derivatives_of_polynomials():
  nodes = chebyshev.nodes().astype(np.float64)
  for degree in range(16):
    want = degree * nodes ** max(degree - 1, 0)
    got = chebyshev.derivatives().astype(np.float64) @ nodes**degree
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


def _checked(case, causal, tolerance=1e-4, **options):
  attend = functools.partial(
    la.attend_checked, causal=causal, tolerance=tolerance, **options
  )
  return jax.jit(attend)(case)


# One number of nodes, to compile less.
CHECKED = functools.partial(la.attend_checked, tolerance=1e-4, num_nodes=(32,))


@pytest.mark.parametrize("causal", [True, False])
def test_attend_checked_falls_back_to_exact_attention(causal):
  case = make_case(s=60.0, t=1.5, slopes=SLOPES, keep=make_keep())
  assert bound_of(case, 256) > 1e-4
  oracle = Dense(case, causal)
  limit = rounding(case, oracle) * spread(case)
  out, grads, expected = _gradients(case, oracle, causal, CHECKED)
  np.testing.assert_allclose(out, oracle.out, rtol=0, atol=limit)
  for got, want in zip(grads, expected, strict=True):
    np.testing.assert_allclose(
      got, want, rtol=0, atol=3e-5 * np.abs(want).max()
    )


def test_attend_checked_is_exact_if_one_head_has_a_wide_range():
  case = make_case(s=2.0, t=1.0)
  q = np.array(case.q_BLH)
  q[1, :, 2] *= 30
  case = case._replace(q_BLH=jnp.asarray(q))
  oracle = Dense(case, True)
  limit = rounding(case, oracle) * spread(case)
  out = _checked(case, True, num_nodes=(32,))
  np.testing.assert_allclose(out, oracle.out, rtol=0, atol=limit)


def test_attend_checked_takes_the_first_sufficient_number_of_nodes():
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
