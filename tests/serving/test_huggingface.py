"""Exports for transformers: the same predictions there as here."""

import dataclasses
import warnings

import numpy as np
import pytest

import folding
from folding import config as c
from folding.data import trimming
from folding.models.attention import rope_frequencies
from folding.schema import ConfigError
from folding.serving import export as export_lib
from folding.serving import huggingface, predict
from tests.serving import models

_ENCODER = c.bert(**models.SHAPE, pooler=True)
_CASES = {
  "bert": (_ENCODER, {"groups": 2, "v_block": 4}),
  "bert-identity": (_ENCODER, {"v_identity": True}),
  "bert-shrunk": (_ENCODER, {"groups": 2, "v_block": 1}),
  "gpt2": (c.gpt2(**models.SHAPE), {}),
  "llama-pairs": (
    c.llama(**models.SHAPE | {"width": 32}, num_kv_heads=2),
    {"groups": 4, "rope": "pairs", "v_block": 0},
  ),
  "llama-own-keys": (
    c.llama(**models.SHAPE, num_kv_heads=2),
    {"groups": 0, "v_block": 1, "first_dense": True},
  ),
}


def _model(name):
  shape, options = _CASES[name]
  task = "lm" if shape.causal else "classify"
  model = models.make(task, shape, c.FoldConfig(**options))
  for n in range(2) if "pairs" in name else ():
    # 2 of the 4 pairs of K = 8 channels, others in each key head.
    own = rope_frequencies(8, 10000.0)[np.array([[0, 2], [3, 1]])]
    model.params[f"blocks_{n}"]["attn"]["frequency"] = own
  if "shrunk" in name:  # one layer to fewer neurons than the other
    model = export_lib.shrunk(models.with_zeros(model, []))
    first, second = model.config.model.mlp_width
    assert first == second + 1
  return model


@pytest.fixture(scope="module")
def transformers():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reason = "needs the extra `parity` (PyTorch and transformers)"
    pytest.importorskip("torch", reason=reason)
    found = pytest.importorskip("transformers", reason=reason)
  found.logging.set_verbosity_error()
  found.logging.disable_progress_bar()
  return found


@pytest.mark.filterwarnings("ignore")  # those of torch
@pytest.mark.parametrize("name", _CASES)
def test_transformers_predicts_the_same(transformers, name, tmp_path):
  import torch

  model = _model(name)
  huggingface.export_hf(tmp_path / "out", model)
  of_task = {
    "lm": transformers.AutoModelForCausalLM,
    "classify": transformers.AutoModelForSequenceClassification,
  }
  theirs = of_task[model.config.task].from_pretrained(tmp_path / "out").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  named = {"[PAD]", "[CLS]", "[SEP]"}
  if not model.config.model.causal:
    named |= {"[UNK]"}
    assert (tokenizer.cls_token, tokenizer.sep_token) == ("[CLS]", "[SEP]")
    assert (tokenizer.unk_token, tokenizer.mask_token) == ("[UNK]", None)
  assert set(tokenizer.all_special_tokens) == named
  texts = ["the cats sat on a mat", "a dog"]
  batch = tokenizer(texts, return_tensors="pt", padding=True)
  with torch.no_grad():
    logits = theirs(**batch).logits.numpy()
  for i, text in enumerate(texts):
    expected = models.logits(model, text)
    found = logits[i] if model.labels else logits[i, : len(expected)]
    # float32 on both sides, in another order of operations.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  if model.labels:
    assert list(theirs.config.id2label.values()) == list(model.labels)


@pytest.mark.parametrize("name", _CASES)
def test_folding_reads_it_back_and_predicts_the_same(name, tmp_path):
  model = _model(name)
  size = huggingface.export_hf(tmp_path / "out", model)
  assert size["files"] == sum(
    f.stat().st_size for f in (tmp_path / "out").iterdir()
  )
  found = folding.load(tmp_path / "out")
  assert found.labels == model.labels
  assert found.config.task == model.config.task
  width = np.max(model.config.model.mlp_width)
  assert found.config.model.mlp_width == width
  np.testing.assert_allclose(
    models.logits(found, "the cats sat"),
    models.logits(model, "the cats sat"),
    rtol=1e-5,
    atol=1e-5,
  )


def test_mapped_tokens_get_their_rows_back(tmp_path):
  model = models.make(model=_ENCODER)
  model.params["embed"]["embedding"][[5, 9]] = 0  # cat, mat
  mapped = export_lib.shrunk(model)
  huggingface.export_hf(tmp_path / "out", mapped)
  found = folding.load(tmp_path / "out")
  rows, old = (m.params["embed"]["embedding"] for m in (found, model))
  np.testing.assert_array_equal(rows, old)
  [ours], [theirs] = (
    predict.predict(m, ["the cat sat"], batch_size=1) for m in (mapped, found)
  )
  np.testing.assert_allclose(
    theirs.probabilities, ours.probabilities, atol=1e-6
  )


def test_tokens_that_left_the_tokenizer_get_no_rows(tmp_path):
  model = models.make(model=_ENCODER)
  keep = ~np.isin(np.arange(21), [5, 9])  # without "cat", "mat"
  params = dict(model.params)
  rows = params["embed"]["embedding"][keep]
  params["embed"] = {"embedding": rows}
  trimmed = dataclasses.replace(
    model, params=params, tokenizer=trimming.trimmed(model.tokenizer, keep)
  )
  huggingface.export_hf(tmp_path / "out", trimmed)
  found = folding.load(tmp_path / "out")
  np.testing.assert_array_equal(found.params["embed"]["embedding"], rows)
  assert found.tokenizer.vocab_size == 19
  [ours], [theirs] = (
    predict.predict(m, ["the cat sat on a mat"], batch_size=1)
    for m in (trimmed, found)
  )
  np.testing.assert_allclose(
    theirs.probabilities, ours.probabilities, atol=1e-6
  )


def _without_heads():
  model = models.with_zeros(models.make(model=_ENCODER), [])
  for n in range(2):
    model.params[f"blocks_{n}"]["attn"]["o"]["kernel"][1] = 0
  found = export_lib.shrunk(model)
  assert found.config.model.heads is not None
  return found


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (_without_heads(), "heads of this model were removed, .* shrunk from"),
    (models.make(), "no model of transformers computes this one: gpt2 needs"),
  ],
  ids=["heads", "alibi"],
)
def test_what_they_do_not_have_is_refused(model, message, tmp_path):
  with pytest.raises(ConfigError, match=message) as error:
    huggingface.export_hf(tmp_path / "out", model)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_angles_that_they_do_not_have_are_refused(tmp_path):
  model = _model("llama-pairs")
  model.params["blocks_1"]["attn"]["frequency"] *= np.float32(1.1)
  message = "no dense form: blocks_1/attn/frequency: the dense model has no"
  with pytest.raises(ConfigError, match=message):
    huggingface.export_hf(tmp_path / "out", model)
