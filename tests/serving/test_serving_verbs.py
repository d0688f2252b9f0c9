"""`folding export` and `folding predict`, on a run that was trained."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import folding
from folding import cli
from folding import config as c
from tests.serving import models


def _call(capsys, *argv):
  """Returns (exit status, output, errors) of a verb."""
  status = cli.main([str(a) for a in argv])
  out, err = capsys.readouterr()
  return status, out, err


def _error(capsys, *argv):
  status, out, err = _call(capsys, *argv)
  assert (status, out) == (2, "")
  (line,) = err.splitlines()
  return line


def test_export_has_the_accuracy_of_the_run(run, tmp_path, capsys):
  status, out, _ = _call(capsys, "export", run, "--output", tmp_path / "out")
  assert status == 0
  numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", out)][:5]
  stored, values, masks, dense, files = numbers
  assert stored == values + masks < 0.5 * dense
  assert files == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())

  small, whole = folding.load(tmp_path / "out"), folding.load(run)
  assert small.labels == whole.labels == ("animal", "tool, sharp")
  shape = whole.params["embed"]["embedding"].shape
  assert small.params["embed"]["embedding"].shape[0] < 0.4 * shape[0]
  rows = (run.parent / "data" / "test.tsv").read_text("utf-8").splitlines()
  labels, texts = zip(*(row.split("\t") for row in rows), strict=True)
  (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
  result = json.loads((run / "result.json").read_text("utf-8"))
  expected = result["test"]["accuracy"]
  answers = []
  for path in (run, tmp_path / "out"):
    arguments = (path, tmp_path / "in.txt", "--format=jsonl", "--batch-size=3")
    status, out, _ = _call(capsys, "predict", *arguments)
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert tuple(one["text"] for one in found) == texts
    right = [
      one["label"] == label for one, label in zip(found, labels, strict=True)
    ]
    assert np.mean(right) == pytest.approx(expected)
    answers.append([list(one["probabilities"].values()) for one in found])
  np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_export_of_stablehlo_and_bfloat16(run, tmp_path, capsys):
  for option, message in (
    ("--format=stablehlo", "bytes of program; "),
    ("--dtype=bfloat16", "bytes of files"),
  ):
    output = tmp_path / option
    status, out, _ = _call(capsys, "export", run, "--output", output, option)
    assert status == 0
    assert message in out
    assert out.endswith(f"The exported model is in {output}\n")
  assert (tmp_path / "--format=stablehlo" / "model.stablehlo").is_file()
  found = folding.load(output)
  dtypes = {x.dtype.name for x in jax.tree.leaves(found.params)}
  assert dtypes == {"bfloat16", "float32"}  # ALiBi's slopes stay exact
  status, out, _ = _call(capsys, "predict", output, run / "labels.json")
  assert (status, len(out.splitlines())) == (0, 2)
  assert out.splitlines()[0] == "label\tanimal\ttool, sharp"


def test_export_of_onnx_prints_its_size(run, tmp_path, capsys):
  pytest.importorskip("onnx", reason="needs the extra `onnx`")
  output = tmp_path / "out"
  argv = ("export", run, "--output", output, "--format=onnx", "--dtype=int8")
  status, out, _ = _call(capsys, *argv)
  assert status == 0
  size = sum(f.stat().st_size for f in output.iterdir())
  assert out.startswith(f"{size:,} bytes of files, for onnxruntime")


def test_export_of_a_checkpoint_of_pairs_keeps_its_segments(tmp_path, capsys):
  shape = c.bert(**models.SHAPE, pooler=True, segments=2)
  model = dataclasses.replace(models.make("classify", shape), pair=("a", "b"))
  model.save(tmp_path / "hf", "hf")
  argv = ("export", tmp_path / "hf", "--pairs", "--output", tmp_path / "out")
  assert _call(capsys, *argv)[0] == 0
  pairs = [("the cats sat", "a dog"), ("ran", "the old red barn")]
  expected, found = (
    [one.probabilities for one in each.predict(pairs)]
    for each in (model, folding.load(tmp_path / "out"))
  )
  for one, other in zip(found, expected, strict=True):
    assert one == pytest.approx(other, abs=1e-5)


def test_export_that_fails_leaves_nothing(run, tmp_path, capsys, monkeypatch):
  def fail(*_):
    raise OSError("the disk is full")

  argv = ("export", run, "--output", tmp_path / "out")
  monkeypatch.setattr("os.replace", fail)
  assert "the disk is full" in _error(capsys, *argv)
  assert list(tmp_path.iterdir()) == []


def test_predict_answers_standard_input_line_by_line(run, capsys, monkeypatch):
  stdin = types.SimpleNamespace(buffer=io.BytesIO(b"cat\n\ndog axe\n"))
  monkeypatch.setattr("sys.stdin", stdin)
  status, out, _ = _call(capsys, "predict", run, "-", "--batch-size=1")
  assert status == 0
  header, *lines = (line.split("\t") for line in out.splitlines())
  assert header == ["label", "animal", "tool, sharp"]
  assert len(lines) == 3
  for label, *numbers in lines:
    assert sum(map(float, numbers)) == pytest.approx(1, abs=2e-6)
    assert label == header[1 + int(np.argmax([float(n) for n in numbers]))]


# fmt: off
@pytest.mark.parametrize(("argv", "message"), [
  ("export RUN --output RUN", "not an empty"),
  ("export TMP --output TMP/out", "neither a run"),
  ("export RUN --output TMP/out --format=hf", "no model of transformers"),
  ("export RUN --output O --format=hf --dtype=int8", "float32 or bfloat16"),
  ("export RUN --output O --format=onnx --dtype=bfloat16", "int8"),
  ("export RUN --output O --dtype=int8", "bfloat16"),
  ("export RUN --output TMP/o --max-drop=1", "--data"),
  ("export RUN --output TMP/o --max-drop=1 --data=F", "--format=onnx"),
  ("export RUN --output TMP/o --format=onnx --max-drop=-1 --data=DATA",
   "0.00 points less; --max-drop=-1"),
  ("export RUN --output TMP/o --format=onnx --max-drop=1 --data=TMP/none.txt",
   "there is no file"),
  ("export RUN --output O --format=gguf", "not the name of a .gguf file"),
  ("export RUN --output TMP/o.gguf --format=gguf", "writes language models"),
  ("predict RUN TMP/none.txt", "No such file"),
  ("predict RUN /dev/null", "no text in /dev/null"),
  ("predict RUN TMP/a.txt --pairs", "single texts"),
  ("export RUN --output TMP/o --pairs", "single texts"),
  ("compress RUN --texts=F --saving=0.2 --output=TMP/o --pairs --steps=2",
   "leave --pairs out"),
])
# fmt: on
def test_mistake_is_one_line(run, tmp_path, capsys, argv, message):
  (tmp_path / "a.txt").write_text("a\n")
  argv = argv.replace("RUN", str(run)).replace("TMP", str(tmp_path))
  data = run.parent / "data" / "test.tsv"
  argv = argv.replace("DATA", str(data)).split()
  assert message in _error(capsys, *argv)


def test_backend_that_does_not_exist_is_one_line(run):
  done = subprocess.run(
    [sys.executable, "-m", "folding", "predict", run, run / "labels.json"],
    env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (2, "")
  [line] = done.stderr.splitlines()
  assert "JAX_PLATFORMS" in line
  assert "checkpoint" not in line
