import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from folding import paths
from folding.compression.observe import observe
from folding.config import Config, FoldConfig, ModelConfig, resolve
from folding.config import llama as llama_config
from folding.models.shape import shape_of
from folding.models.transformer import make_model

_TOKENS = np.array([[0, 1, 1, 4], [4, 4, 2, 0]])
_KEEP = np.array([[True, True, True, False], [True, True, False, False]])


class Net(nn.Module):
  """Embed, a layer called twice, heads with two input axes, a batch norm."""

  remat: bool = False

  @nn.compact
  def __call__(self, tokens, train: bool = False):
    dense = nn.remat(nn.Dense) if self.remat else nn.Dense
    x = nn.Embed(6, 8, name="embed")(tokens)
    shared = dense(8, name="shared")
    x = shared(nn.tanh(shared(x)))
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    heads = x.reshape(*x.shape[:-1], 2, 4)
    return nn.DenseGeneral(3, axis=(-2, -1), name="merge")(heads)


def _variables(seed=0):
  shapes = jax.eval_shape(Net().init, jax.random.key(0), _TOKENS)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: rng.uniform(0.1, 1, size=s.shape).astype(s.dtype), shapes
  )


def _expected(variables, keep=None):
  """Runs the net in NumPy float64 and averages squares token by token."""
  v = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
  p, norm = v["params"], v["batch_stats"]["norm"]
  weight = np.ones(_TOKENS.shape) if keep is None else keep.astype(np.float64)

  def mean_square(x):
    total = 0
    for index in np.ndindex(_TOKENS.shape):
      total = total + weight[index] * x[index] ** 2
    return total / weight.sum()

  embedded = p["embed"]["embedding"][_TOKENS]
  w, b = p["shared"]["kernel"], p["shared"]["bias"]
  once = np.tanh(embedded @ w + b)
  x = (once @ w + b - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
  x = x * p["norm"]["scale"] + p["norm"]["bias"]
  one_hot = np.eye(6)[_TOKENS]
  return {
    "embed/embedding": mean_square(one_hot),
    "shared/kernel": (mean_square(embedded) + mean_square(once)) / 2,
    "merge/kernel": mean_square(x.reshape(2, 4, 2, 4)),
  }


def _assert_close(stats, expected):
  assert set(stats) == set(expected)
  for name, value in expected.items():
    assert stats[name].dtype == jnp.float32
    # float32 rounding over three small layers.
    np.testing.assert_allclose(stats[name], value, rtol=2e-5)


@pytest.mark.parametrize("keep", [None, _KEEP], ids=["all", "padded"])
@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_observe_equals_a_loop_over_tokens(keep, remat):
  variables = _variables()
  apply = observe(Net(remat).apply)
  kept = None if keep is None else jnp.asarray(keep)
  out, stats = jax.jit(apply)(variables, _TOKENS, keep=kept)
  _assert_close(stats, _expected(variables, keep))
  plain = jax.jit(Net(remat).apply)(variables, _TOKENS)
  np.testing.assert_array_equal(out, plain)


def test_observe_does_not_change_gradients():
  variables, target = _variables(), jnp.ones((2, 4, 3))

  def loss(params, apply):
    out = apply(variables | {"params": params}, _TOKENS)
    return jnp.mean((out - target) ** 2)

  def observed(*args):
    return observe(Net(remat=True).apply)(*args)[0]

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  grad = gradient(variables["params"], observed)
  plain = gradient(variables["params"], Net().apply)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grad, plain
  )


@pytest.mark.parametrize(
  "mutable",
  [
    "batch_stats",
    nn.DenyList("params"),
    [],
  ],
  ids=["name", "deny", "none"],
)
def test_observe_returns_mutable_collections_as_apply_does(mutable):
  variables = _variables()
  options = {"train": mutable != [], "mutable": mutable}

  @functools.partial(jax.jit, static_argnums=0)
  def run(apply, variables):
    return apply(variables, _TOKENS, **options)

  (out, new), stats = run(observe(Net().apply), variables)
  plain_out, plain_new = run(Net().apply, variables)
  np.testing.assert_array_equal(out, plain_out)
  assert jax.tree.structure(new) == jax.tree.structure(plain_new)
  jax.tree.map(np.testing.assert_array_equal, new, plain_new)
  assert set(stats) == set(_expected(variables))


def test_observe_returns_captured_intermediates_as_apply_does():
  variables = _variables()
  (out, new), stats = observe(Net().apply)(
    variables, _TOKENS, capture_intermediates=True
  )
  plain_out, plain_new = Net().apply(
    variables, _TOKENS, capture_intermediates=True
  )
  np.testing.assert_array_equal(out, plain_out)
  jax.tree.map(np.testing.assert_array_equal, new, plain_new)
  assert set(stats) == set(_expected(variables))


class ByKeyword(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="dense")(inputs=x)


def test_observe_counts_inputs_by_keyword():
  x = jnp.array([[1.0, -2.0], [3.0, 0.0]])
  variables = jax.jit(ByKeyword().init)(jax.random.key(0), x)
  _, stats = observe(ByKeyword().apply)(variables, x)
  np.testing.assert_allclose(stats["dense/kernel"], [5.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("axis", [(2, 1), (-1, -2)], ids=str)
def test_observe_orders_input_axes_as_the_kernel(axis):
  x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
  layer = nn.DenseGeneral(2, axis=axis)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  _, stats = observe(layer.apply)(variables, jnp.asarray(x))
  rest = tuple(a for a in range(3) if a not in {i % 3 for i in axis})
  expected = np.mean(np.float64(x) ** 2, axis=rest)
  assert stats["kernel"].shape == variables["params"]["kernel"].shape[:-1]
  np.testing.assert_allclose(stats["kernel"], expected, rtol=1e-6)


def test_observe_skips_layers_with_batch_dims():
  x = jnp.ones((5, 3, 4))
  layer = nn.DenseGeneral(2, axis=-1, batch_dims=0)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  _, stats = observe(layer.apply)(variables, x)
  assert stats == {}


def test_observe_averages_bfloat16_in_float32():
  x = jnp.full((300, 2), 1.5, jnp.bfloat16)
  layer = nn.Dense(2, dtype=jnp.bfloat16)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  _, stats = observe(layer.apply)(variables, x)
  # A sum of 300 terms would not be exact in bfloat16 (8 bits).
  np.testing.assert_array_equal(stats["kernel"], np.float32([2.25, 2.25]))


def test_observe_without_tokens_gives_zeros():
  keep = jnp.zeros(_TOKENS.shape, bool)
  _, stats = observe(Net().apply)(_variables(), _TOKENS, keep=keep)
  for value in stats.values():
    np.testing.assert_array_equal(value, np.zeros(value.shape))


def test_observe_on_eight_devices_equals_one():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  x = np.random.default_rng(0).normal(size=(16, 3, 8)).astype(np.float32)
  layer = nn.Dense(4)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  _, stats = jax.jit(observe(layer.apply))(variables, placed)
  expected = np.mean(np.float64(x) ** 2, axis=(0, 1))
  np.testing.assert_allclose(stats["kernel"], expected, rtol=1e-6)


_MODELS = {
  "folded": (ModelConfig(), FoldConfig()),
  "input-axis": (
    ModelConfig(norm="rmsnorm", remat=True),
    FoldConfig(groups=4, axis="input", values="dense"),
  ),
  "llama": (llama_config(num_kv_heads=2), FoldConfig(groups=0, values="dense")),
}


@pytest.mark.parametrize("name", _MODELS)
def test_observe_sees_every_kernel_and_embedding_of_ours(name):
  model_config, fold = _MODELS[name]
  model_config = dataclasses.replace(
    model_config, num_layers=2, width=16, num_heads=4
  )
  config = resolve(Config(model=model_config, fold=fold))
  model = make_model(shape_of(config), vocab_size=11)
  tokens = jnp.arange(12).reshape(2, 6) % 11
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  _, stats = jax.eval_shape(observe(model.apply), shapes, tokens)
  leaves = paths.flatten(shapes["params"])
  observed = {n for n in leaves if n.endswith(("/kernel", "/embedding"))}
  assert set(stats) == observed
  for path, stat in stats.items():
    assert stat.shape == leaves[path].shape[: stat.ndim]
