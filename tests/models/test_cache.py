"""Decoding with a cache against one pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import paths
from folding.models import cache as cache_lib
from tests.models import decoding

KINDS = {
  "alibi": (decoding.alibi, {}, {}),
  "alibi_1": (decoding.alibi, {"groups": 1, "v_block": 1}, {}),
  "alibi_2_remat": (
    decoding.alibi,
    {"groups": 2, "v_block": 8},
    {"remat": True},
  ),
  "alibi_input_axis": (decoding.alibi, {"groups": 4, "axis": "input"}, {}),
  "alibi_window": (decoding.alibi, {"groups": 1, "v_block": 1}, {"window": 3}),
  "alibi_heads": (decoding.alibi, {"v_block": 1}, {"heads": ((0, 3),)}),
  "by_layer": (
    decoding.alibi,
    {"groups": (1, 2), "v_block": 1, "first_dense": True},
    {"num_layers": 2, "mlp_width": (8, 12)},
  ),
  "learned_1": (
    decoding.gpt2,
    {"groups": 1, "v_block": 1, "v_identity": True},
    {},
  ),
  "post_norm": (decoding.bert, {"groups": 1}, {"causal": True}),
  "rope_shared": (decoding.llama, {}, {"num_kv_heads": 2}),
  "rope_copy": (
    decoding.llama,
    {"groups": 2, "v_block": 1},
    {"num_kv_heads": 1},
  ),
  "rope_pairs_window": (
    decoding.llama,
    {"groups": 2, "rope": "pairs"},
    {"num_kv_heads": 2, "window": 4, "rope_scaling": (2.0,)},
  ),
  "no_positions": (decoding.alibi, {"groups": 2}, {"positions": "none"}),
}


@pytest.mark.parametrize(("build", "fold", "fields"), KINDS.values(), ids=KINDS)
def test_cached_logits_are_those_of_the_whole_text(build, fold, fields):
  model, params = decoding.make(build, fold, fields)
  # A window needs no more slots; else there are some to spare.
  num_slots = fields.get("window", decoding.LONGEST + decoding.STEPS + 3)
  found, _ = decoding.decoded(model, params, num_slots)
  # The same float32 sums in another order, and angles of other places.
  np.testing.assert_allclose(
    found, decoding.whole(model, params), rtol=2e-5, atol=5e-5
  )


def test_bfloat16_is_cached_as_such():
  model, params = decoding.make(
    decoding.alibi, {"groups": 1, "v_block": 1}, {"dtype": "bfloat16"}
  )
  found, cache = decoding.decoded(
    model, params, decoding.LONGEST + decoding.STEPS
  )
  assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
  expected = decoding.whole(model, params)
  # A few roundings of 2^-8 over two layers.
  assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
  ("name", "keys", "values"),
  [
    ("alibi", (decoding.B * decoding.H, decoding.K), decoding.B * decoding.H),
    ("alibi_1", (decoding.B * decoding.H, 1), decoding.B * decoding.H),
    ("rope_shared", (decoding.B * 2, decoding.K), decoding.B * 2),
    (
      "rope_copy",
      (decoding.B, decoding.K),
      decoding.B * decoding.H,
    ),  # as a rotation leaves it
    ("rope_pairs_window", (decoding.B * 2, 2), decoding.B * 2),
  ],
)
def test_a_key_is_as_small_as_its_folding(name, keys, values):
  model, params = decoding.make(*KINDS[name])
  _, prompts_BL, start_B = decoding.texts()
  cache = jax.eval_shape(
    lambda: cache_lib.resize(
      model.apply(
        params, prompts_BL, start_B, method="prefill", mutable=["cache"]
      )[1]["cache"],
      30,
    )
  )
  shapes = {name: x.shape for name, x in paths.flatten(cache).items()}
  assert shapes == {
    "blocks_0/attn/slots/k": (*keys, 30),
    "blocks_0/attn/slots/v": (values, 30, decoding.K),
  }


def test_training_knows_nothing_of_the_cache():
  model, params = decoding.make(*KINDS["alibi_1"])
  tokens_BL, prompts_BL, start_B = decoding.texts()
  tokens_BL = jnp.asarray(tokens_BL)
  created = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)
  assert set(created) == {"params"}
  trained = jax.make_jaxpr(model.apply)(params, tokens_BL)
  _, cache = jax.eval_shape(
    lambda: model.apply(
      params, prompts_BL, start_B, method="prefill", mutable=["cache"]
    )
  )
  step = cache_lib.Step(jnp.int32(decoding.LONGEST), start_B)
  decoded = jax.make_jaxpr(
    lambda cache: model.apply(
      params | cache, start_B, step, method="decode", mutable=["cache"]
    )
  )(cache)
  assert "dynamic_update_slice" in str(decoded)
  assert "dynamic_update_slice" not in str(trained)


@pytest.mark.parametrize("num_slots", [1, 3, 5, 8, 10])
def test_slots_hold_the_newest_places(num_slots):
  length = 5
  place_M = np.arange(length)
  cache = {
    "k": jnp.asarray(np.tile(place_M, (2, 3, 1)), jnp.float32),
    "v": jnp.asarray(np.tile(place_M[:, None], (2, 1, 3)), jnp.float32),
  }
  cache = cache_lib.resize({"slots": cache}, num_slots)["slots"]
  for place in range(length, length + 9):
    new = {"k": jnp.full((2, 3, 1), place), "v": jnp.full((2, 1, 3), place)}
    new = {name: x.astype(jnp.float32) for name, x in new.items()}
    cache = cache_lib.write(cache, new, jnp.int32(place))
    held = np.asarray(cache_lib.places(num_slots, jnp.int32(place)))
    seen = {p for p in range(place + 1) if p > place - num_slots}
    assert {p for p in held if p >= 0} == seen
    for slot, p in enumerate(held):
      if p >= 0:
        np.testing.assert_array_equal(cache["k"][..., slot], p)
        np.testing.assert_array_equal(cache["v"][:, slot], p)
