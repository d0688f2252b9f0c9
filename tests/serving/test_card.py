"""README.md of exported folders, and folders of the hub."""

import dataclasses
import json
import re
import shutil

import huggingface_hub
import pytest

import folding
from folding import config as c
from folding import files
from folding.errors import ConfigError
from folding.serving import card, formats
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_card_counts_the_bytes_of_the_folder(dtype, tmp_path):
  shape = c.bert(**models.SHAPE)
  model = models.make(model=shape, fold=c.FoldConfig(groups=1))
  if dtype == "int8":
    onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
    model.save(tmp_path / "out", "onnx", dtype)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = sum(len(x.raw_data) for x in graph.initializer)
  else:
    model.save(tmp_path / "out", dtype=dtype)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    stored = len(data) - 8 - int.from_bytes(data[:8], "little")  # its head
  text = (tmp_path / "out" / "README.md").read_text("utf-8")
  assert f"Its parameters take {stored:,} bytes" in text


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


def test_program_of_a_pair_model_runs(source, tmp_path, monkeypatch):
  folding.load(source, pairs=True).save(tmp_path / "pairs")
  text = (tmp_path / "pairs" / "README.md").read_text("utf-8")
  [program] = re.findall(r"```python\n(.*?)```", text, re.S)
  monkeypatch.chdir(tmp_path)
  exec(program, {})


def test_export_of_an_export_keeps_origin_and_notes(source, tmp_path):
  model = folding.load(source)
  notes = ("Accuracy 90%: of 'a' and 'b'.",)
  origin = model.origin._replace(notes=notes)
  model = dataclasses.replace(model, origin=origin)
  model.save(tmp_path / "one")
  assert folding.load(tmp_path / "one").origin == origin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_card_says_that_its_figures_are_of_other_weights(
  dtype, source, tmp_path
):
  model = folding.load(source)
  origin = model.origin._replace(notes=("Accuracy 90%",))
  model = dataclasses.replace(model, origin=origin)
  model.save(tmp_path / "out", dtype=dtype)
  text = (tmp_path / "out" / "README.md").read_text("utf-8")
  assert ("before its weights became bfloat16" in text) == (dtype == "bfloat16")


@pytest.mark.slow
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


@pytest.mark.parametrize(
  ("folder", "blob", "is_read"),
  [
    ("net", "private", False),
    ("models--lab--net/snapshots/1", "models--lab--net/blobs/2", True),
    ("models--lab--net/snapshots/1", "models--lab--other/blobs/2", False),
  ],
)
def test_card_follows_links_within_a_hub_cache_alone(
  tmp_path, folder, blob, is_read
):
  folder, blob = tmp_path / folder, tmp_path / blob
  folder.mkdir(parents=True)
  blob.parent.mkdir(parents=True, exist_ok=True)
  blob.write_text("---\nlicense: mit\n---\n")
  for name in ("LICENSE", "README.md"):
    (folder / name).symlink_to(blob)
  origin = card.origin_of_folder(str(folder))
  assert (bool(origin.license_text), origin.license) == (
    (True, "mit") if is_read else (False, "")
  )


@pytest.mark.parametrize("field", ["tags", "notes", "license", "made_from"])
@pytest.mark.parametrize("value", ["5", "{a: b}", "[[1], 2]"])
def test_card_ignores_metadata_that_is_no_text(tmp_path, field, value):
  text = f"---\ntags: [folding]\n{field}: {value}\n---\n"
  if field == "tags":
    text = f"---\n{field}: {value}\n---\n"
  (tmp_path / "README.md").write_text(text)
  base = tmp_path.name if field == "tags" else ""
  assert card.origin_of_folder(str(tmp_path)) == card.Origin(base)


@pytest.mark.parametrize(
  ("text", "base"),
  [
    (
      "---\nlicense: mit\n---\n\n# all-MiniLM-L6-v2\nA text\n",
      "all-MiniLM-L6-v2",
    ),
    ("# lab/net", "lab/net"),
    ("# Model card of a net\n", "model"),
    ("# [net](x)\n", "model"),
    ("Some words\n# net\n", "model"),
    ("---\nlicense: mit\n# net\n", "model"),
  ],
)
def test_card_names_a_checkpoint_as_its_own_title(tmp_path, text, base):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "README.md").write_text(text)
  assert card.origin_of_folder(str(folder)).base == base


@pytest.mark.parametrize(
  ("start", "base"),
  [
    ("lab/net", "lab/net"),
    ("lab/net@refs/pr/1", "lab/net"),
    ("../gone/net", "net"),
    ("/gone/net", "net"),
  ],
)
def test_card_names_the_start_of_a_run_without_its_place(tmp_path, start, base):
  assert card.origin_of_run(str(tmp_path), start).base == base


def test_card_does_not_name_a_folder_that_is_gone_as_on_the_hub(tmp_path):
  config = c.Config(
    pretrained="runs/tuned",
    data=c.DataConfig(tokenizer="runs/tuned/tokenizer.json"),
  )
  c.save(config, str(tmp_path / "config.json"))
  assert card.origin_of_run(str(tmp_path), "runs/tuned").base == "tuned"


def test_card_names_the_checkpoint_behind_a_dense_run(tmp_path):
  dense, ring = tmp_path / "dense", tmp_path / "ring"
  for folder, start in ((dense, "lab/net"), (ring, str(ring))):
    (folder / "checkpoints").mkdir(parents=True)
    c.save(c.resolve(c.Config(pretrained=start)), str(folder / "config.json"))
  for folder, base in ((dense, "lab/net"), (ring, "ring")):
    assert card.origin_of_run(str(tmp_path), str(folder)).base == base


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", ["0.9", None, [1]])
def test_load_refuses_a_run_of_damaged_metrics(run, tmp_path, accuracy):
  folder = shutil.copytree(run, tmp_path / "run")
  result = files.read_json(str(folder / "result.json"), dict)
  result["test"]["accuracy"] = accuracy
  (folder / "result.json").write_text(json.dumps(result))
  with pytest.raises(ConfigError, match=r"result\.json differs"):
    folding.load(folder)
  result["schema"] = 1  # as of an earlier version
  del result["checksum"]
  (folder / "result.json").write_text(json.dumps(result))
  with pytest.raises(ConfigError, match="test is"):
    folding.load(folder)


@pytest.mark.parametrize(
  ("name", "format", "message"),
  [
    ("net", "safetensors", "USER/NAME"),
    ("https://huggingface.co/lab/net", "safetensors", "USER/NAME"),
    ("lab/net", "gguf", "is a file"),
  ],
)
def test_push_to_hub_needs_a_folder_and_a_user(tmp_path, name, format, message):
  output = tmp_path / ("out.gguf" if format == "gguf" else "out")
  with pytest.raises(ConfigError, match=message):
    models.make("lm").save(output, format, push_to_hub=name)
  assert not output.exists()


def test_card_shows_hostile_words_as_text(tmp_path, monkeypatch):
  model = models.make(model=c.bert(**models.SHAPE))
  origin = card.Origin("[x](y)", notes=("one\n# two <b>",))
  model = dataclasses.replace(model, origin=origin)
  folder = tmp_path / 'a"`\n```'
  model.save(folder)
  text = (folder / "README.md").read_text("utf-8")
  body = text.split("---\n")[2]
  assert "made from \\[x\\](y)" in body
  assert "\n# two" not in body
  [program] = re.findall(r"```python\n(.*?)\n```", body, re.S)
  monkeypatch.chdir(tmp_path)
  exec(program, {})
