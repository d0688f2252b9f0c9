"""Tensors and folders of checkpoints, in both directions."""

import dataclasses
import json
import pathlib
import sys
import tracemalloc
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from huggingface_hub import constants

from folding import paths
from folding.errors import ConfigError
from folding.models import families, hf_weights
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, assert_same

load = hf_weights.load_pretrained


def _case(name, head=None):
  """Returns description, head, our parameters and their tensors."""
  head = head or dict(checkpoints.CASES[: len(FAMILIES)])[name]
  described = checkpoints.description(name, head)
  params = checkpoints.random_params(described)
  if head == "none" and described.family == "bert":  # BertModel has a pooler
    rng, width = np.random.default_rng(1), described.config.width
    pooler = {"kernel": rng.normal(size=(width, width)), "bias": np.ones(width)}
    params["pooler"] = {k: x.astype(np.float32) for k, x in pooler.items()}
  return described, head, params, _export(described, head, params)


def _export(described, head, params):
  return hf_weights.export_tensors(described, head, params)


def _import(described, head, tensors):
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  return hf_weights.import_params(described, head, shapes, tensors.__getitem__)


@pytest.mark.parametrize(("name", "head"), checkpoints.CASES)
def test_import_inverts_export_bit_for_bit(name, head):
  described, head, params, tensors = _case(name, head)
  assert_same(_import(described, head, tensors), params)


def test_kernels_are_transposed_and_their_heads_joined():
  _, _, params, tensors = _case("llama")
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
def test_segment_0_is_added_to_every_position(name):
  described, head, params, tensors = _case(name, "classify")
  segments = f"{name}.embeddings.token_type_embeddings.weight"
  rng = np.random.default_rng(1)
  tensors[segments] = rng.normal(size=tensors[segments].shape)
  loaded = _import(described, head, tensors)
  expected = params["position_embed"]["embedding"] + tensors[segments][:1]
  np.testing.assert_array_equal(loaded["position_embed"]["embedding"], expected)


def test_positions_of_roberta_begin_after_those_of_padding():
  _, _, params, tensors = _case("roberta")
  rows = tensors["embeddings.position_embeddings.weight"]
  np.testing.assert_array_equal(rows[2:], params["position_embed"]["embedding"])
  assert not rows[:2].any()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_import_accepts_names_with_and_without_the_prefix(name):
  described, head, params, tensors = _case(name)
  prefix = families.FAMILIES[described.family].layout.prefix
  other = {
    prefix + key if head == "none" else key.removeprefix(prefix): tensor
    for key, tensor in tensors.items()
  }
  assert other.keys() != tensors.keys()
  assert_same(_import(described, head, other), params)


def test_import_accepts_older_names_of_norms():
  described, head, params, tensors = _case("bert")
  older, other = {"weight": "gamma", "bias": "beta"}, {}
  for key, tensor in tensors.items():
    stem, _, end = key.rpartition(".")
    other[f"{stem}.{older[end]}" if "LayerNorm" in key else key] = tensor
  assert other.keys() != tensors.keys()
  assert_same(_import(described, head, other), params)


# Buffers and heads for other tasks.
UNUSED = {
  "bert": "embeddings.position_ids cls.predictions.bias cls.seq_relationship.x",
  "roberta": "embeddings.position_ids lm_head.dense.weight pooler.dense.bias",
  "distilbert": "vocab_projector.bias vocab_layer_norm.weight vocab_transform.x",
  "gpt2": "h.0.attn.bias h.1.attn.masked_bias score.weight",
  "llama": "layers.0.self_attn.rotary_emb.inv_freq rotary_emb.inv_freq score.x",
}


@pytest.mark.parametrize("name", UNUSED)
def test_import_leaves_out_unused_tensors(name):
  described, head, params, tensors = _case(name)
  more = dict.fromkeys(UNUSED[name].split(), np.zeros(1))
  assert_same(_import(described, head, tensors | more), params)


def test_import_of_an_encoder_without_pooler():
  described, _, params, tensors = _case("bert", "classify")
  tensors = {
    k: v
    for k, v in tensors.items()
    if "classifier" not in k and "pooler" not in k
  }
  again = _import(described, "none", tensors)
  del params["head"], params["pooler"]
  assert_same(again, params)


# fmt: off
@pytest.mark.parametrize(("dropped", "added", "message"), [
  ("model.norm", {}, "model.norm.weight is missing"),
  ("model.layers.1.", {}, r"layers\.1\..* \(and 8 more\) is missing"),
  (None, {"model.layers.2.mlp.up_proj.weight": 3}, "layers.2.* has no place"),
  (None, {"model.layers.0.mlp.up.bias": 3}, "mlp.up.bias has no place"),
  (None, {"model.embed_tokens.weight": (29, 16)}, r"\[29, 16\]; .* \[30, "),
])
# fmt: on
def test_import_names_tensors_that_do_not_fit(dropped, added, message):
  described, head, _, tensors = _case("llama")
  lost = [k for k in tensors if dropped is not None and k.startswith(dropped)]
  tensors = {k: v for k, v in tensors.items() if k not in lost}
  tensors |= {name: np.zeros(shape) for name, shape in added.items()}
  with pytest.raises(ConfigError, match=message):
    _import(described, head, tensors)


def test_import_checks_all_shapes_before_it_reads():
  described, head, _, tensors = _case("gpt2")
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  shapes["transformer.ln_f.bias"] = (1,)

  def read(name):
    raise AssertionError(f"read {name}")

  with pytest.raises(ConfigError, match="ln_f.bias is of shape"):
    hf_weights.import_params(described, head, shapes, read)


@pytest.mark.parametrize("family", ["gpt2", "llama_biases_scaled"])
def test_import_refuses_an_output_layer_unlike_the_tied_embedding(family):
  described, head, params, tensors = _case(family)
  [name] = [x for x in tensors if x.endswith(("wte.weight", "tokens.weight"))]
  same = tensors | {"lm_head.weight": tensors[name]}
  assert_same(_import(described, head, same), params)
  with pytest.raises(ConfigError, match="lm_head.weight is not"):
    _import(described, head, same | {"lm_head.weight": tensors[name] + 1})


def test_export_moves_the_bias_of_gpt2s_head_into_the_last_norm():
  described, head, params, _ = _case("gpt2", "classify")
  params["head"]["bias"] = np.float32([1, -2, 0.5])
  again = _import(described, head, _export(described, head, params))
  assert not again["head"]["bias"].any()
  tokens = jnp.asarray([[1, 2, 3, 4], [4, 3, 2, 9]])
  apply = jax.jit(checkpoints.model_of(described).apply)
  logits = [apply({"params": p}, tokens) for p in (params, again)]
  # Two more roundings of a bias of size 1.
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_export_refuses_a_bias_that_llamas_head_lacks():
  described, head, params, _ = _case("llama", "classify")
  params["head"]["bias"] = np.float32([1, -2, 0.5])
  with pytest.raises(ConfigError, match="head/bias is not zero"):
    _export(described, head, params)


def test_export_writes_zeros_for_biases_that_the_model_lacks():
  described, head, params, whole = _case("gpt2")
  bare = jax.tree_util.tree_map_with_path(
    lambda path, x: None if path[-1].key == "bias" else x, params
  )
  config = dataclasses.replace(described.config, use_bias=False, qkv_bias=False)
  described = dataclasses.replace(described, config=config)
  assert set(paths.flatten(bare)) == set(checkpoints.shapes_of(described))
  tensors = _export(described, head, bare)
  assert tensors.keys() == whole.keys()
  for name, tensor in tensors.items():
    expected = 0 if name.endswith("bias") else whole[name]
    np.testing.assert_array_equal(tensor, expected)


# fmt: off
@pytest.mark.parametrize(("path", "change", "message"), [
  ("blocks_1/attn/q/kernel", lambda w: w[..., :1], r"\[16, 4, 1\]; .* 4\]"),
  ("blocks_0/mlp/up/kernel", None, "blocks_0/mlp/up/kernel is missing"),
  ("blocks_0/attn/log_slopes", lambda _: np.zeros(4), "has no place"),
])
# fmt: on
def test_save_names_parameters_that_do_not_fit(path, change, message, tmp_path):
  described, head, params, _ = _case("bert")
  flat = paths.flatten(params)
  w = flat.pop(path, None)
  flat |= {} if change is None else {path: change(w)}
  params = traverse_util.unflatten_dict(flat, sep="/")
  with pytest.raises(ConfigError, match=message):
    hf_weights.save_pretrained(tmp_path / "out", params, described)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("name", "head"), [("bert", "classify"), ("roberta", "none")]
)
def test_load_returns_what_was_saved(name, head, tmp_path):
  described = checkpoints.description(name, head)
  params = checkpoints.write(tmp_path / "model", name, head)
  loaded = load(tmp_path / "model")
  assert_same(loaded.params, params)
  assert loaded == hf_weights.Pretrained(
    **vars(described),
    params=loaded.params,
    tokenizer_path=tmp_path / "model" / "tokenizer.json",
  )


def _tensors(folder):
  return safetensors.numpy.load_file(folder / hf_weights.WEIGHTS)


def _shard(folder):
  """Splits the weights into three files with an index."""
  tensors = _tensors(folder)
  shards = [f"model-{i}-of-3.safetensors" for i in range(3)]
  for i, shard in enumerate(shards):
    part = {n: tensors[n] for n in list(tensors)[i::3]}
    safetensors.numpy.save_file(part, folder / shard)
  (folder / hf_weights.WEIGHTS).unlink()
  where = {n: shards[i % 3] for i, n in enumerate(tensors)}
  (folder / hf_weights.INDEX).write_text(json.dumps({"weight_map": where}))


def test_load_reads_symlinked_shards(folder, tmp_path):
  whole = load(folder)
  _shard(folder)
  # As the cache of the hub lays them out.
  for shard in folder.glob("model-*"):
    blob = shard.rename(tmp_path / shard.name)
    shard.symlink_to(pathlib.Path("..") / blob.name)
  assert_same(load(folder).params, whole.params)


def test_load_converts_other_floats(folder):
  kind = ml_dtypes.bfloat16
  tensors = {k: x.astype(kind) for k, x in _tensors(folder).items()}
  safetensors.numpy.save_file(tensors, folder / hf_weights.WEIGHTS)
  kernel = load(folder).params["blocks_1"]["mlp"]["up"]["kernel"]
  expected = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
  np.testing.assert_array_equal(kernel, expected.T)
  assert kernel.dtype == np.float32


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "bert"])
def test_mapped_parameters_equal_those_that_are_read(name, tmp_path):
  described, _, params, _ = _case(name)
  hf_weights.save_pretrained(tmp_path, params, described, dtype="bfloat16")
  checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  mapped, found = (load(tmp_path, mapped=x).params for x in (True, False))
  kernel = mapped["blocks_0"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == ml_dtypes.bfloat16
  assert not kernel.flags.owndata and not kernel.flags.writeable
  as_read = paths.map_named(lambda _, w: w.astype(np.float32), mapped)
  assert_same(as_read, found)
  assert all(w.flags.owndata for w in paths.flatten(found).values())


def _configured(**fields):
  def write(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return write


def test_load_holds_one_copy_of_the_weights(folder):
  width = 1 << 14
  _configured(intermediate_size=width)(folder)
  tensors = _tensors(folder)
  large = [name for name in tensors if ".mlp." in name]
  for name in large:
    shape = (16, width) if "down" in name else (width, 16)
    tensors[name] = np.ones(shape, np.float32)
  one = tensors[large[0]].nbytes
  safetensors.numpy.save_file(tensors, folder / hf_weights.WEIGHTS)
  del tensors
  load(folder)  # what is imported on the way is not counted
  tracemalloc.start()
  loaded = load(folder)
  held, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert loaded.params["blocks_1"]["mlp"]["up"]["kernel"].nbytes == one
  assert len(large) == 6
  assert 6 <= held / one < 6.3
  assert peak / one < 7.3  # and the one that is being transposed


def test_load_for_classification_leaves_the_output_layer_out(llama_folder):
  loaded = load(llama_folder, task="classify")
  assert "head" not in loaded.params
  assert (loaded.num_classes, loaded.config.pooling) == (0, "last")


def test_load_for_the_next_token_needs_a_decoder_with_its_layer(tmp_path):
  checkpoints.write(tmp_path / "bert", "bert")
  with pytest.raises(ConfigError, match="does not predict the next token"):
    load(tmp_path / "bert", task="lm")
  checkpoints.write(tmp_path / "llama", "llama", "classify")
  with pytest.raises(ConfigError, match="llama: .*lm_head.weight is missing"):
    load(tmp_path / "llama", task="lm")


def _written(name, text):
  return lambda folder: (folder / name).write_text(text)


def _unlinked(name):
  return lambda folder: (folder / name).unlink()


def _cut(name, is_sharded=False):
  def cut(folder):
    if is_sharded:
      _shard(folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])

  return cut


def _pickled(folder):
  (folder / hf_weights.WEIGHTS).rename(folder / "pytorch_model.bin")


def _quantized(folder):
  tensors = _tensors(folder)
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  safetensors.numpy.save_file(tensors, folder / hf_weights.WEIGHTS)


def _shard_lost(folder):
  _shard(folder)
  (folder / "model-1-of-3.safetensors").unlink()


def _index_empty(folder):
  _pickled(folder)
  (folder / hf_weights.INDEX).write_text("{}")


# fmt: off
BROKEN = {
  "no_config": (_unlinked("config.json"), "there is no .*config.json"),
  "list": (_written("config.json", "[]"), "config.json is damaged"),
  "model": (_configured(model_type="t5"), "llama: config.json: .*'t5'"),
  "export": (_written("config.json", '{"format": "folding"}'), "dense run"),
  "type": (_configured(rope_scaling="linear"), "config.json is broken"),
  "zero": (
    _configured(model_type="modernbert", global_attn_every_n_layers=0),
    "config.json is broken: ZeroDivision",
  ),
  "pickle": (_pickled, r"pickles are not read; .*save_pretrained\(\)"),
  "truncated": (_cut("model.safetensors"), "model.safetensors is truncated"),
  "quantized": (_quantized, "model.norm.weight is stored as I8"),
  "no_tokenizer": (_unlinked("tokenizer.json"), "has no tokenizer.json"),
  "shard_lost": (_shard_lost, "there is no .*model-1-of-3.safetensors"),
  "shard_cut": (_cut("model-2-of-3.safetensors", True), "2-of-3.* truncated"),
  "index_empty": (_index_empty, "must have a weight_map"),
}
# fmt: on


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_load_of_a_broken_folder_is_refused_in_one_line(
  change, message, folder
):
  change(folder)
  with pytest.raises(ConfigError, match=message) as caught:
    load(folder)
  assert "\n" not in str(caught.value)


def test_load_of_no_folder_is_refused(llama_folder, monkeypatch):
  def refuse(*_, **__):
    raise OSError("offline\nagain")

  hub = types.SimpleNamespace(snapshot_download=refuse)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  for name, message in (
    ("./no/such", "there is no folder ./no/such"),
    ("/no/such", "there is no folder /no/such"),
    (llama_folder / hf_weights.WEIGHTS, "is a file"),
    ("a/b", r"there is no folder a/b, .* \(offline\)"),
  ):
    with pytest.raises(ConfigError, match=message) as caught:
      load(name)
    assert "\n" not in str(caught.value)


def test_load_of_a_hub_id_reads_the_cache(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  # As the library lays out what it has downloaded.
  model = tmp_path / "models--somebody--llama"
  (model / "refs").mkdir(parents=True)
  (model / "refs" / "main").write_text("0" * 40)
  params = checkpoints.write(model / "snapshots" / ("0" * 40), "llama", "lm")
  assert_same(load("somebody/llama").params, params)
