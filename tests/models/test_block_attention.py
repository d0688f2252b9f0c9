"""Attention in blocks against the same attention with all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as config_lib
from folding.models import block_attention, exact_attention
from tests import jaxprs
from tests.models import oracle
from tests.models.layers import D, H, K, make_layer, normal, randomized

B, L = 2, 29
SIZE = 8  # so that 29 positions are four blocks, the last one padded

# Sums of a few hundred float32 products, relative to the largest result. The
# gradient of the biases of keys is 0 up to rounding.
TOLERANCE = 1e-5


def results(module, params, x, keep, size, queries=L):
  """Returns the output and its gradients in loops over blocks, or unrolled.

  Args:
    size: Most positions of a block of the loops; with L there are none.
    queries: Most queries of an unrolled block.
  """
  cotangent = np.asarray(normal(8, B, L, D))
  if keep is not None:  # no other row has an effect on a model's loss
    cotangent = np.where(keep[..., None], cotangent, 0)

  def output(params, x):
    out = module.apply({"params": params}, x, keep)
    return (out * cotangent).sum(), out

  function = jax.jit(jax.value_and_grad(output, argnums=(0, 1), has_aux=True))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(block_attention, "SIZES", {"default": size})
    patch.setattr(exact_attention, "QUERIES", queries)
    program = function.trace(params, x)
    (_, out), gradients = program.lower().compile()(params, x)
  loops = str(program.jaxpr).count("scan[")
  assert bool(loops) == (size < L)
  return {"out": np.asarray(out) * (cotangent != 0), "gradients": gradients}


ONE = {"groups": 1, "values": "diagonal"}
ROWS = {"groups": 4, "axis": "input", "values": "diagonal"}
SHARED = {"positions": "rope", "num_kv_heads": 2, "use_bias": False}
TWO_WAYS = {"causal": False}
CASES = {
  "dense_alibi": ({}, {}, None),
  "low_rank_values": ({"groups": 2, "value_rank": 3}, {}, None),
  "dense_alibi_both_ways": ({}, TWO_WAYS, None),
  "dense_alibi_padded": ({}, {}, "left"),
  "dense_rope_shared_window": ({}, SHARED | {"window": 6}, "right"),
  "folded_one": (ONE, {}, None),
  "folded_one_key_head_relative": (
    ONE | {"groups": 2},
    TWO_WAYS | {"positions": "none", "num_kv_heads": 1, "relative_buckets": 32},
    "right",
  ),
  "folded_rope_pairs_capped": (
    ONE | {"groups": 2, "rope": "pairs"},
    SHARED | {"attention_cap": 0.5},
    None,
  ),
  "input_rows_window_both_ways": (ROWS, TWO_WAYS | {"window": 10}, None),
}


@pytest.mark.parametrize(("fold", "kind", "padded"), CASES.values(), ids=CASES)
def test_layer_in_blocks_equals_the_whole(fold, kind, padded):
  module, _ = make_layer(fold, **kind)
  params, x = randomized(module, 0.5), normal(9, B, L, D)
  at, keep = np.arange(L), None
  if padded == "left":
    keep = jnp.asarray(at >= np.array([[0], [SIZE + 3]]))
  if padded == "right":
    keep = jnp.asarray(at < np.array([[L], [SIZE + 3]]))
  whole = results(module, params, x, keep, L)
  looped = results(module, params, x, keep, SIZE)
  assert_near(looped, whole)
  if module.shape.causal:
    assert_near(results(module, params, x, keep, L, SIZE), whole)


def assert_near(found, expected):
  for (path, a), b in zip(
    jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
  ):
    name, scale = jax.tree_util.keystr(path), float(np.abs(a).max())
    np.testing.assert_allclose(
      b, a, rtol=0, atol=TOLERANCE * max(scale, 5), err_msg=name
    )


@functools.partial(jax.jit, static_argnames="config")  # with `small` alone
def attend(q, k, v, keep, config, slopes=None):
  return exact_attention.attend_whole(
    q,
    k,
    v,
    exact_attention.Biases(slopes),
    keep,
    causal=config.causal,
    window=config.window,
    head_dim=K,
  )


@pytest.fixture(params=["looped", "unrolled"])
def small(monkeypatch, request):
  if request.param == "looped":
    monkeypatch.setattr(block_attention, "SIZES", {"default": SIZE})
  monkeypatch.setattr(exact_attention, "QUERIES", SIZE)
  attend.clear_cache()


def test_blocks_equal_loops_in_float64(small):
  q, k, v = normal(0, B, L, H, 2), normal(1, B, L, 2, 2), normal(2, B, L, H, K)
  slopes = jnp.array([0.1, 0.2, 0.5, 1.0])
  keep = jnp.asarray(np.eye(B, L, 1) + np.eye(B, L, 4) == 0)
  config = config_lib.ModelConfig(causal=True, window=11)
  out = attend(q, k, v, keep, config, slopes)
  distance = np.arange(L)[:, None] - np.arange(L)
  bias = -np.asarray(slopes)[:, None, None] * distance
  bias = np.where((distance >= 0) & (distance < 11), bias, -np.inf)
  expected = oracle.attend(q, k, v, bias, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, SIZE, SIZE + 1, SIZE + 2])
def test_window_at_the_edge_of_a_block_hides_no_key(small, window, causal):
  config = config_lib.ModelConfig(causal=causal, window=window)
  # One key is much larger than all others: wherever it is seen, it wins.
  q = jnp.ones((1, 4 * SIZE, 1, K))
  at = np.arange(4 * SIZE)
  for key in (SIZE - 1, SIZE, 2 * SIZE):
    v = np.zeros((1, 4 * SIZE, 1, K), np.float32)
    v[:, key] = 1.0
    out = np.asarray(attend(q, 50 * v, v, None, config))[0, :, 0, 0]
    seen = np.abs(at - key) < window
    seen &= (at >= key) if causal else True
    np.testing.assert_array_equal(np.round(out, 3), seen)


def test_bfloat16_is_summed_in_float32(small):
  config = config_lib.ModelConfig(causal=False)
  q, k, v = (jnp.bfloat16(normal(n, B, L, H, K)) for n in range(3))
  out = attend(q, k, v, None, config)
  assert out.dtype == jnp.bfloat16
  expected = oracle.attend(q, k, v, np.zeros((1, L, L)), None)
  # Weights and the result are rounded to 8 bits, sums are not.
  np.testing.assert_allclose(
    out.astype(jnp.float32), expected, rtol=0, atol=2**-7
  )


def test_row_without_any_key_is_finite(small):
  config = config_lib.ModelConfig(causal=True)
  q, k, v = (normal(n, B, L, H, K) for n in range(3))
  keep = jnp.asarray(np.arange(L) >= np.array([[0], [L]]))

  def total(q, k, v):
    return attend(q, k, v, keep, config).sum()

  found = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


def test_long_sequences_have_no_array_of_all_logits():
  length = 4096
  module, _ = make_layer({"groups": 1})
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, length, D))
  )
  x = jax.ShapeDtypeStruct((B, length, D), jnp.float32)

  def largest():
    def loss(params, x):
      return (module.apply(params, x) ** 2).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(shapes, x)
    return max(jaxprs.sizes(program.jaxpr))

  size = max(block_attention.SIZES.values())
  assert largest() <= max(B * length * D, B * H * size**2)
  with pytest.MonkeyPatch.context() as patch:
    # All at once: the test can see it.
    patch.setattr(block_attention, "SIZES", {"default": length})
    patch.setattr(exact_attention, "QUERIES", length)
    assert largest() == B * H * length**2


def test_prefill_of_a_long_prompt_equals_the_whole(monkeypatch):
  module, _ = make_layer({"groups": 2})
  params, x = {"params": randomized(module, 0.5)}, normal(9, B, L, D)
  keep = jnp.asarray(np.arange(L) >= np.array([[0], [5]]))

  def prefill():
    apply = jax.jit(functools.partial(module.apply, method="prefill"))
    out, _ = apply(params, x, keep, None)
    return np.asarray(out)[keep]

  whole = prefill()
  monkeypatch.setattr(block_attention, "SIZES", {"default": SIZE})
  np.testing.assert_allclose(prefill(), whole, rtol=0, atol=TOLERANCE)
