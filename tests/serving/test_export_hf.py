"""Hugging Face folders: the same predictions in transformers as here."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import folding
from folding import config as c
from folding import paths
from folding.data import trim
from folding.data.tokenizers import load_tokenizer
from folding.errors import ConfigError
from folding.models.attention import rope_frequencies
from folding.models.transformer import require_params
from folding.serving import export as export_lib
from folding.serving import predict
from tests.models import checkpoints
from tests.serving import models

_ENCODER = c.bert(**models.SHAPE, pooler=True)
_CASES = {
  # One layer has fewer neurons than the other, one fewer heads.
  "bert-shrunk": (
    _ENCODER,
    {
      "groups": 2,
      "values": ("diagonal", "dense"),
      "value_rank": (0, 2),
      "embedding_rank": 5,
    },
  ),
  "gpt2": (c.gpt2(**models.SHAPE), {}),
  # One layer has one of the two keys, and its heads.
  "llama-pairs": (
    c.llama(**models.SHAPE | {"width": 32}, num_kv_heads=2),
    {"groups": 4, "rope": "pairs", "values": "dense"},
  ),
  # The layers share one table, and the last has fewer heads.
  "mpnet-heads": (c.bert(**models.SHAPE, pooler=True, relative_buckets=32), {}),
  # Heads of a diagonal W_V read channels that the others do not name.
  "alibi-heads": (
    c.ModelConfig(**models.SHAPE),
    {"groups": 2, "values": "diagonal"},
  ),
  # A diagonal W_V beside shared keys: the dense form repeats the keys.
  "llama-own-keys": (
    c.llama(**models.SHAPE, num_kv_heads=2),
    {"groups": 0, "values": ("dense", "diagonal")},
  ),
}


@pytest.fixture(scope="module")
def make():
  """Returns a function that makes a case, once."""
  made = {}

  def get(name):
    if name not in made:
      made[name] = _model(name)
    return made[name]

  return get


def _model(name):
  shape, options = _CASES[name]
  task = "lm" if shape.causal else "classify"
  model = models.make(task, shape, c.FoldConfig(**options))
  for n in range(2) if "pairs" in name else ():
    # 2 of the 4 pairs of K = 8 channels, others in each key head.
    own = rope_frequencies(8, 10000.0)[np.array([[0, 2], [3, 1]])]
    model.params[f"blocks_{n}"]["attn"]["frequency"] = own
  for n in range(2) if "mpnet" in name else ():
    table = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    model.params[f"blocks_{n}"]["attn"]["relative_bias"] = table
  if "heads" in name:
    model.params["blocks_1"]["attn"]["o"]["kernel"][1:3] = 0
    model = export_lib.shrunk(model)
    assert model.config.model.heads == ((0, 1, 2, 3), (0, 3))
  if "shrunk" in name:
    model = models.with_zeros(model, [])
    model.params["blocks_1"]["attn"]["o"]["kernel"][1] = 0
    model = export_lib.shrunk(model)
    first, second = model.config.model.mlp_width
    assert first == second + 1
    assert model.config.model.heads == ((0, 1, 2, 3), (0, 2, 3))
  elif "pairs" in name:
    model.params["blocks_1"]["attn"]["o"]["kernel"][:2] = 0
    model = export_lib.shrunk(model)
    assert model.config.model.heads == ((0, 1, 2, 3), (2, 3))
  return model


@pytest.mark.parametrize(
  "name", ["bert-shrunk", "llama-pairs", "mpnet-heads", "alibi-heads"]
)
def test_dense_model_computes_the_same(make, name):
  model, text = make(name), "the cats sat on a mat"
  dense = model.dense()
  assert dense.shape.is_dense
  shapes = {n: np.shape(w) for n, w in paths.flatten(dense.params).items()}
  require_params(dense.module, shapes, "the dense model")
  np.testing.assert_allclose(
    models.logits(dense, text), models.logits(model, text), rtol=1e-4, atol=1e-4
  )


def test_heads_of_a_shared_table_stay_in_a_dense_model(make):
  model = make("mpnet-heads")
  tables = [
    model.dense().params[f"blocks_{n}"]["attn"]["relative_bias"]
    for n in range(2)
  ]
  whole = model.params["blocks_0"]["attn"]["relative_bias"]
  np.testing.assert_array_equal(tables, [whole, whole])


def test_dense_model_without_its_shared_keys_is_refused(make):
  with pytest.raises(ConfigError, match="fold.values='dense'"):
    make("llama-own-keys").dense()


@pytest.mark.filterwarnings("ignore")  # those of torch
@pytest.mark.parametrize("name", ["bert-shrunk", "gpt2", "llama-pairs"])
def test_transformers_predicts_the_same_from_text(
  transformers, make, name, tmp_path
):
  import torch

  model = make(name)
  export_lib.export_hf(tmp_path / "out", model)
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
  texts = ["the cats sat on a mat", "a dog [SEP] ran"]  # [SEP] is text here
  batch = tokenizer(texts, return_tensors="pt", padding=True)
  assert set(batch) == {"input_ids", "attention_mask"}
  with torch.no_grad():
    logits = theirs(**batch).logits.numpy()
  for i, text in enumerate(texts):
    expected = models.logits(model, text)
    found = logits[i] if model.labels else logits[i, : len(expected)]
    # float32 on both sides, in another order of operations.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  if model.labels:
    assert list(theirs.config.id2label.values()) == list(model.labels)


@pytest.mark.filterwarnings("ignore")  # those of torch
def test_transformers_scores_the_same_pairs(transformers, tmp_path):
  import torch

  shape = dataclasses.replace(_ENCODER, segments=2)
  model = models.make("regress", shape)
  model = dataclasses.replace(model, pair=("a", "b"))
  export_lib.export_hf(tmp_path / "out", model)
  kind = transformers.AutoModelForSequenceClassification
  theirs = kind.from_pretrained(tmp_path / "out").eval()
  assert (theirs.config.problem_type, theirs.num_labels) == ("regression", 1)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  pairs = [("the cats sat", "a dog"), ("ran", "the old red barn")]
  batch = tokenizer(pairs, return_tensors="pt", padding=True)
  with torch.no_grad():
    scores = theirs(**batch).logits[:, 0].numpy()
  again = folding.load(tmp_path / "out", pairs=True)
  for loaded in (model, again):
    found = [one.label for one in predict.predict(loaded, pairs)]
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)


def test_heads_that_all_layers_lost_are_left_out(transformers, tmp_path):
  model = models.make(
    "lm",
    c.llama(**models.SHAPE | {"width": 32}, num_kv_heads=2),
    c.FoldConfig(groups=0, values="dense"),
  )
  for n, heads in enumerate([slice(0, 2), slice(2, 4)]):
    model.params[f"blocks_{n}"]["attn"]["o"]["kernel"][heads] = 0
  small = export_lib.shrunk(model)
  assert small.config.model.heads == ((2, 3), (0, 1))
  told = []
  export_lib.export_hf(tmp_path / "out", small, report=told.append)
  fields = _fields(tmp_path / "out")
  found = [
    fields[f"num_{kind}"] for kind in ("attention_heads", "key_value_heads")
  ]
  assert (*found, fields["head_dim"]) == (2, 1, 8)
  assert "zeros" not in told[0]
  import torch

  kind = transformers.AutoModelForCausalLM
  theirs = kind.from_pretrained(tmp_path / "out").eval()
  [ids] = small.tokenizer.encode_batch(["the cats sat on a mat"], 40)
  with torch.no_grad():
    logits = theirs(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()
  expected = models.logits(small, "the cats sat on a mat")
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [x for x in _CASES if "heads" not in x])
def test_load_reads_it_back_and_predicts_the_same(make, name, tmp_path):
  model = make(name)
  size = export_lib.export_hf(tmp_path / "out", model)
  files = [f.stat().st_size for f in (tmp_path / "out").iterdir()]
  assert size["files"] == sum(files)
  found = folding.load(tmp_path / "out")
  assert found.labels == model.labels
  assert found.config.task == model.config.task
  assert found.config.model.mlp_width == np.max(model.config.model.mlp_width)
  np.testing.assert_allclose(
    models.logits(found, "the cats sat"),
    models.logits(model, "the cats sat"),
    rtol=1e-5,
    atol=1e-5,
  )


def test_export_hf_in_bfloat16_reports_and_halves_the_size(make, tmp_path):
  model, out = make("bert-shrunk"), tmp_path / "out"
  told = []

  def report(message):
    assert not out.exists()
    told.append(int(message.split()[1].replace(",", "")))

  export_lib.export_hf(out, model, "bfloat16", report=report)
  tensors = safetensors.numpy.load_file(out / "model.safetensors")
  assert {w.dtype for w in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
  [size] = told
  segments = tensors["bert.embeddings.token_type_embeddings.weight"]
  assert size == sum(w.nbytes for w in tensors.values()) - segments.nbytes
  assert _fields(out)["torch_dtype"] == "bfloat16"
  halves = export_lib.cast(model, "bfloat16")
  np.testing.assert_allclose(
    models.logits(folding.load(out), "the cats sat"),
    models.logits(export_lib.cast(halves, "float32"), "the cats sat"),
    rtol=1e-4,
    atol=1e-4,
  )


def test_export_hf_refuses_a_dtype_of_whole_numbers(make, tmp_path):
  with pytest.raises(ConfigError, match="int8 would round"):
    export_lib.export_hf(tmp_path / "out", make("bert-shrunk"), "int8")
  assert not (tmp_path / "out").exists()


def test_load_of_a_name_asks_the_hub(make, tmp_path, monkeypatch):
  model = make("gpt2")
  export_lib.export_hf(tmp_path / "out", model)
  asked = []

  def download(name, **_):
    asked.append(name)
    return str(tmp_path / "out")

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  found = folding.load("org/model")
  assert asked == ["org/model"]
  np.testing.assert_allclose(
    models.logits(found, "the cats sat"),
    models.logits(model, "the cats sat"),
    rtol=1e-5,
    atol=1e-5,
  )


def _same_predictions(*two):
  [ours], [theirs] = (
    predict.predict(m, ["the cat sat on a mat"], batch_size=1) for m in two
  )
  np.testing.assert_allclose(
    theirs.probabilities, ours.probabilities, atol=1e-6
  )


def test_mapped_tokens_get_their_rows_back(tmp_path):
  model = models.make(model=_ENCODER)
  model.params["embed"]["embedding"][[5, 9]] = 0  # cat, mat
  mapped = export_lib.shrunk(model)
  assert mapped.num_rows == 20
  export_lib.export_hf(tmp_path / "out", mapped)
  found = folding.load(tmp_path / "out")
  rows = found.params["embed"]["embedding"]
  np.testing.assert_array_equal(rows, model.params["embed"]["embedding"])
  _same_predictions(mapped, found)


def test_trimmed_tokens_get_no_rows(tmp_path):
  model = models.make(model=_ENCODER)
  keep = ~np.isin(np.arange(21), [5, 9])  # without "cat", "mat"
  params = dict(model.params)
  rows = params["embed"]["embedding"][keep]
  params["embed"] = {"embedding": rows}
  trimmed = dataclasses.replace(
    model, params=params, tokenizer=trim.trimmed(model.tokenizer, keep)
  )
  export_lib.export_hf(tmp_path / "out", trimmed)
  found = folding.load(tmp_path / "out")
  np.testing.assert_array_equal(found.params["embed"]["embedding"], rows)
  assert found.tokenizer.vocab_size == 19
  _same_predictions(trimmed, found)


def _other_angles():
  model = _model("llama-pairs")
  model.params["blocks_1"]["attn"]["frequency"] *= np.float32(1.1)
  return model


@pytest.mark.parametrize(
  ("make_model", "message"),
  [
    (models.make, "no model of transformers computes this one"),
    (_other_angles, "no dense form: blocks_1/attn/frequency"),
  ],
)
def test_export_hf_refuses_a_model_without_a_standard_form(
  make_model, message, tmp_path
):
  with pytest.raises(ConfigError, match=message) as error:
    export_lib.export_hf(tmp_path / "out", make_model())
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def _fields(folder, name="config.json"):
  return json.loads((folder / name).read_text("utf-8"))


def _edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields))


def test_causal_classifier_sees_the_end_of_its_texts(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  checkpoints.write(source, "llama", "classify")
  loaded = folding.load(source)
  # transformers would ignore the end of a text if it were the pad token.
  _edit(source / "config.json", pad_token_id=2)
  with pytest.raises(ConfigError, match="ends each text .*add_eos_token"):
    folding.load(source)
  # Without "<pad>", "</s>" pads.
  words = ["<none>", *checkpoints.WORDS[1:]]
  path = checkpoints.write_tokenizer(tmp_path / "tokenizer.json", words)
  tokenizer = load_tokenizer(path)
  assert tokenizer.pad_id == tokenizer.end_id == 2
  export_lib.export_hf(out, dataclasses.replace(loaded, tokenizer=tokenizer))
  values = _fields(out)
  assert (values["pad_token_id"], values["eos_token_id"]) == (1, 2)
  assert _fields(out, "tokenizer_config.json")["pad_token"] == "<s>"
  folding.load(out)


def test_decoder_without_begin_generates_from_an_end(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  checkpoints.write(source, "gpt2", "lm")
  _edit(source / "tokenizer.json", post_processor=None)
  export_lib.export_hf(out, folding.load(source))
  values = _fields(out)
  assert (values["bos_token_id"], values["eos_token_id"]) == (2, 2)


def test_load_refuses_more_tokens_than_embeddings(tmp_path):
  checkpoints.write(tmp_path / "out", "llama", "lm")
  words = [*checkpoints.WORDS, *(f"w{i}" for i in range(30))]
  checkpoints.write_tokenizer(tmp_path / "out" / "tokenizer.json", words)
  with pytest.raises(ConfigError, match="ids go up to 39, .* 30 embeddings"):
    folding.load(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_chat_is_written_as_before_the_export(transformers, tmp_path):
  source, kept, out = (tmp_path / name for name in ("source", "kept", "out"))
  checkpoints.write(source, "llama", "lm")
  words = [*checkpoints.WORDS, "<|im_start|>"]
  path = checkpoints.write_tokenizer(source / "tokenizer.json", words)
  inner = tokenizers.Tokenizer.from_file(str(path))
  inner.add_special_tokens(["<|im_start|>"])
  inner.save(str(path))
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}"
    "{% endfor %}",
  }
  (source / "tokenizer_config.json").write_text(json.dumps(options))
  _edit(source / "config.json", eos_token_id=[2, 3])
  # Through an export, which has no tokenizer_config.json.
  loaded = folding.load(source)
  export_lib.export(kept, loaded)
  export_lib.export_hf(out, folding.load(kept))
  chat = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
  before, after = (
    transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
      chat, return_dict=False
    )
    for folder in (source, out)
  )
  assert before.count(words.index("<|im_start|>")) == 2
  assert after == before
  assert _fields(out)["eos_token_id"] == [2, 3]
