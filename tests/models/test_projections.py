import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.models import projections

KEY = jax.random.key(0, impl="rbg")  # compiles faster than threefry
B, L, D, H, K = 2, 3, 24, 3, 8
HEADS = tuple(range(H))

# float32 sums of at most 24 products of unit numbers: about 1e-6.
TOLERANCE = 5e-6


def _normal(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def _randomized(module, x):
  """Returns parameters of the module's shapes, none of them 0 or 1."""
  shapes = jax.eval_shape(module.init, KEY, x)["params"]
  return {
    name: _normal(n, *shapes[name].shape) for n, name in enumerate(shapes)
  }


def _project(x, w, b):
  """Returns x w + b in float64 by loops over heads and outputs."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  out = np.empty((*x.shape[:-1], *w.shape[1:]))
  for h in range(w.shape[1]):
    for k in range(w.shape[2]):
      out[..., h, k] = x @ w[:, h, k] + (0 if b is None else b[h, k])
  return out


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
  ("groups", "size"), [(0, K), (1, 1), (2, 2), (K, K)], ids=str
)
def test_output_axis_gives_one_number_a_group(groups, size, use_bias):
  module = projections.HeadProjection(H, K, groups, use_bias=use_bias)
  x = _normal(9, B, L, D)
  params = _randomized(module, x)
  shapes = {name: w.shape for name, w in params.items()}
  assert shapes == {
    "kernel": (D, H, size),
    **({"bias": (H, size)} if use_bias else {}),
  }
  expected = _project(x, params["kernel"], params.get("bias"))
  out = jax.jit(module.apply)({"params": params}, x)
  np.testing.assert_allclose(out, expected, rtol=0, atol=4 * TOLERANCE)


@pytest.mark.parametrize("groups", [1, 2, 8, D])
def test_input_axis_sums_the_channels_of_a_group(groups):
  module = projections.HeadProjection(H, K, groups, "input")
  x = _normal(9, B, L, D)
  params = _randomized(module, x)
  assert params["kernel"].shape == (groups, H, K)
  sums = np.zeros((B, L, groups))
  for channel in range(D):
    sums[..., channel // (D // groups)] += np.asarray(x[..., channel])
  expected = _project(sums, params["kernel"], params["bias"])
  out = jax.jit(module.apply)({"params": params}, x)
  np.testing.assert_allclose(out, expected, rtol=0, atol=4 * TOLERANCE)


def test_diagonal_projection_equals_a_diagonal_matrix():
  module = projections.DiagonalProjection(HEADS, K)
  x = _normal(9, B, L, D)
  params = _randomized(module, x)
  assert params["diagonal"].shape == (D, 1, 1)
  full = np.diag(np.asarray(params["diagonal"], np.float64).reshape(D))
  out = jax.jit(module.apply)({"params": params}, x)
  expected = np.einsum("bld,de->ble", x, full).reshape(B, L, H, K)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_diagonal_projection_of_some_heads_reads_their_channels():
  x = _normal(9, B, L, D)
  module = projections.DiagonalProjection(HEADS, K)
  w = _randomized(module, x)["diagonal"]
  heads = (0, H - 1)
  kept = w.reshape(H, K)[jnp.array(heads)].reshape(-1, 1, 1)
  few = projections.DiagonalProjection(heads, K)
  out = few.apply({"params": {"diagonal": kept}}, x)
  whole = module.apply({"params": {"diagonal": w}}, x)
  np.testing.assert_array_equal(out, whole[:, :, heads])


def test_diagonal_projection_as_the_identity_has_no_parameters():
  x = _normal(9, B, L, D)
  module = projections.DiagonalProjection((1, 2), K, is_identity=True)
  out, variables = module.init_with_output(KEY, x)
  np.testing.assert_array_equal(out, x.reshape(B, L, H, K)[:, :, 1:3])
  assert variables == {}


def test_diagonal_projection_starts_as_the_identity():
  x = _normal(9, B, L, D)
  out, _ = projections.DiagonalProjection(HEADS, K).init_with_output(KEY, x)
  np.testing.assert_array_equal(out, x.reshape(B, L, H, K))


@pytest.mark.parametrize(
  ("groups", "axis"),
  [(0, "output"), (1, "output"), (4, "output"), (8, "input")],
  ids=str,
)
def test_logits_of_a_folded_pair_start_at_unit_variance(groups, axis):
  num_heads, head_dim, width = 256, 16, 256
  module = projections.HeadProjection(num_heads, head_dim, groups, axis)
  x = _normal(9, 1, 1024, width)
  init = jax.jit(module.init_with_output)
  q, _ = init(KEY, x)
  k, _ = init(jax.random.fold_in(KEY, 1), x)
  copies = head_dim // q.shape[-1]  # by copies, as unfolded
  q, k = (np.repeat(np.asarray(y)[0], copies, -1) for y in (q, k))
  # The mean of (q k / sqrt(K))^2 over all pairs, without forming them.
  moment_q, moment_k = (np.einsum("lhj,lhk->hjk", y, y) / 1024 for y in (q, k))
  variance = np.einsum("hjk,hjk->h", moment_q, moment_k).mean() / head_dim
  # One draw of 256 heads and 1024 tokens scatters by 0.12 where G = 1.
  assert variance == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
  "module",
  [
    projections.HeadProjection(H, K, 2, dtype=jnp.bfloat16),
    projections.HeadProjection(H, K, 2, "input", dtype=jnp.bfloat16),
    projections.DiagonalProjection(HEADS, K, dtype=jnp.bfloat16),
  ],
  ids=["output", "input", "diagonal"],
)
def test_bfloat16_computes_near_float32_and_stores_float32(module):
  x = _normal(9, B, L, D)
  stored = jax.eval_shape(module.init, KEY, x)["params"]
  assert {w.dtype for w in jax.tree.leaves(stored)} == {jnp.dtype("float32")}
  params = {"params": _randomized(module, x)}
  out = jax.jit(module.apply)(params, x)
  exact = jax.jit(module.clone(dtype=jnp.float32).apply)(params, x)
  assert out.dtype == jnp.bfloat16
  # 8 bits: 2^-8 a factor and on the result, of values up to about 15.
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.15)
