"""Folded models against their dense baselines, and `fold` against `unfold`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from folding import paths
from folding.compression.fold import fold, unfold
from folding.config import Config, FoldConfig, ModelConfig, llama, resolve
from folding.config import gpt2 as gpt2_config
from folding.models.attention import rope_frequencies
from folding.models.shape import shape_of
from folding.models.transformer import make_model

_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, size=(2, 6)))
# N 1, D 16, H 4, K 4.
_SHAPE = {"num_layers": 1, "width": 16, "num_heads": 4, "mlp_width": 24}


def _random_like(shapes, seed=0):
  """Returns random values everywhere, so that no bias or scale is trivial."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.4).astype(s.dtype)),
    shapes,
  )


def _model(model_config, **fold_options):
  options = {"groups": 0, "values": "dense"} | fold_options
  config = resolve(Config(model=model_config, fold=FoldConfig(**options)))
  return make_model(shape_of(config), vocab_size=11)


def _params(model, seed=0):
  shapes = jax.eval_shape(model.init, jax.random.key(0), _TOKENS)
  return _random_like(shapes["params"], seed)


_JITTED = {}  # the dense baseline of many cases is the same model


def _logits(model, params):
  apply = _JITTED.setdefault(repr(model), jax.jit(model.apply))
  return np.asarray(apply({"params": params}, _TOKENS))


def _assert_bit_equal(tree, expected):
  tree, expected = paths.flatten(tree), paths.flatten(expected)
  assert list(tree) == list(expected)
  for name, leaf in expected.items():
    assert tree[name].dtype == leaf.dtype, name
    np.testing.assert_array_equal(tree[name], leaf, err_msg=name)


_CASES = {
  "paper": (ModelConfig(**_SHAPE), {"groups": 1, "values": "diagonal"}),
  "values-only": (ModelConfig(**_SHAPE), {"groups": 0, "values": "diagonal"}),
  "input-axis": (
    ModelConfig(**_SHAPE),
    {"groups": 4, "axis": "input", "values": "diagonal"},
  ),
  "input-row": (
    ModelConfig(**_SHAPE, norm="rmsnorm"),
    {"groups": 1, "axis": "input", "values": "dense"},
  ),
  "grouped-queries": (
    ModelConfig(**_SHAPE, num_kv_heads=2),
    {"groups": 2, "values": "dense"},
  ),
  "learned": (gpt2_config(**_SHAPE), {"groups": 2, "values": "diagonal"}),
  "llama": (llama(**_SHAPE, num_kv_heads=1), {"groups": 2}),
  "llama-values": (llama(**_SHAPE), {"groups": 1, "values": "diagonal"}),
}


def _assert_same_logits(folded, params, dense, baseline):
  shapes = jax.eval_shape(dense.init, jax.random.key(0), _TOKENS)["params"]
  assert jax.tree.map(jnp.shape, baseline) == jax.tree.map(jnp.shape, shapes)
  found, expected = _logits(folded, params), _logits(dense, baseline)
  # Float32 sums in another order: some 1e-6 of the largest logit.
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", _CASES)
def test_unfold_gives_the_same_logits_and_fold_undoes_it(name):
  model_config, options = _CASES[name]
  folded = _model(model_config, **options)
  params = _params(folded)
  baseline = unfold(params)
  _assert_same_logits(folded, params, _model(model_config), baseline)
  options = {"groups": 0, "values": "dense"} | options
  _assert_bit_equal(fold(baseline, **options), params)
  _assert_bit_equal(fold(params, **options), params)
  _assert_bit_equal(unfold(baseline), baseline)


@pytest.mark.parametrize("values", [("diagonal", "dense"), "diagonal"])
def test_unfold_repeats_shared_keys_if_any_layer_has_separate_values(values):
  shape = llama(**_SHAPE | {"num_layers": 2}, num_kv_heads=2)
  folded = _model(shape, groups=2, values=values)
  dense = _model(dataclasses.replace(shape, num_kv_heads=4))
  params = _params(folded)
  _assert_same_logits(folded, params, dense, unfold(params))


def test_unfold_pads_values_of_low_rank():
  shape = ModelConfig(**_SHAPE, num_kv_heads=2)
  folded = _model(shape, groups=2, value_rank=3)
  params = _params(folded)
  _assert_same_logits(folded, params, _model(shape), unfold(params, None, 4))
  with pytest.raises(ValueError, match="head_dim"):
    unfold(params)


@pytest.mark.parametrize("embed_width", [0, 6])
def test_unfold_multiplies_an_embedding_of_low_rank(embed_width):
  shape = ModelConfig(**_SHAPE, tie_embeddings=False, embed_width=embed_width)
  folded = _model(shape, groups=2, embedding_rank=5)
  params = _params(folded)
  _assert_same_logits(folded, params, _model(shape), unfold(params))


def test_unfold_multiplies_embeddings_that_share_a_matrix():
  shape = ModelConfig(**_SHAPE, tie_embeddings=False, positions="learned")
  folded = _model(shape, groups=2, embedding_rank=5, embedding_shared=True)
  params = _params(folded)
  assert params["position_embed"]["embedding"].shape[1] == 5
  _assert_same_logits(folded, params, _model(shape), unfold(params))


def test_unfold_finds_layers_in_lists():
  params = _params(_model(_CASES["paper"][0], groups=1, values="diagonal"))
  layer = params["blocks_0"]["attn"]
  (found,) = unfold({"layers": [layer]})["layers"]
  _assert_bit_equal(found, unfold(layer))


@pytest.mark.parametrize("role", ["q", "v"])
def test_logits_of_a_changed_baseline_differ(role):
  """Negative control of `_assert_same_logits`."""
  model_config, options = _CASES["paper"]
  folded, dense = _model(model_config, **options), _model(model_config)
  params = _params(folded)
  baseline = unfold(params)
  kernel = baseline["blocks_0"]["attn"][role]["kernel"]
  baseline["blocks_0"]["attn"][role]["kernel"] = kernel.at[0].add(0.01)
  found, expected = _logits(folded, params), _logits(dense, baseline)
  assert np.abs(found - expected).max() > 3e-5 * np.abs(expected).max()


def test_fold_of_a_folded_tree_makes_fewer_groups():
  params = _params(_model(_CASES["paper"][0], groups=1))
  two = fold(unfold(params), groups=2, values="dense")
  assert two["blocks_0"]["attn"]["q"]["kernel"].shape == (16, 4, 2)
  _assert_bit_equal(fold(two, groups=1, values="dense"), params)
  with pytest.raises(ValueError, match="q is already folded on the other axis"):
    fold(two, groups=2, axis="input", values="dense")


def test_unfold_copies_no_array_outside_a_folded_projection():
  config = ModelConfig(**(_SHAPE | {"num_layers": 2}))
  model = _model(config, values=("dense", "diagonal"))
  params = paths.flatten(_params(model))
  tree = traverse_util.unflatten_dict(params, sep="/")
  baseline = paths.flatten(unfold(tree))
  moved = {n for n in baseline if baseline[n] is not params.get(n)}
  assert moved == {f"blocks_1/attn/v/{a}" for a in ("kernel", "bias")}


def test_unfold_of_missing_values_is_the_identity():
  model_config = ModelConfig(**_SHAPE)
  folded = _model(model_config, values="identity", groups=2)
  params = _params(folded)
  baseline = unfold(params)
  value = baseline["blocks_0"]["attn"]["v"]["kernel"]
  np.testing.assert_array_equal(value.reshape(16, 16), np.eye(16))
  _assert_same_logits(folded, params, _model(model_config), baseline)
  _assert_bit_equal(fold(baseline, groups=2, values="identity"), params)
  _assert_bit_equal(fold(params, groups=2, values="diagonal"), params)
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  assert all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(unfold(half)))


def _pairs(**fields):
  """Returns a model with 2 of 4 rotary pairs, different ones per key head."""
  shape = _SHAPE | {"width": 32, "num_kv_heads": 2}
  model_config = llama(**(shape | fields))
  options = {"groups": 4, "rope": "pairs"}
  params = _params(_model(model_config, **options))
  frequencies = rope_frequencies(8, 10000.0, share=model_config.rope_share)
  own = jnp.asarray(frequencies[np.array([[2, 0], [1, 3]])])
  params["blocks_0"]["attn"]["frequency"] = own
  return model_config, params, frequencies, options


# A quarter of the channels rotate: three pairs have the frequency 0.
@pytest.mark.parametrize("fields", [{"qkv_bias": True}, {"rope_share": 0.25}])
def test_unfold_puts_pairs_at_their_frequencies(fields):
  model_config, params, frequencies, options = _pairs(**fields)
  baseline = unfold(params, frequencies)
  folded, dense = _model(model_config, **options), _model(model_config)
  _assert_same_logits(folded, params, dense, baseline)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: None, "attn/frequency: give the frequencies"),
    (lambda f: f * 1.01, "attn/frequency: the dense model does not have"),
    (lambda f: f[np.array([0, 0, 1, 3])], "the dense model does not have"),
  ],
  ids=["none", "others", "missing"],
)
def test_unfold_refuses_frequencies_that_the_dense_model_lacks(change, message):
  _, params, frequencies, _ = _pairs()
  with pytest.raises(ValueError, match=message):
    unfold(params, change(frequencies))


def test_unfold_refuses_a_frequency_that_a_head_has_twice():
  _, params, frequencies, _ = _pairs()
  twice = jnp.asarray(frequencies[np.array([[2, 2], [1, 3]])])
  params["blocks_0"]["attn"]["frequency"] = twice
  with pytest.raises(ValueError, match="does not have these frequencies"):
    unfold(params, frequencies)


# ---------------------------------------------------------------------------
# Refusals.


def _layer(seed=0):
  """Returns a dense layer with the structure of G = 2 and a diagonal W_V."""
  rng = np.random.default_rng(seed)
  folded = {
    "q": {
      "kernel": rng.normal(size=(8, 2, 2)),
      "bias": rng.normal(size=(2, 2)),
    },
    "k": {
      "kernel": rng.normal(size=(8, 2, 2)),
      "bias": rng.normal(size=(2, 2)),
    },
    "v": {"diagonal": rng.normal(size=(8, 1, 1))},
    "o": {"kernel": rng.normal(size=(2, 4, 8))},
  }
  return unfold({"enc": {"attn": jax.tree.map(jnp.asarray, folded)}})


def _changed(path, index):
  leaves = paths.flatten(_layer())
  leaves[path] = leaves[path].at[index].add(1e-4)
  return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize(
  ("path", "index", "options", "message"),
  [
    ("q/kernel", (3, 1, 1), {"groups": 2}, "q: rows of a group differ"),
    ("k/bias", (0, 3), {"groups": 2}, "k: rows of a group differ"),
    ("v/kernel", (7, 0, 0), {"groups": 0}, "v: there are values off"),
    ("v/bias", (0, 0), {"groups": 0}, "v: .* no bias"),
  ],
)
def test_fold_refuses_what_would_change_the_function(
  path, index, options, message
):
  fold(_layer(), **options)
  with pytest.raises(ValueError, match=message):
    fold(_changed(f"enc/attn/{path}", index), **options)


@pytest.mark.parametrize(
  ("tree", "options", "message"),
  [
    (_layer(), {"groups": 1}, "q: rows of a group differ"),
    (_layer(), {"groups": 3}, "3 groups do not divide an axis of 4"),
    (_layer(), {"groups": -1}, "groups must be .* it is -1"),
    (_layer(), {"groups": True}, "groups must be .* it is True"),
    (_layer(), {"groups": 2, "axis": "input"}, "q: rows of a group differ"),
    (_layer(), {"groups": 2, "values": "identity"}, "v is not the identity"),
    (jax.tree.map(lambda w: w[None], _layer()), {}, "nn.scan"),
    ({"a": {"kernel": 0}}, {}, "no attention layer"),
    (3, {}, "no attention layer"),
  ],
)
def test_fold_refuses_what_does_not_fit(tree, options, message):
  with pytest.raises(ValueError, match=message):
    fold(tree, **options)


@pytest.mark.parametrize("head_dim", [0, True, 2.0])
def test_unfold_refuses_heads_of_no_size(head_dim):
  with pytest.raises(ValueError, match="unfold: head_dim must be"):
    unfold(_layer(), head_dim=head_dim)


@pytest.mark.parametrize("convert", [fold, unfold])
@pytest.mark.parametrize(
  ("role", "held", "message"),
  [
    ("q", {"kernel": jnp.ones((8, 8))}, r"a/q .* it has {'kernel': \(8, 8\)}"),
    ("q", jnp.ones((8, 2, 4)), "a/q must have a kernel of three axes"),
    ("o", {"bias": jnp.ones(8)}, r"a/o .* it has {'bias': \(8,\)}"),
    ("v", {}, "a/v must have a kernel of three axes"),
  ],
  ids=["axes", "array", "missing", "empty"],
)
def test_conversion_refuses_a_layer_of_another_form(
  convert, role, held, message
):
  with pytest.raises(ValueError, match=message):
    convert({"a": _layer()["enc"]["attn"] | {role: held}})


def test_unfold_takes_a_list_of_layers():
  layer = _layer()["enc"]["attn"]
  [found], expected = unfold([{"a": layer}]), unfold({"a": layer})
  chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
  ("role", "leaf", "shape", "message"),
  [
    ("q", "kernel", (8, 2, 3), "a/q/kernel .* does not fold"),
    ("k", "kernel", (3, 2, 4), "a/k/kernel .* does not fold"),
    ("v", "diagonal", (4, 2, 2), "a/v/diagonal .* does not fit"),
  ],
)
def test_unfold_refuses_shapes_that_do_not_fit(role, leaf, shape, message):
  layer = _layer()["enc"]["attn"] | {role: {leaf: jnp.ones(shape)}}
  with pytest.raises(ValueError, match=message):
    unfold({"a": layer})
