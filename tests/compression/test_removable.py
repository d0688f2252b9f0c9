"""What a shrink may take away, and what it must leave."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folding import config as c
from folding.compression.shrink import shrink
from tests.compression.shrink_cases import (
  MODELS,
  TOKENS,
  F,
  H,
  N,
  V,
  logits,
  make_config,
  oracle_logits,
  random_params,
)


@pytest.mark.parametrize(
  ("change", "heads"),
  [
    # A constant, as attention weights add up to 1.
    ({"v/kernel": 0, "v/bias": 1}, ((0, 1, 2, 3), (0, 1, 2, 3))),
    ({"v/kernel": 0, "v/bias": 0}, ((0,), (0, 1, 2, 3))),
    # Not dead: they attend to all alike.
    ({"q/kernel": 0, "k/kernel": 0}, ((0, 1, 2, 3), (0, 1, 2, 3))),
    ({"o/kernel": 0}, ((0,), (0, 1, 2, 3))),  # one stays
  ],
  ids=["values_are_a_constant", "no_values", "no_logits", "no_output"],
)
def test_a_head_is_dead_if_it_adds_nothing(change, heads):
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


def test_a_head_that_shares_a_live_key_stays():
  config = make_config(c.gpt2, "lm", {}, {"num_kv_heads": 2})
  params = random_params(config)
  params["blocks_0"]["attn"]["o"]["kernel"][[1, 2]] = 0
  assert shrink(config, params).config == config


@pytest.mark.parametrize("zero", ["up", "gate"])
def test_a_neuron_with_a_bias_is_a_constant_and_stays(zero):
  config = make_config(c.gpt2, "lm", {}, {"gated": True})
  params = random_params(config)
  params["blocks_0"]["mlp"][zero]["kernel"][:, 3] = 0
  assert shrink(config, params).config == config
  params["blocks_0"]["mlp"][zero]["bias"][3] = 0
  small = shrink(config, params)
  assert small.config.model.mlp_width == (F - 1, F)


def test_a_layer_without_a_living_neuron_keeps_one():
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
def test_sizes_follow_from_the_zeros(dead, tokens, heads, multiple):
  config, params = _plain()
  params = jax.tree.map(np.copy, params)
  params["blocks_0"]["mlp"]["down"]["kernel"][sorted(dead)] = 0
  params["blocks_0"]["attn"]["o"]["kernel"][sorted(heads)] = 0
  params["embed"]["embedding"][sorted(tokens)] = 0
  small = shrink(config, params, multiple=multiple)
  layer = c.layers_of(small.config.model, small.config.fold)[0]
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
