"""FPP in the training loops of other people: libraries, optimizers, meshes.

One model in the libraries of JAX, with the same weights and data. Wherever it is
trained, the masks are those of the Linen model on one device.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, PartitionSpec

import folding
from folding import paths
from folding.compression.fpp import FPPState
from folding.compression.shrink import remove_neurons

STEPS = {"begin": 4, "end": 16, "every": 4}
HIDDEN = 16


def _weights():
  rng = np.random.default_rng(0)
  shapes = {"up": (8, HIDDEN), "down": (HIDDEN, 8)}
  return {
    name: (
      jnp.asarray(rng.normal(size=shape) / 3, jnp.float32),
      jnp.asarray(rng.normal(size=shape[1]) / 9, jnp.float32),
    )
    for name, shape in shapes.items()
  }


def _data():
  x = jax.random.normal(jax.random.key(0), (32, 8))
  return x, jnp.sin(2 * x)


def _loss(prediction, y):
  return jnp.mean((prediction - y) ** 2)


@dataclasses.dataclass(frozen=True)
class Library:
  """The model in a library.

  Attributes:
    params: Its parameters.
    apply: (params, x) -> (prediction, statistics).
    kernel: Name of a kernel in its layer.
    bias: Name of a bias.
  """

  params: Any
  apply: Callable[[Any, jax.Array], Any]
  kernel: str = "kernel"
  bias: str = "bias"


class LinenMLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(HIDDEN, name="up")(x))
    return nn.Dense(8, name="down")(x)


def _linen():
  def apply(params, x):
    return folding.observe(LinenMLP().apply)({"params": params}, x)

  params = {n: {"kernel": w, "bias": b} for n, (w, b) in _weights().items()}
  return Library(params, apply)


class MLP(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.up = nnx.Linear(8, HIDDEN, rngs=rngs)
    self.down = nnx.Linear(HIDDEN, 8, rngs=rngs)
    for name, (w, b) in _weights().items():
      layer = getattr(self, name)
      layer.kernel[...], layer.bias[...] = w, b

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


def _nnx():
  graphdef, params = nnx.split(MLP(), nnx.Param)

  def apply(params, x):
    return folding.observe(nnx.merge(graphdef, params))(x)

  return Library(params, apply)


def _haiku():
  hk = pytest.importorskip("haiku", reason="it is in the extra parity")

  def forward(x):
    inputs = {}

    def note(call, args, kwargs, context):
      if context.method_name == "__call__":
        inputs[f"{context.module.module_name}/w"] = args[0]
      return call(*args, **kwargs)

    with hk.intercept_methods(note):
      x = jax.nn.gelu(hk.Linear(HIDDEN, name="up")(x))
      return hk.Linear(8, name="down")(x), folding.statistics(inputs)

  params = {n: {"w": w, "b": b} for n, (w, b) in _weights().items()}
  apply = hk.without_apply_rng(hk.transform(forward)).apply
  return Library(params, apply, "w", "b")


def _equinox():
  eqx = pytest.importorskip("equinox", reason="it is in the extra parity")

  class Dense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x):
      return x @ self.kernel + self.bias

  class Model(eqx.Module):
    up: Dense
    down: Dense

    def __call__(self, x):
      hidden = jax.nn.gelu(self.up(x))
      return self.down(hidden), {"up/kernel": x, "down/kernel": hidden}

  def apply(model, x):
    prediction, inputs = jax.vmap(model)(x)
    return prediction, folding.statistics(inputs)

  return Library(Model(**{n: Dense(*w) for n, w in _weights().items()}), apply)


def _rules(library, granularity="weight"):
  """Returns half of each kernel, or of the hidden neurons or rows."""
  kernel, bias = library.kernel, library.bias
  if granularity == "weight":
    return [folding.Rule(f"(up|down)/{kernel}", 0.5)]
  tied = {f"up/{bias}": 0, f"down/{kernel}": 0}
  if granularity == "neuron":
    return [folding.Rule(f"up/{kernel}", 0.5, "neuron", tied)]
  return [folding.Rule(f"up/{kernel}", 0.5, "row")]


def _wrapped(fpp, bias, wrapper):
  """Returns a transform that has `fpp(optimizer)` in it."""
  adamw = optax.adamw(1e-2)

  def is_kernel(params):
    return paths.map_named(lambda n, _: not n.endswith(bias), params)

  def labels(params):
    return jax.tree.map(str, is_kernel(params))

  clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
  schedule = optax.inject_hyperparams(optax.adamw)
  steps = {name: value // 2 for name, value in STEPS.items()}
  return {
    "adamw": lambda: fpp(adamw),
    "chain-before": lambda: optax.chain(optax.clip(1.0), fpp(adamw)),
    "chain-inside": lambda: fpp(clipped),
    "masked": lambda: optax.masked(fpp(adamw), is_kernel),
    "masked-inside": lambda: fpp(optax.masked(adamw, is_kernel)),
    "multi-transform": lambda: optax.multi_transform(
      {"True": fpp(adamw), "False": optax.sgd(1e-2)}, labels
    ),
    "multi-steps": lambda: optax.MultiSteps(fpp(adamw, **steps), 2),
    "apply-if-finite": lambda: optax.apply_if_finite(fpp(adamw), 2),
    "apply-if-finite-inside": lambda: fpp(optax.apply_if_finite(adamw, 2)),
    "inject-hyperparams": lambda: fpp(schedule(learning_rate=1e-2)),
    "muon": lambda: fpp(optax.contrib.muon(1e-2)),
    "adafactor": lambda: fpp(optax.adafactor(1e-2, min_dim_size_to_factor=8)),
    "bfloat16-moments": lambda: fpp(optax.adamw(1e-2, mu_dtype=jnp.bfloat16)),
    "schedule-free": lambda: fpp(optax.contrib.schedule_free_adamw(1e-2)),
  }[wrapper]()


def _mesh(place):
  """Returns a context with eight devices, or one."""
  if place == "one":
    return contextlib.nullcontext()
  kind = AxisType.Explicit if place == "explicit" else AxisType.Auto
  return jax.set_mesh(jax.make_mesh((8,), ("devices",), (kind,)))


def _placed(params, data, place):
  """Returns params and data on the devices of the context."""
  if place == "one":
    return params, data
  split, whole = PartitionSpec("devices"), PartitionSpec()

  def put(w):
    return jax.device_put(w, split if place == "fsdp" else whole)

  return jax.tree.map(put, params), jax.device_put(data, split)


def _restored(tree, folder):
  """Returns a tree as Orbax saves and restores it."""
  leaves, structure = jax.tree.flatten(tree)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "leaves", leaves)
    checkpointer.wait_until_finished()
    return structure.unflatten(checkpointer.restore(folder / "leaves", leaves))


def _train(library, tx, place, folder):
  """Trains with optax. With a folder, it restarts from a checkpoint.

  Each step is waited for: collectives of several programs at once can deadlock
  on simulated devices.
  """
  params, (x, y) = _placed(library.params, _data(), place)

  def step(params, state, x, y):
    def loss_fn(params):
      prediction, stats = library.apply(params, x)
      return _loss(prediction, y), stats

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    if place == "shard-map":
      grads, stats = jax.lax.pmean((grads, stats), "devices")
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  if place == "shard-map":
    whole, split = PartitionSpec(), PartitionSpec("devices")
    specs = (whole, whole, split, split)
    step = jax.shard_map(step, in_specs=specs, out_specs=whole, check_vma=False)
  step = jax.jit(step)
  state = tx.init(params)
  for n in range(20):
    params, state = jax.block_until_ready(step(params, state, x, y))
    if folder and n == 9:
      params, state = _restored((params, state), folder)
  return params, state


def _train_state(library, tx, place, folder):
  """Trains with a `TrainState` of Flax."""

  class TrainState(train_state.TrainState):
    def apply_gradients(self, *, grads, stats):
      updates, opt_state = self.tx.update(
        grads, self.opt_state, self.params, stats=stats
      )
      params = optax.apply_updates(self.params, updates)
      return self.replace(
        step=self.step + 1, params=params, opt_state=opt_state
      )

  params, (x, y) = _placed(library.params, _data(), place)
  train = TrainState.create(apply_fn=library.apply, params=params, tx=tx)

  @jax.jit
  def step(train, x, y):
    def loss_fn(params):
      prediction, stats = train.apply_fn(params, x)
      return _loss(prediction, y), stats

    grads, stats = jax.grad(loss_fn, has_aux=True)(train.params)
    return train.apply_gradients(grads=grads, stats=stats)

  for n in range(20):
    train = jax.block_until_ready(step(train, x, y))
    if folder and n == 9:
      train = _restored(train, folder)
  return train.params, train.opt_state


def _train_nnx(library, tx, place, folder):
  """Trains with `nnx.Optimizer`; `library` has the same weights."""
  model = MLP()
  params, (x, y) = _placed(library.params, _data(), place)
  nnx.update(model, params)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x, y):
    def loss_fn(model):
      prediction, stats = folding.observe(model)(x)
      return _loss(prediction, y), stats

    grads, stats = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, stats=stats)

  for n in range(20):
    step(model, optimizer, x, y)
    jax.block_until_ready(model)
    if folder and n == 9:
      for x_, name in ((model, "model"), (optimizer, "optimizer")):
        (folder / name).mkdir()
        nnx.update(x_, _restored(nnx.state(x_), folder / name))
  return nnx.state(model, nnx.Param), optimizer.opt_state


LOOPS = {
  "linen": (_linen, _train),
  "linen-train-state": (_linen, _train_state),
  "nnx": (_nnx, _train),
  "nnx-optimizer": (_nnx, _train_nnx),
  "haiku": (_haiku, _train),
  "equinox": (_equinox, _train),
}


def _run(loop, wrapper="adamw", place="one", folder=None, **options):
  """Returns ({layer: zeros of its kernel}, what `fpp_counts` counts)."""
  make, train = LOOPS[loop]
  library = make()
  rules = _rules(library, options.pop("granularity", "weight"))
  fpp = functools.partial(folding.fpp, rules=rules, **STEPS | options)
  tx = _wrapped(fpp, library.bias, wrapper)

  def is_own(x):
    return isinstance(x, FPPState)

  with _mesh(place):
    params, state = train(library, tx, place, folder)
    (own,) = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
    counts = folding.fpp_counts(rules, own, params)
  leaves = paths.flatten(params)
  zeros = {
    name: np.asarray(leaves[f"{name}/{library.kernel}"]) == 0
    for name in ("up", "down")
  }
  return zeros, counts


@functools.cache
def _expected(**options):
  """Returns the zeros of the Linen model in a plain loop on one device."""
  return _run("linen", **options)[0]


def _case(*values):
  return pytest.param(*values, marks=pytest.mark.slow, id="-".join(values))


_FAST = {("nnx-optimizer", "one"), ("haiku", "one"), ("equinox", "one")}
_PLACES = [
  _case(loop, place)
  if (loop, place) not in _FAST
  else pytest.param(loop, place, id=f"{loop}-{place}")
  for loop in LOOPS
  for place in ("one", "data", "fsdp", "explicit", "orbax")
]
_PLACES.append(_case("linen", "shard-map"))


@pytest.mark.parametrize(("loop", "place"), _PLACES)
def test_fpp_in_any_loop_has_the_masks_of_the_plain_one(loop, place, tmp_path):
  folder = tmp_path if place == "orbax" else None
  place = "one" if folder else place
  zeros, counts = _run(loop, place=place, folder=folder)
  for name, expected in _expected().items():
    np.testing.assert_array_equal(zeros[name], expected)
    assert expected.sum() == expected.size // 2
  assert counts["undone"] == counts["frozen"] == 0
  assert counts["zero"] == 2 * 8 * HIDDEN / 2


_WRAPPERS = (
  "chain-before chain-inside masked masked-inside multi-transform multi-steps "
  "apply-if-finite apply-if-finite-inside inject-hyperparams schedule-free "
  "muon adafactor bfloat16-moments"
)


@pytest.mark.parametrize(
  ("loop", "wrapper"),
  [
    _case(loop, wrapper)
    for loop in ("linen", "nnx-optimizer")
    for wrapper in _WRAPPERS.split()
  ],
)
def test_fpp_with_transforms_of_optax_reaches_the_target(loop, wrapper):
  zeros, counts = _run(loop, wrapper)
  for is_zero in zeros.values():
    assert is_zero.sum() == is_zero.size // 2
  assert counts["undone"] == counts["frozen"] == 0


_SCORES = "relative activation magnitude saliency movement random".split()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["one", "fsdp"])
@pytest.mark.parametrize("granularity", ["weight", "row", "neuron"])
@pytest.mark.parametrize("score", _SCORES)
def test_fpp_of_nnx_has_the_masks_of_linen(score, granularity, place):
  options = {"score": score, "granularity": granularity}
  zeros, _ = _run("nnx-optimizer", place=place, **options)
  for name, expected in _expected(**options).items():
    np.testing.assert_array_equal(zeros[name], expected)


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


def _images():
  x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
  return x, (x.sum((1, 2, 3)) > 0).astype(jnp.int32)


def _train_cnn(rules):
  model = CNN()
  x, labels = _images()
  params = jax.jit(model.init)(jax.random.key(1), x)["params"]
  tx = folding.fpp(
    optax.adamw(1e-2, weight_decay=0.1), rules, begin=4, end=16, every=4
  )

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


def test_remove_neurons_refuses_rules_without_the_reading_rows():
  params = {
    "up": np.zeros((2, 3)),
    "bias": np.zeros(3),
    "gate": np.zeros((2, 3)),
    "down": np.zeros((3, 2)),
    "norm/scale": np.zeros(3),
  }
  haiku = {"up/w": params["up"], "up/b": params["bias"]}
  with pytest.raises(ValueError, match="ties no array that reads its neurons"):
    remove_neurons(folding.Rule("up/w", 0.5, "neuron", {"up/b": 0}), haiku)
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
