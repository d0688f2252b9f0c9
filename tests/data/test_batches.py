import collections
import dataclasses
import itertools

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, normalizers, pre_tokenizers

from folding import config as c
from folding.data import batches, tokenizers
from folding.errors import ConfigError
from folding.typed import edited
from tests.data import labelled_rows, text_files

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
  """Returns the ids with an end token before, between and after."""
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


def test_lm_evaluation_scores_each_token_of_the_stream_once(tmp_path):
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
  docs = (*DOCS, "x" * 10)
  data = batches.make_data(_lm(tmp_path, docs))
  stream = _stream(data.tokenizer, docs)
  assert len(stream) % L == 0  # so the last window lacks one target
  size = data.num_examples["train"]
  assert size == (len(stream) - 1) // L
  windows = [
    (stream[i * L : i * L + L], stream[i * L + 1 : i * L + L + 1])
    for i in range(size)
  ]
  steps = (data.train_batch(i) for i in itertools.count())
  rows = itertools.chain.from_iterable(_rows(batch) for batch in steps)
  assert np.all(data.train_batch(0)["weights"] == 1)
  epochs = [list(itertools.islice(rows, size)) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(windows)
  assert epochs[0] != windows  # shuffled
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def _word_tokenizer(size, normalizer=None):
  words = {f"w{i}": i for i in range(size)}
  inner = hf.Tokenizer(models.WordLevel(words, unk_token="w0"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  if normalizer is not None:
    inner.normalizer = normalizer
  return tokenizers.Tokenizer(inner)


@pytest.mark.parametrize("size", [300, 70_001])
def test_windows_keep_the_largest_id(tmp_path, size):
  config = _lm(tmp_path, docs=[f"w{size - 1} w7 " * 100])
  data = batches.make_data(config, _word_tokenizer(size))
  counts = collections.Counter(data.train_batch(0)["targets"].ravel().tolist())
  assert counts == {size - 1: B * L / 2, 7: B * L / 2}


def test_a_text_without_tokens_has_an_end_token(tmp_path):
  _, config = labelled_rows.write(tmp_path)
  (tmp_path / "valid.tsv").write_text("0\tqq\n1\tw5\n")
  foreign = _word_tokenizer(9, normalizers.Replace("q", ""))
  data = batches.make_data(config, foreign)
  [batch] = data.eval_batches("valid")
  assert batch["mask"].sum(axis=1).tolist() == [1, 1, 0, 0, 0, 0]
  assert batch["tokens"][:2, 0].tolist() == [foreign.end_id, 5]


def test_first_epoch_ignores_first_batch(tmp_path):
  lengths = [5 + i for i in range(43)]
  rows, config = labelled_rows.write(tmp_path, lengths, first_batch=3)
  data = batches.make_data(config)
  numbers = []
  for batch in data.first_epoch():
    numbers += labelled_rows.check(data, batch, rows)
  assert len(numbers) == len(set(numbers)) == 40


def test_token_counts_are_those_of_the_training_split(tmp_path):
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
  size = one.num_examples["train"]
  if config.task == "classify":  # without the rows that are left out
    size = size // 8 * 8

  def rows(data):
    steps = range(2 * size // 8 + 1)
    return [
      row for step in steps for row in data.train_batch(step)["tokens"].tolist()
    ]

  # Runs of neighbouring seeds share no epoch.
  assert rows(one)[:size] != rows(reseeded)[:size]
  assert rows(one)[size : 2 * size] != rows(reseeded)[:size]


def test_prefetching_from_a_step_changes_no_batch(config):
  fresh = batches.make_data(config)
  # Of a run that goes on from another's step 9.
  config = edited(config, {"data.first_batch": 9})
  stream = batches.make_data(config).train_batches(first_step=12)
  for step in range(21, 60):
    _equal(next(stream), fresh.train_batch(step))


def test_processes_share_each_batch_by_rows(config):
  config = edited(config, {"data.eval_batch_size": 12})
  whole = batches.make_data(config)
  parts = [batches.make_data(config, None, p, 4) for p in range(4)]
  for step in range(30):
    expected = whole.train_batch(step)
    shares = [part.train_batch(step) for part in parts]
    for name, array in expected.items():
      for p, share in enumerate(shares):
        np.testing.assert_array_equal(share[name], array[p::4])
  epochs = [each.first_epoch() for each in (whole, *parts)]
  for expected, *same in zip(*epochs, strict=True):
    for batch in same:  # calibration text, which all read
      _equal(batch, expected)
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
def test_a_batch_that_does_not_divide_is_refused(config, field):
  config = edited(config, {"data.batch_size": 8, "data.eval_batch_size": 8})
  config = edited(config, {f"data.{field}": 10})
  with pytest.raises(ConfigError, match=f"data.{field} 10 "):
    batches.make_data(config, process_count=4)


def test_a_train_split_below_one_batch_is_refused(tmp_path):
  _, config = labelled_rows.write(tmp_path, batch_size=5000)
  with pytest.raises(
    ConfigError, match="has 203 texts, .* lower data.batch_size"
  ):
    batches.make_data(config)
  config = _lm(tmp_path, length=5000)
  with pytest.raises(ConfigError, match="has 0 windows of 5000 .* data.length"):
    batches.make_data(config)


def test_evaluating_an_empty_split_is_refused(config, tmp_path):
  (tmp_path / "test.tsv").unlink()
  config = edited(config, {"data.test_fraction": 0.0})
  data = batches.make_data(config)
  assert data.num_examples["test"] == 0
  with pytest.raises(ConfigError, match="no test split"):
    next(data.eval_batches("test"))


def test_a_given_tokenizer_is_not_trained(tmp_path):
  config = _lm(tmp_path, tokenizer="bpe", vocab_size=300)
  given = tokenizers.train_tokenizer(config.data, ["other text " * 9])
  data = batches.make_data(config, given)
  assert data.tokenizer is given
  trained = batches.make_data(config).tokenizer
  [one], [two] = (t.encode_batch(["document"]) for t in (given, trained))
  assert one.tolist() != two.tolist()  # the test can tell them apart


def test_rows_of_an_epoch_are_distinct_and_in_random_order(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  data = batches.make_data(config)
  assert (data.num_classes, data.label_names) == (3, ("0", "1", "2"))
  num_batches = len(rows) // 8
  orders, dropped = [], set()
  for epoch in range(3):
    numbers, shapes = [], []
    for step in range(epoch * num_batches, (epoch + 1) * num_batches):
      batch = data.train_batch(step)
      shapes.append(batch["tokens"].shape)
      numbers += labelled_rows.check(data, batch, rows)
    assert set(shapes) == {(8, bucket) for bucket in (16, 32, 64, 100)}
    assert shapes != sorted(shapes)
    assert len(numbers) == len(set(numbers)) == num_batches * 8
    dropped |= set(range(len(rows))) - set(numbers)
    orders.append(numbers)
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert len(dropped) > 3  # 3 per epoch, not always the same


def test_full_share_counts_rows_of_at_least_a_length(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  share = np.mean([len(text) >= 100 for _, text in rows])
  assert batches.make_data(config).full_share(100) == share > 0.1


def test_rare_long_rows_are_trained_as_often_as_others(tmp_path):
  lengths = [90 if i % 20 == 7 else 9 for i in range(79)]  # 4 long, B of 8
  rows, config = labelled_rows.write(tmp_path, lengths)
  data = batches.make_data(config)
  seen = collections.Counter()
  for step in range(40 * 9):
    seen.update(labelled_rows.check(data, data.train_batch(step), rows))
  # 72 of 79 per epoch: 36.5 of 40 each, with a standard deviation of 1.8.
  assert min(seen[i] for i in range(79)) >= 29


def test_a_row_is_in_its_bucket_or_moved_up_a_remainder(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  data = batches.make_data(config)
  moved, numbers = collections.Counter(), []
  for step in range(len(rows) // 8):
    batch = data.train_batch(step)
    numbers += labelled_rows.check(data, batch, rows)
    width = batch["tokens"].shape[1]
    below = {16: 0, 32: 16, 64: 32, 100: 64}[width]
    moved[width] += int((batch["mask"].sum(axis=1) <= below).sum())
  assert moved[16] == 0
  assert all(moved[width] < 8 for width in (32, 64, 100))
  sizes = np.array([len(rows[i][1]) for i in numbers])
  assert moved[32] == (sizes <= 16).sum() % 8


def test_classify_evaluation_has_all_rows_in_order(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  data = batches.make_data(config)
  numbers, weights = [], []
  for batch in data.eval_batches("valid"):
    longest = batch["mask"].sum(axis=1).max()
    width = min(w for w in (16, 32, 64, 100) if w >= longest)
    assert batch["tokens"].shape == batch["mask"].shape == (6, width)
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
    assert batch["mask"].dtype == bool
    numbers += labelled_rows.check(data, batch, rows)
    weights += batch["weights"].tolist()
  assert numbers == list(range(23))
  assert weights == [1.0] * 23 + [0.0]  # 4 batches of 6
  assert data.num_examples["valid"] == 23


def test_a_short_length_is_the_only_bucket(tmp_path):
  _, config = labelled_rows.write(tmp_path, length=9)
  data = batches.make_data(config)
  assert {data.train_batch(i)["tokens"].shape for i in range(9)} == {(8, 9)}


ROWS = {
  "train__tsv": "0\ta b\n1\tc\n",
  "valid__tsv": "0\td\n1\te\n",
  "test__tsv": "1\tf\n0\tg\n",
}


def _digest(folder, **rows):
  folder.mkdir()
  data = dataclasses.replace(
    text_files.write(folder, **(ROWS | rows)), tokenizer="bytes", batch_size=2
  )
  config = c.Config(task="classify", data=data)
  return batches.make_data(c.resolve(config)).digest


def test_digest_is_of_text_splits_and_labels(tmp_path):
  digests = [
    _digest(tmp_path / str(i), **rows)
    for i, rows in enumerate(
      (
        {"train__tsv": "0\ta b\n1\tC\n"},
        {"train__tsv": "1\ta b\n0\tc\n"},
        {"train__tsv": "0\ta \n1\tbc\n"},  # where a text ends
        {"test__tsv": "1\tg\n0\tg\n"},
        {"valid__tsv": "1\td\n0\te\n"},
        {"valid__tsv": "1\tf\n0\tg\n", "test__tsv": "0\td\n1\te\n"},
        {},
      )
    )
  ]
  assert len(set(digests)) == 7
  assert _digest(tmp_path / "elsewhere") == digests[-1]


def test_batches_have_room_for_a_teacher_that_needs_more_tokens(tmp_path):
  # A tokenizer of bytes makes more tokens than words do.
  theirs = tokenizers.train_tokenizer(c.DataConfig(tokenizer="bytes"), [])
  (tmp_path / "teacher").mkdir()
  theirs.save(str(tmp_path / "teacher" / "tokenizer.json"))
  lines = [f"the cat sat on mat {i % 10}" for i in range(40)]
  text = tmp_path / "texts.txt"
  text.write_text("\n".join(lines), encoding="utf-8")
  data = c.DataConfig(path=str(text), vocab_size=300, length=64, batch_size=B)
  distill = c.DistillConfig(teacher=str(tmp_path / "teacher"))
  order = c.Order(task="embed", data=data, distill=distill)
  batch = batches.make_data(order).train_batch(0)
  assert batch["mask"].sum(1).max() < 16 < batch["teacher_mask"].sum(1).min()
  for ids, mask in zip(
    batch["teacher_tokens"], batch["teacher_mask"], strict=True
  ):
    assert theirs.decode(ids[mask]) in lines


def test_teacher_reads_tokens_that_share_a_row_apart(tmp_path):
  plain = tokenizers.train_tokenizer(c.DataConfig(tokenizer="bytes"), [])
  plain.save(str(tmp_path / "tokenizer.json"))
  token_map = np.arange(plain.vocab_size)
  [[a, b]] = plain.encode_batch(["ab"])
  token_map[b] = a
  token_map[token_map > b] -= 1
  lines = [f"ab{i}" for i in range(40)]
  text = tmp_path / "texts.txt"
  text.write_text("\n".join(lines), encoding="utf-8")
  data = c.DataConfig(
    path=str(text),
    tokenizer=str(tmp_path / "tokenizer.json"),
    length=8,
    batch_size=B,
  )
  order = c.Order(task="embed", data=data)
  tokenizer = tokenizers.MappedTokenizer(plain, token_map)
  batch = batches.make_data(order, tokenizer).train_batch(0)
  for ids, mask in zip(
    batch["teacher_tokens"], batch["teacher_mask"], strict=True
  ):
    assert plain.decode(ids[mask]) in lines
