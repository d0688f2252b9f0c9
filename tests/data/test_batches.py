import collections
import dataclasses
import itertools

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, normalizers, pre_tokenizers

from folding import config as c
from folding.data import batches, tokenizers
from folding.schema import ConfigError
from tests.data import labelled_rows

DOCS = [f"document {i} " + "ab é " * (i * 7 % 23) for i in range(50)]
B, L = 4, 20


def _lm(tmp_path, docs=tuple(DOCS), **fields):
  """Returns a config of byte tokens over the documents, valid = test = 7."""
  for split, texts in (("train", docs), ("valid", docs[:7]), ("test", ())):
    rows = "".join(f"0\t{text}\n" for text in texts)
    (tmp_path / f"{split}.tsv").write_text(rows or "0\tx\n", encoding="utf-8")
  data = {
    "path": str(tmp_path),
    "tokenizer": "bytes",
    "length": L,
    "batch_size": B,
    "eval_batch_size": 6,
  }
  return c.resolve(c.Config(task="lm", data=c.DataConfig(**(data | fields))))


def _stream(tokenizer, docs):
  """The stream by the book: an end token before, between and after."""
  stream = [tokenizer.end_id]
  for doc in docs:
    [ids] = tokenizer.encode_batch([doc])
    stream += ids.tolist()
    stream.append(tokenizer.end_id)
  return stream


def _rows(batch):
  pairs = (batch["tokens"].tolist(), batch["targets"].tolist())
  return list(zip(*pairs, strict=True))


def _equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name])


def test_lm_evaluation_predicts_each_token_of_the_stream_once(tmp_path):
  data = batches.make_data(_lm(tmp_path))
  stream = _stream(data.tokenizer, DOCS[:7])
  tokens, targets = [], []
  for batch in data.eval_batches("valid"):
    assert batch["tokens"].shape == batch["targets"].shape == (6, L)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    scored = batch["weights"] == 1
    assert np.all(batch["weights"][~scored] == 0)
    assert np.all(batch["targets"][~scored] == data.tokenizer.pad_id)
    tokens += batch["tokens"][scored].tolist()
    targets += batch["targets"][scored].tolist()
  assert tokens == stream[:-1]
  assert targets == stream[1:]
  assert data.num_examples["valid"] == -(-(len(stream) - 1) // L)


def test_num_bytes_is_the_text_behind_the_scored_targets(tmp_path):
  data = batches.make_data(_lm(tmp_path))
  # One token a byte, so every scored target but an end token is a byte.
  num_targets = num_ends = 0
  for batch in data.eval_batches("valid"):
    scored = batch["targets"][batch["weights"] == 1]
    num_targets += scored.size
    num_ends += int((scored == data.tokenizer.end_id).sum())
  assert num_ends == 7
  assert data.num_bytes["valid"] == num_targets - num_ends
  assert data.num_bytes["valid"] == sum(len(d.encode()) for d in DOCS[:7])


def test_lm_epoch_has_each_whole_window_once(tmp_path):
  data = batches.make_data(_lm(tmp_path))
  stream = _stream(data.tokenizer, DOCS)
  size = data.num_examples["train"]
  assert size == (len(stream) - 1) // L
  windows = [
    (stream[i * L : i * L + L], stream[i * L + 1 : i * L + L + 1])
    for i in range(size)
  ]
  steps = (data.train_batch(i) for i in itertools.count())
  rows = itertools.chain.from_iterable(_rows(batch) for batch in steps)
  epochs = [list(itertools.islice(rows, size)) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(windows)
  assert epochs[0] != windows  # shuffled
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_lm_training_rows_are_all_scored(tmp_path):
  data = batches.make_data(_lm(tmp_path))
  for step in range(40):
    batch = data.train_batch(step)
    assert batch["tokens"].shape == (B, L)
    assert np.all(batch["weights"] == 1)


def _word_tokenizer(size, normalizer=None):
  words = {f"w{i}": i for i in range(size)}
  inner = hf.Tokenizer(models.WordLevel(words, unk_token="w0"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  if normalizer is not None:
    inner.normalizer = normalizer
  return tokenizers.Tokenizer(inner)


@pytest.mark.parametrize("size", [300, 70_001])
def test_the_largest_id_of_a_vocabulary_survives(tmp_path, size):
  config = _lm(tmp_path, docs=[f"w{size - 1} w7 " * 100])
  data = batches.make_data(config, _word_tokenizer(size))
  counts = collections.Counter(data.train_batch(0)["targets"].ravel().tolist())
  assert counts == {size - 1: B * L / 2, 7: B * L / 2}


def test_a_text_without_tokens_still_gives_the_model_one(tmp_path):
  _, config = labelled_rows.write(tmp_path)
  (tmp_path / "valid.tsv").write_text("0\tqq\n1\tw5\n")
  foreign = _word_tokenizer(9, normalizers.Replace("q", ""))
  data = batches.make_data(config, foreign)
  [batch] = data.eval_batches("valid")
  assert batch["mask"].sum(axis=1).tolist() == [1, 1, 0, 0, 0, 0]
  assert batch["tokens"][:2, 0].tolist() == [foreign.end_id, 5]


def test_the_first_epoch_is_whole_wherever_a_run_begins(tmp_path):
  lengths = [5 + i for i in range(43)]
  rows, config = labelled_rows.write(tmp_path, lengths, first_batch=3)
  data = batches.make_data(config)
  numbers = []
  for batch in data.first_epoch():
    numbers += labelled_rows.check(data, batch, rows)
  assert len(numbers) == len(set(numbers)) == 40


def test_tokens_are_counted_in_all_the_text_of_training(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  data = batches.make_data(config)
  cut = [ids for _, text in rows for ids in data.tokenizer.encode_batch([text])]
  expected = collections.Counter(i for ids in cut for i in ids[:100].tolist())
  found = {i: n for i, n in enumerate(data.token_counts().tolist()) if n}
  assert (found, len(data.token_counts())) == (expected, 258)
  lm = batches.make_data(_lm(tmp_path))
  stream = collections.Counter(_stream(lm.tokenizer, DOCS))
  assert {i: n for i, n in enumerate(lm.token_counts().tolist()) if n} == stream


@pytest.fixture(params=["lm", "classify"])
def config(request, tmp_path):
  if request.param == "lm":
    return _lm(tmp_path, batch_size=8)
  return labelled_rows.write(tmp_path)[1]


def test_a_batch_is_a_function_of_config_seed_and_step(config):
  one, other = batches.make_data(config), batches.make_data(config)
  for step in (40, 0, 7):  # in any order
    _equal(one.train_batch(step), other.train_batch(step))
  reseeded = batches.make_data(dataclasses.replace(config, seed=1))
  differs = [
    not np.array_equal(
      one.train_batch(i)["tokens"], reseeded.train_batch(i)["tokens"]
    )
    for i in range(8)
  ]
  assert all(differs)


@pytest.mark.parametrize("ahead", [0, 3])
def test_prefetching_starts_anywhere_and_changes_nothing(config, ahead):
  fresh = batches.make_data(config)
  config.data.prefetch_batches = ahead
  config.data.first_batch = 9  # of a run that goes on from another's step 9
  stream = batches.make_data(config).train_batches(first_step=12)
  for step in range(21, 60):
    _equal(next(stream), fresh.train_batch(step))


def test_processes_share_each_batch_by_rows(config):
  config.data.eval_batch_size = 12
  whole = batches.make_data(config)
  parts = [batches.make_data(config, None, p, 4) for p in range(4)]
  for step in range(30):
    expected = whole.train_batch(step)
    shares = [part.train_batch(step) for part in parts]
    for name, array in expected.items():
      for p, share in enumerate(shares):
        np.testing.assert_array_equal(share[name], array[p::4])
  evaluations = zip(
    whole.eval_batches("valid"),
    *(part.eval_batches("valid") for part in parts),
    strict=True,
  )
  for expected, *shares in evaluations:
    for name, array in expected.items():
      for p, share in enumerate(shares):
        np.testing.assert_array_equal(share[name], array[p::4])


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_processes_that_cannot_share_evenly_are_an_error(config, field):
  config.data.batch_size = config.data.eval_batch_size = 8
  setattr(config.data, field, 10)
  with pytest.raises(ConfigError, match=f"data.{field} 10 .* 4 processes"):
    batches.make_data(config, process_count=4)


def test_train_split_smaller_than_a_batch_is_an_error(config):
  config.data.batch_size = 5000
  match = r"train split has \d+ .*one batch of 5000; lower data.batch_size"
  with pytest.raises(ConfigError, match=match):
    batches.make_data(config)


def test_evaluating_an_empty_split_is_an_error(config, tmp_path):
  (tmp_path / "test.tsv").unlink()
  config.data.test_fraction = 0.0
  data = batches.make_data(config)
  assert data.num_examples["test"] == 0
  with pytest.raises(ConfigError, match="no test split; set data.test_frac"):
    next(data.eval_batches("test"))


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
  config = _lm(tmp_path, tokenizer="bpe", vocab_size=300)
  given = tokenizers.train_tokenizer(config.data, ["other text " * 9])
  data = batches.make_data(config, given)
  assert data.tokenizer is given
  trained = batches.make_data(config).tokenizer
  [one], [two] = (t.encode_batch(["document"]) for t in (given, trained))
  assert one.tolist() != two.tolist()  # else the test could not tell


def test_python_stdlib_end_to_end(stdlib_dir):
  data_config = c.DataConfig(dir=stdlib_dir, max_bytes=400_000)
  config = c.resolve(c.Config(data=data_config))
  data = batches.make_data(config)
  batch = data.train_batch(0)
  assert batch["tokens"].shape == (32, 128)
  assert batch["tokens"].max() < data.tokenizer.vocab_size == 1024
  num_targets = sum(b["weights"].sum() for b in data.eval_batches("valid"))
  # Source code at this vocabulary: between 2 and 3.5 bytes a token.
  assert 2 < data.num_bytes["valid"] / num_targets < 3.5
