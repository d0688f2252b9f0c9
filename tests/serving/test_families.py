"""Each family on its whole way: import, fold, export, generate."""

import json
import warnings

import jax
import numpy as np
import pytest

import folding
from folding.data.trim import plain_tokenizer
from folding.models import families, hf_config, hf_weights
from folding.serving import export as export_lib
from folding.serving import onnx_export
from folding.serving.generate import Generator
from tests.models import checkpoints
from tests.serving import models

pytestmark = pytest.mark.slow


def _folder(path, family):
  """Writes a checkpoint with a tokenizer whose tokens can be trimmed."""
  values = checkpoints.FAMILIES[family]
  described = hf_config.describe(values)
  params = checkpoints.random_params(described)
  if described.config.causal and "position_embed" in params:
    # Large, so that the next token depends on it.
    params["position_embed"]["embedding"] *= 8
  hf_weights.save_pretrained(path, params, described)
  text = models.word_pieces()
  if described.pad_id == 1:
    text = _with_pad_1(text)
  (path / "tokenizer.json").write_text(text)
  return path


def _with_pad_1(text):
  """Returns a tokenizer.json in which [PAD] and [UNK] have changed places."""
  values = json.loads(text)
  ids = values["model"]["vocab"]
  ids["[PAD]"], ids["[UNK]"] = 1, 0
  for token in values["added_tokens"]:
    token["id"] = ids[token["content"]]
  return json.dumps(values)


def _transformers(folder, task):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reason = "needs the extra `parity` (PyTorch and transformers)"
    torch = pytest.importorskip("torch", reason=reason)
    found = pytest.importorskip("transformers", reason=reason)
  auto = found.AutoModelForCausalLM if task == "lm" else found.AutoModel
  return torch, auto.from_pretrained(folder).eval()


@pytest.mark.filterwarnings("ignore")  # those of torch
@pytest.mark.parametrize("family", families.FAMILIES)
def test_family_is_folded_exported_and_generates(family, tmp_path):
  if family == "xlm-roberta":
    pytest.skip("is RoBERTa by another name")
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(models.WORDS, 7)) for _ in range(64)]
  dense = _folder(tmp_path / "dense", family)
  small = folding.compress(dense, texts, saving=0.25)
  layers, whole = small.shape.layers, small.shape.dense().layers
  assert layers != whole

  tokens = np.concatenate(small.tokenizer.encode_batch(texts[:1], 9))[None]
  mask = np.ones_like(tokens, bool)
  model, params = small.module, {"params": small.params}
  is_lm = small.config.task == "lm"

  @jax.jit
  def run(params, tokens):
    if is_lm:
      return model.apply(params, tokens)
    encoded = model.apply(params, tokens, method="encode")
    if small.config.model.norm_position == "pre":
      encoded = model.bind(params).norm_final(encoded)
    return encoded

  ours = np.asarray(run(params, tokens))

  export_lib.export_hf(tmp_path / "hf", small)
  torch, theirs = _transformers(tmp_path / "hf", small.config.task)
  _, token_map = plain_tokenizer(small.tokenizer)
  ids = tokens if token_map is None else np.argsort(token_map)[tokens]
  with torch.no_grad():
    out = theirs(input_ids=torch.tensor(ids))
  found = out.logits if is_lm else out.last_hidden_state
  scale = np.abs(ours).max()
  np.testing.assert_allclose(found.numpy(), ours, rtol=0, atol=1e-5 * scale)

  onnx_export.export_onnx(tmp_path / "onnx", small)
  runtime = pytest.importorskip("onnxruntime", reason="needs `onnx`")
  session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
  feed = {
    "input_ids": ids.astype(np.int64),
    "attention_mask": mask.astype(np.int64),
  }
  for x in session.get_inputs()[len(feed) :]:  # an empty KV cache
    size = len(ids), x.shape[1], 0, x.shape[3]
    feed[x.name] = np.zeros(size, np.float32)
  first = session.run(None, feed)[0]
  np.testing.assert_allclose(first, ours, rtol=0, atol=2e-5 * scale)

  if is_lm:
    [new] = Generator(model)(small.params, [tokens[0, :3]], max_new_tokens=6)
    # Attention is causal, so one pass has the logits after each prefix.
    read = np.concatenate([tokens[0, :3], new])[None, :-1]
    for logits, token in zip(run(params, read)[0, 2:], new, strict=True):
      assert logits[token] >= logits.max() - 1e-5 * scale
