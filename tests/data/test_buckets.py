"""Batches of texts of like length, over an epoch and in evaluation."""

import collections

import numpy as np

from folding.data import batches
from tests.data import labelled_rows


def test_classify_epochs_have_each_row_at_most_once(tmp_path):
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
    assert {b for b, _ in shapes} == {8}
    assert {bucket for _, bucket in shapes} == {16, 32, 64, 100}
    # In random order, not one bucket after another.
    assert [s[1] for s in shapes] != sorted(s[1] for s in shapes)
    assert len(numbers) == len(set(numbers)) == num_batches * 8
    missing = set(range(len(rows))) - set(numbers)
    assert len(missing) == 3
    dropped |= missing
    orders.append(numbers)
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert len(dropped) > 3  # not the same rows each epoch


def test_how_many_rows_are_as_long_as_may_be_is_told(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  share = np.mean([len(text) >= 100 for _, text in rows])
  assert batches.make_data(config).full_share(100) == share > 0.1


def test_rare_long_rows_are_trained_on_as_others(tmp_path):
  lengths = [90 if i % 20 == 7 else 9 for i in range(79)]  # 4 long, B of 8
  rows, config = labelled_rows.write(tmp_path, lengths)
  data = batches.make_data(config)
  seen = collections.Counter()
  for step in range(40 * 9):
    seen.update(labelled_rows.check(data, data.train_batch(step), rows))
  # 72 of 79 an epoch: 36.5 of 40 each, with a standard deviation of 1.8.
  assert min(seen[i] for i in range(79)) >= 29


def test_a_row_is_in_its_bucket_or_moved_up_a_remainder(tmp_path):
  rows, config = labelled_rows.write(tmp_path)
  data = batches.make_data(config)
  moved, numbers = collections.Counter(), []
  for step in range(len(rows) // 8):
    batch = data.train_batch(step)
    numbers += labelled_rows.check(data, batch, rows)
    lengths = batch["mask"].sum(axis=1)
    width = batch["tokens"].shape[1]
    below = {16: 0, 32: 16, 64: 32, 100: 64}[width]
    moved[width] += int((lengths <= below).sum())
  assert moved[16] == 0
  assert all(moved[width] < 8 for width in (32, 64, 100))
  sizes = np.array([len(rows[i][1]) for i in numbers])  # less what is left out
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


def test_short_length_is_the_only_bucket(tmp_path):
  _, config = labelled_rows.write(tmp_path, length=9)
  data = batches.make_data(config)
  assert {data.train_batch(i)["tokens"].shape for i in range(9)} == {(8, 9)}
