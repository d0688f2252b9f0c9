"""Decoding with a KV cache or a constant state, against whole passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding.models import constant_state
from folding.models import decode as decode_lib
from folding.models.decode import KVCache, Step
from folding.models.linear_attention import Span
from folding.models.shape import shape_of
from folding.models.transformer import make_model

D, H, K, V, MOST = 16, 4, 4, 11, 24
LENGTHS = (3, 8, 5)  # of the prompts
B, LONGEST, STEPS = 3, 8, 6
SHAPE = {"num_layers": 1, "width": D, "num_heads": H, "mlp_width": 12}
ONE = {"groups": 1, "values": "diagonal"}
KINDS = {
  "dense": (c.ModelConfig, {}, {}),
  "folded": (c.ModelConfig, ONE, {"remat": True}),
  "input_axis": (c.ModelConfig, {"groups": 4, "axis": "input"}, {}),
  "window": (c.ModelConfig, ONE, {"window": 3}),
  "heads": (c.ModelConfig, {"values": "diagonal"}, {"heads": ((0, 3),)}),
  "by_layer": (
    c.ModelConfig,
    {"groups": (1, 2), "values": ("dense", "diagonal")},
    {"num_layers": 2, "mlp_width": (8, 12), "positions": "none"},
  ),
  "learned": (c.gpt2, ONE, {}),
  "post_norm": (c.bert, {"groups": 1, "value_rank": 3}, {"causal": True}),
  "rope_shared": (c.llama, {}, {"num_kv_heads": 2}),
  "norms_both": (
    c.llama,
    {"value_rank": 3},
    {"norm_position": "both", "qk_norm": True, "scale_embeddings": True},
  ),
  "rope_copy": (
    c.llama,
    {"groups": 2, "values": "diagonal"},
    {"num_kv_heads": 1},
  ),
  "rope_pairs_window": (
    c.llama,
    {"groups": 2, "rope": "pairs"},
    {
      "num_layers": 2,
      "num_kv_heads": 2,
      "window": (4, 0),
      "rope_base": (10000.0, 100.0),
      "rope_scaling": (2.0,),
    },
  ),
}
CONSTANT = {
  "alibi": (c.ModelConfig, ONE, {}),
  "shared_key": (
    c.ModelConfig,
    {"groups": 1, "value_rank": 3},
    {"num_kv_heads": 2},
  ),
  # The second layer has a KV cache.
  "one_of_two": (
    c.ModelConfig,
    {"groups": (1, 2), "values": "diagonal"},
    {"num_layers": 2},
  ),
}


def _make(build, fold, fields):
  """Returns a small model and random parameters."""
  config = c.resolve(
    c.Config(
      preset="none",
      data=c.DataConfig(length=MOST),
      model=build(**(SHAPE | fields)),
      fold=c.FoldConfig(**fold),
    )
  )
  model = make_model(shape_of(config), V)
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(shapes)
  # With RoPE by pairs the frequencies are parameters; any values will do.
  values = [np.float32(0.5 * rng.normal(size=x.shape)) for x in leaves]
  return model, jax.tree.unflatten(tree, list(map(jnp.asarray, values)))


def _texts():
  """Returns whole texts, left-padded prompts, and the pad tokens of each."""
  rng = np.random.default_rng(1)
  texts_BL = rng.integers(0, V, (B, LONGEST + STEPS)).astype(np.int32)
  start_B = LONGEST - np.array(LENGTHS, np.int32)
  prompts_BL = rng.integers(0, V, (B, LONGEST)).astype(np.int32)  # at padding
  for row, length in enumerate(LENGTHS):
    prompts_BL[row, LONGEST - length :] = texts_BL[row, :length]
  return texts_BL, jnp.asarray(prompts_BL), jnp.asarray(start_B)


def _decoded(model, params, num_slots, states=None):
  """Returns logits after the prompts and each next token, and the caches."""
  texts_BL, prompts_BL, start_B = _texts()
  at_BT = np.array(LENGTHS)[:, None] + np.arange(STEPS)
  next_TB = jnp.asarray(np.take_along_axis(texts_BL, at_BT, 1).T)

  @jax.jit
  def run(params):
    apply = functools.partial(model.apply, {"params": params})
    first_BV, caches = apply(prompts_BL, start_B, states, method="prefill")
    caches = [
      decode_lib.resize(x, layer.window or num_slots)
      if isinstance(x, KVCache)
      else x
      for x, layer in zip(caches, model.shape.layers, strict=True)
    ]

    def step(carry, tokens_B):
      caches, index = carry
      at = Step(index, start_B)
      logits_BV, caches = apply(tokens_B, caches, at, method="decode")
      return (caches, index + 1), logits_BV

    carry = (caches, jnp.int32(LONGEST))
    (caches, _), rest_TBV = jax.lax.scan(step, carry, next_TB)
    return jnp.concatenate([first_BV[None], rest_TBV]), caches

  logits_TBV, caches = run(params)
  return np.asarray(logits_TBV).swapaxes(0, 1), caches


def _whole(model, params):
  """Returns the same logits from one pass over the texts."""
  texts_BL, _, _ = _texts()
  apply = jax.jit(model.apply)
  logits_BLV = np.asarray(apply({"params": params}, jnp.asarray(texts_BL)))
  at_BT = np.array(LENGTHS)[:, None] - 1 + np.arange(STEPS + 1)
  return np.take_along_axis(logits_BLV, at_BT[..., None], 1)


@pytest.mark.parametrize(("build", "fold", "fields"), KINDS.values(), ids=KINDS)
def test_cached_logits_are_those_of_whole_texts(build, fold, fields):
  model, params = _make(build, fold, fields)
  # A window needs no more slots; otherwise there are some to spare.
  num_slots = LONGEST + STEPS + 3
  found, _ = _decoded(model, params, num_slots)
  expected = _whole(model, params)
  # Another order of float32 sums, and angles of other positions.
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-5)


def test_cache_of_bfloat16_model_is_bfloat16():
  model, params = _make(c.ModelConfig, ONE, {"dtype": "bfloat16"})
  found, caches = _decoded(model, params, LONGEST + STEPS)
  assert {x.dtype for x in jax.tree.leaves(caches)} == {jnp.dtype("bfloat16")}
  expected = _whole(model, params)
  # A few roundings of 2^-8.
  assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
  ("name", "keys", "values"),
  [
    ("dense", (B * H, K), B * H),
    ("folded", (B * H, 1), B * H),
    ("rope_shared", (B * 2, K), B * 2),
    ("rope_copy", (B, K), B * H),  # rotated keys have K numbers
    ("rope_pairs_window", (B * 2, 2), B * 2),
  ],
)
def test_cache_has_the_size_of_folded_keys(name, keys, values):
  model, params = _make(*KINDS[name])
  _, prompts_BL, start_B = _texts()
  _, [cache, *_] = jax.eval_shape(
    lambda: model.apply(
      {"params": params}, prompts_BL, start_B, method="prefill"
    )
  )
  assert cache.k.shape == (*keys, LONGEST)
  assert cache.v.shape == (values, LONGEST, K)


@pytest.mark.parametrize("num_slots", [1, 3, 5, 8, 10])
def test_slots_hold_the_newest_positions(num_slots):
  length = 5
  index_M = np.arange(length)
  cache = KVCache(
    jnp.asarray(np.tile(index_M, (2, 3, 1)), jnp.float32),
    jnp.asarray(np.tile(index_M[:, None], (2, 1, 3)), jnp.float32),
  )
  cache = decode_lib.resize(cache, num_slots)
  write = jax.jit(decode_lib.write)
  slot_positions = jax.jit(decode_lib.slot_positions, static_argnums=0)
  for index in range(length, length + 9):
    new = KVCache(
      np.full((2, 3, 1), index, np.float32),
      np.full((2, 1, 3), index, np.float32),
    )
    cache = jax.device_get(write(cache, new, jnp.int32(index)))
    held = np.asarray(slot_positions(num_slots, jnp.int32(index)))
    seen = {i for i in range(index + 1) if i > index - num_slots}
    assert {i for i in held if i >= 0} == seen
    for slot, i in enumerate(held):
      if i >= 0:
        np.testing.assert_array_equal(cache.k[..., slot], i)
        np.testing.assert_array_equal(cache.v[:, slot], i)


def _states(model, params, margin):
  spans = jax.jit(functools.partial(constant_state.measure_spans, model))(
    params
  )
  return constant_state.empty_states(model, spans, B, margin)


@pytest.mark.parametrize(
  ("build", "fold", "fields"), CONSTANT.values(), ids=CONSTANT
)
def test_logits_of_constant_state_are_those_of_whole_texts(build, fold, fields):
  model, params = _make(build, fold, fields)
  states = _states(model, params, 2.0)
  found, caches = _decoded(model, params, 20, states)
  assert not caches[0].is_outside_B.any()
  # The size does not grow.
  sizes = [jax.tree.map(jnp.size, x[0]) for x in (states, caches)]
  assert sizes[0] == sizes[1]
  # Interpolation is off by no more than rounding; see `chebyshev`.
  expected = _whole(model, params)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-5)


def test_constant_state_outside_its_range_is_flagged_and_wrong():
  model, params = _make(*CONSTANT["alibi"])
  found, [cache] = _decoded(model, params, 20, _states(model, params, 0.3))
  assert cache.is_outside_B.all()
  assert np.abs(found - _whole(model, params)).max() > 1e-2


def test_widen_keeps_the_center():
  ends = [jnp.asarray([[x]]) for x in (-1.0, 3.0, 2.0, 2.5)]
  wide = constant_state.widen(Span(*ends), 2.0)
  np.testing.assert_allclose(np.ravel(wide), [-3.0, 5.0, 1.75, 2.75])


def test_nodes_for_covers_the_widest_layer_or_returns_none():
  def span(s, t, center=0.0):
    ends = (center - s, center + s, -t, t)
    return Span(*(jnp.full((1, 1), x) for x in ends))

  small, large = span(2.0, 1.0), span(12.0, 4.0)
  assert constant_state.nodes_for([small], 1e-4) == 64
  assert constant_state.nodes_for([small, large], 1e-4) == 192
  assert constant_state.nodes_for([small, span(1e4, 9.0)], 1e-4) is None
  # Panels have a least width, which more of them do not reduce.
  assert constant_state.nodes_for([span(0.01, 100.0, 100.0)], 1e-4) is None
