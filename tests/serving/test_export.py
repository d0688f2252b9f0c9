"""Compact exports: arrays, folders, and what `load` refuses."""

import dataclasses
import hashlib
import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import folding
from folding import config as c
from folding import files, paths
from folding.compression import accounting
from folding.errors import ConfigError
from folding.serving import card, formats
from folding.serving import export as export_lib
from folding.serving import loaded as loaded_lib
from folding.serving import packed as packed_lib
from tests.serving import models

DEAD = [7, 9, 10, 17]  # on, mat, and, ##s
TEXT = "The cats sat on a mat and the dog ran to the old barn zzz"


def _random(shape, zeros=(), dtype=np.float32):
  w = np.random.default_rng(0).normal(size=shape).astype(dtype)
  for index in zeros:
    w[index] = 0
  return w


def _tree():
  """Returns arrays for which each way of storage is the cheapest once."""
  odd = np.random.default_rng(1).uniform(size=(7, 5, 3)) < 0.8
  return {
    "embed": {"embedding": _random((11, 8), [0, 3, 4, 10, (1, 2)])},
    "blocks_0": {
      "up": {"kernel": _random((6, 9), [(slice(None), slice(2, 7))])},
      "o": {"kernel": _random((7, 5, 3), [odd]), "bias": np.zeros(9)},
      "q": {"kernel": _random((8, 2, 1))},
      "half": _random((5, 6), [1, 2], ml_dtypes.bfloat16),
    },
    "nan": np.array([0, np.nan, 0, np.inf] * 8, np.float32),
    "scale": np.float32(3),
    "map": np.arange(300, dtype=np.uint16),
  }


def _header(path):
  raw = path.read_bytes()
  (size,) = struct.unpack("<Q", raw[:8])
  return json.loads(raw[8 : 8 + size])


def _assert_same(found, expected):
  found, expected = paths.flatten(found), paths.flatten(expected)
  assert found.keys() == expected.keys()
  for name, w in expected.items():
    assert (found[name].dtype, found[name].shape) == (w.dtype, w.shape), name
    assert np.asarray(found[name]).tobytes() == np.asarray(w).tobytes(), name


@pytest.fixture
def packed(tmp_path):
  path = tmp_path / "w.safetensors"
  packed_lib.save_packed(_tree(), path)
  return path


def test_packed_arrays_come_back_bit_for_bit(packed):
  _assert_same(packed_lib.load_packed(packed), _tree())
  ways = json.loads(_header(packed)["__metadata__"]["folding"])["packed"]
  assert {name: entry["way"] for name, entry in ways.items()} == {
    "embed/embedding": "first",
    "blocks_0/half": "first",
    "blocks_0/up/kernel": "last",
    "blocks_0/o/kernel": "values",
    "blocks_0/o/bias": "values",
    "nan": "values",
  }


def test_packed_file_has_the_bytes_that_account_counts(packed):
  size = {"values": 0, "masks": 0}
  for name, entry in _header(packed).items():
    if name != "__metadata__":
      begin, end = entry["data_offsets"]
      size["masks" if name.endswith(":bits") else "values"] += end - begin
  tree = _tree()
  overall = accounting.account(tree, tree)["bytes"]["overall"]
  assert size == {"values": overall["stored"], "masks": overall["masks"]}


def test_packed_file_has_the_permissions_of_a_new_file(packed):
  plain = packed.with_name("plain")
  plain.touch()
  assert packed.stat().st_mode == plain.stat().st_mode


def _flip_last(path):
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1
  path.write_bytes(raw)


def _repack(path, shape, bits):
  """Writes a file that claims an array of this shape."""
  tensors = {"w": np.zeros((0, 3), np.float32), "w:bits": np.zeros(bits, "B")}
  entry = {"packed": {"w": {"way": "first", "shape": shape}}}
  metadata = {"folding": json.dumps(entry)}
  safetensors.numpy.save_file(tensors, path, metadata)


def _bits_of_others(path):
  packed_lib.save_packed({"w": _random(64, [slice(0, 40)])}, path)
  _flip_last(path)


# fmt: off
@pytest.mark.parametrize(("damage", "message"), [
  (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated"),
  (lambda path: path.unlink(), "there is no"),
  (lambda path: safetensors.numpy.save_file({}, path), "not packed"),
  (_bits_of_others, "not packed"),
  (lambda path: _repack(path, [100, 3], 1), "not packed"),
  (lambda path: _repack(path, [4, 3], 2), "not packed"),
  (lambda path: _repack(path, "abc", 1), "not packed"),
  (lambda path: _repack(path, [10**7, 10**7], 1_250_000), "not packed"),
])
# fmt: on
def test_load_packed_refuses_damaged_files(packed, damage, message):
  damage(packed)
  with pytest.raises(ConfigError, match=message):
    packed_lib.load_packed(packed)


def write(folder, model):
  return export_lib.export(folder, model)


@pytest.fixture(scope="module")
def model():
  return models.with_zeros(models.make(), DEAD)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
  """Returns an export; not to be changed."""
  folder = tmp_path_factory.mktemp("export") / "out"
  return folder, write(folder, model)


def test_export_without_a_name_per_class_writes_nothing(model, tmp_path):
  with pytest.raises(ConfigError, match="head/bias"):
    write(tmp_path / "out", dataclasses.replace(model, labels=()))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [(0, 1, 2), ("a", "a", "b")])
def test_export_with_labels_that_load_refuses_writes_nothing(
  model, tmp_path, labels
):
  with pytest.raises(ConfigError, match="labels must be different names"):
    write(tmp_path / "out", dataclasses.replace(model, labels=labels))
  assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(exported, tmp_path):
  return shutil.copytree(exported[0], tmp_path / "out")


def test_load_returns_what_was_exported(model, exported, tmp_path):
  found = folding.load(exported[0])
  assert (found.config, found.labels) == (model.config, model.labels)
  assert found.module == model.module
  assert "params" not in repr(found)  # arrays would fill the screen
  _assert_same(found.params, model.params)
  assert found.tokenizer.to_json() == model.tokenizer.to_json()
  write(tmp_path / "again", found)
  for file in exported[0].iterdir():
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_export_returns_bytes_of_account_and_disk(model, exported):
  folder, size = exported
  dense = models.make(
    model=model.config.model, fold=c.FoldConfig(groups=0, values="dense")
  )
  expected = accounting.account(model.params, dense.params)["bytes"]["overall"]
  assert size == {
    "dense": expected["dense"],
    "values": expected["stored"],
    "masks": expected["masks"],
    "files": sum(f.stat().st_size for f in folder.iterdir()),
  }
  assert size["values"] + size["masks"] < 0.8 * size["dense"]


def test_export_needs_an_empty_folder(folder, model):
  with pytest.raises(ConfigError, match="not an empty folder"):
    write(folder, model)
  with pytest.raises(ConfigError, match="not a folder"):
    write(folder / "config.json", model)


def test_shrunk_model_computes_the_same(model, tmp_path):
  small = export_lib.shrunk(model)
  write(tmp_path / "out", small)
  found = folding.load(tmp_path / "out")
  assert found.params["embed"]["embedding"].shape == (21 - 3, 16)
  assert found.config.model.mlp_width == (14, 13)
  for text in [TEXT, "a"]:
    # Sums of other order and one product less: float32 rounding.
    np.testing.assert_allclose(
      models.logits(found, text),
      models.logits(model, text),
      rtol=2e-5,
      atol=2e-5,
    )
  assert loaded_lib.sizes(found)["dense"] == loaded_lib.sizes(model)["dense"]
  # The tokens alone change no bit.
  rows = model.params["embed"]["embedding"]
  [plain] = model.tokenizer.encode_batch([TEXT], 40)
  [mapped] = found.tokenizer.encode_batch([TEXT], 40)
  assert (rows[plain] == 0).all(axis=1).sum() == 4
  new_rows = found.params["embed"]["embedding"]
  np.testing.assert_array_equal(new_rows[mapped], rows[plain])
  path = tmp_path / "out" / "token_map.json"
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(ConfigError, match="token_map.json is not the file"):
    folding.load(tmp_path / "out")


def test_cast_halves_the_values_and_loads_again(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE))
  half = export_lib.cast(model, "bfloat16")
  whole = write(tmp_path / "whole", model)
  size = write(tmp_path / "half", half)
  assert size["values"] * 2 == whole["values"]
  found = folding.load(tmp_path / "half")
  dtypes = {x.dtype for x in jax.tree.leaves(found.params)}
  assert dtypes == {np.dtype(ml_dtypes.bfloat16)}
  _assert_same(found.params, half.params)
  rounded = jax.tree.map(
    lambda w: w.astype(ml_dtypes.bfloat16).astype(np.float32), model.params
  )
  expected = models.logits(dataclasses.replace(model, params=rounded), TEXT)
  np.testing.assert_allclose(models.logits(found, TEXT), expected, atol=1e-5)
  assert np.abs(models.logits(model, TEXT) - expected).max() > 1e-3


@pytest.mark.parametrize(
  ("positions", "rope", "name"),
  [("rope", "pairs", "frequency"), ("alibi", "copy", "log_slopes")],
)
def test_cast_leaves_factors_of_positions_as_they_are(positions, rope, name):
  shape = models.SHAPE | {"positions": positions, "causal": True}
  fold = c.FoldConfig(groups=2, rope=rope)
  model = models.make("lm", c.ModelConfig(**shape), fold)
  name = f"blocks_0/attn/{name}"
  before = paths.flatten(model.params)[name]
  after = paths.flatten(export_lib.cast(model, "bfloat16").params)
  assert (before.astype(ml_dtypes.bfloat16) != before).any()
  np.testing.assert_array_equal(after[name], before)
  assert {x.dtype.name for n, x in after.items() if n != name} >= {"bfloat16"}


def test_cast_refuses_a_dtype_of_whole_numbers():
  with pytest.raises(ConfigError, match="int8 would round"):
    export_lib.cast(models.make(), "int8")


def _set(section=None, **fields):
  def change(values):
    (values["config"][section] if section else values).update(fields)

  return change


# fmt: off
CHANGED = [
  (_set(schema=2), "schema 2"),
  (lambda v: v.pop("labels"), "damaged.*labels"),
  (_set(labels=[1, 2, 3]), "labels must be"),
  (_set(labels=["a", "a", "b"]), "labels must be"),
  (_set(labels=["a", "b"]), r"head/bias is \(3,\), not"),
  (_set("model", num_heads=0), "num_heads"),
  (_set(config={"colour": 1}), "no field 'colour'"),
  (_set("model", mlp_width=7), "not of its"),
  (_set("model", num_layers=1), "not None"),
  (lambda v: v["sha256"].pop("tokenizer.json"), "checksum differs"),
  (_set(sha256="abc"), "damaged"),
  (lambda v: v["sha256"].update({"../x": ""}), "damaged: sha256 names"),
]
# fmt: on


@pytest.mark.parametrize(("change", "message"), CHANGED)
def test_load_refuses_a_changed_config(folder, change, message):
  path = folder / "config.json"
  values = json.loads(path.read_text("utf-8"))
  change(values)
  path.write_text(json.dumps(values))
  (folder / "checksums.json").unlink()
  with pytest.raises(ConfigError, match=message) as error:
    folding.load(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("normalize", [True, False])
def test_earlier_export_of_an_encoder_is_of_task_embed(tmp_path, normalize):
  encoder = c.bert(**models.SHAPE, normalize=normalize)
  model = models.make("embed", encoder)
  write(tmp_path / "out", model)
  path = tmp_path / "out" / "config.json"
  values = json.loads(path.read_text("utf-8"))
  values["config"]["task"] = "classify"
  del values["config"]["model"]["normalize"]
  values["is_normalized"] = normalize
  path.write_text(json.dumps(values))
  (tmp_path / "out" / "checksums.json").unlink()
  assert folding.load(tmp_path / "out").config == model.config


def test_load_compares_shapes_before_it_allocates(folder):
  path = folder / "model.safetensors"
  tensors = {"embed/embedding": np.zeros((0, 10**7), np.float32)}
  tensors["embed/embedding:bits"] = np.zeros(1_250_000, np.uint8)
  entry = {"embed/embedding": {"way": "first", "shape": [10**7, 10**7]}}
  metadata = {"folding": json.dumps({"packed": entry})}
  safetensors.numpy.save_file(tensors, path, metadata)
  values = json.loads((folder / "config.json").read_text("utf-8"))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  values["sha256"]["model.safetensors"] = digest
  (folder / "config.json").write_text(json.dumps(values))
  (folder / "checksums.json").unlink()
  with pytest.raises(ConfigError, match="not of its config"):
    folding.load(folder)


FOLDERS = [
  (name, dtype)
  for name, row in formats.FORMATS.items()
  for dtype in row.dtypes
  if not row.ending
]


def _of_bert():
  return models.make(model=c.bert(**models.SHAPE, pooler=True))


@pytest.mark.parametrize(("name", "dtype"), FOLDERS)
def test_every_export_has_checksums_of_all_its_files(name, dtype, tmp_path):
  _of_bert().save(tmp_path, name, dtype)
  found = files.read_checksums(str(tmp_path))
  assert found is not None
  written = {p.name for p in tmp_path.iterdir()}
  assert written - found.keys() == {"checksums.json", card.README}
  assert files.require_intact(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", formats.FORMATS)
def test_no_export_writes_parameters_that_are_not_finite(name, value, tmp_path):
  model = _of_bert()
  model.params["blocks_1"]["mlp"]["up"]["kernel"][2, 3] = value
  with pytest.raises(ConfigError, match="blocks_1/mlp/up/kernel has values"):
    model.save(tmp_path / f"out{formats.FORMATS[name].ending}", name)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["safetensors", "hf"])
def test_load_refuses_an_edited_config_until_its_checksum_is_removed(
  name, tmp_path
):
  _of_bert().save(tmp_path, name)
  path = tmp_path / "config.json"
  path.write_text(path.read_text("utf-8").replace("so so", "so"), "utf-8")
  with pytest.raises(ConfigError, match=r"config\.json differs.* remove"):
    folding.load(tmp_path)
  (tmp_path / "checksums.json").unlink()
  assert folding.load(tmp_path).labels[1] == "so"


def test_checksums_of_another_program_are_not_read(tmp_path):
  export_lib.export_hf(tmp_path, _of_bert())
  for other in ({"config.json": "0" * 64}, ["config.json"]):
    (tmp_path / "checksums.json").write_text(json.dumps(other))
    assert folding.load(tmp_path).labels == models.LABELS


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_load_refuses_a_damaged_or_missing_file(folder, name):
  _flip_last(folder / name)
  with pytest.raises(ConfigError, match=f"{name} is not the file that was"):
    folding.load(folder)
  (folder / name).unlink()
  with pytest.raises(ConfigError, match=f"has no {name}"):
    folding.load(folder)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "config.json is damaged"),
    ("[]", "config.json is damaged"),
    (None, "neither a run nor"),
  ],
)
def test_load_refuses_a_folder_of_another_kind(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError, match=message):
    folding.load(tmp_path)


def test_model_saves_itself_in_a_format(tmp_path):
  model = models.with_zeros(models.make(), [5, 6])
  size = model.save(tmp_path / "small")
  small = folding.load(tmp_path / "small")
  assert small.num_rows < model.num_rows
  text = "the cat sat"
  np.testing.assert_allclose(
    models.logits(small, text), models.logits(model, text), atol=1e-5
  )
  assert size["files"] == files.folder_bytes(str(tmp_path / "small"))
  for wrong, message in (
    ({"format": "pickle"}, "format is one of safetensors, hf"),
    ({"dtype": "int8"}, "writes float32 or bfloat16"),
    ({"format": "gguf"}, "not the name of a .gguf file"),
  ):
    with pytest.raises(ConfigError, match=message):
      model.save(tmp_path / "other", **wrong)
  assert not (tmp_path / "other").exists()
