"""Uniform plans: plain folders for transformers, as small as their arrays."""

import json
import warnings

import numpy as np
import pytest
import safetensors.numpy

import folding
from folding import config as c
from folding import paths
from folding.serving.export import export_hf
from tests.serving import models

_TEXT = "the cats sat on a mat"


def _compressed(task, shape, saving):
  """Returns a random dense model and a uniform smaller one."""
  model = models.make(task, shape, c.FoldConfig(groups=0, values="dense"))
  texts = [text for text in models.random_texts(300) if text]
  return model, folding.compress(model, texts, saving=saving, uniform=True)


def _size(params):
  return sum(np.size(w) for w in paths.flatten(params).values())


def _config(folder):
  return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def decoder():
  shape = c.llama(
    num_layers=2,
    width=16,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    mlp_width=32,
    tie_embeddings=True,
  )
  return _compressed("lm", shape, 0.3)


@pytest.fixture(scope="module")
def transformers():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reason = "needs the extra `parity` (PyTorch and transformers)"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def test_all_layers_of_a_decoder_have_one_size(decoder):
  model, small = decoder
  m, fold = small.config.model, small.config.fold
  assert m.mlp_width == 16
  assert [len(heads) for heads in m.heads] == [4, 4]
  assert (set(fold.groups), set(fold.value_rank)) == ({0}, {0})
  # In steps of eight neurons, a tenth of the parameters.
  assert 0.6 < _size(small.params) / _size(model.params) <= 0.7


@pytest.mark.filterwarnings("ignore")  # those of torch
def test_transformers_computes_the_same_decoder(
  transformers, decoder, tmp_path
):
  import torch

  _, small = decoder
  export_hf(tmp_path / "out", small)
  stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert _size(stored) == _size(small.params)
  kind = transformers.AutoModelForCausalLM
  theirs = kind.from_pretrained(tmp_path / "out").eval()
  [ids] = small.tokenizer.encode_batch([_TEXT], 40)
  with torch.no_grad():
    logits = theirs(torch.tensor(ids[None], dtype=torch.long)).logits[0]
  np.testing.assert_allclose(logits, models.logits(small, _TEXT), atol=1e-5)
