"""The attention layer, folded and dense, by its parameters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as config_lib
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

D = H * K


def _layer(params, x, config, slopes, keep):
  """The attention layer in float64, from its stored parameters."""
  params, x = oracle.wide(params, x)

  def project(w, rows_repeat):
    kernel = np.repeat(w["kernel"], rows_repeat, 0)
    out = np.einsum("bld,dhg->blhg", x, kernel)
    return out + w["bias"] if "bias" in w else out

  q, k = (project(params[n], D // len(params[n]["kernel"])) for n in "qk")
  if "diagonal" in params["v"]:
    v = x * params["v"]["diagonal"].reshape(D)
    v = v.reshape(*x.shape[:2], H, K)
  else:
    v = project(params["v"], 1)
  if config.positions == "rope":
    q, k = (
      oracle.turned(oracle.unfolded(y, K), config.rope_base) for y in (q, k)
    )
  out = oracle.attend(q, k, v, alibi_bias(slopes, config.causal), keep)
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
  [layer] = config_lib.layers_of(config.model, config.fold)
  return attention.Attention(config.model, layer, init), config.model


def _randomized(module):
  x = jnp.zeros((1, L, D))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  values = [normal(n, *leaf.shape) for n, leaf in enumerate(leaves)]
  return jax.tree.unflatten(tree, values)


FOLDS = {
  "dense": {},
  "irc1_dwc": {"groups": 1, "values": "diagonal"},
  "irc2_blocks": {"groups": 2, "values": "diagonal"},
  "input_rows": {"groups": 4, "axis": "input", "values": "diagonal"},
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


@_each(*(f"{fold}-{kind}" for fold in FOLDS for kind in KINDS))
def test_layer_equals_the_oracle_on_its_parameters(fold, kind):
  module, config = _model(fold, **kind)
  params, x = _randomized(module), normal(9, B, L, D)
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
  params, x = _randomized(module), normal(9, 1, L, D)

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
  params, x = _randomized(module), normal(9, B, L, D)
  keep = jnp.asarray(np.tile(np.arange(L) < 4, (B, 1)))
  apply = jax.jit(module.apply)
  padded = np.asarray(apply({"params": params}, x, keep))[:, :4]
  alone = apply({"params": params}, jnp.asarray(np.asarray(x)[:, :4]))
  # Of sums up to 40, in an order that depends on the machine.
  np.testing.assert_allclose(padded, alone, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_slopes_start_geometric_and_are_learned(causal):
  module, config = _model(causal=causal)
  x = normal(9, B, L, D)
  started = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)["params"]
  np.testing.assert_allclose(
    np.exp(started["log_slopes"]), [2**-2, 2**-4, 2**-6, 2**-8], rtol=1e-6
  )
  params, cotangent = _randomized(module), normal(8, B, L, D)

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
  params, x = {"params": _randomized(module)}, normal(9, B, L, D)
  apply = jax.jit(module.apply)
  there, back = apply(params, x), np.asarray(apply(params, x[:, ::-1]))
  assert np.allclose(there, back[:, ::-1], rtol=0, atol=TOLERANCE) == symmetric


def test_dense_layer_equals_flax_multi_head_attention():
  module, _ = _model(positions="none", causal=False)
  params, x = _randomized(module), normal(9, B, L, D)
  twin = nn.MultiHeadDotProductAttention(H)
  names = {"query": "q", "key": "k", "value": "v", "out": "o"}
  weights = {theirs: params[ours] for theirs, ours in names.items()}
  out = jax.jit(module.apply)({"params": params}, x)
  expected = jax.jit(twin.apply)({"params": weights}, x)
  np.testing.assert_allclose(out, expected, rtol=0, atol=10 * TOLERANCE)


def test_queries_and_values_fold_each_by_itself():
  module, _ = _model({"groups": 0, "values": "diagonal"})
  folded = module.clone(
    layer=dataclasses.replace(module.layer, groups=2, values="dense")
  )
  shapes = [jax.tree.map(np.shape, _randomized(m)) for m in (module, folded)]
  assert [s["q"]["kernel"] for s in shapes] == [(D, H, K), (D, H, 2)]
  assert [s["v"] for s in shapes] == [
    {"diagonal": (D, 1, 1)},
    {"kernel": (D, H, K), "bias": (H, K)},
  ]
