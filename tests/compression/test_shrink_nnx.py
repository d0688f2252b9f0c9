"""Removal of neurons from NNX modules: smaller layers with the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from folding.compression.nnx_sizes import set_sizes
from folding.compression.shrink import remove_neurons, shrink_layers
from folding.compression.sites import Rule
from tests.compression.test_observe_nnx import Stack

_DEAD = np.array([1, 3])  # of six neurons, or of four heads
_NORM = {"norm/scale": 0, "norm/bias": 0}


class Dense(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
    self.down = nnx.Linear(6, 8, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.norm(self.up(x))))


class Unscaled(Dense):
  def __init__(self, rngs):
    super().__init__(rngs)
    self.norm = nnx.BatchNorm(
      6, use_scale=False, use_running_average=True, rngs=rngs
    )


class Convolution(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Conv(8, 6, (3,), rngs=rngs)
    self.down = nnx.Conv(6, 8, (3,), rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


class General(nnx.Module):
  """Einsum and LinearGeneral, whose biases need the new widths."""

  def __init__(self, rngs):
    self.up = nnx.Einsum("bld,df->blf", (8, 6), (6,), rngs=rngs)
    self.gate = nnx.LinearGeneral(8, 6, rngs=rngs)
    self.down = nnx.LinearGeneral(6, 8, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.gate(x)) * self.up(x))


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.attn = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)

  def __call__(self, x):
    return self.attn(x)


_HEADS = {f"attn/{x}/kernel": 1 for x in ("key", "value")}
_HEADS |= {f"attn/{x}/bias": 0 for x in ("query", "key", "value")}
# {model: rule, {attribute of a layer: its new value}}
_CASES = {
  Dense: (
    Rule("up/kernel", 0.3, "neuron", {"up/bias": 0, "down/kernel": 0, **_NORM}),
    {"up.out_features": 4, "norm.num_features": 4, "down.in_features": 4},
  ),
  Unscaled: (
    Rule(
      "up/kernel",
      0.3,
      "neuron",
      {"up/bias": 0, "norm/bias": 0, "down/kernel": 0},
    ),
    {"norm.num_features": 4},
  ),
  Convolution: (
    Rule("up/kernel", 0.3, "neuron", {"up/bias": 0, "down/kernel": 1}, axis=2),
    {"up.kernel_shape": (3, 8, 4), "down.in_features": 4},
  ),
  General: (
    Rule(
      "up/kernel",
      0.3,
      "neuron",
      {"up/bias": 0, "gate/kernel": 1, "gate/bias": 0, "down/kernel": 0},
    ),
    {
      "up.bias_shape": (4,),
      "gate.out_features": (4,),
      "down.in_features": (4,),
    },
  ),
  Attention: (
    Rule(
      "attn/query/kernel",
      0.5,
      "neuron",
      {**_HEADS, "attn/out/kernel": 0},
      axis=1,
    ),
    {"attn.num_heads": 2, "attn.num_kv_heads": 2, "attn.qkv_features": 4},
  ),
}


@nnx.jit  # one program instead of one for each operation
def _apply(module, x):
  return module(x)


def _kill(module, rule, dead, layer=None):
  """Zeroes neurons, all arrays of theirs."""
  members = {rule.pattern: rule.axis or 1, **rule.tied}
  for path, w in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    axis = members.get("/".join(map(str, path)))
    if axis is not None:
      index = (slice(None),) * axis + (dead,)
      values = np.array(w[...])
      values[index if layer is None else (layer, *index)] = 0
      w[...] = jnp.asarray(values)


@pytest.mark.parametrize("model", _CASES)
def test_remove_neurons_returns_a_module_of_smaller_layers(model):
  rule, sizes = _CASES[model]
  module = nnx.jit(lambda: model(nnx.Rngs(0)))()
  x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
  _kill(module, rule, _DEAD)
  expected = _apply(module, x)
  small, kept = remove_neurons([rule], module)
  assert not set(kept[rule.pattern]) & set(_DEAD)
  np.testing.assert_allclose(_apply(small, x), expected, rtol=1e-5, atol=1e-6)
  for name, value in sizes.items():
    layer = small
    for part in name.split("."):
      layer = getattr(layer, part)
    assert layer == value, name
  np.testing.assert_array_equal(_apply(module, x), expected)  # stays as it is


def test_remove_neurons_of_scanned_nnx_layers_keeps_the_function():
  tied = {"layers/up/bias": 0, "layers/down/kernel": 0}
  rule = Rule("layers/up/kernel", 0.3, "neuron", tied, layers=0)
  module = nnx.jit(lambda: Stack(0, nnx.Rngs(0)))()
  x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
  for layer in range(3):
    _kill(module, rule, np.array([layer, layer + 2]), layer)
  small, _ = remove_neurons([rule], module)
  assert small.layers.up.kernel.shape == (3, 4, 4)
  assert small.layers.up.out_features == small.layers.down.in_features == 4
  found, expected = _apply(small, x), _apply(module, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_remove_neurons_of_unequal_layers_keeps_their_order():
  tied = {"layers/up/bias": 0, "layers/down/kernel": 0}
  rule = Rule("layers/up/kernel", 0.3, "neuron", tied, layers=0)
  module = nnx.jit(lambda: Stack(0, nnx.Rngs(0)))()
  for layer, dead in enumerate(([1], [0, 1, 2], [5])):
    _kill(module, rule, np.array(dead), layer)
  _, kept = remove_neurons([rule], module)
  assert kept[rule.pattern].tolist() == [
    [0, 2, 3, 4, 5],
    [0, 1, 3, 4, 5],  # two more than it has to keep
    [0, 1, 2, 3, 4],
  ]


_LAYERS = {
  "linear": lambda n, rngs: nnx.Linear(n, 2 * n, rngs=rngs),
  "general": lambda n, rngs: nnx.LinearGeneral(
    (2, n), (n, 3), axis=(-2, -1), rngs=rngs
  ),
  "batched": lambda n, rngs: nnx.LinearGeneral(
    n, 2 * n, batch_axis={0: 3}, rngs=rngs
  ),
  "conv": lambda n, rngs: nnx.Conv(
    2 * n, 2 * n, (3,), feature_group_count=2, rngs=rngs
  ),
  "transposed": lambda n, rngs: nnx.ConvTranspose(n, 3, (2,), rngs=rngs),
  "einsum": lambda n, rngs: nnx.Einsum(_EQUATION, (n, 3), (3,), rngs=rngs),
  "embed": lambda n, rngs: nnx.Embed(n, 2 * n, rngs=rngs),
  "batch_norm": lambda n, rngs: nnx.BatchNorm(n, rngs=rngs),
  "norm_without_scale": lambda n, rngs: nnx.BatchNorm(
    n, use_scale=False, rngs=rngs
  ),
  "layer_norm": lambda n, rngs: nnx.LayerNorm(n, rngs=rngs),
  "rms_norm": lambda n, rngs: nnx.RMSNorm(n, rngs=rngs),
  "attention": lambda n, rngs: nnx.MultiHeadAttention(
    n, 8, qkv_features=2 * n, num_kv_heads=n // 2, rngs=rngs
  ),
}
_EQUATION = "bd,df->bf"


@pytest.mark.parametrize("name", _LAYERS)
def test_set_sizes_makes_the_attributes_of_a_smaller_layer(name):
  def sizes(layer):
    return {
      (*path, attribute): value
      for path, each in nnx.iter_modules(layer)
      for attribute, value in vars(each).items()
      if isinstance(value, int | tuple)
    }

  whole, small = (
    nnx.eval_shape(lambda n=n: _LAYERS[name](n, nnx.Rngs(0))) for n in (8, 4)
  )
  assert sizes(whole) != sizes(small)
  params = nnx.to_flat_state(nnx.state(small, nnx.Param))
  set_sizes(whole, {"/".join(path): w.shape for path, w in params})
  assert sizes(whole) == sizes(small)


def test_shrink_layers_takes_an_nnx_state():
  params = {"mlp": {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}}
  params["mlp"]["down"] = params["mlp"]["down"].at[1].set(0)
  params = {"mlp": {n: {"kernel": w} for n, w in params["mlp"].items()}}
  state = nnx.State(jax.tree.map(nnx.Param, params))
  small, _ = shrink_layers(state)
  assert isinstance(small, nnx.State)
  assert small["mlp"]["up"]["kernel"].shape == (2, 2)
