"""Programs of `jax.export`: the same logits without this library."""

import json

import jax.export
import numpy as np
import pytest

from folding import config as c
from folding.serving import export as export_lib
from tests.serving import models

_CASES = {
  "mapped": lambda: export_lib.shrunk(
    models.with_zeros(models.make(), [7, 9, 10])
  ),
  "last-by-input-axis": lambda: models.make(
    model=c.gpt2(**models.SHAPE, pooling="last"),
    fold=c.FoldConfig(groups=4, axis="input"),
  ),
  "llama": lambda: models.make(
    "lm",
    c.llama(**models.SHAPE, num_kv_heads=2, window=5),
    c.FoldConfig(groups=2, values="dense"),
  ),
}


def _batch(model, length):
  """Returns ids of the tokenizer, and a mask with padding at the end."""
  rng = np.random.default_rng(0)
  shape = (3, length)
  tokens = rng.integers(0, model.tokenizer.plain_size, shape).astype(np.int32)
  return tokens, np.arange(length) < np.array([[length], [2], [length - 1]])


def _apply(model, tokens, keep):
  tokens = getattr(model.tokenizer, "token_map", np.arange(21))[tokens]
  apply = jax.jit(model.module.apply)
  return np.asarray(apply({"params": model.params}, tokens, keep))


def test_program_of_pairs_reads_segments(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE, segments=2))
  export_lib.export_stablehlo(tmp_path / "out", model)
  tokens, keep = _batch(model, 9)
  segments = (keep & (np.arange(9) > 4)).astype(np.int32)
  apply = jax.jit(model.module.apply, static_argnums=3)
  expected = apply({"params": model.params}, tokens, keep, True, segments)
  found = _load(tmp_path / "out").call(tokens, keep, segments)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
  meta = json.loads((tmp_path / "out" / "meta.json").read_text())
  assert [*meta["inputs"]] == ["tokens", "mask", "segments"]


def _load(folder):
  data = (folder / "model.stablehlo").read_bytes()
  return jax.export.deserialize(bytearray(data))


@pytest.mark.parametrize("name", _CASES)
def test_program_computes_the_model_whatever_pads(tmp_path, name):
  model, out = _CASES[name](), tmp_path / "out"
  size = export_lib.export_stablehlo(out, model)
  program = (out / "model.stablehlo").stat().st_size
  assert program == size["program"] > size["parameters"] > 0
  saved = (out / "tokenizer.json").read_text("utf-8")
  assert saved == model.tokenizer.to_json()
  exported = _load(out)
  assert exported.platforms == ("cpu", "cuda", "tpu")
  tokens, keep = _batch(model, 17)
  expected, found = _apply(model, tokens, keep), exported.call(tokens, keep)
  # The same sums, fused otherwise.
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
  other = exported.call((tokens + 1) % 20, keep)
  assert np.abs(found - other).max() > 1e-2
  if model.labels:
    for value in (-300, 10**6):
      padded = np.where(keep, tokens, value).astype(np.int32)
      np.testing.assert_array_equal(exported.call(padded, keep), found)


def test_program_with_learned_positions_refuses_longer_texts(tmp_path):
  model = models.make(model=c.bert(**models.SHAPE), length=8)
  export_lib.export_stablehlo(tmp_path / "out", model)
  exported = _load(tmp_path / "out")
  meta = json.loads((tmp_path / "out" / "meta.json").read_text("utf-8"))
  assert (meta["longest"], meta["labels"]) == (8, list(models.LABELS))
  assert meta["calling_convention"] == exported.calling_convention_version
  exported.call(*_batch(model, 8))
  with pytest.raises(ValueError, match="shapes"):
    exported.call(*_batch(model, 9))


def test_program_of_an_encoder_returns_vectors(tmp_path):
  model = models.make("embed")
  export_lib.export_stablehlo(tmp_path / "out", model)
  [text] = ["the cat sat"]
  ids = model.tokenizer.encode_batch([text], 9)[0][None]
  mask = np.ones_like(ids, bool)
  found = _load(tmp_path / "out").call(ids, mask)
  expected = models.logits(model, text)
  np.testing.assert_allclose(found[0], expected, atol=1e-5)
