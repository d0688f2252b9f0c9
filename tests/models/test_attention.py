"""Attention: its function, its positions, and the layer, against NumPy."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.models import attention, exact_attention
from tests.models import oracle
from tests.models.layers import D, H, K, make_layer, normal, randomized

B, L = 2, 6

# Sums of a few dozen float32 products of unit numbers.
TOLERANCE = 1e-5


def alibi_bias(slopes, causal, length=L):
  bias = np.zeros((len(slopes), length, length))
  for h, i, j in np.ndindex(bias.shape):
    hidden = causal and j > i
    bias[h, i, j] = -np.inf if hidden else -slopes[h] * abs(i - j)
  return bias


@jax.jit
def attend(q, k, v, bias, keep):
  k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  return exact_attention.attend(q, k, v, bias, keep, head_dim=K)


@pytest.mark.parametrize(
  ("groups", "key_heads", "value_heads"),
  [(K, 4, 4), (2, 4, 4), (1, 2, 2), (K, 2, 4), (2, 1, 4)],
  ids=str,
)
def test_attend_equals_attention_on_unfolded_rows(
  groups, key_heads, value_heads
):
  q, k = normal(0, B, L, H, groups), normal(1, B, L, key_heads, groups)
  v = normal(2, B, L, value_heads, K)
  bias = alibi_bias([0.1, 0.2, 0.5, 1.0], causal=True)
  keep = jnp.asarray(np.eye(B, L, 1) + np.eye(B, L, 4) == 0)
  bias32 = jnp.asarray(np.maximum(bias, -1e30), jnp.float32)
  out = attend(q, k, v, bias32, keep)
  expected = oracle.attend(q, k, v, bias, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_row_without_any_key_is_the_finite_mean_of_the_values():
  q, k, v = (normal(n, B, L, H, K) for n in range(3))
  keep, bias = jnp.zeros((B, L), bool), jnp.zeros((1, L, L))

  def summed(q):
    return attend(q, k, v, bias, keep).sum()

  out = attend(q, k, v, bias, keep)
  expected = np.broadcast_to(np.mean(v, 1, keepdims=True), out.shape)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
  np.testing.assert_array_equal(jax.jit(jax.grad(summed))(q), np.zeros_like(q))


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
  np.testing.assert_allclose(exact_attention.alibi_slopes(num_heads), slopes)


def _rotate(x, base):
  frequency = attention.rope_frequencies(x.shape[-1], base)
  return attention.rotate(x, frequency[None], jnp.arange(x.shape[1]))


def test_rope_scaling_slows_only_slow_rotations():
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


def test_rotate_bfloat16_uses_float32_angles():
  x = jnp.bfloat16(normal(0, 1, 600, 1, 8))
  out = _rotate(x, 10000.0)
  assert out.dtype == jnp.bfloat16
  expected = oracle.turned(x, 10000.0)
  # Only the result is rounded; a bfloat16 position would be off by 2 radians.
  np.testing.assert_allclose(
    out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3
  )


ONE = {"groups": 1, "values": "diagonal"}
ROWS = {"groups": 4, "axis": "input", "values": "diagonal"}
SHARED = {"positions": "rope", "num_kv_heads": 2, "use_bias": False}
ONE_KEY = {"positions": "none", "num_kv_heads": 1, "causal": False}
CASES = {
  "dense_alibi": ({}, {}),
  "dense_alibi_both_ways": ({}, {"causal": False}),
  "dense_rope_shared": ({}, SHARED),
  "folded_alibi": (ONE, {}),
  "folded_one_key_head": (ONE | {"groups": 2}, ONE_KEY),
  "folded_rope_shared": (ONE | {"groups": 2}, SHARED),
  "input_rows_both_ways": (ROWS, {"causal": False}),
  "input_rows_rope": (ROWS, SHARED),
  "low_rank_values_shared": ({"groups": 2, "value_rank": 3}, SHARED),
}


@pytest.mark.parametrize(("fold", "kind"), CASES.values(), ids=CASES)
def test_layer_equals_the_oracle_on_its_parameters(fold, kind):
  module, config = make_layer(fold, **kind)
  params, x = randomized(module), normal(9, B, L, D)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [4]]))
  layer = oracle.Model(config, {}).attention
  expected = layer(*oracle.wide(params, x), keep)
  out = jax.jit(module.apply)({"params": params}, x, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_slopes_start_geometric_and_are_learned(causal):
  module, config = make_layer(causal=causal)
  x = normal(9, B, L, D)
  started = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)["params"]
  np.testing.assert_allclose(
    np.exp(started["log_slopes"]), [2**-2, 2**-4, 2**-6, 2**-8], rtol=1e-6
  )
  params, cotangent = randomized(module), np.asarray(normal(8, B, L, D))

  def summed(log_slopes):
    changed = params | {"log_slopes": log_slopes}
    return (module.apply({"params": changed}, x) * cotangent).sum()

  wide, x64 = oracle.wide(params, x)
  layer = oracle.Model(config, {}).attention

  def summed64(log_slopes):
    changed = wide | {"log_slopes": log_slopes}
    return (layer(changed, x64, np.ones((B, L), bool)) * cotangent).sum()

  log_slopes = wide["log_slopes"]
  differences = [
    (summed64(log_slopes + step) - summed64(log_slopes - step)) / 2e-4
    for step in 1e-4 * np.eye(H)
  ]
  gradient = jax.jit(jax.grad(summed))(params["log_slopes"])
  assert np.abs(gradient).min() > 1e-2
  np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-4)


def test_parameters_are_float32_with_x64():
  module, _ = make_layer()
  with jax.enable_x64(True):
    x = jnp.zeros((1, L, D), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
  assert {w.dtype for w in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_dense_layer_equals_flax_multi_head_attention():
  module, _ = make_layer(positions="none", causal=False)
  params, x = randomized(module), normal(9, B, L, D)
  reference = nn.MultiHeadDotProductAttention(H)
  names = {"query": "q", "key": "k", "value": "v", "out": "o"}
  weights = {theirs: params[ours] for theirs, ours in names.items()}
  out = jax.jit(module.apply)({"params": params}, x)
  expected = jax.jit(reference.apply)({"params": weights}, x)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)


def test_logits_of_bfloat16_are_summed_in_float32():
  size = 512
  q, k = (jnp.bfloat16(normal(n, B, L, H, size)) for n in (0, 1))
  bias = jnp.zeros((1, L, L))
  logits = jax.jit(
    exact_attention.attention_logits, static_argnames="head_dim"
  )(q.swapaxes(1, 2), k.transpose(0, 2, 3, 1), bias, None, head_dim=size)
  q, k = oracle.wide(q, k)
  expected = np.einsum("blhk,bmhk->bhlm", q, k) / size**0.5
  # Products of bfloat16 numbers are exact in float32; in bfloat16, sums of up
  # to 70 would be off by 0.1.
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
  q, k = jnp.bfloat16(q), jnp.bfloat16(k)
  out = attend(q, k, k, bias, None)
  assert out.dtype == jnp.bfloat16


def test_frequencies_of_rotary_pairs_have_no_gradient():
  module, _ = make_layer({"groups": 2, "rope": "pairs"}, positions="rope")
  params, x = randomized(module), normal(9, B, L, D)

  @jax.jit
  @jax.grad
  def gradient(params):
    return (module.apply({"params": params}, x) ** 2).sum()

  found = gradient(params)
  np.testing.assert_array_equal(found["frequency"], np.zeros((H, 1)))
  assert np.abs(found["q"]["kernel"]).min() > 0


def test_relative_bias_is_added_per_head_and_not_trained():
  module, config = make_layer(
    positions="none", causal=False, relative_buckets=32
  )
  params, x = randomized(module), normal(9, B, L, D)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [4]]))
  layer = oracle.Model(config, {}).attention
  expected = layer(*oracle.wide(params, x), keep)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    out = module.apply({"params": params}, x, keep)
    return (out**2).sum(), out

  found, out = gradient(params)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)
  assert not np.any(found["relative_bias"])


def test_slopes_of_kept_heads_are_their_own():
  module, _ = make_layer(heads=((0, 3),))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, L, D)))
  slopes = np.exp(params["params"]["log_slopes"])
  np.testing.assert_allclose(slopes, [2**-2, 2**-8], rtol=1e-6)


@pytest.mark.parametrize(("causal", "rank"), [(True, 0), (False, 3)])
def test_linear_layer_equals_dense_layer(causal, rank):
  dense, _ = make_layer({"groups": 1, "value_rank": rank}, causal=causal)
  linear = dense.clone(
    shape=dataclasses.replace(dense.shape, attention="linear")
  )
  params = {"params": randomized(dense)}
  x = normal(9, B, L, D)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [4]]))
  programs = [jax.make_jaxpr(m.apply)(params, x, keep) for m in (dense, linear)]
  assert ["cond[" in str(program) for program in programs] == [False, True]
  outs = [jax.jit(m.apply)(params, x, keep) for m in (dense, linear)]
  # At kept tokens; elsewhere a row may see no key.
  np.testing.assert_allclose(
    *(np.asarray(out)[keep] for out in outs), rtol=0, atol=10 * TOLERANCE
  )
