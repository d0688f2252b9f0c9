import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as config_lib
from folding.models import attention
from tests.models import oracle

B, L, H, K = 2, 6, 4, 4
D = H * K

attend = jax.jit(attention.attend, static_argnames="head_dim")

# Sums of a few dozen float32 products of unit numbers.
TOLERANCE = 1e-5


def _normal(seed, *shape):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def _bias(slopes, causal, length=L):
  bias = np.zeros((len(slopes), length, length))
  for h, i, j in np.ndindex(bias.shape):
    hidden = causal and j > i
    bias[h, i, j] = -np.inf if hidden else -slopes[h] * abs(i - j)
  return bias


def _layer(params, x, config, slopes, keep):
  """The attention layer in float64, from its stored parameters."""
  params, x = oracle.wide(params, x)

  def project(w, rows_repeat):
    kernel = np.repeat(w["kernel"], rows_repeat, 0)
    out = np.einsum("bld,dhg->blhg", x, kernel)
    return out + w["bias"] if "bias" in w else out

  q, k = (project(params[n], D // len(params[n]["kernel"])) for n in "qk")
  if "diagonal" in params["v"]:
    blocks = params["v"]["diagonal"]
    v = x.reshape(*x.shape[:2], *blocks.shape[:2])[..., None] * blocks
    v = v.sum(-2).reshape(*x.shape[:2], H, K)
  else:
    v = project(params["v"], 1)
  if config.positions == "rope":
    q, k = (
      oracle.turned(oracle.unfolded(y, K), config.rope_base) for y in (q, k)
    )
  out = oracle.attend(q, k, v, _bias(slopes, config.causal), keep)
  out = np.einsum("blhk,hkd->bld", out, params["o"]["kernel"])
  return out + params["o"]["bias"] if "bias" in params["o"] else out


def _model(fold=None, **fields):
  """Returns an attention layer of width D and its config."""
  shape = {"num_layers": 1, "width": D, "num_heads": H} | fields
  config = config_lib.resolve(
    config_lib.Config(
      task="classify",
      preset="none",
      model=config_lib.ModelConfig(**shape),
      fold=config_lib.FoldConfig(**(fold or {})),
    )
  )
  init = nn.initializers.lecun_normal()
  return attention.Attention(config.model, config.fold, init), config.model


def _randomized(module):
  x = jnp.zeros((1, L, D))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  values = [_normal(n, *leaf.shape) for n, leaf in enumerate(leaves)]
  return jax.tree.unflatten(tree, values)


FOLDS = {
  "dense": {},
  "irc1_dwc": {"groups": 1, "v_block": 1},
  "irc2_blocks": {"groups": 2, "v_block": 8},
  "input_rows": {"groups": 4, "axis": "input", "v_block": 2},
}
KINDS = {
  "alibi": {"positions": "alibi"},
  "alibi_both_ways": {"positions": "alibi", "causal": False},
  "rope_grouped": {"positions": "rope", "num_kv_heads": 2, "use_bias": False},
  "one_kv_head": {"positions": "none", "num_kv_heads": 1, "causal": False},
}


def _each(*names):
  """Parametrizes over "fold-kind" names."""
  pairs = [name.split("-") for name in names]
  pairs = [(FOLDS[fold], KINDS[kind]) for fold, kind in pairs]
  return pytest.mark.parametrize(("fold", "kind"), pairs, ids=names)


a_few = _each(
  *("dense-rope_grouped", "irc1_dwc-alibi"),
  *("irc2_blocks-one_kv_head", "input_rows-alibi_both_ways"),
)


@pytest.mark.parametrize("groups", [1, 2, K])
@pytest.mark.parametrize(
  ("key_heads", "value_heads"), [(4, 4), (2, 2), (2, 4), (1, 4)], ids=str
)
def test_attend_equals_attention_on_unfolded_rows(
  groups, key_heads, value_heads
):
  q, k = _normal(0, B, L, H, groups), _normal(1, B, L, key_heads, groups)
  v = _normal(2, B, L, value_heads, K)
  bias = _bias([0.1, 0.2, 0.5, 1.0], causal=True)
  keep = jnp.asarray(np.eye(B, L, 1) + np.eye(B, L, 4) == 0)
  bias32 = jnp.asarray(np.maximum(bias, -1e30), jnp.float32)
  out = attend(q, k, v, bias32, keep, head_dim=K)
  expected = oracle.attend(q, k, v, bias, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_attend_takes_fewer_queries_than_keys_and_one_bias_for_all_heads():
  q, k, v = (_normal(n, B, 2 if n == 0 else L, H, K) for n in range(3))
  bias = _normal(3, 1, 2, L)
  out = attend(q, k, v, bias, None, head_dim=K)
  expected = oracle.attend(q, k, v, bias, None)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_dense_attend_equals_jax_dot_product_attention(key_heads):
  q = _normal(0, B, L, H, K)
  k, v = (_normal(n, B, L, key_heads, K) for n in (1, 2))
  bias = _normal(3, H, L, L)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [3]]))
  out = attend(q, k, v, bias, keep, head_dim=K)
  expected = jax.nn.dot_product_attention(
    q, k, v, bias=bias[None], mask=keep[:, None, None]
  )
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_a_row_without_any_key_is_the_finite_mean_of_the_values():
  q, k, v = (_normal(n, B, L, H, K) for n in range(3))
  keep, bias = jnp.zeros((B, L), bool), jnp.zeros((1, L, L))

  def summed(q):
    return attend(q, k, v, bias, keep, head_dim=K).sum()

  out = attend(q, k, v, bias, keep, head_dim=K)
  expected = np.broadcast_to(np.mean(v, 1, keepdims=True), out.shape)
  np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
  np.testing.assert_array_equal(jax.jit(jax.grad(summed))(q), np.zeros_like(q))


@pytest.mark.parametrize("groups", [1, K])
def test_bfloat16_attend_is_near_float64(groups):
  q, k = (jnp.bfloat16(_normal(n, B, L, H, groups)) for n in (0, 1))
  v = jnp.bfloat16(_normal(2, B, L, H, K))
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
  x = _normal(0, B, L, H, 8)
  out = _rotate(x, base)
  np.testing.assert_allclose(
    out, oracle.turned(x, base), rtol=0, atol=TOLERANCE
  )


def test_rotate_keeps_norms_and_the_first_position():
  x = _normal(0, B, L, H, 8)
  out = _rotate(x, 10000.0)
  np.testing.assert_array_equal(out[:, 0], x[:, 0])
  np.testing.assert_allclose(
    np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
  )


def test_rotated_logits_depend_on_the_distance_alone():
  q, k = (jnp.tile(_normal(n, 1, 1, H, 8), (1, L, 1, 1)) for n in (0, 1))
  q, k = _rotate(q, 100.0), _rotate(k, 100.0)
  logits = np.einsum("blhk,bmhk->hlm", q, k)
  np.testing.assert_allclose(
    logits[:, 1:, 1:], logits[:, :-1, :-1], rtol=0, atol=TOLERANCE
  )
  # ... and they do depend on it, to either side.
  distances = np.concatenate([logits[:, 0, ::-1], logits[:, 1:, 0]], -1)
  assert np.abs(np.diff(distances)).min() > 1e-3


def test_rotate_turns_bfloat16_by_float32_angles():
  x = jnp.bfloat16(_normal(0, 1, 600, 1, 8))
  out = _rotate(x, 10000.0)
  assert out.dtype == jnp.bfloat16
  expected = oracle.turned(x, 10000.0)
  # Only the result is rounded; a bfloat16 position would be off by 2 radians.
  np.testing.assert_allclose(
    out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3
  )


@_each(*(f"{fold}-{kind}" for fold in FOLDS for kind in KINDS))
def test_layer_equals_the_oracle_on_its_parameters(fold, kind):
  module, config = _model(fold, **kind)
  params, x = _randomized(module), _normal(9, B, L, D)
  keep = jnp.asarray(np.arange(L) < np.array([[L], [4]]))
  slopes = np.exp(
    oracle.wide(params.get("log_slopes", -np.inf * jnp.ones(1)))[0]
  )
  expected = _layer(params, x, config, slopes, keep)
  out = jax.jit(module.apply)({"params": params}, x, keep)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)


@a_few
def test_the_future_has_exactly_zero_gradient_where_causal(fold, kind):
  module, config = _model(fold, **kind)
  params, x = _randomized(module), _normal(9, 1, L, D)

  def summed_heads(x):
    return module.apply({"params": params}, x)[0].sum(-1)

  jacobian = jax.jit(jax.jacobian(summed_heads))
  reach = np.abs(jacobian(x)[:, 0]).max(-1)
  past = np.tril(np.ones((L, L), bool))
  assert (reach[past] > 0).all()
  assert (reach[~past] == 0).all() == config.causal


@a_few
def test_padding_changes_nothing(fold, kind):
  module, _ = _model(fold, **kind)
  params, x = _randomized(module), _normal(9, B, L, D)
  keep = jnp.asarray(np.tile(np.arange(L) < 4, (B, 1)))
  apply = jax.jit(module.apply)
  padded = np.asarray(apply({"params": params}, x, keep))[:, :4]
  alone = apply({"params": params}, jnp.asarray(np.asarray(x)[:, :4]))
  np.testing.assert_allclose(padded, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_slopes_start_geometric_and_are_learned(causal):
  module, config = _model(causal=causal)
  x = _normal(9, B, L, D)
  started = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)["params"]
  np.testing.assert_allclose(
    np.exp(started["log_slopes"]), [2**-2, 2**-4, 2**-6, 2**-8], rtol=1e-6
  )
  params, cotangent = _randomized(module), _normal(8, B, L, D)

  def summed(log_slopes):
    changed = params | {"log_slopes": log_slopes}
    return (module.apply({"params": changed}, x) * cotangent).sum()

  def summed64(log_slopes):
    out = _layer(params, x, config, np.exp(log_slopes), None)
    return (out * oracle.wide(cotangent)[0]).sum()

  (log_slopes,) = oracle.wide(params["log_slopes"])
  differences = [
    (summed64(log_slopes + step) - summed64(log_slopes - step)) / 2e-4
    for step in 1e-4 * np.eye(H)
  ]
  gradient = jax.jit(jax.grad(summed))(params["log_slopes"])
  assert np.abs(gradient).min() > 1e-2
  np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-4)


def test_parameters_are_float32_where_x64_is_on():
  module, _ = _model()
  with jax.enable_x64(True):
    x = jnp.zeros((1, L, D), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
  assert {w.dtype for w in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
  ("causal", "symmetric"), [(False, True), (True, False)], ids=["both", "past"]
)
def test_alibi_without_causality_knows_no_direction(causal, symmetric):
  module, _ = _model(causal=causal)
  params, x = {"params": _randomized(module)}, _normal(9, B, L, D)
  apply = jax.jit(module.apply)
  there, back = apply(params, x), np.asarray(apply(params, x[:, ::-1]))
  assert np.allclose(there, back[:, ::-1], rtol=0, atol=TOLERANCE) == symmetric


def test_dense_layer_equals_flax_multi_head_attention():
  module, _ = _model(positions="none", causal=False)
  params, x = _randomized(module), _normal(9, B, L, D)
  twin = nn.MultiHeadDotProductAttention(H)
  names = {"query": "q", "key": "k", "value": "v", "out": "o"}
  weights = {theirs: params[ours] for theirs, ours in names.items()}
  out = jax.jit(module.apply)({"params": params}, x)
  expected = jax.jit(twin.apply)({"params": weights}, x)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)


def test_queries_and_values_fold_each_by_itself():
  module, _ = _model({"groups": 0, "v_block": 1})
  folded = module.clone(fold=config_lib.FoldConfig(2, v_block=0))
  shapes = [jax.tree.map(np.shape, _randomized(m)) for m in (module, folded)]
  assert [s["q"]["kernel"] for s in shapes] == [(D, H, K), (D, H, 2)]
  assert [s["v"] for s in shapes] == [
    {"diagonal": (D, 1, 1)},
    {"kernel": (D, H, K), "bias": (H, K)},
  ]
