"""A folded and pruned model goes through int8 quantisation by `qwix`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import folding
from folding import config as c
from folding import paths

qwix = pytest.importorskip("qwix", reason="needs the package qwix (extra test)")

# qwix 0.1.8 imports a name that is now an alias in Flax.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.VariableState. was removed:DeprecationWarning"
)

# All but embeddings, which are looked up and not multiplied.
RULE = {"module_path": r"(?!embed).*", "weight_qtype": "int8"}


@pytest.fixture(scope="module")
def model():
  """Returns (module, parameters with zeros, tokens) of a folded model."""
  config = c.resolve(
    c.Config(
      preset="none",
      data=c.DataConfig(length=16),
      model=c.ModelConfig(num_layers=1, width=32, num_heads=4),
      fold=c.FoldConfig(groups=2, values="diagonal"),
    )
  )
  module = folding.make_model(folding.shape_of(config), vocab_size=50)
  tokens = np.random.default_rng(0).integers(0, 50, (4, 16))
  params = jax.jit(module.init)(jax.random.key(1), tokens)["params"]
  rng = np.random.default_rng(2)

  def prune(name, w):
    if not name.endswith(("up/kernel", "down/kernel")):
      return w
    return w * (rng.uniform(size=w.shape) >= 0.7).astype(w.dtype)

  return module, paths.map_named(prune, params), tokens


def _quantised(module, params, tokens, **rule):
  provider = qwix.PtqProvider([qwix.QuantizationRule(**(RULE | rule))])
  int8 = qwix.quantize_model(module, provider)
  like = jax.eval_shape(int8.init, jax.random.key(0), tokens)["params"]
  return int8, qwix.quantize_params(params, like)


def _by_hand(small):
  """Returns {path: float64 values} of a quantised tree."""
  leaves, found = paths.flatten(small), {}
  for name, leaf in leaves.items():
    if name.endswith("/array/qvalue"):
      scale = leaves[name.removesuffix("qvalue") + "scale"]
      name = name.removesuffix("/array/qvalue")
      found[name] = np.asarray(leaf, np.float64) * np.asarray(scale, np.float64)
    elif not name.endswith("/array/scale"):
      found[name] = np.asarray(leaf, np.float64)
  return found


def test_folded_heads_compute_with_the_rounded_weights(model):
  module, params, tokens = model
  int8, small = _quantised(module, params, tokens)
  rounded = _by_hand(small)
  assert rounded["blocks_0/attn/q/kernel"].shape == (32, 4, 2)  # not unfolded
  apply = jax.jit(module.apply)
  expected = apply(
    {
      "params": paths.map_named(
        lambda name, w: jnp.asarray(rounded[name], w.dtype), params
      )
    },
    tokens,
  )
  found = jax.jit(int8.apply)({"params": small}, tokens)
  # Products of up to 128 float32 terms, the scale before or after the sum.
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  exact = apply({"params": params}, tokens)
  assert np.abs(exact - expected).max() > 1e-3  # control: rounding is visible


def test_no_weight_moves_by_more_than_half_a_step_and_zeros_stay(model):
  module, params, tokens = model
  _, small = _quantised(module, params, tokens)
  leaves, rounded = paths.flatten(small), _by_hand(small)
  for name, w in paths.flatten(params).items():
    scale = leaves.get(f"{name}/array/scale")
    if scale is None:
      np.testing.assert_array_equal(rounded[name], w)
      continue
    step = np.broadcast_to(scale, w.shape)
    assert (np.abs(rounded[name] - w) <= 0.5001 * step).all(), name
    assert (rounded[name][np.asarray(w) == 0] == 0).all(), name


def test_account_counts_a_byte_per_value_and_a_bit_per_element(model):
  module, params, tokens = model
  _, small = _quantised(module, params, tokens)
  kernel = small["blocks_0"]["mlp"]["up"]["kernel"]
  size = folding.account({"w": kernel}, {"w": kernel})["bytes"]["overall"]
  values = np.count_nonzero(kernel.array.qvalue)
  assert 0 < values < 0.32 * 32 * 128
  assert size["stored"] == values + 4 * 128  # and a float32 scale per column
  assert size["masks"] == 32 * 128 // 8
