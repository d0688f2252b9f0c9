"""Shrunk models against the float64 oracle of the model before."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folding import config as c
from folding import paths
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from tests.compression.shrink_cases import (
  MODELS,
  TOKENS,
  C,
  D,
  F,
  H,
  K,
  L,
  N,
  V,
  logits,
  make_config,
  oracle_logits,
  random_params,
  shrink,
)

ABSENT = [2, 5, 6]  # tokens with a row of zeros
# Neurons without effect, by layer and by the kernel where they are zero.
SILENT = [{"down": [0, 1, 20], "up": [5], "gate": [7]}, {"down": [3, 9]}]


def _silence(params, config):
  """Zeroes SILENT neurons, ABSENT tokens, and one group of heads per layer."""
  params = jax.tree.map(np.copy, params)
  shared = config.model.num_heads // config.model.num_kv_heads
  for n, neurons in enumerate(SILENT):
    mlp, attn = params[f"blocks_{n}"]["mlp"], params[f"blocks_{n}"]["attn"]
    for role, indices in neurons.items():
      if role == "down":
        mlp["down"]["kernel"][indices] = 0
      elif role in mlp:
        mlp[role]["kernel"][:, indices] = 0
        if "bias" in mlp[role]:
          mlp[role]["bias"][indices] = 0
    if n == 0:
      attn["o"]["kernel"][shared : 2 * shared] = 0
    elif "diagonal" in attn["v"]:
      attn["v"]["diagonal"].reshape(H, -1)[:shared] = 0
    else:
      for name, w in attn["v"].items():
        w[(slice(None), 0) if name == "kernel" else 0] = 0
  params["embed"]["embedding"][ABSENT] = 0
  return params


@functools.cache
def _case(name):
  """Returns config, silenced parameters, and their `Shrunk`."""
  config = make_config(*MODELS[name])
  params = _silence(random_params(config), config)
  return config, params, shrink(config, params)


@pytest.mark.parametrize("name", MODELS)
def test_shrink_keeps_the_function_of_the_oracle(name):
  config, params, small = _case(name)
  is_new = small.config.fold.rope == "pairs"  # the oracle has no pairs
  expected = (logits if is_new else oracle_logits)(config, params, TOKENS)
  found = logits(small.config, small.params, small.cut.token_map[TOKENS])
  # float32 through two layers of weights near 0.5: rounding of about 1e-6.
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("name", MODELS)
def test_shrink_removes_silent_units_and_nothing_else(name):
  config, params, small = _case(name)
  before = shape_of(config).layers
  is_gated = config.model.gated
  assert small.config.model.mlp_width == tuple(
    layer.mlp_width - sum(len(SILENT[n].get(r, ())) for r in roles)
    for n, layer in enumerate(before)
    for roles in [("down", "up", "gate") if is_gated else ("down", "up")]
  )
  assert small.config.model.dense_mlp_width == config.model.mlp_width
  heads = ((0, 2, 3), (1, 2, 3))
  if config.model.num_kv_heads == 2:
    heads = ((0, 1), (2, 3))
  assert small.config.model.heads == heads
  rows = V - 2 if config.task == "classify" else V
  assert small.params["embed"]["embedding"].shape == (rows, D)
  assert not any(
    "v/diagonal" in n and w.shape[-1] == 1
    for n, w in paths.flatten(small.params).items()
  )
  # The model has exactly these parameters.
  model = make_model(shape_of(small.config), rows, C)
  tokens = jax.ShapeDtypeStruct((1, L), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  chex.assert_trees_all_equal_shapes_and_dtypes(small.params, shapes)
  assert c.resolve(small.config) == small.config


@pytest.mark.parametrize("name", MODELS)
def test_shrink_twice_is_shrink_once_and_keeps_the_baseline(name):
  config, _, small = _case(name)
  assert shape_of(small.config).dense() == shape_of(config).dense()
  again = shrink(small.config, small.params)
  assert again.config == small.config
  assert again.cut.is_empty
  chex.assert_trees_all_equal(again.params, small.params)
  rows = len(small.params["embed"]["embedding"])
  np.testing.assert_array_equal(again.cut.token_map, np.arange(rows))
  # One more neuron: the width before is still that of the first shrink.
  quieter = jax.tree.map(np.copy, small.params)
  quieter["blocks_1"]["mlp"]["down"]["kernel"][4] = 0
  again = shrink(small.config, quieter).config
  assert again.model.dense_mlp_width == config.model.mlp_width
  assert shape_of(again).dense() == shape_of(config).dense()


def test_shrink_maps_removed_tokens_to_one_row():
  config = make_config(*MODELS["bert_folded"])
  params = random_params(config)
  params["embed"]["embedding"][ABSENT] = 0
  small = shrink(config, params, absorb=False)
  assert small.config == config  # the vocabulary is not in it
  np.testing.assert_array_equal(
    small.cut.token_map, [0, 1, 2, 3, 4, 2, 2, 5, 6, 7, 8]
  )
  assert not small.params["embed"]["embedding"][2].any()
  np.testing.assert_array_equal(
    logits(config, params, TOKENS),
    logits(config, small.params, small.cut.token_map[TOKENS]),
  )


def test_shrink_without_absorb_keeps_diagonals():
  config, params, _ = _case("gpt2_folded")
  small = shrink(config, params, absorb=False)
  assert small.config.fold.values == "diagonal"
  np.testing.assert_array_equal(
    small.params["blocks_0"]["attn"]["v"]["diagonal"].reshape(3, K),
    params["blocks_0"]["attn"]["v"]["diagonal"].reshape(H, K)[[0, 2, 3]],
  )


def test_cut_refuses_a_state_of_other_shapes():
  config, params, _ = _case("gpt2_folded")
  small = shrink(config, params)
  tx = optax.adafactor(1e-3, min_dim_size_to_factor=4)
  with pytest.raises(ValueError, match="has the shape"):
    small.cut(tx.init(params))


@pytest.mark.parametrize(
  ("change", "heads"),
  [
    # The output is a constant, as attention weights add up to 1.
    ({"v/kernel": 0, "v/bias": 1}, ((0, 1, 2, 3), (0, 1, 2, 3))),
    ({"v/kernel": 0, "v/bias": 0}, ((0,), (0, 1, 2, 3))),
    # Not dead: they attend to all tokens equally.
    ({"q/kernel": 0, "k/kernel": 0}, ((0, 1, 2, 3), (0, 1, 2, 3))),
    ({"o/kernel": 0}, ((0,), (0, 1, 2, 3))),  # one stays
  ],
  ids=["values_are_a_constant", "no_values", "no_logits", "no_output"],
)
def test_shrink_removes_a_head_that_adds_nothing(change, heads):
  config = make_config(*MODELS["gpt2"])
  params = random_params(config)
  for name, value in change.items():
    role, kind = name.split("/")
    params["blocks_0"]["attn"][role][kind][:] = value
  small = shrink(config, params)
  found = small.config.model.heads or (tuple(range(H)),) * N
  assert found == heads
  np.testing.assert_allclose(
    logits(small.config, small.params, TOKENS),
    oracle_logits(config, params, TOKENS),
    rtol=2e-5,
    atol=5e-5,
  )


def test_shrink_keeps_a_head_that_shares_a_live_key():
  config = make_config(c.gpt2, "lm", {}, {"num_kv_heads": 2})
  params = random_params(config)
  params["blocks_0"]["attn"]["o"]["kernel"][[1, 2]] = 0
  assert shrink(config, params).config == config


@pytest.mark.parametrize("zero", ["up", "gate"])
def test_shrink_keeps_a_neuron_that_is_a_constant(zero):
  config = make_config(c.gpt2, "lm", {}, {"gated": True})
  params = random_params(config)
  params["blocks_0"]["mlp"][zero]["kernel"][:, 3] = 0
  assert shrink(config, params).config == config
  params["blocks_0"]["mlp"][zero]["bias"][3] = 0
  small = shrink(config, params)
  assert small.config.model.mlp_width == (F - 1, F)


def test_shrink_keeps_one_neuron_per_layer():
  config = make_config(*MODELS["gpt2"])
  params = random_params(config)
  for n in range(N):
    params[f"blocks_{n}"]["mlp"]["down"]["kernel"][:] = 0
  assert shrink(config, params).config.model.mlp_width == 1
  assert shrink(config, params, multiple=8).config.model.mlp_width == 8


@functools.cache
def _plain():
  config = make_config(*MODELS["bert_folded"])
  return config, random_params(config)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  dead=st.sets(st.integers(0, F - 1)),
  tokens=st.sets(st.integers(0, V - 1)),
  heads=st.sets(st.integers(0, H - 1)),
  multiple=st.integers(1, 2 * F),
)
def test_shrink_sizes_follow_from_the_zeros(dead, tokens, heads, multiple):
  config, params = _plain()
  params = jax.tree.map(np.copy, params)
  params["blocks_0"]["mlp"]["down"]["kernel"][sorted(dead)] = 0
  params["blocks_0"]["attn"]["o"]["kernel"][sorted(heads)] = 0
  params["embed"]["embedding"][sorted(tokens)] = 0
  small = shrink(config, params, multiple=multiple)
  layer = shape_of(small.config).layers[0]
  least = max(F - len(dead), 1)
  width = next(
    w for w in range(F + 1) if w == F or w >= least and not w % multiple
  )
  assert layer.mlp_width == width
  down = small.params["blocks_0"]["mlp"]["down"]["kernel"]
  assert (down != 0).any(1).sum() == F - len(dead)
  assert len(layer.heads) == max(H - len(heads), 1)
  rows = small.params["embed"]["embedding"]
  assert len(rows) == V - max(len(tokens) - 1, 0)
  np.testing.assert_array_equal(
    rows[small.cut.token_map], params["embed"]["embedding"]
  )
  again = shrink(small.config, small.params, multiple=multiple)
  assert again.cut.is_empty and again.config == small.config


def test_cut_of_an_optimizer_state_cuts_every_moment():
  config, params, _ = _case("llama_shared_keys")
  small = shrink(config, params)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  cut = small.cut(state)
  chex.assert_trees_all_equal_shapes(cut, tx.init(small.params))
  adam, before = cut[1][0], state[1][0]
  chex.assert_trees_all_equal(adam.mu, small.cut(before.mu))
  np.testing.assert_allclose(
    adam.nu["embed"]["embedding"], before.nu["embed"]["embedding"]
  )
  np.testing.assert_allclose(  # the gradient was the parameters
    adam.mu["blocks_1"]["mlp"]["up"]["kernel"],
    0.1
    * before.count
    * _clipped(params)["blocks_1"]["mlp"]["up"]["kernel"][
      :, small.cut.kept["blocks_1/mlp/up/kernel"][1]
    ],
    rtol=1e-5,
  )
  assert adam.count == 1


def test_cut_of_an_optimizer_of_some_parameters_cuts_its_moments():
  config, params, _ = _case("llama_shared_keys")
  small = shrink(config, params)

  def is_of_layers(params):
    return paths.map_named(lambda n, _: n.startswith("blocks_"), params)

  tx = optax.masked(optax.sgd(0.1, momentum=0.9), is_of_layers)
  cut = small.cut(tx.init(params))
  chex.assert_trees_all_equal(cut, tx.init(small.params))


def _clipped(params):
  norm = np.sqrt(
    sum((w.astype(float) ** 2).sum() for w in jax.tree.leaves(params))
  )
  return jax.tree.map(lambda w: w / max(norm, 1.0), params)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"multiple": 0}, "multiple must be a whole number of at least 1"),
    ({"is_zero": {"embed": np.zeros(3, bool)}}, "one shape"),
  ],
  ids=["multiple", "is_zero"],
)
def test_shrink_refuses_what_does_not_fit(change, message):
  config = make_config(*MODELS["gpt2"])
  values = {"config": config, "params": random_params(config)} | change
  with pytest.raises(ValueError, match=message):
    shrink(**values)
