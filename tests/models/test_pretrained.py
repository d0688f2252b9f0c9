import json
import sys
import tracemalloc
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from folding import paths, schema
from folding.models import pretrained
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, WORDS

load = pretrained.load_pretrained


@pytest.fixture
def folder(tmp_path):
  """Returns a folder with a tiny Llama."""
  checkpoints.write(tmp_path / "llama", "llama", "lm")
  return tmp_path / "llama"


def _tensors(folder):
  return safetensors.numpy.load_file(folder / pretrained.WEIGHTS)


def _assert_equal(a, b):
  a, b = paths.flatten(a), paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert a[path].dtype == b[path].dtype == np.float32


@pytest.mark.parametrize("head", ["own", "classify"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_loads_again(name, head, tmp_path):
  head = checkpoints.own_head(FAMILIES[name]) if head == "own" else head
  described = checkpoints.description(name, head)
  params = checkpoints.write(tmp_path / "model", name, head)
  loaded = load(tmp_path / "model")
  _assert_equal(loaded.params, params)
  assert loaded.config == described.config
  assert loaded.label_names == described.label_names
  assert loaded.max_length == described.max_length
  assert loaded.tokenizer_path == tmp_path / "model" / "tokenizer.json"
  assert loaded.left_out == ()


def _shard(folder):
  """Splits the weights into three files with an index."""
  tensors = _tensors(folder)
  parts = [f"model-{i}-of-3.safetensors" for i in range(3)]
  where = {name: parts[i % 3] for i, name in enumerate(tensors)}
  for part in parts:
    names = [name for name in where if where[name] == part]
    safetensors.numpy.save_file({n: tensors[n] for n in names}, folder / part)
  (folder / pretrained.WEIGHTS).unlink()
  (folder / pretrained.INDEX).write_text(json.dumps({"weight_map": where}))
  return where


def test_shards_are_one_checkpoint(folder):
  whole = load(folder)
  _shard(folder)
  _assert_equal(load(folder).params, whole.params)


@pytest.mark.parametrize(
  "kind", [ml_dtypes.bfloat16, np.float16, np.float64], ids=str
)
def test_other_floats_become_float32(kind, folder):
  tensors = {k: x.astype(kind) for k, x in _tensors(folder).items()}
  expected = {k: x.astype(np.float32) for k, x in tensors.items()}
  safetensors.numpy.save_file(expected, folder / pretrained.WEIGHTS)
  rounded = load(folder).params
  safetensors.numpy.save_file(tensors, folder / pretrained.WEIGHTS)
  _assert_equal(load(folder).params, rounded)


def test_there_is_one_copy_of_the_weights(folder):
  width = 1 << 16
  values = json.loads((folder / "config.json").read_text())
  values["intermediate_size"] = width
  (folder / "config.json").write_text(json.dumps(values))
  tensors = _tensors(folder)
  large = [name for name in tensors if ".mlp." in name]
  for name in large:
    shape = (16, width) if "down" in name else (width, 16)
    tensors[name] = np.ones(shape, np.float32)
  one = tensors[large[0]].nbytes
  safetensors.numpy.save_file(tensors, folder / pretrained.WEIGHTS)
  del tensors
  load(folder)  # what is imported on the way is not counted
  tracemalloc.start()
  loaded = load(folder)
  held, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert loaded.params["blocks_1"]["mlp"]["up"]["kernel"].nbytes == one
  assert len(large) == 6
  assert 6 <= held / one < 6.1
  assert peak / one < 7.1  # and the one that is being transposed


def test_classification_leaves_the_output_layer_out(folder):
  loaded = load(folder, task="classify")
  assert "head" not in loaded.params
  assert loaded.left_out == ("lm_head.weight",)
  assert (loaded.num_classes, loaded.config.pooling) == (0, "last")


def test_the_next_token_needs_a_decoder(tmp_path):
  checkpoints.write(tmp_path / "bert", "bert")
  with pytest.raises(
    schema.ConfigError, match="a bert model does not predict the next token"
  ):
    load(tmp_path / "bert", task="lm")


def test_a_next_token_model_out_of_a_classifier_misses_its_layer(tmp_path):
  checkpoints.write(tmp_path / "llama", "llama", "classify")
  with pytest.raises(
    schema.ConfigError, match="llama: tensor lm_head.weight is missing"
  ):
    load(tmp_path / "llama", task="lm")


def test_the_embedding_may_have_more_rows_than_the_tokenizer(folder):
  assert load(folder).vocab_size > len(WORDS)


def _longer_tokenizer(folder):
  words = [*WORDS, *(f"w{i}" for i in range(30))]
  checkpoints.write_tokenizer(folder / "tokenizer.json", words)


def _keep(n):
  """Cuts the weights to n bytes, or by -n."""

  def cut(folder):
    path = folder / pretrained.WEIGHTS
    path.write_bytes(path.read_bytes()[:n])

  return cut


def _renamed(old, new):
  return lambda folder: (folder / old).rename(folder / new)


def _written(name, text):
  return lambda folder: (folder / name).write_text(text)


def _configured(**fields):
  def write(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return write


def _unlinked(name):
  return lambda folder: (folder / name).unlink()


def _pickled(folder):
  (folder / pretrained.WEIGHTS).rename(folder / "pytorch_model.bin")


def _quantized(folder):
  tensors = _tensors(folder)
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  safetensors.numpy.save_file(tensors, folder / pretrained.WEIGHTS)


def _shard_lost(folder):
  _shard(folder)
  (folder / "model-1-of-3.safetensors").unlink()


def _shard_cut(folder):
  _shard(folder)
  path = folder / "model-2-of-3.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


def _shards_mixed_up(folder):
  where = _shard(folder)
  where = dict(zip(where, [*where.values()][::-1], strict=True))
  (folder / pretrained.INDEX).write_text(json.dumps({"weight_map": where}))


def _index(weight_map):
  def write(folder):
    _pickled(folder)
    index = json.dumps({"weight_map": weight_map})
    (folder / pretrained.INDEX).write_text(index)

  return write


BROKEN = {
  "no_config": (_unlinked("config.json"), "there is no .*config.json"),
  "no_json": (_written("config.json", "{"), "config.json is damaged"),
  "list": (
    _written("config.json", "[]"),
    "config.json is damaged: it is no dict",
  ),
  "model": (
    _written("config.json", '{"model_type": "t5"}'),
    "llama: config.json: model_type 't5' is not supported; supported are bert",
  ),
  "pickle": (
    _pickled,
    r"pytorch_model.bin is a pickle, .*not read.*convert it once: transformers\."
    r"LlamaForCausalLM and transformers\.AutoTokenizer, each \.from_pretrained\("
    r"'.*llama'\)\.save_pretrained\(OUT\)",
  ),
  "no_weights": (
    _unlinked(pretrained.WEIGHTS),
    "has no model.safetensors and no model.safetensors.index.json; convert it",
  ),
  "truncated": (
    _keep(-5),
    "model.safetensors is truncated or no safetensors file",
  ),
  "header": (_keep(20), "model.safetensors is truncated or no safetensors"),
  "empty": (_keep(0), "model.safetensors is truncated or no safetensors file"),
  "quantized": (
    _quantized,
    "tensor model.norm.weight is stored as I8; only F64, F32, F16, BF16",
  ),
  "no_tokenizer": (
    _unlinked("tokenizer.json"),
    "has no tokenizer.json; convert it once: .* transformers.AutoTokenizer",
  ),
  "other_type": (
    _configured(rope_scaling="linear"),
    "config.json is broken: TypeError",
  ),
  "not_a_tokenizer": (
    _written("tokenizer.json", "{}"),
    "is not a tokenizer.json",
  ),
  "other_tokenizer": (
    _longer_tokenizer,
    r"does not fit the model: its ids go up to 39, and there are 30 embeddings",
  ),
  "shard_lost": (_shard_lost, "there is no .*model-1-of-3.safetensors, which"),
  "shard_cut": (_shard_cut, "model-2-of-3.safetensors is truncated"),
  "shards_mixed_up": (_shards_mixed_up, "has no tensor .*, which .* says"),
  "index_of_pickles": (
    _index({"model.norm.weight": "pytorch_model.bin"}),
    "pytorch_model.bin is a pickle",
  ),
  "index_elsewhere": (
    _index({"model.norm.weight": "../other/model.safetensors"}),
    "has no weight_map of names and files",
  ),
  "index_without_map": (_index(None), "has no weight_map of names and files"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_in_one_line(change, message, folder):
  change(folder)
  with pytest.raises(schema.ConfigError, match=message) as caught:
    load(folder)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("./no/such", "there is no folder ./no/such"),
    ("/no/such", "there is no folder /no/such"),
    ("model.bin", "model.bin is a pickle"),
  ],
)
def test_a_path_to_nothing_is_told(name, message):
  with pytest.raises(schema.ConfigError, match=message):
    load(name)


def test_a_file_is_no_folder(folder):
  with pytest.raises(schema.ConfigError, match="is a file; name the folder"):
    load(folder / pretrained.WEIGHTS)


def test_the_hub_needs_its_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(schema.ConfigError, match=r"pip install -e '\.\[hub\]'"):
    load("some/model")


def test_what_the_hub_does_not_have_is_told_in_one_line():
  pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
  with pytest.raises(
    schema.ConfigError, match="there is no folder a/b/c, and the .* hub did not"
  ) as caught:
    load("a/b/c")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["tokenizer.json", pretrained.WEIGHTS])
def test_what_the_hub_has_in_other_files_is_converted_by_its_name(
  lost, folder, monkeypatch
):
  (folder / lost).unlink()
  hub = types.SimpleNamespace(snapshot_download=lambda *_, **__: str(folder))
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  with pytest.raises(
    schema.ConfigError,
    match=f"some/model has no {lost}.* on the hub; .*transformers.LlamaForCausal"
    r"LM and .*AutoTokenizer, each .from_pretrained\('some/model'\)",
  ):
    load("some/model")


def test_a_hub_id_is_a_folder_of_the_cache(tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
  monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(schema.ConfigError, match="hub did not send it"):
    load("somebody/llama")
  # As the library lays out what it has downloaded.
  model = tmp_path / "models--somebody--llama"
  (model / "refs").mkdir(parents=True)
  (model / "refs" / "main").write_text("0" * 40)
  (model / "snapshots").mkdir()
  params = checkpoints.write(model / "snapshots" / ("0" * 40), "llama", "lm")
  _assert_equal(load("somebody/llama").params, params)
