"""Large text, read in slices, against the same text in memory."""

import csv
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from folding import config as c
from folding.data import batches, corpus, pieces, sources
from folding.errors import ConfigError

LINES = [f"line {i} " + "é ñ 漢字 🙂 word " * (i * 7 % 5) for i in range(60)]
TEXT = "\n".join(LINES) + "\n\n\nthe end without a line end"
ROWS = [*LINES, LINES[3], "", "two\nlines", LINES[3]]


def _config(path, **fields):
  data = {
    "path": str(path),
    "vocab_size": 300,
    "length": 8,
    "batch_size": 2,
  } | fields
  return c.resolve(c.Config(task="lm", data=c.DataConfig(**data)))


def _jsonl(path, rows):
  path.write_text("".join(json.dumps({"text": x}) + "\n" for x in rows))


def _table(texts, labels):
  """Returns a table with classes as Hugging Face stores them."""
  label = {"_type": "ClassLabel", "names": ["bad", "good"]}
  features = {"label": label, "text": {"_type": "Value"}}
  info = json.dumps({"info": {"features": features}})
  table = pa.table({"text": texts, "label": labels})
  return table.replace_schema_metadata({"huggingface": info})


def _txt(folder):
  (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
  return folder / "a.txt"


def _one_line(folder):
  (folder / "a.txt").write_text("🙂" * 250, encoding="utf-8")
  return folder / "a.txt"


def _rows(folder):
  rows = [x for x in ROWS if x]
  _jsonl(folder / "a.jsonl", rows)
  return folder / "a.jsonl"


def _twice(folder):
  _jsonl(folder / "a.jsonl", LINES[:10] * 2)
  return folder / "a.jsonl"


def _long_characters(folder):
  _jsonl(folder / "a.jsonl", [f"{'🙂' * 9}{i}" for i in range(60)])
  return folder / "a.jsonl"


def _csv(folder):
  with open(folder / "a.csv", "w", encoding="utf-8", newline="") as file:
    csv.writer(file).writerows([["text"], *([x] for x in ROWS if x)])
  return folder / "a.csv"


def _split_files(folder):
  _jsonl(folder / "train.jsonl", LINES)
  (folder / "valid.txt").write_text(TEXT, encoding="utf-8")
  return folder


def _shards(folder):
  for n in range(2):
    path = folder / f"train-0000{n}-of-00002.parquet"
    parquet.write_table(_table(LINES[n::2], [-1] * 30), path)
  parquet.write_table(_table(LINES[:9], [0] * 9), folder / "test.parquet")
  return folder


SOURCES = {
  "txt": (_txt, {}),
  "txt_bytes": (
    _txt,
    {"tokenizer": "bytes", "max_bytes": 740},
  ),  # a block of two lines
  "one_line": (  # cut before the last byte of a character
    _one_line,
    {"tokenizer": "bytes", "max_bytes": 303, "valid_fraction": 0.25},
  ),
  "jsonl": (_rows, {}),
  "jsonl_limited": (_rows, {"max_bytes": 1001, "test_fraction": 0.3}),
  # One row is to be set aside: two equal ones are as near to it as none.
  "jsonl_twice": (_twice, {"tokenizer": "bytes", "valid_fraction": 0.05}),
  # Two bytes for valid and test hold no character.
  "no_documents": (_long_characters, {"tokenizer": "bytes", "max_bytes": 17}),
  "csv": (_csv, {"tokenizer": "bytes"}),
  "split_files": (_split_files, {}),
  "shards": (_shards, {}),
}


@pytest.fixture
def small(monkeypatch):
  """Everything is large, slices and pieces are short."""
  monkeypatch.setattr(pieces, "_PIECE", 64)
  monkeypatch.setattr(pieces, "_TRAINING_PIECE", 64)
  monkeypatch.setattr(pieces, "_GROUP", 256)
  monkeypatch.setattr(corpus, "_BLOCK", 37)
  monkeypatch.setattr(corpus, "LARGE", 0)


@pytest.mark.parametrize(
  ("write", "fields"), SOURCES.values(), ids=list(SOURCES)
)
def test_tokens_are_those_of_the_text_in_memory(
  small, monkeypatch, write, fields, tmp_path
):
  config = _config(write(tmp_path), **fields)
  found = [batches.make_data(config) for _ in range(2)]  # written, then read
  monkeypatch.setattr(corpus, "LARGE", 1 << 40)
  expected = batches.make_data(config)
  for data in found:
    assert data.tokenizer.to_json() == expected.tokenizer.to_json()
    assert data.digest == expected.digest
    assert data.num_bytes == expected.num_bytes
    assert data.num_examples == expected.num_examples
    for split, stream in expected.examples._streams.items():
      ours = data.examples._streams[split]
      assert ours.dtype == stream.dtype
      np.testing.assert_array_equal(ours, stream)
    for step in range(3):
      for name, array in expected.train_batch(step).items():
        np.testing.assert_array_equal(data.train_batch(step)[name], array)
  assert isinstance(found[1].examples._streams["train"], np.memmap)


def test_table_of_one_row_is_cut_as_in_memory(small, monkeypatch, tmp_path):
  _jsonl(tmp_path / "a.jsonl", [TEXT])
  config = _config(tmp_path / "a.jsonl", tokenizer="bytes")
  found = batches.make_data(config)
  monkeypatch.setattr(corpus, "LARGE", 1 << 40)
  assert found.num_bytes == batches.make_data(config).num_bytes
  assert all(found.num_bytes.values())


def test_text_without_a_safe_end_is_cut_at_a_line_end(small, monkeypatch):
  monkeypatch.setattr(pieces, "_LONGEST", 100)
  text = "".join(f" word {i} \n" for i in range(99))
  slices = [text[i : i + 37] for i in range(0, len(text), 37)]
  found = list(pieces.of_text(slices, pieces._END_OF_LINE, 64))
  assert "".join(found) == text
  assert max(map(len, found)) <= 137
  assert all(piece.endswith("\n") for piece in found[:-1])


@pytest.mark.parametrize("make", [_txt, _rows])
def test_later_runs_do_not_read_the_text(small, tmp_path, monkeypatch, make):
  path = make(tmp_path)
  first = batches.make_data(_config(path))

  def fail(*_):
    raise AssertionError("the text is read again")

  monkeypatch.setattr(corpus, "_splits", fail)
  monkeypatch.setattr(corpus.local_files, "rows_of", fail)
  again = batches.make_data(_config(path, length=9))
  resumed = batches.make_data(_config(path), first.tokenizer)
  assert first.digest == again.digest == resumed.digest
  stat = path.stat()
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  with pytest.raises(AssertionError, match="read again"):
    batches.make_data(_config(path))


def _streams(data):
  return {k: np.array(x) for k, x in data.examples._streams.items()}


@pytest.mark.parametrize(
  "name", ["train.bin", "valid.bin", "meta.json", "checksums.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_damaged_tokens_are_made_again_with_a_line(
  small, tmp_path, caplog, name, harm
):
  config = _config(_txt(tmp_path))
  first = batches.make_data(config)
  streams = _streams(first)
  [meta] = (tmp_path / corpus.FOLDER).rglob("meta.json")
  path = meta.with_name(name)
  content = path.read_bytes()
  middle = len(content) // 2
  flipped = bytearray(content)
  flipped[middle] ^= 1
  changed = {"flip": flipped, "cut": content[:middle], "empty": b""}
  if harm == "remove":
    path.unlink()
  else:
    path.write_bytes(changed[harm])
  for lines in (1, 0):
    caplog.clear()
    again = batches.make_data(config)
    assert len(caplog.records) == lines
    assert again.digest == first.digest
    for split, stream in _streams(again).items():
      np.testing.assert_array_equal(stream, streams[split])
  assert path.read_bytes() == content


def test_damaged_trained_tokenizer_is_made_again(small, tmp_path, caplog):
  config = _config(_txt(tmp_path))
  first = batches.make_data(config)
  [path] = (tmp_path / corpus.FOLDER).rglob("tokenizer.json")
  content = path.read_text()
  path.write_text(content.replace("a", "b", 1))
  again = batches.make_data(config)
  assert again.tokenizer.to_json() == first.tokenizer.to_json()
  assert path.read_text() == content
  assert "made again" in caplog.text


def test_tokens_that_are_not_kept_leave_the_folders_as_they_are(
  small, tmp_path, caplog
):
  config = _config(_txt(tmp_path))
  found = batches.make_data(config, keep_tokens=False)
  assert not (tmp_path / corpus.FOLDER).exists()
  kept = batches.make_data(config)
  assert kept.digest == found.digest
  [meta] = (tmp_path / corpus.FOLDER).rglob("meta.json")
  meta.write_text("{}")
  again = batches.make_data(config, keep_tokens=False)
  assert again.digest == kept.digest
  assert meta.read_text() == "{}"
  np.testing.assert_array_equal(
    _streams(again)["train"], _streams(kept)["train"]
  )


def test_a_given_tokenizer_reads_large_text(small, tmp_path):
  path = _txt(tmp_path)
  given = batches.make_data(_config(path, tokenizer="bytes"))
  found = batches.make_data(_config(path), given.tokenizer)
  np.testing.assert_array_equal(
    found.examples._streams["train"], given.examples._streams["train"]
  )


def test_another_column_is_another_text(small, tmp_path):
  path = tmp_path / "a.jsonl"
  row = json.dumps({"first": "one text", "second": "another text"})
  path.write_text(f"{row}\n" * 60)
  digests = {
    batches.make_data(_config(path, label_field=name, tokenizer="bytes")).digest
    for name in ("first", "second")
  }
  assert len(digests) == 2


def test_folder_that_cannot_be_written_is_named(small, tmp_path):
  path = _txt(tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"set data\.dir"):
    batches.make_data(_config(path, dir=str(tmp_path / "file")))
  batches.make_data(_config(path, dir=str(tmp_path / "other")))
  assert not (tmp_path / corpus.FOLDER).exists()


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"good \xff bad", "UTF-8"),
    ("a.txt", b" \n ", "empty"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', ":2 has no text"),
    ("a.jsonl", b'{"text": "a"}\n{', ":2: not JSON"),
    ("a.csv", b"text\ngood\n\xff\n", "UTF-8"),
    ("a.parquet", b"PAR1 no", "cannot read"),
  ],
)
def test_damaged_large_text_is_refused(small, tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    batches.make_data(_config(tmp_path / name))
  assert not list(tmp_path.rglob("meta.json"))


def test_columnar_files_name_classes_as_hugging_face_does(tmp_path):
  table = _table(["a", "b", "c"], [1, 0, -1])
  (tmp_path / "train").mkdir()
  with (
    pa.OSFile(str(tmp_path / "train" / "data-00000-of-00001.arrow"), "wb") as f,
    pa.ipc.new_stream(f, table.schema) as writer,
  ):
    writer.write_table(table)
  # `map` of a data set that was read from here writes its result beside it.
  (tmp_path / "train" / "cache-0123456789abcdef.arrow").write_bytes(b"")
  parquet.write_table(table, tmp_path / "test.parquet")
  data = c.DataConfig(path=str(tmp_path), valid_fraction=0.0)
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("bad", "good")
  for split in ("train", "test"):
    assert texts.texts[split] == ["a", "b"]
    assert texts.labels[split].tolist() == [1, 0]
