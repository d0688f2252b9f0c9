"""FPP of stacked layers, as `nn.scan` makes them, against separate layers."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from folding import paths
from folding.compression.fpp import fpp, fpp_counts, member_masks
from folding.compression.observe import observe
from folding.compression.shrink import remove_neurons
from folding.compression.sites import Rule, make_sites
from folding.training.sharding import shardings_like
from tests import transforms_battery as battery
from tests.compression.fpp_cases import random_params

_COUNT = 2
_STEPS = {"begin": 1, "end": 7, "every": 2}
_TIED = {"bias": 0, "gate": 1, "down": 0}
_CASES = {
  "weights-inner": (1, Rule("up", 0.7), {}),
  "neurons-leading": (
    0,
    Rule("up", 0.5, "neuron", _TIED),
    {"score": "activation", "patience": 2},
  ),
  "rows-verified": (
    1,
    Rule("down", 0.5, "row", {"up": 1, "bias": 0}),
    {"score": "saliency", "tolerance": 0.01},
  ),
  "last-axis": (2, Rule("up", 0.5), {"score": "magnitude"}),
  "vectors": (1, Rule("bias", 0.5), {"score": "magnitude"}),
}


def _stack(layers, axis):
  return jax.tree.map(
    lambda *x: jnp.stack(x, min(axis, x[0].ndim)), *layers.values()
  )


def _unstack(tree, axis):
  def layer(i):
    return jax.tree.map(lambda x: x.take(i, min(axis, x.ndim - 1)), tree)

  return {str(i): layer(i) for i in range(_COUNT)}


def _frozen(rules, state, params):
  """Returns which elements FPP freezes or has zeroed."""
  leaves = paths.flatten(params)
  masks = member_masks(make_sites(rules, params), state.mask_bits, leaves)
  return {n: jnp.broadcast_to(m, leaves[n].shape) for n, m in masks.items()}


@pytest.mark.parametrize(
  "case",
  [
    "weights-inner",
    pytest.param("neurons-leading", marks=pytest.mark.slow),
    pytest.param("rows-verified", marks=pytest.mark.slow),
    pytest.param("last-axis", marks=pytest.mark.slow),
    pytest.param("vectors", marks=pytest.mark.slow),
  ],
)
def test_fpp_prunes_stacked_layers_as_separate_ones(case):
  axis, rule, options = _CASES[case]
  # Layers differ in scale: a common threshold would prune only the first.
  separate = {
    str(i): {n: (i + 1) * (w + i) for n, w in random_params().items()}
    for i in range(_COUNT)
  }
  stacked = _stack(separate, axis)
  one = Rule(
    rf"(\d)/({rule.pattern})",
    rule.target,
    rule.granularity,
    {rf"\1/{name}": a for name, a in rule.tied.items()},
  )
  whole = Rule(
    rule.pattern, rule.target, rule.granularity, rule.tied, layers=axis
  )
  params, rules = (separate, stacked), ([one], [whole])
  txs = [fpp(optax.adam(0.1), r, **_STEPS, **options) for r in rules]

  def value_fn(params):  # exact in any order of summation
    return sum(jnp.sum(jnp.abs(w) > 1) for w in jax.tree.leaves(params)) / 1.0

  @battery.jit
  def step_fn(params, states, step):
    grads = jax.tree.map(
      lambda w: w - jnp.sin(step + jnp.arange(w.size)).reshape(w.shape),
      params[1],
    )
    sizes = {"up": 8, "gate": 8, "down": 6}
    stats = {
      n: jnp.abs(jnp.cos(step + jnp.arange(_COUNT * k))).reshape(_COUNT, k)
      for n, k in sizes.items()
    }
    each = {f"{i}/{n}": x[i] for n, x in stats.items() for i in range(_COUNT)}
    new = []
    for tx, g, state, p, s in zip(
      txs,
      (_unstack(grads, axis), grads),
      states,
      params,
      (each, stats),
      strict=True,
    ):
      updates, state = tx.update(g, state, p, stats=s, value_fn=value_fn)
      new.append((optax.apply_updates(p, updates), state))
    frozen = [
      _frozen(r, state, p) for r, (p, state) in zip(rules, new, strict=True)
    ]
    return *zip(*new, strict=True), frozen

  states = tuple(tx.init(p) for tx, p in zip(txs, params, strict=True))
  seen = 0
  for step in range(9):
    params, states, frozen = step_fn(params, states, jnp.float32(step))
    theirs, both = (
      _unstack(jax.device_get(x[1]), axis) for x in (params, frozen)
    )
    jax.tree.map(np.testing.assert_array_equal, params[0], theirs)
    both = paths.flatten(both)
    assert both.keys() == frozen[0].keys()
    for name, mask in frozen[0].items():
      np.testing.assert_array_equal(mask, both[name])
      seen += int(mask.sum())
  assert seen
  counts = [
    jax.jit(functools.partial(fpp_counts, r))(*x)
    for r, *x in zip(rules, states, params, strict=True)
  ]
  assert counts[0] == counts[1]
  assert counts[0]["zero"] > 0


@pytest.mark.parametrize("layers", [None, 0])
def test_a_rule_that_ranks_stacked_layers_together_gives_a_warning(layers):
  """Without `layers`, one layer loses all of its weights."""
  params = {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}
  params["kernel"] = params["kernel"].at[0].multiply(0.1)
  rule = Rule("kernel", 0.5, layers=layers)
  tx = fpp(optax.sgd(0.0), rule, begin=0, end=0, every=1, score="magnitude")
  message = pytest.warns(UserWarning, match=r"stack 2 layers.*layers=0\)")
  with contextlib.nullcontext() if layers == 0 else message:
    state = tx.init(params)
  updates, _ = jax.jit(tx.update)(params, state, params)
  zeros = np.sum(updates["kernel"] == -params["kernel"], axis=(1, 2))
  assert zeros.tolist() == ([8, 8] if layers == 0 else [16, 0])


class Layer(nn.Module):
  """A residual layer with kernels [embed, mlp] and [mlp, embed]."""

  @nn.compact
  def __call__(self, x, keep=None):
    return x + nn.Dense(4, name="down")(
      nn.gelu(nn.Dense(6, name="up")(x))
    ), keep


class Stack(nn.Module):
  """Layers in a loop, or in a scan that stacks parameters along axis 1."""

  is_scanned: bool

  @nn.compact
  def __call__(self, x):
    if not self.is_scanned:
      for i in range(_COUNT):
        x, _ = Layer(name=str(i))(x)
      return x
    layers = nn.scan(
      nn.remat(Layer),
      variable_axes={"params": 1, "observed": 0},
      split_rngs={"params": True},
      length=_COUNT,
    )
    return layers(name="layers")(x, None)[0]


def test_observe_returns_statistics_of_scanned_layers():
  x = jax.random.normal(jax.random.key(0), (2, 5, 4))
  keep = jnp.array([[True] * 5, [True, True, True, False, False]])
  scanned, unrolled = Stack(True), Stack(False)
  stacked = jax.jit(scanned.init)(jax.random.key(1), x)["params"]
  out, stats = jax.jit(observe(scanned.apply))(
    {"params": stacked}, x, keep=keep
  )
  separate = _unstack(stacked["layers"], 1)
  expected, each = jax.jit(observe(unrolled.apply))(
    {"params": separate}, x, keep=keep
  )
  np.testing.assert_allclose(out, expected, rtol=1e-5)
  assert len(stats) == 2
  for name, value in stats.items():
    role = name.removeprefix("layers/")
    alone = np.stack([each[f"{i}/{role}"] for i in range(_COUNT)])
    np.testing.assert_allclose(value, alone, rtol=1e-5)


def test_remove_neurons_of_stacked_layers_keeps_each_its_own():
  params = {n: np.array(w) for n, w in random_params().items()}
  layers = {str(i): jax.tree.map(np.copy, params) for i in range(2)}
  dead = ([0, 3], [1, 2, 4])
  for layer, neurons in zip(layers.values(), dead, strict=True):
    for name, axis in {"up": 1, **_TIED}.items():
      layer[name].swapaxes(0, axis)[neurons] = 0
  rule = Rule("up", 0.5, "neuron", _TIED, layers=1)
  small, kept = remove_neurons([rule], _stack(layers, 1))
  # The second layer keeps one zero, so that both have four.
  np.testing.assert_array_equal(kept["up"], [[1, 2, 4, 5], [0, 1, 3, 5]])
  for i, stays in enumerate(kept["up"]):
    layer = layers[str(i)]
    np.testing.assert_array_equal(small["up"][:, i], layer["up"][:, stays])
    np.testing.assert_array_equal(small["bias"][:, i], layer["bias"][stays])
    np.testing.assert_array_equal(small["down"][:, i], layer["down"][stays])
    np.testing.assert_array_equal(small["embed"][:, i], layer["embed"])


def test_fpp_on_devices_that_split_the_layers_has_the_masks_of_one():
  tx = fpp(
    optax.sgd(0.1),
    [Rule("w", 0.5, layers=0)],
    begin=0,
    end=2,
    every=1,
    score="magnitude",
  )
  mesh = jax.make_mesh((8,), ("stage",), (AxisType.Auto,))

  def run(spec):
    w = jax.random.normal(jax.random.key(0), (8, 16, 32))
    params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
    state = jax.eval_shape(tx.init, params)
    placed = shardings_like(state, params)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    step = battery.jit(lambda state, p: tx.update(p, state, p))
    for _ in range(3):
      updates, state = step(state, params)
      params = optax.apply_updates(params, updates)
    return params["w"], state.suspected["w"]

  split, whole = run(PartitionSpec("stage")), run(PartitionSpec())
  assert not split[1].sharding.is_fully_replicated
  np.testing.assert_array_equal(np.mean(whole[0] == 0, axis=(1, 2)), 0.5)
  for found, expected in zip(split, whole, strict=True):
    np.testing.assert_array_equal(found, expected)
