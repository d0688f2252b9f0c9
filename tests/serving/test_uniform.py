"""Uniform plans: plain folders for transformers, as small as their arrays."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import folding
from folding import cli, paths
from folding import config as c
from folding.serving import compress_file
from folding.serving.export import export_hf
from tests.serving import models

pytestmark = pytest.mark.slow  # they plan and refit whole models

_TEXT = "the cats sat on a mat"


def _compressed(task, shape, saving):
  """Returns a random dense model and a uniform smaller one."""
  model = models.make(task, shape, c.FoldConfig(groups=0, values="dense"))
  if task == "embed":  # which chooses a rank by errors
    for name in ("embed", "position_embed"):
      model.params[name]["embedding"][:, 6:] *= 0.1
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


def test_all_layers_of_a_decoder_have_one_size(decoder):
  model, small = decoder
  m, fold = small.config.model, small.config.fold
  assert m.mlp_width == 16
  assert [len(heads) for heads in m.heads] == [4, 4]
  assert (fold.groups, fold.value_rank) == (0, 0)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_have_the_type_of_the_checkpoint(
  decoder, dtype, tmp_path, capsys
):
  export_hf(tmp_path / "dense", decoder[0], dtype)
  texts = tmp_path / "texts.txt"
  texts.write_text("\n".join(models.random_texts(300)))
  argv = ["compress", str(tmp_path / "dense"), f"--texts={texts}", "--uniform"]
  small, out = tmp_path / "small", tmp_path / "out"
  assert cli.main([*argv, "--saving=0.3", f"--output={small}"]) == 0
  told = capsys.readouterr().out
  argv = ["export", str(small), "--format=hf", f"--output={out}"]
  assert cli.main(argv) == 0
  before, after = (
    _size(one.params) * np.dtype(dtype).itemsize for one in decoder
  )
  for folder in small, out:
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {w.dtype.name for w in stored.values()} == {dtype}
    assert sum(w.nbytes for w in stored.values()) == after
    card = (folder / "README.md").read_text()
    assert f"take {after:,} bytes" in card
    assert f"dense model in {dtype} {before:,} (" in card
  # The perplexity is that of the files.
  dense = folding.load(tmp_path / "dense")
  found = dataclasses.replace(folding.load(small), tokenizer=dense.tokenizer)
  _, held = compress_file._texts(str(texts), dense)
  before, after = compress_file._perplexities(dense, found, [*map(str, held)])
  assert f"perplexity {before:.2f} is now {after:.2f}" in told


def _bert(**fields):
  shape = {"num_layers": 2, "width": 16, "num_heads": 4, "mlp_width": 32}
  return c.bert(**shape | fields)


def test_embeddings_of_an_encoder_share_one_matrix():
  model, small = _compressed("embed", _bert(mlp_width=8), 0.05)
  shapes = {name: w.shape for name, w in paths.flatten(small.params).items()}
  assert small.config.fold.embedding_rank == 8
  assert shapes["embed/embedding"] == (21, 8)
  assert shapes["position_embed/embedding"] == (40, 8)
  assert shapes["embed_expand/kernel"] == (8, 16)
  assert "embed_expand/bias" not in shapes
  assert small.config.model.heads is None  # BERT has heads of width / heads
  assert _size(small.params) <= 0.95 * _size(model.params)


@pytest.mark.filterwarnings("ignore")  # those of torch
@pytest.mark.parametrize("task", ["embed", "classify", "regress"])
def test_transformers_computes_the_same_encoder(transformers, task, tmp_path):
  import torch

  is_pair = task == "regress"
  # The plan of the vectors takes neurons before ranks.
  F, saving = (8, 0.05) if task == "embed" else (32, 0.25)
  shape = _bert(
    pooler=task != "embed", segments=2 if is_pair else 0, mlp_width=F
  )
  _, small = _compressed(task, shape, saving)
  export_hf(tmp_path / "out", small)
  fields = _config(tmp_path / "out")
  assert fields["model_type"] == "deberta-v2"
  assert fields["embedding_size"] == small.config.fold.embedding_rank
  assert fields["intermediate_size"] == small.config.model.mlp_width
  kind = transformers.AutoModelForSequenceClassification
  kind = transformers.AutoModel if task == "embed" else kind
  theirs, told = kind.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(told.values())  # such as newly initialized weights
  ids = [small.tokenizer.encode_batch([text], 40)[0] for text in (_TEXT, "a")]
  tokens = np.zeros((2, len(ids[0])), int)
  for row, one in zip(tokens, ids, strict=True):
    row[: len(one)] = one
  mask = tokens > 0
  with torch.no_grad():
    found = theirs.eval()(
      input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)
    )
  found = found.last_hidden_state[mask] if task == "embed" else found.logits
  for each in (small, folding.load(tmp_path / "out")):
    apply = jax.jit(each.model.apply, static_argnames="method")
    method = "encode" if task == "embed" else None
    expected = apply({"params": each.params}, tokens, mask, method=method)
    expected = np.asarray(expected)[mask] if task == "embed" else expected
    np.testing.assert_allclose(found, expected, atol=1e-5)
