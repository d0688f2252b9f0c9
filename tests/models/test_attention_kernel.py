"""The attention kernel for TPUs, interpreted on CPUs, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from folding.models import attention_kernel, exact_attention
from tests.models import oracle
from tests.models.layers import K, normal

L = 130  # two blocks of 128 positions, the second one padded
TOLERANCE = 1e-5  # sums of a hundred float32 products


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(attention_kernel, "SIZE", 128)


def make_mesh(*sizes):
  kinds = (AxisType.Auto,) * 3
  return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), kinds)


def results(inputs, keep, cotangent, **options):
  """Returns the output, and the gradients of its product with a cotangent.

  `inputs` are queries, keys, values and, with ALiBi, slopes.
  """
  options = {"causal": True, "mesh": make_mesh(1, 1, 1)} | options
  attend = functools.partial(
    attention_kernel.by_splash, head_dim=K, interpret=True, **options
  )

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(inputs):
    q, k, v, *slopes = inputs
    out = attend(q, k, v, keep, *slopes)
    return (out * cotangent).sum(), out

  (_, out), gradients = run(inputs)
  return out, gradients


# Groups, heads of keys and of values, numbers per value, options, padding.
SLOPES = {"slopes": (0.03, 0.7)}
WINDOW_TWO_WAYS = {"window": 7, "causal": False}
CASES = {
  "causal": (K, 2, 2, K, {}, None),
  "both_ways": (K, 2, 2, K, {"causal": False}, None),
  "shared_keys_window": (K, 1, 1, K, {"window": 20}, None),
  "capped_padded": (K, 2, 2, K, {"cap": 0.5}, "right"),
  "folded_left_padded": (1, 2, 2, K, {}, "left"),
  "folded_low_rank_window": (2, 1, 2, 3, WINDOW_TWO_WAYS, "right"),
  "alibi": (K, 2, 2, K, SLOPES, None),
  "alibi_folded_shared_keys": (1, 1, 2, 3, SLOPES | {"window": 20}, "left"),
}


@pytest.mark.parametrize(
  ("groups", "key_heads", "value_heads", "r", "options", "padded"),
  CASES.values(),
  ids=CASES,
)
def test_kernel_equals_loops_in_float64(
  groups, key_heads, value_heads, r, options, padded
):
  inputs = (
    normal(0, 1, L, 2, groups),
    normal(1, 1, L, key_heads, groups),
    normal(2, 1, L, value_heads, r),
  )
  options = dict(options)
  if "slopes" in options:
    inputs += (jnp.array(options.pop("slopes")),)
  at, keep = np.arange(L), np.ones((1, L), bool)
  if padded:
    keep[0] = at >= 40 if padded == "left" else at < 99
  cotangent = np.asarray(normal(3, 1, L, 2, r)) * keep[..., None, None]
  mask = jnp.asarray(keep) if padded else None
  out, gradients = results(inputs, mask, cotangent, **options)

  distance = at[:, None] - at
  is_seen = np.abs(distance) < options.get("window", L)
  if options.get("causal", True):
    is_seen &= distance >= 0
  bias = np.where(is_seen | ~keep[0, :, None], 0, -np.inf)[None]
  cap = options.get("cap", np.inf)

  def attend(q, k, v, *slopes):
    v = np.pad(v, [(0, 0)] * 3 + [(0, K - r)])
    alibi = sum(-slope[:, None, None] * np.abs(distance) for slope in slopes)
    return oracle.attend(q, k, v, bias + alibi, keep, cap)[..., :r]

  inputs = oracle.wide(*inputs)
  expected = attend(*inputs)
  np.testing.assert_allclose(
    *(np.asarray(x)[keep] for x in (out, expected)), rtol=0, atol=TOLERANCE
  )
  # The derivative in a random direction.
  noise = [normal(4, *x.shape) for x in inputs]
  directions = oracle.wide(*noise)
  ahead, behind = (
    attend(*map(lambda x, d: x + e * d, inputs, directions))
    for e in (1e-5, -1e-5)
  )
  slope = ((ahead - behind) * cotangent).sum() / 2e-5
  found = sum(
    (np.asarray(g) * d).sum()
    for g, d in zip(gradients, directions, strict=True)
  )
  assert found == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_alibi_of_the_kernel_is_exact_in_bfloat16():
  slopes, length = jnp.array([0.0123, 3.7]), 20_000

  @jax.jit
  def make():
    channels = attention_kernel.alibi_channels(slopes, length)
    return [x.astype(jnp.bfloat16) for x in channels]

  (slopes, *channels) = oracle.wide(slopes, *make())
  queries = [0, 9_000, length - 1]
  logits = channels[0][queries].swapaxes(0, 1) @ channels[1].T
  for i, at in enumerate(queries):
    apart = logits[:, i] - logits[:, i, at, None]
    expected = slopes[:, None] * (np.arange(length) - at)
    np.testing.assert_allclose(apart, expected, rtol=1e-7)


def test_gradients_of_slopes_are_close_in_bfloat16():
  inputs = [normal(i, 1, 256, 4, K).astype(jnp.bfloat16) for i in range(3)]
  slopes = jnp.array([0.004, 0.03, 0.3, 1.7])
  cotangent = normal(3, 1, 256, 4, K)
  _, gradients = results((*inputs, slopes), None, cotangent)

  @jax.jit
  @jax.grad
  def expected(slopes):
    out = exact_attention.attend_whole(
      *(x.astype(jnp.float32) for x in inputs),
      exact_attention.Biases(slopes),
      None,
      causal=True,
      head_dim=K,
    )
    return (out * cotangent).sum()

  np.testing.assert_allclose(gradients[3], expected(slopes), rtol=2**-7)


# Three rows and one head do not divide.
@pytest.mark.parametrize(("rows", "key_heads"), [(4, 2), (3, 1)])
def test_kernel_on_a_mesh_equals_blocks(rows, key_heads):
  q, k = normal(0, rows, L, 4, K), normal(1, rows, L, key_heads, K)
  v, cotangent = normal(2, rows, L, key_heads, K), normal(3, rows, L, 4, K)
  at = np.arange(L)
  keep = jnp.asarray(at < np.array([[L], [50], [60], [L]])[:rows])
  cotangent *= keep[..., None, None]
  mesh = make_mesh(2, 2, 2)
  out, gradients = results((q, k, v), keep, cotangent, mesh=mesh)

  def attend(q, k, v):
    out = exact_attention.attend_whole(
      q, k, v, exact_attention.Biases(), keep, causal=True, head_dim=K
    )
    return (out * cotangent).sum(), out

  reference = jax.jit(jax.grad(attend, argnums=(0, 1, 2), has_aux=True))
  expected_gradients, expected = reference(q, k, v)
  keep = np.asarray(keep)
  pairs = [(np.asarray(out)[keep], np.asarray(expected)[keep])]
  pairs += zip(gradients, expected_gradients, strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_kernels_are_for_accelerators_in_the_context():
  heads = [normal(i, 1, L, 2, K) for i in range(3)]
  attend = functools.partial(
    attention_kernel.attend, *heads, None, causal=True, head_dim=K
  )
  mesh = make_mesh(2, 2, 2).abstract_mesh
  assert attend() is None
  with jax.sharding.use_abstract_mesh(mesh):
    assert attend() is None


# XLA's attention has the arguments of cuDNN's and runs anywhere.
@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize(
  ("groups", "key_heads", "value_heads", "r", "causal", "slopes"),
  [
    (K, 2, 2, K, True, None),
    (K, 1, 1, K, False, None),
    (2, 1, 2, 3, True, (0.03, 0.7)),
  ],
  ids=["causal", "shared_keys_both_ways", "folded_low_rank_alibi"],
)
def test_kernel_of_gpus_equals_blocks(
  implementation, groups, key_heads, value_heads, r, causal, slopes
):
  if implementation == "cudnn" and jax.default_backend() != "gpu":
    pytest.skip("cuDNN's kernel runs on GPUs only")
  dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
  inputs = [
    normal(0, 2, L, 2, groups).astype(dtype),
    normal(1, 2, L, key_heads, groups).astype(dtype),
    normal(2, 2, L, value_heads, r).astype(dtype),
  ]
  slopes = None if slopes is None else jnp.array(slopes)
  cotangent = normal(3, 2, L, 2, r)

  def run(attend, dtype, inputs):
    def loss(inputs, slopes):
      q, k, v = (x.astype(dtype) for x in inputs)
      out = attend(q, k, v, slopes)
      return (out * cotangent).sum(), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, out = grad(inputs, slopes)
    return jax.tree.leaves((out, gradients))

  def kernel(*inputs):
    return attention_kernel.by_cudnn(
      *inputs, causal=causal, head_dim=K, implementation=implementation
    )

  def reference(q, k, v, slopes):
    biases = exact_attention.Biases(slopes)
    return exact_attention.attend_whole(
      q, k, v, biases, None, causal=causal, head_dim=K
    )

  found = run(kernel, dtype, inputs)
  expected = run(reference, jnp.float32, inputs)
  for a, b in zip(found, expected, strict=True):
    scale = float(np.abs(b).max())
    tolerance = (1e-5 if dtype == jnp.float32 else 2e-2) * scale
    np.testing.assert_allclose(
      np.asarray(a, np.float32), b, rtol=0, atol=tolerance
    )


def test_cudnn_takes_bfloat16_and_128_channels():
  def fits(size, dtype=jnp.bfloat16, slopes=None):
    heads = [normal(i, 1, 4, 2, size).astype(dtype) for i in range(3)]
    return attention_kernel.fits_cudnn(*heads, slopes)

  slopes = jnp.ones(2)
  assert fits(128) and fits(118, slopes=slopes)
  assert not fits(136)
  assert not fits(128, slopes=slopes)
  assert not fits(8, jnp.float32)
