import json
import shutil

import numpy as np
import pytest

import folding
from folding import cli
from folding.config import ModelConfig
from folding.errors import ConfigError
from folding.models import sentence
from folding.serving import export as export_lib
from tests.models import checkpoints
from tests.serving import models

reason = "needs the extra `parity` (PyTorch and transformers)"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

TEXTS = ["a b c", "f", "a b c d e f a b c d e f a", "", "c c", "e d c b a"]


def make_encoder(bert, folder, pooling="mean", normalize=True):
  """Returns a copy of a checkpoint that makes vectors of 9 tokens."""
  shutil.copytree(bert, folder)
  shape = ModelConfig(pooling=pooling, normalize=normalize)
  sentence.write(folder, shape, 9)
  return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  """Returns a tiny BERT without sentence files."""
  folder = tmp_path_factory.mktemp("encode") / "bert"
  checkpoints.write(folder, "bert")
  return folder


def oracle(folder, texts, length, pooling="mean"):
  """Returns the pooled vectors that torch computes, one text at a time."""
  model = transformers.AutoModel.from_pretrained(folder).eval()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>"
  )
  found = []
  for text in texts:
    inputs = tokenizer(
      [text], truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
      hidden = model(inputs["input_ids"]).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}
    found.append(vector[pooling].numpy())
  return np.array(found)


@pytest.mark.parametrize(
  ("pooling", "normalize"), [("mean", True), ("first", False)]
)
def test_vectors_are_those_of_torch(bert, tmp_path, pooling, normalize):
  folder = make_encoder(bert, tmp_path / "bert", pooling, normalize)
  expected = oracle(folder, TEXTS, 9, pooling)
  if normalize:
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  model = folding.load(folder)
  reports = []
  found = model.encode(TEXTS, batch_size=4, report=reports.append)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert (found.dtype, reports) == (np.float32, [4, 2])


def test_encoder_without_sentence_files_takes_the_mean(bert):
  expected = oracle(bert, TEXTS, checkpoints.P)
  found = folding.load(bert).encode(TEXTS, batch_size=4)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_exports_of_an_encoder_make_its_vectors(bert, tmp_path):
  model = folding.load(make_encoder(bert, tmp_path / "bert"))
  expected = model.encode(TEXTS, batch_size=8)
  export_lib.export_hf(tmp_path / "hf", model)
  export_lib.export(tmp_path / "own", model)
  for name in ("hf", "own"):
    found = folding.load(tmp_path / name).encode(TEXTS, batch_size=8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
  limits = json.loads((tmp_path / "hf/sentence_bert_config.json").read_text())
  assert limits["max_seq_length"] == 9


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_auto_model_of_an_exported_encoder_draws_no_weights(family, tmp_path):
  checkpoints.write(tmp_path / "source", family)
  folding.load(tmp_path / "source").save(tmp_path / "out", "hf")
  theirs, told = transformers.AutoModel.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(told.values())  # such as missing_keys
  with torch.no_grad():
    out = theirs.eval()(input_ids=torch.tensor([[4, 5, 6]]))
  first = out.last_hidden_state[:, 0]
  torch.testing.assert_close(out.pooler_output, torch.tanh(first))


def test_encode_verb_writes_a_row_per_line(bert, tmp_path, capsys):
  (tmp_path / "texts.txt").write_text("a b c\n\nf e\n", encoding="utf-8")
  command = ["encode", str(bert), str(tmp_path / "texts.txt")]
  output = f"--output={tmp_path / 'vectors.npy'}"
  assert cli.main([*command, output]) == 0
  found = np.load(tmp_path / "vectors.npy")
  expected = folding.load(bert).encode(["a b c", "", "f e"])
  np.testing.assert_array_equal(found, expected)
  assert cli.main([*command, output]) == 2  # it is there already
  assert cli.main([*command, f"--output={tmp_path / 'a.txt'}"]) == 2
  (tmp_path / "texts.txt").write_text("\n", encoding="utf-8")
  assert cli.main([*command, f"--output={tmp_path / 'b.npy'}"]) == 2
  assert "no text" in capsys.readouterr().err


def test_encode_refuses_models_without_vectors(tmp_path):
  with pytest.raises(ConfigError, match="language model"):
    models.make("lm").encode(["the cat"])
  with pytest.raises(ConfigError, match="predict"):
    models.make("classify").encode(["the cat"])
  with pytest.raises(ConfigError, match="one text"):
    models.make("embed").encode("the cat")
  checkpoints.write(tmp_path / "gpt2", "gpt2")
  with pytest.raises(ConfigError, match="modules.json"):
    folding.load(tmp_path / "gpt2").encode(["a"])
