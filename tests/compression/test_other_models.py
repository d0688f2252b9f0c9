"""FPP and the removal of neurons on models that `folding` did not define.

One is written like the MNIST model of Flax's Linen examples, one in Flax NNX.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import folding
from folding import paths
from folding.compression.shrink import remove_neurons

STEPS = {"begin": 4, "end": 16, "every": 4}
UP = r"(up)/kernel"  # of the NNX model; half of its neurons are removed


class CNN(nn.Module):
  """A smaller model of `examples/mnist/train.py`; its width `hidden` shrinks."""

  hidden: int = 32

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(features=4, kernel_size=(3, 3))(x))
    x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
    x = x.reshape((x.shape[0], -1))
    x = nn.relu(nn.Dense(features=self.hidden)(x))
    return nn.Dense(features=10)(x)


class MLP(nnx.Module):
  """Two layers of Flax NNX."""

  def __init__(self, hidden: int, rngs: nnx.Rngs):
    self.up = nnx.Linear(8, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, 3, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.up(x)))


def _images():
  x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
  return x, (x.sum((1, 2, 3)) > 0).astype(jnp.int32)


def _train_cnn(rules):
  model = CNN()
  x, labels = _images()
  params = jax.jit(model.init)(jax.random.key(1), x)["params"]
  tx = folding.fpp(optax.adamw(1e-2, weight_decay=0.1), rules, **STEPS)

  def loss_fn(params):
    logits, stats = folding.observe(model.apply)({"params": params}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return loss.mean(), stats

  @jax.jit
  def step(params, state):
    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(20):
    params, state = step(params, state)
  return params


def _zeros(w):
  return np.count_nonzero(np.asarray(w) == 0)


def test_remove_neurons_of_a_linen_model_keeps_the_function():
  tied = {"Dense_0/bias": 0, "Dense_1/kernel": 0}
  rules = [folding.Rule("Dense_0/kernel", 0.75, "neuron", tied)]
  params = _train_cnn(rules)
  small, kept = remove_neurons(rules, params)
  assert len(kept["Dense_0/kernel"]) == 8
  assert small["Dense_0"]["kernel"].shape == (64, 8)
  assert small["Dense_0"]["bias"].shape == (8,)
  assert small["Dense_1"]["kernel"].shape == (8, 10)
  x, _ = _images()
  apply = jax.jit(CNN(hidden=8).apply)
  before = apply({"params": small}, x)
  # Sums of 8 terms instead of 32, of which 24 are zero.
  whole = jax.jit(CNN().apply)({"params": params}, x)
  np.testing.assert_allclose(before, whole, rtol=1e-5, atol=1e-6)
  # Control: without one more neuron the function changes.
  less = jax.tree.map(lambda w: w, small)
  less["Dense_1"]["kernel"] = less["Dense_1"]["kernel"].at[0].set(0)
  after = apply({"params": less}, x)
  assert np.abs(np.asarray(after - before)).max() > 1e-3


def _equinox_layer():
  equinox = pytest.importorskip("equinox", reason="it is in no extra")
  layer = equinox.nn.Linear(8, 8, key=jax.random.key(0))
  return equinox.filter(layer, equinox.is_array), jax.vmap(layer)


def _torch_layer():
  torch = pytest.importorskip("torch", reason="it is in the extra parity")
  layer = torch.nn.Linear(8, 8, dtype=torch.float32)
  weights = {n: jnp.asarray(w.numpy()) for n, w in layer.state_dict().items()}

  def apply(x):
    return jnp.asarray(layer(torch.tensor(np.asarray(x))).detach().numpy())

  return weights, apply


@pytest.mark.parametrize("make", [_equinox_layer, _torch_layer])
def test_inputs_of_equinox_and_torch_layers_are_on_axis_1(make):
  """Half of the inputs are zero; their weights are pruned, outputs stay."""
  params, apply = make()
  x = jax.random.normal(jax.random.key(1), (32, 8)).at[:, ::2].set(0)
  rule = folding.Rule("weight", 0.5, inputs=1)
  tx = folding.fpp(optax.sgd(0.0), rule, begin=0, end=0, every=1)
  stats = {"weight": jnp.mean(x**2, axis=0)}
  updates, _ = tx.update(params, tx.init(params), params, stats=stats)
  pruned = paths.flatten(optax.apply_updates(params, updates))
  assert (pruned["weight"][:, ::2] == 0).all()
  found = x @ pruned["weight"].T + pruned["bias"][None]
  np.testing.assert_allclose(found, apply(x), rtol=1e-5, atol=1e-6)


def _nnx_rules(granularity):
  tied = {r"\1/bias": 0, "down/kernel": 0}
  return [
    folding.Rule(UP, 0.5, granularity, tied if granularity == "neuron" else {})
  ]


def _nnx_data():
  x = jax.random.normal(jax.random.key(0), (32, 8))
  return x, jnp.sin(x[:, :3])


def _train_nnx(rules):
  """With `nnx.Optimizer`, as the guides of NNX do."""
  model = MLP(16, nnx.Rngs(0))
  x, y = _nnx_data()
  tx = folding.fpp(optax.adamw(1e-2), rules, score="magnitude", **STEPS)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)

  for _ in range(20):
    step(model, optimizer)
  return model


def test_fpp_in_an_nnx_optimizer_equals_a_loop_over_its_state():
  rules = _nnx_rules("weight")
  found = nnx.state(_train_nnx(rules), nnx.Param)
  x, y = _nnx_data()
  graphdef, params = nnx.split(MLP(16, nnx.Rngs(0)), nnx.Param)
  tx = folding.fpp(optax.adamw(1e-2), rules, score="magnitude", **STEPS)
  state = tx.init(params)

  def loss_fn(params):
    return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(20):
    params, state = step(params, state)
  by_hand = paths.flatten(params)
  assert _zeros(by_hand["up/kernel"]) == 64  # half of 8 * 16
  for name, w in paths.flatten(found).items():
    np.testing.assert_allclose(w, by_hand[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(w) == 0, by_hand[name] == 0)


def test_remove_neurons_of_an_nnx_model_keeps_the_function():
  rules = _nnx_rules("neuron")
  model = _train_nnx(rules)
  small, kept = remove_neurons(rules, nnx.state(model, nnx.Param))
  assert len(kept["up/kernel"]) == 8
  smaller = MLP(8, nnx.Rngs(1))
  nnx.update(smaller, small)
  x, _ = _nnx_data()
  np.testing.assert_allclose(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_remove_neurons_refuses_rules_without_the_reading_rows():
  params = {
    "up": np.zeros((2, 3)),
    "bias": np.zeros(3),
    "gate": np.zeros((2, 3)),
    "down": np.zeros((3, 2)),
    "norm/scale": np.zeros(3),
  }
  tied_to = ({}, {"bias": 0}, {"bias": 0, "gate": 1}, {"gate": -1})
  for tied in (*tied_to, {"norm/scale": 0}):
    rule = folding.Rule("up", 0.5, "neuron", tied)
    with pytest.raises(
      ValueError, match="ties no array that reads its neurons"
    ):
      remove_neurons([rule], params)


@pytest.mark.parametrize("inputs", [None, 1])
def test_remove_neurons_knows_the_reading_axis_of_kernels_out_in(inputs):
  params = {"up": np.ones((4, 4)), "down": np.ones((4, 4))}
  params["up"][1], params["down"][:, 1] = 0, 0
  rule = folding.Rule("up", 0.5, "neuron", {"down": 1}, axis=0, inputs=inputs)
  if inputs is None:
    with pytest.raises(ValueError, match="ties no array"):
      remove_neurons(rule, params)
    return
  small, kept = remove_neurons(rule, params)
  assert kept["up"].tolist() == [0, 2, 3]
  assert {n: w.shape for n, w in small.items()} == {
    "up": (3, 4),
    "down": (4, 3),
  }


def test_remove_neurons_keeps_one_and_ignores_other_rules():
  params = {"up": np.zeros((2, 3)), "down": np.zeros((3, 2)), "w": np.zeros(4)}
  rules = [
    folding.Rule("up", 0.5, "neuron", {"down": 0}),
    folding.Rule("w", 0.5),
  ]
  small, kept = remove_neurons(rules, params)
  shapes = {name: w.shape for name, w in small.items()}
  assert shapes == {"up": (2, 1), "down": (1, 2), "w": (4,)}
  assert kept["up"].tolist() == [0]
