"""Attention of queries, keys and values as given, and ALiBi and RoPE alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.models import attention
from tests.models import oracle
from tests.models.attention_cases import (
  TOLERANCE,
  B,
  H,
  K,
  L,
  alibi_bias,
  normal,
)

attend = jax.jit(attention.attend, static_argnames="head_dim")


@pytest.mark.parametrize("groups", [1, 2, K])
@pytest.mark.parametrize(
  ("key_heads", "value_heads"), [(4, 4), (2, 2), (2, 4), (1, 4)], ids=str
)
def test_attend_equals_attention_on_unfolded_rows(
  groups, key_heads, value_heads
):
  q, k = normal(0, B, L, H, groups), normal(1, B, L, key_heads, groups)
  v = normal(2, B, L, value_heads, K)
  bias = alibi_bias([0.1, 0.2, 0.5, 1.0], causal=True)
  keep = jnp.asarray(np.eye(B, L, 1) + np.eye(B, L, 4) == 0)
  bias32 = jnp.asarray(np.maximum(bias, -1e30), jnp.float32)
  out = attend(q, k, v, bias32, keep, head_dim=K)
  expected = oracle.attend(q, k, v, bias, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_attend_takes_fewer_queries_than_keys_and_one_bias_for_all_heads():
  q, k, v = (normal(n, B, 2 if n == 0 else L, H, K) for n in range(3))
  bias = normal(3, 1, 2, L)
  out = attend(q, k, v, bias, None, head_dim=K)
  expected = oracle.attend(q, k, v, bias, None)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_dense_attend_equals_jax_dot_product_attention(key_heads):
  q = normal(0, B, L, H, K)
  k, v = (normal(n, B, L, key_heads, K) for n in (1, 2))
  bias = normal(3, H, L, L)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [3]]))
  out = attend(q, k, v, bias, keep, head_dim=K)
  expected = jax.nn.dot_product_attention(
    q, k, v, bias=bias[None], mask=keep[:, None, None]
  )
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_a_row_without_any_key_is_the_finite_mean_of_the_values():
  q, k, v = (normal(n, B, L, H, K) for n in range(3))
  keep, bias = jnp.zeros((B, L), bool), jnp.zeros((1, L, L))

  def summed(q):
    return attend(q, k, v, bias, keep, head_dim=K).sum()

  out = attend(q, k, v, bias, keep, head_dim=K)
  expected = np.broadcast_to(np.mean(v, 1, keepdims=True), out.shape)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
  np.testing.assert_array_equal(jax.jit(jax.grad(summed))(q), np.zeros_like(q))


@pytest.mark.parametrize("groups", [1, K])
def test_bfloat16_attend_is_near_float64(groups):
  q, k = (jnp.bfloat16(normal(n, B, L, H, groups)) for n in (0, 1))
  v = jnp.bfloat16(normal(2, B, L, H, K))
  bias = jnp.zeros((1, L, L))
  out = attend(q, k, v, bias, None, head_dim=K)
  assert out.dtype == jnp.bfloat16
  # 2^-8 on queries, logits, weights and the result, of values up to 3.
  np.testing.assert_allclose(
    out.astype(jnp.float32),
    oracle.attend(q, k, v, bias, None),
    rtol=0,
    atol=0.06,
  )


@pytest.mark.parametrize(
  ("num_heads", "slopes"),
  [
    (1, [2**-8]),
    (4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
  ],
  ids=["1", "4", "8"],
)
def test_alibi_slopes_are_those_of_the_paper(num_heads, slopes):
  np.testing.assert_allclose(attention.alibi_slopes(num_heads), slopes)


@pytest.mark.parametrize("num_heads", [3, 16])
def test_alibi_slopes_are_a_geometric_series(num_heads):
  slopes = attention.alibi_slopes(num_heads)
  assert slopes[-1] == 2**-8
  np.testing.assert_allclose(slopes[1:] / slopes[:-1], slopes[0], rtol=1e-12)


def _rotate(x, base):
  frequency = attention.rope_frequencies(x.shape[-1], base)
  return attention.rotate(x, frequency[None])


def test_slow_rotations_are_scaled_and_fast_ones_are_not():
  plain = attention.rope_frequencies(16, 100.0)
  linear = attention.rope_frequencies(16, 100.0, (4.0,))
  np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
  low, high, length = 1.0, 3.0, 60.0
  scaled = attention.rope_frequencies(16, 100.0, (4.0, low, high, length))
  kinds = set()
  for before, after in zip(plain, scaled, strict=True):
    turns = length * before / (2 * math.pi)
    if turns < low:
      kinds.add("slow")
      expected = before / 4
    elif turns > high:
      kinds.add("fast")
      expected = before
    else:
      kinds.add("between")
      share = (turns - low) / (high - low)
      expected = share * before + (1 - share) * before / 4
    assert after == pytest.approx(expected, rel=1e-6)
  assert kinds == {"slow", "fast", "between"}


@pytest.mark.parametrize("base", [10000.0, 3.0])
def test_rotate_multiplies_complex_numbers(base):
  x = normal(0, B, L, H, 8)
  out = _rotate(x, base)
  np.testing.assert_allclose(
    out, oracle.turned(x, base), rtol=0, atol=TOLERANCE
  )


def test_rotate_keeps_norms_and_the_first_position():
  x = normal(0, B, L, H, 8)
  out = _rotate(x, 10000.0)
  np.testing.assert_array_equal(out[:, 0], x[:, 0])
  np.testing.assert_allclose(
    np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
  )


def test_rotated_logits_depend_on_the_distance_alone():
  q, k = (jnp.tile(normal(n, 1, 1, H, 8), (1, L, 1, 1)) for n in (0, 1))
  q, k = _rotate(q, 100.0), _rotate(k, 100.0)
  logits = np.einsum("blhk,bmhk->hlm", q, k)
  np.testing.assert_allclose(
    logits[:, 1:, 1:], logits[:, :-1, :-1], rtol=0, atol=TOLERANCE
  )
  # ... and they do depend on it, to either side.
  distances = np.concatenate([logits[:, 0, ::-1], logits[:, 1:, 0]], -1)
  assert np.abs(np.diff(distances)).min() > 1e-3


def test_rotate_turns_bfloat16_by_float32_angles():
  x = jnp.bfloat16(normal(0, 1, 600, 1, 8))
  out = _rotate(x, 10000.0)
  assert out.dtype == jnp.bfloat16
  expected = oracle.turned(x, 10000.0)
  # Only the result is rounded; a bfloat16 position would be off by 2 radians.
  np.testing.assert_allclose(
    out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3
  )
