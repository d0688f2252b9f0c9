"""Linear attention against float64 softmax attention and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.models import attention
from folding.models import linear_attention as la
from tests.models.linear_attention_cases import (
  SLOPES,
  B,
  Dense,
  H,
  K,
  L,
  bound_of,
  make_case,
  make_keep,
  rounding,
  run,
  spread,
)


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
def test_equals_dense_attention_and_its_gradients(kind):
  causal, is_padded = "causal" in kind, "padded" in kind
  case = make_case(
    heads=(2, 1) if is_padded else (4, 4),
    slopes=SLOPES if "alibi" in kind else None,
    keep=make_keep() if is_padded else None,
  )
  oracle = Dense(case, causal)
  d_out = np.random.default_rng(2).standard_normal(oracle.out.shape)
  argnums = (0, 1, 2) if case.slopes is None else (0, 1, 2, 3)

  def loss(*arrays):
    out = la.attend_linear(
      *arrays, head_dim=K, causal=causal, num_nodes=32, chunk=16
    )
    return (out * np.float32(d_out)).sum(), out

  grad = jax.grad(loss, argnums=argnums, has_aux=True)
  grads, out = jax.jit(grad)(*case)
  np.testing.assert_allclose(out, oracle.out, rtol=0, atol=5e-6)
  for got, want in zip(grads, oracle.gradients(d_out), strict=False):
    # Derivatives of the polynomials are X^2 times as large as they.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=5e-5 * np.abs(want).max()
    )


def _gradients(case, causal=True, num_nodes=32):
  """Returns gradients of attention in linear time, and those in float64."""
  oracle = Dense(case, causal)
  d_out = np.random.default_rng(2).standard_normal(oracle.out.shape)

  def loss(q, k, v):
    out = la.attend_linear(
      *(q, k, v, *case[3:]),
      head_dim=K,
      causal=causal,
      num_nodes=num_nodes,
      chunk=16,
    )
    return (out * d_out.astype(np.float32)).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*case[:3])
  return grads, oracle.gradients(d_out)[:3]


def test_gradients_where_no_query_is_near_0():
  # 75 positions are not of whole chunks of 16: some are added at the end.
  case = make_case()
  case = case._replace(q=case.q + 3 / K**0.5)
  for got, want in zip(*_gradients(case), strict=True):
    # Queries are larger here, and rounding is 1.0e-4 on some machines.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=2e-4 * np.abs(want).max()
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1e-5, 0.0])
def test_gradients_where_queries_are_the_same(scale, causal):
  case = make_case()
  case = case._replace(q=scale * case.q)
  grads, expected = _gradients(case, causal)
  for got, want in zip(grads, expected, strict=True):
    # That of keys is as small as the queries; no more than rounding is off.
    np.testing.assert_allclose(
      got, want, rtol=0, atol=2e-4 * max(np.abs(want).max(), 0.05)
    )


def test_gradients_beside_float64():
  case = make_case(slopes=SLOPES)
  expected, _ = _gradients(case)
  with jax.enable_x64(True):
    for got, want in zip(_gradients(case)[0], expected, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_at_moderate_ranges_is_within_5e_6_of_the_dense_path():
  shape = (1, 1024, 2, 32)
  case = make_case(shape=shape)
  distance = np.arange(1024)[:, None] - np.arange(1024)
  bias = np.where(distance >= 0, 0, -1e30).astype(np.float32)[None]
  dense = jax.jit(functools.partial(attention.attend, head_dim=32))(
    case.q[..., None], case.k[..., None], case.v, bias, None
  )
  np.testing.assert_allclose(run(case), dense, rtol=0, atol=5e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64, 75, 200])
def test_any_chunk_size(chunk):
  case = make_case(slopes=SLOPES, keep=make_keep())
  out = run(case, causal=False, chunk=chunk)
  np.testing.assert_allclose(out, Dense(case, False).out, rtol=0, atol=5e-6)


def test_many_blocks_of_chunks():
  # 700 positions times 8 heads of 2 texts: several steps of the scan.
  case = make_case(shape=(2, 700, 8, 2), slopes=np.repeat(SLOPES, 2))
  out = run(case, chunk=32)
  np.testing.assert_allclose(out, Dense(case, True).out, rtol=0, atol=5e-6)


def test_logits_far_apart_neither_overflow_nor_vanish():
  # Logits from -150 to 150, all of one sign in a row, and steep slopes.
  case = make_case(slopes=np.array([5, 2, 0.1, 1e-3], np.float32))
  case = case._replace(
    q=np.float32(50 + case.q), k=np.float32(np.clip(case.k, -1, 1))
  )
  assert bound_of(case, 64) < 1e-4
  for causal in (True, False):
    oracle = Dense(case, causal)
    limit = rounding(case, oracle) * spread(case)
    out = run(case, causal=causal, num_nodes=64, chunk=16)
    np.testing.assert_allclose(out, oracle.out, rtol=0, atol=limit)


def test_equal_queries_equal_keys_and_a_text_of_padding():
  case = make_case(keep=make_keep())
  keep = case.keep.copy()
  keep[1] = False
  case = case._replace(
    q=np.full_like(case.q, 7.3), k=np.full_like(case.k, 1.1), keep=keep
  )
  for causal in (True, False):
    out = run(case, causal=causal)
    np.testing.assert_allclose(out, Dense(case, causal).out, rtol=0, atol=5e-6)
    assert not out[1].any()


def test_with_a_given_span_nothing_depends_on_what_comes_later():
  span = make_span(-3.0, 3.0, -4.0, 4.0)
  case = make_case(slopes=SLOPES)
  other = make_case(seed=9, slopes=SLOPES)
  at = 40
  mixed = case._replace(
    **{
      n: np.concatenate(
        [getattr(case, n)[:, :at], getattr(other, n)[:, at:]], 1
      )
      for n in "qkv"
    }
  )
  a, b = (run(c, span=span, num_nodes=48, chunk=16) for c in (case, mixed))
  np.testing.assert_array_equal(a[:, :at], b[:, :at])
  assert (a[:, at:] != b[:, at:]).any((2, 3)).all()

  def early(k, v):
    out = la.attend_linear(
      case.q, k, v, head_dim=K, causal=True, num_nodes=48, span=span, chunk=16
    )
    return out[:, :at].sum()

  for grad in jax.jit(jax.grad(early, argnums=(0, 1)))(case.k, case.v):
    assert grad[:, :at].any()
    assert not grad[:, at:].any()


def test_decoding_continues_a_prompt():
  case = make_case(slopes=SLOPES, heads=(2, 1), keep=make_keep())
  span = make_span(-2.0, 2.0, -4.0, 4.0)
  extend = jax.jit(functools.partial(la.extend, head_dim=K, chunk=16))
  state = la.init_state(span, B, H, K, num_nodes=48)
  num_bytes = sum(x.nbytes for x in state[1:])
  assert num_bytes == 4 * B * H * (3 + 48 * (K + 1))
  outs, at = [], 0
  # A prompt of two chunks and a bit, another piece, then one at a time.
  for stop in (37, 45, *range(46, L + 1)):
    part = (x[:, at:stop] for x in case[:3])
    state, out = extend(state, *part, case.slopes, case.keep[:, at:stop])
    outs, at = [*outs, out], stop
  assert sum(x.nbytes for x in state[1:]) == num_bytes
  out = np.concatenate(outs, 1)
  np.testing.assert_allclose(out, Dense(case, True).out, rtol=0, atol=1e-5)
  whole = run(case, span=span, num_nodes=48)
  np.testing.assert_allclose(out, whole, rtol=0, atol=1e-5)


def test_results_have_the_dtype_of_the_values():
  case = make_case()
  low = case._replace(v=jnp.asarray(case.v, jnp.bfloat16))
  attend = functools.partial(
    la.attend_linear, head_dim=K, causal=True, num_nodes=32
  )
  out = jax.jit(attend)(*low)
  assert out.dtype == jnp.bfloat16
  want = Dense(case, True).out
  np.testing.assert_allclose(np.float64(out), want, rtol=0, atol=0.03)


def test_memory_of_training_grows_with_the_length_not_its_square():
  def loss(*arrays):
    return la.attend_checked(
      *arrays, head_dim=K, causal=True, tolerance=1e-4, num_nodes=(32,)
    ).sum()

  def needed(length):
    shapes = [(1, length, 8)] * 2 + [(1, length, 8, K), (8,)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    return grad.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

  short, long = needed(2048), needed(8192)
  assert long < 5 * short
  assert long < 8 * 8192**2  # a quarter of one matrix of logits of each head
