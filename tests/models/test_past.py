"""Decoding in constant memory against one pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import paths
from folding.models import past as past_lib
from folding.models.linear_attention import Span
from tests.models import decoding

NODES = 256
ONE = {"groups": 1, "v_block": 1}
KINDS = {
  "alibi": (decoding.alibi, ONE, {}),
  "shared_key": (decoding.alibi, {"groups": 1}, {"num_kv_heads": 2}),
  "learned_remat": (decoding.gpt2, ONE, {"remat": True}),
  "post_norm": (decoding.bert, ONE, {"causal": True}),
  # The second layer has slots.
  "one_of_two": (
    decoding.alibi,
    {"groups": (1, 2), "v_block": 1},
    {"num_layers": 2},
  ),
}


def _spans(model, params, margin):
  tokens = np.random.default_rng(5).integers(0, decoding.V, (64, 12))
  _, written = jax.jit(lambda p, t: model.apply(p, t, mutable=["spans"]))(
    params, jnp.asarray(tokens, jnp.int32)
  )
  return past_lib.widen(written["spans"], margin)


def test_queries_that_hardly_vary_far_from_0_have_no_constant_state():
  one = jnp.ones((1, 1))
  spans = {"spans": Span(100 * one, 100.01 * one, -100 * one, 100 * one)}
  with pytest.raises(ValueError, match="too far from 0 for how little"):
    past_lib.nodes_for(spans, 1e-4)


@pytest.mark.parametrize(("build", "fold", "fields"), KINDS.values(), ids=KINDS)
def test_logits_are_those_of_the_whole_text(build, fold, fields):
  model, params = decoding.make(build, fold, fields)
  spans = _spans(model, params, 2.0)
  assert past_lib.nodes_for(spans, 1e-4) <= NODES
  found, cache = decoding.decoded(
    model.clone(num_nodes=NODES), params | {"spans": spans}, 20
  )
  assert not past_lib.is_outside(cache)
  # Interpolation is off by no more than rounding; see `chebyshev`.
  np.testing.assert_allclose(
    found, decoding.whole(model, params), rtol=2e-5, atol=5e-5
  )


def test_what_leaves_the_range_is_seen_and_would_be_wrong():
  model, params = decoding.make(*KINDS["alibi"])
  spans = _spans(model, params, 0.3)
  found, cache = decoding.decoded(
    model.clone(num_nodes=NODES), params | {"spans": spans}, 20
  )
  assert past_lib.is_outside(cache)
  assert np.abs(found - decoding.whole(model, params)).max() > 1e-2


def test_each_end_of_a_range_is_watched():
  rng = np.random.default_rng(0)
  q_BLH, k_BLH = jnp.asarray(rng.normal(size=(2, 2, 5, 3)), jnp.float32)
  v_BLHK = jnp.ones((2, 5, 3, 4))
  span = past_lib.span_of_all(q_BLH, k_BLH, 4)
  assert span.s_low.shape == (1, 3)
  begin = jax.jit(past_lib.begin, static_argnames=("head_dim", "num_nodes"))
  go_on = jax.jit(past_lib.go_on, static_argnames="head_dim")
  begun, _ = begin(
    span, q_BLH, k_BLH, v_BLHK, None, None, head_dim=4, num_nodes=32
  )
  np.testing.assert_array_equal(begun.is_outside_B, [False, False])
  inside = np.zeros((2, 2, 1, 3), np.float32)  # of both, q and k
  inside[0] = (span.s_low + span.s_high) / 4  # s is sqrt(K) q
  inside[1] = (span.t_low + span.t_high) / 2

  def is_outside(change):
    q_B1H, k_B1H = jnp.asarray(inside + change)
    past, _ = go_on(begun, q_B1H, k_B1H, v_BLHK[:, :1], None, head_dim=4)
    return past.is_outside_B.tolist()

  assert is_outside(np.zeros_like(inside)) == [False, False]
  for axis, sign in np.ndindex(2, 2):
    change = np.zeros_like(inside)
    ends = np.array(span)[2 * axis : 2 * axis + 2, 0, 2]
    half = (ends[1] - ends[0]) / 2 / (2 - axis)
    for factor, expected in ((0.99, False), (1.01, True)):
      change[axis, 1, 0, 2] = (2 * sign - 1) * factor * half
      assert is_outside(change) == [False, expected]


def test_a_state_has_the_same_size_after_any_length():
  model, params = decoding.make(*KINDS["one_of_two"])
  spans = _spans(model, params, 2.0)
  model, variables = model.clone(num_nodes=64), params | {"spans": spans}

  def sizes(length):
    tokens_BL = jnp.zeros((2, length), jnp.int32)
    start_B = jnp.zeros(2, jnp.int32)
    _, written = jax.eval_shape(
      lambda: model.apply(
        variables, tokens_BL, start_B, method="prefill", mutable=["cache"]
      )
    )
    layers = {
      n: jax.tree.leaves(written["cache"][f"blocks_{n}"]) for n in range(2)
    }
    return {n: sum(x.size for x in leaves) for n, leaves in layers.items()}

  short, long = sizes(8), sizes(4096)
  H, K, panels = decoding.H, decoding.K, 64 // 16
  assert short[0] == long[0] == 4 * H + 2 * H * (panels + 64 * (K + 1)) + 2
  assert long[1] == 512 * short[1]


def test_training_measures_no_spans():
  model, params = decoding.make(*KINDS["alibi"])
  tokens_BL = jnp.zeros((2, 8), jnp.int32)
  made = jax.eval_shape(
    model.clone(num_nodes=64).init, jax.random.key(0), tokens_BL
  )
  assert set(made) == {"params"}
  assert paths.flatten(made["params"]).keys() == (
    paths.flatten(params["params"]).keys()
  )


def test_a_range_is_widened_about_its_middle():
  ends = [jnp.asarray([[x]]) for x in (-1.0, 3.0, 2.0, 2.5)]
  wide = past_lib.widen({"span": Span(*ends)}, 2.0)["span"]
  np.testing.assert_allclose(np.ravel(wide), [-3.0, 5.0, 1.75, 2.75])
