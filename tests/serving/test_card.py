"""README.md of exported folders, and folders of the hub."""

import dataclasses
import re

import huggingface_hub
import pytest

import folding
from folding import config as c
from folding import files
from folding.serving import formats
from tests.models import checkpoints
from tests.serving import models

_FOLDERS = [name for name, row in formats.FORMATS.items() if not row.ending]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Returns the folder of a classifier with a licence."""
  folder = tmp_path_factory.mktemp("hub") / "models--lab--net" / "snapshots"
  checkpoints.write(folder, "bert", "classify")
  (folder / "README.md").write_text("---\nlicense: mit\n---\n# Net\n")
  (folder / "LICENSE.txt").write_text("As is.")
  return folder


@pytest.fixture(scope="module", params=_FOLDERS)
def exported(request, source, tmp_path_factory):
  """Returns the model, its format and its folder."""
  if request.param == "onnx":
    pytest.importorskip("onnx", reason="needs the extra `onnx`")
  folder = tmp_path_factory.mktemp("exported") / "small"
  model = folding.load(source)
  model.save(folder, request.param)
  return model, request.param, folder


def _metadata(folder):
  found = huggingface_hub.metadata_load(folder / "README.md")
  assert found is not None
  return found


def test_card_names_checkpoint_licence_and_length(exported):
  model, _, folder = exported
  metadata = _metadata(folder)
  assert metadata["base_model"] == "lab/net"
  assert metadata["license"] == "mit"
  assert metadata["pipeline_tag"] == "text-classification"
  text = (folder / "README.md").read_text("utf-8")
  assert f" {model.config.data.length} tokens" in text
  assert (folder / "LICENSE").read_text() == "As is."


def test_exported_folder_names_no_local_path(exported, source):
  *_, folder = exported
  for file in folder.rglob("*"):
    content = file.read_bytes() if file.is_file() else b""
    assert str(source.parents[1]).encode() not in content, file


def test_program_of_a_card_runs(exported, monkeypatch):
  _, format, folder = exported
  needed = {"hf": "transformers", "onnx": "onnxruntime"}.get(format, "jax")
  pytest.importorskip(needed, reason="needs the extra `parity`")
  text = (folder / "README.md").read_text("utf-8")
  [program] = re.findall(r"```python\n(.*?)```", text, re.S)
  monkeypatch.chdir(folder.parent)
  exec(program, {})


def test_export_of_an_export_keeps_origin_and_notes(source, tmp_path):
  model = folding.load(source)
  notes = ("Accuracy 90%: of 'a' and 'b'.",)
  origin = model.origin._replace(notes=notes)
  model = dataclasses.replace(model, origin=origin)
  model.save(tmp_path / "one")
  assert folding.load(tmp_path / "one").origin == origin


def test_card_of_a_run_has_its_test_metrics(run, tmp_path):
  folding.load(run).save(tmp_path / "out")
  _, _, text = (
    (tmp_path / "out" / "README.md").read_text("utf-8").partition("# ")
  )
  [result] = re.findall(r"Test split: .*accuracy ([\d.]+)%", text)
  found = files.read_json(str(run / "result.json"), dict)
  assert float(result) == pytest.approx(
    100 * found["test"]["accuracy"], abs=0.01
  )
  for file in (tmp_path / "out").iterdir():
    assert str(run.parent).encode() not in file.read_bytes(), file


def test_checkpoint_may_have_no_card(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE))
  model.save(tmp_path / "out")
  metadata = _metadata(tmp_path / "out")
  assert "license" not in metadata
  assert "base_model" not in metadata
