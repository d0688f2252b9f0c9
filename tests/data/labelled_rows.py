"""Rows of texts and labels, and batches of them checked against the text."""

import numpy as np

from folding import config as c


def write(tmp_path, lengths=None, **fields):
  """Writes texts of the given lengths in bytes; returns rows and a config.

  A text starts with its number, so a row can be told from another.
  """
  if lengths is None:
    lengths = [5 + (i * i * 31) % 120 for i in range(203)]
  rows = [
    (f"{i % 3}", f"{i:04}".ljust(length, "x"))
    for i, length in enumerate(lengths)
  ]
  text = "".join(f"{label}\t{row}\n" for label, row in rows)
  (tmp_path / "train.tsv").write_text(text)
  (tmp_path / "valid.tsv").write_text("".join(text.splitlines(True)[:23]))
  (tmp_path / "test.tsv").write_text("0\tx\n")
  data = {
    "path": str(tmp_path),
    "tokenizer": "bytes",
    "length": 100,
    "batch_size": 8,
    "eval_batch_size": 6,
  }
  return rows, c.resolve(
    c.Config(task="classify", data=c.DataConfig(**(data | fields)))
  )


def check(data, batch, rows):
  """Checks each row of a batch against its text; returns their numbers."""
  numbers = []
  for tokens, mask, label, weight in zip(
    *(batch[k] for k in ("tokens", "mask", "labels", "weights")), strict=True
  ):
    if weight == 0:
      assert not mask.any()
      assert np.all(tokens == data.tokenizer.pad_id)
      continue
    assert weight == 1
    number = int(data.tokenizer.decode(tokens[:4]))
    [ids] = data.tokenizer.encode_batch([rows[number][1][:100]])
    size = len(ids)
    assert mask.tolist() == [True] * size + [False] * (len(mask) - size)
    assert tokens[:size].tolist() == ids.tolist()
    assert np.all(tokens[size:] == data.tokenizer.pad_id)
    assert str(label) == rows[number][0]
    numbers.append(number)
  return numbers
