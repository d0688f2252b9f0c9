"""Statistics of NNX models against their Linen twins, and of other libraries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from folding import paths
from folding.compression.observe import observe, statistics

_TOKENS = np.array([[0, 1, 1, 4, 2], [4, 4, 2, 0, 3]])
_KEEP = np.array([[True] * 5, [True, True, False, False, False]])
_HEADS = "...d,hde->...he"  # a kernel per head: [heads, in, out]
_MERGE = "bthe,hef->btf"


def _normal(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class LinenNet(nn.Module):
  """One of each layer; a dense layer is called twice."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(6, 8, name="embed")(tokens)
    shared = nn.Dense(8, name="shared")
    x = shared(nn.tanh(shared(x)))
    x = nn.Conv(8, (3,), feature_group_count=2, name="conv")(x)
    x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
    x = nn.Einsum((2, 8, 4), _HEADS, name="heads")(x)
    x = nn.Einsum((2, 4, 8), _MERGE, use_bias=False, name="merge")(x)
    x = x.reshape(*x.shape[:-1], 2, 4)
    return nn.DenseGeneral(3, axis=(-2, -1), name="out")(x)


class NNXNet(nnx.Module):
  """The same layers with the same names."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(6, 8, rngs=rngs)
    self.shared = nnx.Linear(8, 8, rngs=rngs)
    self.conv = nnx.Conv(8, 8, 3, feature_group_count=2, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.heads = nnx.Einsum(_HEADS, (2, 8, 4), (2, 4), rngs=rngs)
    self.merge = nnx.Einsum(_MERGE, (2, 4, 8), rngs=rngs)
    self.out = nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    x = self.shared(nnx.tanh(self.shared(x)))
    x = self.merge(self.heads(self.attn(self.conv(x))))
    return self.out(x.reshape(*x.shape[:-1], 2, 4))


def _twins():
  """Returns a Linen apply, its parameters, and the NNX module with these."""
  model, linen = nnx.jit(lambda: NNXNet(nnx.Rngs(0)))(), LinenNet()
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return linen.apply, params, model


@pytest.mark.parametrize("keep", [None, _KEEP], ids=["all", "padded"])
def test_observe_of_an_nnx_module_equals_its_linen_twin(keep):
  apply, params, model = _twins()
  out, expected = jax.jit(observe(apply))(
    {"params": params}, _TOKENS, keep=keep
  )
  graphdef, state = nnx.split(model)

  @jax.jit
  def merged(state, tokens, keep):
    return observe(nnx.merge(graphdef, state))(tokens, keep=keep)

  @nnx.jit
  def direct(model, tokens, keep):
    return observe(lambda model, x: model(x))(model, tokens, keep=keep)

  kernels = {n for n in paths.flatten(params) if not n.endswith("bias")}
  for found, stats in (
    merged(state, _TOKENS, keep),
    direct(model, _TOKENS, keep),
  ):
    np.testing.assert_array_equal(found, out)
    assert stats.keys() == expected.keys() == kernels
    for name, value in expected.items():
      np.testing.assert_array_equal(stats[name], value, err_msg=name)


def test_observe_counts_the_inputs_of_convolutions_and_einsums():
  """NumPy in float64, for the statistic of each input of the kernels."""
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  rngs, square = nnx.Rngs(0), np.float64(x) ** 2
  conv = nnx.Conv(8, 6, (3,), feature_group_count=2, rngs=rngs)
  groups = square.mean((0, 1)).reshape(2, 4).mean(0)
  cases = [
    (conv, x, np.stack([groups] * 3)),
    (
      nnx.Einsum(_HEADS, (2, 8, 4), rngs=rngs),
      x,
      np.stack([square.mean((0, 1))] * 2),
    ),
    (
      nnx.Einsum(_MERGE, (2, 4, 8), rngs=rngs),
      x.reshape(2, 5, 2, 4),
      square.mean((0, 1)).reshape(2, 4),
    ),
  ]
  for layer, inputs, expected in cases:
    _, stats = observe(layer)(jnp.asarray(inputs))
    np.testing.assert_allclose(stats["kernel"], expected, rtol=1e-6)


def test_observe_skips_an_einsum_whose_inputs_are_the_last_axis():
  layer = nnx.Einsum("bd,fd->bf", (3, 2), rngs=nnx.Rngs(0))
  _, stats = observe(layer)(jnp.ones((4, 2)))
  assert stats == {}


def test_observe_sees_the_base_of_lora_and_a_tied_layer_once():
  class Net(nnx.Module):
    def __init__(self, rngs):
      base = nnx.Linear(4, 4, rngs=rngs)
      self.a = nnx.LoRA(4, 2, 4, base_module=base, rngs=rngs)
      self.b = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
      self.tied = base

    def __call__(self, x):
      return self.tied(self.b(self.a(x)))

  model, x = Net(nnx.Rngs(0)), _normal((6, 4))
  _, stats = observe(model)(x)
  inside = model.b(model.a(x))
  both = (np.mean(x**2, 0) + np.mean(inside**2, 0)) / 2
  assert set(stats) == {"a/base_module/kernel", "b/kernel"}
  np.testing.assert_allclose(stats["a/base_module/kernel"], both, rtol=1e-6)
  assert stats.keys() <= paths.flatten(nnx.state(model, nnx.Param)).keys()


def test_observe_applies_keep_to_layers_with_its_tokens():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(4, 6, rngs=rngs)
      self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
      return self.down(
        self.up(x).reshape(2, 3, 2, 6).mean(2)
      )  # half the tokens

  model, x = Net(nnx.Rngs(0)), _normal((2, 6, 4))
  keep = np.array([[True] * 6, [True] * 2 + [False] * 4])
  _, stats = observe(model)(x, keep=keep)
  pooled = np.float64(model.up(x)).reshape(2, 3, 2, 6).mean(2)
  up, down = np.mean(x[keep] ** 2, 0), np.mean(pooled**2, (0, 1))
  np.testing.assert_allclose(stats["up/kernel"], up, rtol=1e-5)
  np.testing.assert_allclose(stats["down/kernel"], down, rtol=1e-5)
  with pytest.raises(ValueError, match=r"keep has the shape \(2, 5\)"):
    observe(model)(x, keep=keep[:, :5])


class Scaled(nnx.Module):
  """A layer of a user: the axis of its input is its last but one."""

  axis = -2

  def __init__(self, rngs):
    self.kernel = nnx.Param(rngs.params.normal((3, 5)))

  def __call__(self, x):
    return jnp.einsum("...dk,df->...kf", x, self.kernel[...])


def test_observe_of_nnx_takes_further_classes():
  layer, x = Scaled(nnx.Rngs(0)), _normal((4, 3, 2))
  assert observe(layer)(x)[1] == {}
  _, stats = observe(layer, dense=[Scaled])(x)
  np.testing.assert_allclose(stats["kernel"], np.mean(x**2, (0, 2)), rtol=1e-6)


class Inheriting(Scaled):
  """It has no `__call__` of its own."""


def test_observe_of_nnx_takes_a_class_that_inherits_its_call():
  layer, x = Inheriting(nnx.Rngs(0)), _normal((4, 3, 2))
  _, stats = observe(layer, dense=[Inheriting])(x)
  np.testing.assert_allclose(stats["kernel"], np.mean(x**2, (0, 2)), rtol=1e-6)


def test_observe_takes_a_method_of_an_nnx_module():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(4, 6, rngs=rngs)
      self.down = nnx.Linear(6, 4, rngs=rngs)

    def encode(self, x):
      return self.up(x)

  model, x = Net(nnx.Rngs(0)), _normal((5, 4))
  out, stats = observe(model.encode)(x)
  np.testing.assert_array_equal(out, model.up(x))
  assert set(stats) == {"up/kernel"}  # `down` was not called
  np.testing.assert_allclose(stats["up/kernel"], np.mean(x**2, 0), rtol=1e-6)
  assert not hasattr(model.up, "observed")


def test_observe_of_nnx_skips_layers_with_batch_axes():
  layer = nnx.LinearGeneral(4, 3, batch_axis={0: 2}, rngs=nnx.Rngs(0))
  assert observe(layer)(jnp.ones((2, 5, 4)))[1] == {}


@pytest.mark.parametrize("how", ["position", "keyword"])
def test_observe_prefers_the_equation_of_a_call(how):
  x = _normal((4, 4))
  turned = "db,df->bf"
  layer = nnx.Einsum("bd,df->bf", (4, 3), rngs=nnx.Rngs(0))
  if how == "position":
    _, stats = observe(layer)(x, turned)
  else:
    _, stats = observe(layer)(x, einsum_str=turned)
  np.testing.assert_allclose(stats["kernel"], np.mean(x**2, 1), rtol=1e-6)


def test_observe_reads_the_equation_of_a_linen_call():
  layer, x = nn.Einsum((2, 8, 4)), jnp.ones((3, 8))
  variables = layer.init(jax.random.key(1), x, _HEADS)
  for args, kwargs in (((_HEADS,), {}), ((), {"einsum_str": _HEADS})):
    _, stats = observe(layer.apply)(variables, x, *args, **kwargs)
    assert stats["kernel"].shape == (2, 8)


def test_observe_takes_a_linen_convolution_with_an_int_as_size():
  layer, x = nn.Conv(4, 3), _normal((2, 5, 6))
  _, stats = observe(layer.apply)(layer.init(jax.random.key(1), x), x)
  assert stats["kernel"].shape == (3, 6)


class Closing(nnx.Module):
  def __init__(self, rngs):
    self.layer = nnx.Linear(3, 3, rngs=rngs)

  def __call__(self, x):
    return jax.checkpoint(self.layer)(x)


def test_observe_refuses_a_transform_of_jax_and_leaves_the_module_alone():
  model, call = Closing(nnx.Rngs(0)), nnx.Linear.__call__
  before = nnx.graphdef(model)
  with pytest.raises(ValueError, match="closes over a layer"):
    observe(model)(jnp.ones((2, 3)))
  assert nnx.graphdef(model) == before
  assert nnx.Linear.__call__ is call


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(4, 6, rngs=rngs)
    self.down = nnx.Linear(6, 4, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(x)))


class Stack(nnx.Module):
  """Stacked layers as MaxText has them; kernels have the layers on `axis`."""

  def __init__(self, axis, rngs):
    make = nnx.vmap(Block, in_axes=0, out_axes=axis)
    self.layers = nnx.split_rngs(splits=3)(make)(rngs)
    self.axis = axis

  def __call__(self, x):
    axes = nnx.StateAxes({nnx.Param: self.axis, ...: 0})
    run = nnx.scan(
      nnx.remat(lambda x, layer: layer(x)),
      in_axes=(nnx.Carry, axes),
      out_axes=nnx.Carry,
    )
    return run(x, self.layers)


@pytest.mark.parametrize("axis", [0, 1])
def test_observe_of_nnx_scan_equals_separate_layers(axis):
  model = nnx.jit(lambda: Stack(axis, nnx.Rngs(0)))()
  x = _normal((5, 4))

  @nnx.jit
  def step(model, x):
    def loss(model):
      out, stats = observe(model)(x)
      return jnp.mean(out**2), stats

    return nnx.grad(loss, has_aux=True)(model)

  grads, stats = step(model, x)
  leaves = jax.device_get(paths.flatten(nnx.state(model, nnx.Param)))
  assert paths.flatten(grads).keys() == leaves.keys()
  assert set(stats) == {"layers/up/kernel", "layers/down/kernel"}
  graphdef, state = nnx.split(Block(nnx.Rngs(0)))
  alone = jax.jit(lambda state, x: observe(nnx.merge(graphdef, state))(x))
  for n in range(3):
    own = {p: w.take(n, min(axis, w.ndim - 1)) for p, w in leaves.items()}
    own = paths.map_named(lambda p, _, own=own: own[f"layers/{p}"], state)
    x, each = alone(own, x)
    for name, value in each.items():
      found = stats[f"layers/{name}"][n]
      np.testing.assert_allclose(found, value, rtol=2e-5)


def test_observe_returns_statistics_of_linen_vmap():
  heads = nn.vmap(
    nn.Dense,
    variable_axes={"params": 0, "observed": 0},
    split_rngs={"params": True},
  )(5)
  x = _normal((3, 6, 4))
  variables = jax.jit(heads.init)(jax.random.key(1), x)
  _, stats = observe(heads.apply)(variables, x)
  np.testing.assert_allclose(stats["kernel"], np.mean(x**2, 1), rtol=1e-6)


def test_statistics_of_named_inputs_equal_those_of_observe():
  x = _normal((2, 5, 4))
  layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  _, expected = observe(layer)(x, keep=_KEEP)
  found = statistics({"kernel": x}, keep=jnp.asarray(_KEEP))
  np.testing.assert_array_equal(found["kernel"], expected["kernel"])
