import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import folding
from folding import config as c
from folding import paths
from folding.compression.accounting import account
from folding.schema import ConfigError
from folding.serving import export as export_lib
from tests.serving import models

DEAD = [7, 9, 10, 17]  # on, mat, and, ##s
TEXT = "The cats sat on a mat and the dog ran to the old barn zzz"


def write(folder, model) -> dict[str, int]:
  return export_lib.export(
    folder, model.config, model.params, model.tokenizer, model.labels
  )


def assert_same_params(found, expected):
  found, expected = paths.flatten(found), paths.flatten(expected)
  assert found.keys() == expected.keys()
  for name, w in expected.items():
    assert found[name].dtype == w.dtype, name
    assert np.asarray(found[name]).tobytes() == np.asarray(w).tobytes(), name


@pytest.fixture(scope="module")
def model():
  return models.with_zeros(models.make(), DEAD)


@pytest.fixture
def folder(model, tmp_path):
  write(tmp_path / "out", model)
  return tmp_path / "out"


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_an_export_comes_back_bit_for_bit(tmp_path, task):
  model = models.with_zeros(models.make(task), DEAD)
  write(tmp_path / "out", model)
  found = folding.load(tmp_path / "out")
  assert found.config == model.config
  assert found.labels == model.labels
  assert_same_params(found.params, model.params)
  assert found.tokenizer.to_json() == model.tokenizer.to_json()
  assert found.model == model.model
  np.testing.assert_array_equal(
    models.logits(found, TEXT), models.logits(model, TEXT)
  )


def test_an_exported_export_is_the_same_but_for_nothing(folder, tmp_path):
  write(tmp_path / "again", folding.load(folder))
  for file in folder.iterdir():
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_sizes_are_those_of_account_and_of_the_disk(model, tmp_path):
  size = write(tmp_path / "out", model)
  twin = models.make(
    model=model.config.model, fold=c.FoldConfig(groups=0, v_block=0)
  )
  expected = account(model.params, twin.params)["bytes"]["overall"]
  assert size == {
    "dense": expected["dense"],
    "values": expected["stored"],
    "masks": expected["masks"],
    "files": sum(f.stat().st_size for f in (tmp_path / "out").iterdir()),
  }
  assert size["values"] + size["masks"] < 0.8 * size["dense"]


def test_a_shrunk_model_computes_the_same(model, tmp_path):
  small = export_lib.shrunk(model)
  write(tmp_path / "out", small)
  found = folding.load(tmp_path / "out")
  assert found.params["embed"]["embedding"].shape == (21 - 3, 16)
  assert found.config.model.mlp_width == (14, 13)
  assert "v" not in found.params["blocks_0"]["attn"]
  for text in [TEXT, "a"]:
    expected = models.logits(model, text)
    np.testing.assert_allclose(
      # Sums of other order and one product less: float32 rounding.
      models.logits(found, text),
      expected,
      rtol=2e-5,
      atol=2e-5,
    )


def test_removed_tokens_alone_change_no_bit(model):
  rows = model.params["embed"]["embedding"]
  small = export_lib.shrunk(model)
  plain = model.tokenizer.encode_batch([TEXT], 40)[0]
  mapped = small.tokenizer.encode_batch([TEXT], 40)[0]
  np.testing.assert_array_equal(
    small.params["embed"]["embedding"][mapped], rows[plain]
  )
  assert (rows[plain] == 0).all(axis=1).sum() == 4  # there are some


def test_cast_halves_the_values_and_loads_again(tmp_path):
  model = models.make()
  half = export_lib.cast(model, "bfloat16")
  whole = write(tmp_path / "whole", model)
  size = write(tmp_path / "half", half)
  assert size["values"] * 2 == whole["values"]
  found = folding.load(tmp_path / "half")
  assert {x.dtype for x in jax.tree.leaves(found.params)} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  assert_same_params(found.params, half.params)
  rounded = jax.tree.map(
    lambda w: w.astype(ml_dtypes.bfloat16).astype(np.float32), model.params
  )
  expected = models.logits(dataclasses.replace(model, params=rounded), TEXT)
  np.testing.assert_allclose(models.logits(found, TEXT), expected, atol=1e-5)
  assert np.abs(models.logits(model, TEXT) - expected).max() > 1e-3


def test_cast_leaves_rotary_frequencies_as_they_are():
  shape = models.SHAPE | {"positions": "rope", "causal": True}
  fold = c.FoldConfig(groups=2, rope="pairs")
  model = models.make("lm", c.ModelConfig(**shape), fold)
  name = "blocks_0/attn/frequency"
  before = paths.flatten(model.params)[name]
  after = paths.flatten(export_lib.cast(model, "bfloat16").params)
  assert (before.astype(ml_dtypes.bfloat16) != before).any()
  np.testing.assert_array_equal(after[name], before)
  assert {x.dtype.name for n, x in after.items() if n != name} >= {"bfloat16"}


def edit_config(folder: pathlib.Path, change) -> None:
  path = folder / "config.json"
  values = json.loads(path.read_text("utf-8"))
  change(values)
  path.write_text(json.dumps(values))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v: v.update(schema=2), "is an export of schema 2, and this"),
    (lambda v: v.pop("schema"), "is an export of schema None"),
    (lambda v: v.pop("labels"), "lacks 'labels'"),
    (
      lambda v: v.update(labels="abc"),
      "a list of different names; they are 'abc",
    ),
    (lambda v: v.update(labels=[1, 2, 3]), "a list of different names"),
    (lambda v: v.update(labels=["a", "a", "b"]), "a list of different names"),
    (
      lambda v: v["config"]["model"].update(num_heads=0),
      "num_heads must be at",
    ),
    (lambda v: v["config"].update(colour=1), "has no field 'colour'"),
    (lambda v: v["sha256"].pop("tokenizer.json"), "its checksum differs"),
    (lambda v: v.update(sha256="abc"), "checksum by file; it is 'abc'"),
    (
      lambda v: v["config"]["model"].update(mlp_width=7),
      r"are not of its config: .* is \(.*\), not \(",
    ),
    (lambda v: v["labels"].pop(), r"head/bias is \(3,\), not \(2,\)"),
    (lambda v: v["config"]["model"].update(num_layers=1), "is .*, not None"),
  ],
)
def test_a_changed_config_is_refused(folder, change, message):
  edit_config(folder, change)
  with pytest.raises(ConfigError, match=message) as error:
    folding.load(folder)
  assert "\n" not in str(error.value)


def cut(path):
  path.write_bytes(path.read_bytes()[:-5])


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused(folder, damage, name):
  damage(folder / name)
  with pytest.raises(ConfigError, match=f"{name} is not the file that was"):
    folding.load(folder)


def test_a_file_that_is_gone_is_named(folder):
  (folder / "model.safetensors").unlink()
  with pytest.raises(ConfigError, match="has no model.safetensors"):
    folding.load(folder)


def test_a_damaged_map_of_tokens_is_refused(model, tmp_path):
  write(tmp_path / "out", export_lib.shrunk(model))
  cut(tmp_path / "out" / "token_map.json")
  with pytest.raises(ConfigError, match="token_map.json is not the file"):
    folding.load(tmp_path / "out")


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "config.json is damaged"), ("[]", "config.json is damaged")],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError, match=message):
    folding.load(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="is no run and no exported model"):
    folding.load(tmp_path)


def test_nothing_is_written_over(folder, model):
  with pytest.raises(ConfigError, match="not an empty folder"):
    write(folder, model)
  shutil.rmtree(folder)
  folder.write_text("")
  with pytest.raises(ConfigError, match="not an empty folder"):
    write(folder, model)
