"""A model made smaller reads as much as its checkpoint, not as its run."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as kinds

import folding
from configs import embed as embed_config
from configs import pretrained as pretrained_config
from folding import config as c
from folding.data.batches import make_data
from folding.models import sentence
from folding.serving.generate import Generator
from folding.training import loop
from folding.typed import edited
from tests.models import checkpoints
from tests.serving import models

pytestmark = pytest.mark.slow  # they train whole runs

_READS, _TRAINED = 40, 8  # tokens
_EDITS = {
  "data.length": _TRAINED,
  "data.batch_size": 8,
  "data.eval_batch_size": 8,
  "compress.plan": "same",
  "compress.prune": "none",
  "compress.calibration": 32,
  "compress.fit_steps": 2,
  "fpp.attention": "output",
  "fpp.granularity": "weight",
  "fpp.embedding_granularity": "weight",
  "fpp.checks": 1,
  "distill.hidden": 0.0,
  "train.steps": 1,
  "train.eval_every": 1,
  "train.tensorboard": False,
}


def _bytes():
  """Returns the tokenizer.json of a BPE that llama.cpp has."""
  inner = tokenizers.Tokenizer(kinds.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=270,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  inner.train_from_iterator(models.random_texts(20), trainer)
  return inner.to_str()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  """Returns a folder with a Llama, texts, and a run from both."""
  folder = tmp_path_factory.mktemp("decoder")
  dense = models.make(
    "lm",
    c.llama(**models.SHAPE | {"num_layers": 1}, num_kv_heads=2),
    c.FoldConfig(groups=0, values="dense"),
    length=_READS,
    tokenizer_json=_bytes(),
  )
  dense.save(folder / "dense", "hf")
  (folder / "texts.txt").write_text("\n\n".join(models.random_texts(80)))
  config = pretrained_config.get_config(f"{folder / 'dense'},0.2")
  path = {"data.path": str(folder / "texts.txt")}
  loop.run(edited(config, _EDITS | path), str(folder / "run"))
  return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """Returns a folder with a BERT, texts, and a run from both."""
  folder = tmp_path_factory.mktemp("encoder")
  sizes = {"max_position_embeddings": 50, "num_hidden_layers": 1}
  checkpoints.write(folder / "bert", "bert", **sizes)
  sentence.write(folder / "bert", c.ModelConfig(pooling="mean"), _READS)
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice([*"abcdef"], 9)) for _ in range(200)]
  (folder / "texts.txt").write_text("\n".join(lines))
  config = embed_config.get_config(f"{folder / 'bert'},0.2")
  more = {"data.path": str(folder / "texts.txt"), "data.valid_fraction": 0.1}
  config = edited(config, _EDITS | more | {"data.test_fraction": 0.1})
  loop.run(config, str(folder / "run"))
  return folder


def test_decoder_generates_past_its_training_texts_as_transformers(
  decoder, transformers, tmp_path
):
  import torch

  model = folding.load(decoder / "run")
  model.save(tmp_path / "hf", "hf")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  assert theirs.config.max_position_embeddings == _READS
  options = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
  assert options["model_max_length"] == _READS
  [ids] = model.tokenizer.encode_batch(["the cat sat on a mat"])
  count = _READS - ids.size
  assert count > 2 * _TRAINED
  [new] = Generator(model.module)(model.params, [ids], max_new_tokens=count)
  found = theirs.generate(
    torch.tensor(ids[None]),
    attention_mask=torch.ones(1, ids.size),
    do_sample=False,
    min_new_tokens=count,
    max_new_tokens=count,
    pad_token_id=0,
    eos_token_id=None,
  )
  assert new.tolist() == found[0, ids.size :].tolist()


def test_gguf_has_the_context_of_the_checkpoint(decoder, tmp_path):
  gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
  folding.load(decoder / "run").save(tmp_path / "model.gguf", "gguf")
  fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
  assert fields["llama.context_length"].contents() == _READS


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_encoder_reads_as_much_as_its_checkpoint(encoder, format, tmp_path):
  model = folding.load(encoder / "run")
  model.save(tmp_path / "out", format)
  card = (tmp_path / "out" / "README.md").read_text()
  assert f"at most {_READS} tokens" in card
  assert f"at most {_TRAINED} tokens" in card
  again = folding.load(tmp_path / "out")
  dense = folding.load(encoder / "bert")
  lengths = {x.shape.max_length for x in (model, again, dense)}
  assert lengths == {_READS}
  texts = ["a b c d e f " * 5, "a b c d e f " * 20, "a b"]
  found = model.encode(texts)
  np.testing.assert_allclose(again.encode(texts), found, atol=1e-5)
  cut = np.abs(model.reading(_TRAINED).encode(texts) - found).max(axis=1)
  assert (cut > 1e-3).tolist() == [True, True, False]


def test_long_text_has_its_vector_in_transformers(
  encoder, transformers, tmp_path
):
  import torch

  model = folding.load(encoder / "run")
  model.save(tmp_path / "hf", "hf")
  limits = json.loads((tmp_path / "hf/sentence_bert_config.json").read_text())
  assert limits["max_seq_length"] == _READS
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  for text in ("a b c d e f " * 5, "a b c d e f " * 20):
    inputs = tokenizer([text], truncation=True, return_tensors="pt")
    with torch.no_grad():
      hidden = theirs(inputs["input_ids"]).last_hidden_state[0]
    [found] = model.encode([text])
    np.testing.assert_allclose(found, hidden.mean(0).numpy(), atol=1e-5)


def test_run_in_memory_keeps_the_length_of_its_model(decoder, tmp_path):
  dense = folding.load(decoder / "dense")
  train = c.TrainConfig(steps=1, eval_every=1, tensorboard=False)
  path = str(decoder / "texts.txt")
  data = c.DataConfig(path=path, length=_TRAINED, batch_size=8)
  order = c.Config(task="lm", data=data, preset="none", train=train)
  made = make_data(c.resolve(order), dense.tokenizer)
  loop.train(dense, made, order, str(tmp_path / "run"))
  assert folding.load(tmp_path / "run").shape.max_length == _READS
  config = pretrained_config.get_config(str(tmp_path / "run"))
  assert c.resolve(config).model.max_length == _READS
