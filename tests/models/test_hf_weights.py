import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import paths, schema
from folding.models import hf_names, hf_weights
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, V

each_case = pytest.mark.parametrize(
  ("name", "head"),
  [
    (name, head)
    for name, values in FAMILIES.items()
    for head in (checkpoints.own_head(values), "classify")
  ],
)


def _case(name, head=None):
  """Returns description, head, our parameters and their tensors."""
  head = head or checkpoints.own_head(FAMILIES[name])
  described = checkpoints.description(name, head)
  params = checkpoints.random_params(described)
  if head == "none" and described.layout == "bert":  # BertModel has a pooler
    rng, width = np.random.default_rng(1), described.config.width
    pooler = {"kernel": rng.normal(size=(width, width)), "bias": np.ones(width)}
    params["pooler"] = {k: x.astype(np.float32) for k, x in pooler.items()}
  tensors = hf_weights.export_tensors(described, head, params)
  return described, head, params, tensors


def _import(described, head, tensors):
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  return hf_weights.import_params(described, head, shapes, tensors.__getitem__)


def _assert_equal(a, b):
  a, b = paths.flatten(a), paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert a[path].dtype == b[path].dtype == np.float32


@each_case
def test_the_table_names_the_parameters_of_our_model(name, head):
  described = checkpoints.description(name, head)
  table = hf_names.tensors(described, head)
  named = [path for tensor in table for path in tensor.paths]
  assert len(named) == len(set(named))
  expected = set(checkpoints.shapes_of(described))
  if head == "none":  # the encoder alone: its pooler, if it has one
    expected |= {x for x in named if x.startswith("pooler")}
  elif described.layout in ("gpt2", "llama"):
    expected -= {"head/bias"}
  assert set(named) == expected


@each_case
def test_what_is_exported_comes_back_bit_for_bit(name, head):
  described, head, params, tensors = _case(name, head)
  again, left_out = _import(described, head, tensors)
  _assert_equal(again, params)
  assert left_out == []


def test_a_transposed_layout_is_what_it_says():
  described, head, params, tensors = _case("llama")
  kernel = params["blocks_1"]["attn"]["k"]["kernel"]
  weight = tensors["model.layers.1.self_attn.k_proj.weight"]
  D, J, K = kernel.shape
  for d, j, k in np.ndindex(D, J, K):
    assert weight[j * K + k, d] == kernel[d, j, k]


def test_gpt2_has_queries_keys_and_values_in_one_tensor():
  _, _, params, tensors = _case("gpt2")
  weight = tensors["transformer.h.0.attn.c_attn.weight"]
  for part, role in enumerate("qkv"):
    D, H, K = params["blocks_0"]["attn"][role]["kernel"].shape
    for d, h, k in np.ndindex(D, H, K):
      ours = params["blocks_0"]["attn"][role]["kernel"][d, h, k]
      assert weight[d, part * D + h * K + k] == ours


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_segment_0_is_in_every_position(name):
  described, head, params, tensors = _case(name, "classify")
  segments = f"{name}.embeddings.token_type_embeddings.weight"
  tensors[segments] = np.arange(tensors[segments].size, dtype=np.float32)
  tensors[segments] = tensors[segments].reshape(-1, described.config.width)
  loaded, _ = _import(described, head, tensors)
  expected = params["position_embed"]["embedding"] + tensors[segments][:1]
  np.testing.assert_array_equal(loaded["position_embed"]["embedding"], expected)


def test_positions_of_roberta_begin_after_those_of_padding():
  _, _, params, tensors = _case("roberta")
  rows = tensors["embeddings.position_embeddings.weight"]
  np.testing.assert_array_equal(rows[2:], params["position_embed"]["embedding"])
  assert not rows[:2].any()


OLDER = {"weight": "gamma", "bias": "beta"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_prefix_may_be_absent(name):
  described, head, params, tensors = _case(name)
  prefix = hf_names.PREFIXES[described.layout]
  other = {
    prefix + key if head == "none" else key.removeprefix(prefix): tensor
    for key, tensor in tensors.items()
  }
  assert other.keys() != tensors.keys()
  again, _ = _import(described, head, other)
  _assert_equal(again, params)


def test_older_names_of_norms_are_known():
  described, head, params, tensors = _case("bert")
  other = {}
  for key, tensor in tensors.items():
    stem, _, end = key.rpartition(".")
    other[f"{stem}.{OLDER[end]}" if "LayerNorm" in key else key] = tensor
  again, _ = _import(described, head, other)
  _assert_equal(again, params)


# Buffers and heads for other tasks.
UNUSED = {
  "bert": "embeddings.position_ids cls.predictions.bias cls.seq_relationship.x",
  "roberta": "embeddings.position_ids lm_head.dense.weight pooler.dense.bias",
  "distilbert": "vocab_projector.bias vocab_layer_norm.weight vocab_transform.x",
  "gpt2": "h.0.attn.bias h.1.attn.masked_bias score.weight",
  "llama": "layers.0.self_attn.rotary_emb.inv_freq rotary_emb.inv_freq score.x",
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_we_have_no_use_for_is_left_out_and_told(name):
  described, head, params, tensors = _case(name)
  more = UNUSED[name].split()
  again, left_out = _import(
    described, head, tensors | dict.fromkeys(more, np.zeros(1))
  )
  _assert_equal(again, params)
  assert left_out == more


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_an_encoder_may_come_without_a_head(name):
  described, _, params, tensors = _case(name, "classify")
  tensors = {k: v for k, v in tensors.items() if "classifier" not in k}
  tensors = {k: v for k, v in tensors.items() if "pooler" not in k}
  again, _ = _import(described, "none", tensors)
  del params["head"], params["pooler"]
  _assert_equal(again, params)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_missing_tensor_is_named(name):
  described, head, _, tensors = _case(name)
  missing = list(tensors)[3]
  del tensors[missing]
  with pytest.raises(
    schema.ConfigError, match=f"^tensor {missing} is missing$"
  ):
    _import(described, head, tensors)


def test_several_missing_tensors_are_counted():
  described, head, _, tensors = _case("llama")
  tensors = {k: v for k, v in tensors.items() if ".layers.1." not in k}
  with pytest.raises(
    schema.ConfigError, match=r"layers\.1\..* \(and 8 more\) is missing"
  ):
    _import(described, head, tensors)


@pytest.mark.parametrize(
  "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up.bias"]
)
def test_a_tensor_left_over_is_named(name):
  described, head, _, tensors = _case("llama")
  with pytest.raises(
    schema.ConfigError, match=f"tensor {name} has no place in a llama model"
  ):
    _import(described, head, tensors | {name: np.zeros(3)})


@pytest.mark.parametrize("family", ["gpt2", "llama_biases_scaled"])
def test_an_output_layer_that_is_not_the_embedding_is_told(family):
  described, head, params, tensors = _case(family)
  [name] = [x for x in tensors if x.endswith(("wte.weight", "tokens.weight"))]
  same = tensors | {"lm_head.weight": tensors[name]}
  again, _ = _import(described, head, same)
  np.testing.assert_array_equal(
    again["embed"]["embedding"], params["embed"]["embedding"]
  )
  with pytest.raises(
    schema.ConfigError, match="lm_head.weight is not .*tie_word_embeddings to"
  ):
    _import(described, head, same | {"lm_head.weight": tensors[name] + 1})


def test_a_tensor_of_another_shape_is_named():
  described, head, _, tensors = _case("roberta")
  tensors["embeddings.word_embeddings.weight"] = np.zeros((V - 1, 16))
  with pytest.raises(
    schema.ConfigError,
    match=r"embeddings.word_embeddings.weight is of shape \[29, 16\]; "
    r"config.json asks for \[30, 16\]",
  ):
    _import(described, head, tensors)


def test_nothing_is_read_before_all_is_checked():
  described, head, _, tensors = _case("gpt2")
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  shapes["transformer.ln_f.bias"] = (1,)

  def read(name):
    raise AssertionError(f"read {name}")

  with pytest.raises(schema.ConfigError, match="ln_f.bias is of shape"):
    hf_weights.import_params(described, head, shapes, read)


def test_the_bias_of_gpt2s_head_moves_into_the_last_norm():
  described, head, params, _ = _case("gpt2", "classify")
  params["head"]["bias"] = np.float32([1, -2, 0.5])
  tensors = hf_weights.export_tensors(described, head, params)
  again, _ = _import(described, head, tensors)
  assert not again["head"]["bias"].any()
  tokens = jnp.asarray([[1, 2, 3, 4], [4, 3, 2, 9]])
  model = checkpoints.model_of(described)
  logits = [model.apply({"params": p}, tokens) for p in (params, again)]
  # Two roundings of a bias of size 1 more.
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_a_bias_that_llamas_head_lacks_is_refused():
  described, head, params, _ = _case("llama", "classify")
  params["head"]["bias"] = np.float32([1, -2, 0.5])
  with pytest.raises(
    schema.ConfigError,
    match="classifier has no bias, and head/bias is not zero",
  ):
    hf_weights.export_tensors(described, head, params)


def test_biases_that_a_model_has_not_are_zeros():
  described, head, params, whole = _case("gpt2")
  bare = jax.tree_util.tree_map_with_path(
    lambda path, x: None if path[-1].key == "bias" else x, params
  )
  config = dataclasses.replace(described.config, use_bias=False, qkv_bias=False)
  described = dataclasses.replace(described, config=config)
  assert set(paths.flatten(bare)) == set(checkpoints.shapes_of(described))
  tensors = hf_weights.export_tensors(described, head, bare)
  assert tensors.keys() == whole.keys()
  for name, tensor in tensors.items():
    expected = 0 if name.endswith("bias") else whole[name]
    np.testing.assert_array_equal(tensor, expected)


def _folded(params):
  kernel = params["blocks_1"]["attn"]["q"]["kernel"]
  params["blocks_1"]["attn"]["q"]["kernel"] = kernel[..., :1]


def _without(params):
  del params["blocks_0"]["mlp"]["up"]["kernel"]


def _more(params):
  params["blocks_0"]["attn"]["log_slopes"] = np.zeros(4, np.float32)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      _folded,
      r"blocks_1/attn/q/kernel is of shape \[16, 4, 1\]; a dense bert has "
      r"\[16, 4, 4\]",
    ),
    (_without, "parameter blocks_0/mlp/up/kernel is missing; a dense bert"),
    (_more, "blocks_0/attn/log_slopes has no place in a dense bert"),
  ],
)
def test_parameters_that_do_not_fit_are_named(change, message):
  described, head, params, _ = _case("bert")
  change(params)
  with pytest.raises(schema.ConfigError, match=message):
    hf_weights.export_tensors(described, head, params)
