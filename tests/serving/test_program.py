import json
import os
import subprocess
import sys

import jax.export
import numpy as np
import pytest

from folding import config as c
from folding.schema import ConfigError
from folding.serving import program
from folding.serving.export import shrunk
from tests.serving import models

# Runs a program where neither folding nor flax can be imported.
_ALONE = """
import sys
sys.modules |= dict.fromkeys(("folding", "flax", "tokenizers", "optax"))
import jax.export
import numpy as np

with open(sys.argv[1], "rb") as file:
  exported = jax.export.deserialize(bytearray(file.read()))
inputs = np.load(sys.argv[2])
for name in sys.argv[4:]:
  try:
    __import__(name)
  except ImportError:
    pass
  else:
    raise SystemExit(f"{name} could be imported")
tokens, mask = inputs["tokens"], inputs["mask"]
wide = exported.call(tokens, mask)
one = exported.call(tokens[:1, :3], mask[:1, :3])
np.savez(sys.argv[3], wide=wide, one=one)
"""

_CASES = {
  "folded-alibi": models.make(),
  "encoder": models.make(
    model=c.bert(**models.SHAPE), fold=c.FoldConfig(groups=2, v_block=4)
  ),
  "last-by-input-axis": models.make(
    model=c.gpt2(**models.SHAPE, pooling="last"),
    fold=c.FoldConfig(groups=4, axis="input"),
  ),
  "folded-lm": models.make("lm"),
  "llama": models.make(
    "lm",
    c.llama(**models.SHAPE, num_kv_heads=2, window=5),
    c.FoldConfig(groups=2, v_block=0),
  ),
}


def _batch(model, length, seed=0):
  rng = np.random.default_rng(seed)
  shape = (3, length)
  tokens = rng.integers(0, model.tokenizer.vocab_size, shape).astype(np.int32)
  return tokens, np.arange(length) < np.array([[length], [2], [length - 1]])


def _apply(model, tokens, keep):
  apply = jax.jit(model.model.apply)
  return np.asarray(apply({"params": model.params}, tokens, keep))


def _load(folder):
  data = (folder / "model.stablehlo").read_bytes()
  return jax.export.deserialize(bytearray(data))


@pytest.mark.parametrize("name", _CASES)
def test_the_program_computes_the_model(tmp_path, name):
  model = _CASES[name]
  size = program.export_stablehlo(tmp_path / "out", model)
  assert (tmp_path / "out" / "model.stablehlo").stat().st_size == size[
    "program"
  ]
  assert size["program"] > size["parameters"] > 0
  exported = _load(tmp_path / "out")
  assert exported.platforms == ("cpu", "cuda", "tpu")
  tokens, keep = _batch(model, 17)
  expected = _apply(model, tokens, keep)
  found = exported.call(tokens, keep)
  # The same sums, fused otherwise.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  other = _apply(model, (tokens + 1) % 20, keep)
  assert np.abs(found - other).max() > 1e-2


def test_it_runs_where_folding_is_not_installed(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE))
  program.export_stablehlo(tmp_path / "out", model)
  tokens, keep = _batch(model, 9)
  np.savez(tmp_path / "in.npz", tokens=tokens, mask=keep)
  modules = ("folding", "flax", "tokenizers", "optax")
  files = ("out/model.stablehlo", "in.npz", "found.npz")
  done = subprocess.run(
    [sys.executable, "-c", _ALONE, *files, *modules],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert (done.returncode, done.stderr) == (0, "")
  found = np.load(tmp_path / "found.npz")
  for name, rows, length in (("wide", 3, 9), ("one", 1, 3)):
    expected = _apply(model, tokens[:rows, :length], keep[:rows, :length])
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)


def test_a_program_reads_the_ids_of_its_tokenizer(tmp_path):
  model = models.with_zeros(models.make(), [7, 9, 10])
  small = shrunk(model)
  assert small.tokenizer.vocab_size == model.tokenizer.vocab_size - 2
  program.export_stablehlo(tmp_path / "out", small)
  saved = (tmp_path / "out" / "tokenizer.json").read_text("utf-8")
  assert saved == model.tokenizer.to_json()
  tokens, keep = _batch(model, 8)
  expected = _apply(model, tokens, keep)
  found = _load(tmp_path / "out").call(tokens, keep)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_padding_may_be_any_number(tmp_path):
  model = models.make()
  for name, one in (("plain", model), ("mapped", shrunk(model))):
    program.export_stablehlo(tmp_path / name, one)
    tokens, keep = _batch(model, 8)
    assert not keep.all()
    call = _load(tmp_path / name).call
    expected = np.asarray(call(tokens, keep))
    for value in (-1, -300, 10**6):
      found = call(np.where(keep, tokens, value).astype(np.int32), keep)
      np.testing.assert_array_equal(found, expected)


def test_learned_positions_end(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE), length=8)
  program.export_stablehlo(tmp_path / "out", model)
  exported = _load(tmp_path / "out")
  assert json.loads((tmp_path / "out" / "meta.json").read_text("utf-8")) == {
    "program": "model.stablehlo",
    "inputs": {
      "tokens": "int32[b, l]: ids of tokenizer.json; any where mask is false",
      "mask": "bool[b, l]: true at tokens, false at padding, which comes last",
    },
    "output": "float32[b, C]: logits",
    "labels": list(models.LABELS),
    "trained_length": 8,
    "longest": 8,
    "platforms": ["cpu", "cuda", "tpu"],
    "jax": jax.__version__,
    "calling_convention": exported.calling_convention_version,
  }
  exported.call(*_batch(model, 8))
  with pytest.raises(ValueError, match="shapes"):
    exported.call(*_batch(model, 9))


def test_nothing_is_written_over(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="not an empty folder"):
    program.export_stablehlo(tmp_path, _CASES["encoder"])


@pytest.mark.filterwarnings("ignore")  # those of the converter
@pytest.mark.parametrize("name", _CASES)
def test_an_onnx_runtime_computes_the_model(tmp_path, name):
  reason = "needs jax2onnx and onnxruntime, installed with --no-deps"
  pytest.importorskip("jax2onnx", reason=reason)
  runtime = pytest.importorskip("onnxruntime", reason=reason)
  model = _CASES[name]
  size = program.export_onnx(tmp_path / "out", model)
  path = tmp_path / "out" / "model.onnx"
  assert path.stat().st_size == size["program"] > size["parameters"]
  tokens, keep = _batch(model, 40)
  session = runtime.InferenceSession(path)
  for rows in (3, 2):
    inputs = {"tokens": tokens[:rows], "mask": keep[:rows]}
    [found] = session.run(["logits"], inputs)
    expected = _apply(model, tokens[:rows], keep[:rows])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_onnx_needs_is_said(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ConfigError, match="pip install --no-deps jax2onnx"):
    program.export_onnx(tmp_path / "out", _CASES["encoder"])
  assert not (tmp_path / "out").exists()
