import collections
import csv
import dataclasses
import importlib.util
import json
import os
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from folding.config import DataConfig
from folding.data import corpus, local_files, sources
from folding.errors import ConfigError
from tests.data import text_files
from tests.data.text_files import load, pairs


def _jsonl(*rows):
  return "\n".join(json.dumps(row) for row in rows)


def _tsv(rows):
  return "".join(f"{label}\t{text}\n" for label, text in rows)


# Local files.


def test_tsv_folder_is_read_as_written(tmp_path):
  texts = load(
    tmp_path,
    train__tsv="0\t\"an open quote\n1\tit 's\u2028one line\x85still\n",
    val__tsv="0\tv\r\n\r\n1\tw\n\n",
    test__tsv="0\tt\r\n1\tu",
  )
  assert texts.texts == {
    "train": ['"an open quote', "it 's\u2028one line\x85still"],
    "valid": ["v", "w"],
    "test": ["t", "u"],
  }
  labels = {split: ids.tolist() for split, ids in texts.labels.items()}
  assert labels == {"train": [0, 1], "valid": [0, 1], "test": [0, 1]}
  assert texts.labels["train"].dtype == np.int32


@pytest.mark.parametrize("rows", ["0\ta\n2\tb\n", "up\ta\nflat\tb\n"])
def test_labels_txt_orders_the_classes(tmp_path, rows):
  texts = load(tmp_path, train__tsv=rows, labels__txt="up\ndown\nflat\n")
  assert texts.label_names == ("up", "down", "flat")
  assert texts.labels["train"].tolist() == [0, 2]


@pytest.mark.parametrize(
  ("labels", "names"),
  [
    (("b", "a", "c"), ("a", "b", "c")),
    (("10", "9", "2"), ("2", "9", "10")),
    (("01", "2", "0"), ("0", "01", "2")),
    (("1" * 5000, "2"), ("1" * 5000, "2")),  # too long for an int
    (("label", "a", "label"), ("a", "label")),  # and is not a header
    (("1_1", "1_0"), ("1_0", "1_1")),  # for Python, 11 and 10
  ],
)
def test_labels_are_sorted_as_numbers_or_words(tmp_path, labels, names):
  texts = load(tmp_path, train__tsv=_tsv((x, "a text") for x in labels))
  assert texts.label_names == names
  assert texts.labels["train"].tolist() == [names.index(x) for x in labels]


@pytest.mark.parametrize(
  ("content", "fields", "expected"),
  [
    # Quotes and line ends; the columns have usual names.
    (
      'label,id,sentence\nyes,1,"a, b\r\nand c"\nno,2,"say ""x"""\n',
      {},
      [("yes", "a, b\r\nand c"), ("no", 'say "x"')],
    ),
    (
      "text,body,stars\nt,b1,1\nt,b2, 5\n",
      {"text_field": "body", "label_field": "stars"},
      [("1", "b1"), ("5", "b2")],
    ),
    ("Text,LABEL\nt,yes\nu,no\n", {}, [("yes", "t"), ("no", "u")]),
    # Empty lines.
    ("\n\ntext,label\nt,yes\n\nu,no\n\n", {}, [("yes", "t"), ("no", "u")]),
    ("TEXT,label,text\nt,a,u\nt,b,v\n", {}, [("a", "u"), ("b", "v")]),
    # The only column that is not of numbers.
    (
      "id,review,label,stars\n1,bad,0,4.5\n2,7,1,\n3,good,1,-1e3\n",
      {},
      [("0", "bad"), ("1", "7"), ("1", "good")],
    ),
    ("text,label,note\n123,a,x\n456,b,y\n", {}, [("a", "123"), ("b", "456")]),
  ],
)
def test_csv_columns_are_configured_or_guessed(
  tmp_path, content, fields, expected
):
  assert pairs(load(tmp_path, fields=fields, train__csv=content)) == expected


def test_tsv_may_have_a_header(tmp_path):
  texts = load(tmp_path, train__tsv='id\ttext\tlabel\n7\t"a\tx\n8\tb\ty\n')
  assert pairs(texts) == [("x", '"a'), ("y", "b")]


@pytest.mark.parametrize(
  ("rows", "field", "expected"),
  [
    ("id\tbody\n7\ta\n", "body", ["a"]),
    ("id\ttext\n7\ta b\n", None, ["a b"]),
    ("text\na b\n", None, ["a b"]),
    ("text\ta b\n", None, ["a b"]),  # the label is "text"
  ],
)
def test_tsv_of_a_task_without_labels_needs_none(
  tmp_path, rows, field, expected
):
  texts = load(tmp_path, "embed", {"text_field": field}, train__tsv=rows)
  assert texts.texts["train"] == expected


PAIRS = "score\tlabel\tsentence1\tsentence2\n1.5\tx\ta\tb c\n-2\ty\td\te\n"


@pytest.mark.parametrize(
  ("task", "labels", "names"),
  [
    ("classify", [0, 1], ("x", "y")),
    ("regress", [1.5, -2], ("score",)),
  ],
)
def test_pairs_are_found_with_the_label_of_the_task(
  tmp_path, task, labels, names, caplog
):
  texts = load(tmp_path, task, train__tsv=PAIRS)
  assert texts.pair == ("sentence1", "sentence2")
  assert texts.texts["train"] == [("a", "b c"), ("d", "e")]
  assert texts.labels["train"].tolist() == labels
  assert texts.label_names == names
  assert not caplog.messages  # the other label is no text


@pytest.mark.parametrize(
  ("columns", "fields", "expected"),
  [
    ("premise,hypothesis,label", {}, ("p", "q")),
    ("Question,Sentence,label", {}, ("p", "q")),  # QNLI of GLUE
    ("question1,question2,label", {}, ("p", "q")),
    ("text,sentence1,sentence2,label", {}, "p"),
    ("a,b,label", {"text_field": ("b", "a")}, ("q", "p")),
    ("sentence1,sentence2,label", {"text_field": "sentence2"}, "q"),
  ],
)
def test_pairs_have_usual_or_configured_columns(
  tmp_path, columns, fields, expected
):
  width = columns.count(",")
  rows = "".join(f"{','.join('pqr'[:width])},{i}\n" for i in range(2))
  texts = load(tmp_path, fields=fields, train__csv=f"{columns}\n{rows}")
  assert texts.texts["train"] == [expected] * 2


def test_equal_pairs_stay_in_one_split_and_scores_are_no_classes(tmp_path):
  rows = [{"sentence1": "a", "sentence2": f"b{i // 2}", "score": i or 0.5} for i in range(200)]  # fmt: skip
  data = text_files.write(tmp_path, train__jsonl=_jsonl(*rows))
  texts = sources.load_texts(data, "regress")
  parts = [set(texts.texts[split]) for split in sources.SPLITS]
  assert [2 * len(part) for part in parts] == [160, 20, 20]
  assert len(set.union(*parts)) == 100
  data = dataclasses.replace(data, max_bytes=320)  # 4 or 5 bytes a pair
  few = sources.load_texts(data, "regress").texts["train"]
  assert 300 < sum(len(f"{a}\t{b}") for a, b in few) <= 320


def test_several_labels_are_lists_or_have_commas(tmp_path):
  rows = {"text": "t", "labels": ["b", "a"]}, {"text": "u", "labels": []}
  texts = load(
    tmp_path,
    "multilabel",
    train__jsonl=_jsonl(*rows),
    valid__tsv="a\tv\nb,a\tw\n",
  )
  assert texts.label_names == ("a", "b")
  assert texts.labels["train"].tolist() == [[1, 1], [0, 0]]
  assert texts.labels["valid"].tolist() == [[1, 0], [1, 1]]
  assert texts.labels["train"].dtype == np.float32


@pytest.mark.parametrize(
  ("task", "files", "match"),
  [
    ("regress", {"train__tsv": "1.5\ta\nhigh\tb\n"}, "tsv:2: .*'high'"),
    ("regress", {"train__tsv": "1.5\ta\nnan\tb\n"}, "tsv:2: .*not a number"),
    ("regress", {"train__tsv": "1.5\ta\n1e39\tb\n"}, "tsv:2: .*float32"),
    ("regress", {"train__tsv": "1.5\ta\n1_0\tb\n"}, "tsv:2: .*not a number"),
    ("regress", {"train__jsonl": _jsonl({"text": "a", "score": 10**400})}, "float32"),
    ("regress", {"train__txt": "a"}, "'regress' needs.*configs/embed.py"),
    ("regress", {"train__tsv": PAIRS, "valid__tsv": "1\ta\n"}, "sentence1 and"),
    ("regress", {"train__tsv": PAIRS.replace("b c", " ")}, "sentence2 is empty"),
    ("multilabel", {"train__tsv": "a,,b\ta\n"}, "tsv:1: .*''"),
    ("multilabel", {"train__tsv": "a\ta\n"}, "one class, a"),
    ("multilabel", {"train__tsv": "0,1,1\ta\n"}, "tsv:1: .*for each class"),
    ("multilabel", {"train__tsv": "a,b\ta\n1,1\tb\n"}, "tsv:2: .*for each class"),
    ("multilabel", {"train__tsv": "['a', 'b']\ta\n"}, "tsv:1: .*list as text"),
    ("multilabel", {"train__tsv": "a,b\ta\n[]\tb\n"}, "tsv:2: .*list as text"),
    ("lm", {"train__tsv": PAIRS}, "several columns of text"),
  ],
)  # fmt: skip
def test_labels_and_pairs_that_do_not_fit_are_refused(
  tmp_path, task, files, match
):
  with pytest.raises(ConfigError, match=match) as caught:
    load(tmp_path, task, **files)
  assert "\n" not in str(caught.value)


def test_csv_takes_texts_beyond_the_limit_of_the_module(tmp_path):
  long = "x" * 200_000  # the limit is 131,072
  texts = load(tmp_path, train__csv=f"text,label\n{long},1\nb,0\n")
  assert pairs(texts) == [("1", long), ("0", "b")]
  assert csv.field_size_limit() > 131_072  # other readers may need it


def test_jsonl_columns_are_those_of_the_first_row(tmp_path):
  rows = {"label": "1", "body": "b"}, {"title": "t", "label": " x", "body": "c"}
  texts = load(tmp_path, train__jsonl="\n" + _jsonl(*rows) + "\n\n")
  assert pairs(texts) == [("1", "b"), ("x", "c")]


def test_lm_reads_txt_whole_and_rows_without_labels(tmp_path):
  texts = load(
    tmp_path,
    "lm",
    train__txt="one\r\n\n two\n",
    dev__jsonl=_jsonl({"text": "three", "label": 1.5}, {"text": "four"}),
    test__tsv="0\tfive\n",
    labels__txt="a\na\n",
  )
  assert texts.texts == {
    "train": ["one\r\n\n two\n"],
    "valid": ["three", "four"],
    "test": ["five"],
  }
  assert (texts.labels, texts.label_names) == (None, ())


@pytest.mark.parametrize(
  ("files", "line"),
  [
    (
      {"train__csv": "sentence,sentence2,label\na,b,0\nc,d,1\n"},
      "ignored: sentence2",
    ),
    (
      {"train__jsonl": _jsonl(*({"text": f"a{i}", "context": "b", "label": i} for i in (0, 1)))},
      "ignored: context",
    ),
    (
      {"train__tsv": "0\ta\n2\tb\n", "labels__txt": "up\ndown\nflat\n"},
      "1 of 3 classes have no text to train on: down",
    ),
    (
      {"train__tsv": "0\ta\n1\tb\n", "test__tsv": "0\tb\n0\tc\n1\tb\n"},
      "2 of 3 texts (66.7%) of the test split are in train too",
    ),
    (
      {"train__tsv": "0\ta\n1\tb\n", "Test__tsv": "0\tc\n", "all__CSV": "", "notes__md": ""},
      "ignored: Test.tsv, all.CSV; the splits are called train, valid (or "
      "validation, val, dev) and test",
    ),
  ],
)  # fmt: skip
def test_ignored_text_is_reported_in_one_line(tmp_path, files, line, caplog):
  load(tmp_path, **files)
  [found] = caplog.messages
  assert found.endswith(line)


def test_notes_caches_and_scored_pairs_are_not_reported_as_ignored(
  tmp_path, caplog
):
  for name in ("README.txt", "vocab.txt", "cache-1f.arrow", "sts.tsv"):
    (tmp_path / name).write_text("text")
  (tmp_path / "train.csv").write_text("text\na\nb\n")
  sources.load_texts(DataConfig(path=str(tmp_path), sts="sts.tsv"), "embed")
  assert not caplog.messages


def test_lines_may_end_as_on_old_macs(tmp_path):
  texts = load(tmp_path, train__tsv="0\ta\r1\tb\r")
  assert pairs(texts) == [("0", "a"), ("1", "b")]


def test_first_row_of_a_rare_class_is_no_header(tmp_path):
  table = "x\tso good\ny\ta\ny\tb\n"
  assert pairs(load(tmp_path, train__tsv=table))[0][1] == "so good"


GOOD = {"train__tsv": "0\ta\n1\tb\n", "valid__tsv": "0\tc\n"}


@pytest.mark.parametrize(
  ("files", "match"),
  [
    ({}, "no training text"),
    (GOOD | {"train__csv": "text\n"}, "several train files"),
    ({"train__txt": "text"}, "no labels"),
    ({"train__tsv": ""}, "empty"),
    ({"train__tsv": " \n\n"}, "empty"),
    ({"train__tsv": b"0\tab\xff"}, r"byte 4"),
    ({"train__tsv": "0\ta\nb\n"}, "tsv:2: no tab"),
    ({"train__tsv": "0\ta\n\tb\n"}, "tsv:2: .*no label"),
    ({"train__tsv": "0\ta\n0\t \n"}, "tsv:2: .*empty"),
    (
      {"train__tsv": "label\ttext \n0\ta\n"},
      "tsv:1: .*'label.ttext ' .*header",
    ),
    ({"train__tsv": "body\tlabel\nso good\t1\n"}, "tsv:1: .*header"),
    ({"train__tsv": "label\ttext\n0\ta\tb\n"}, "tsv:2: .* 2 columns"),
    ({"train__tsv": "0\ta\n1\t\t\tb\n"}, "tsv:2: several tabs"),
    (
      {"train__tsv": "kind\tmessage\nx\ta\ny\tb\ny\tc\nx\td\n"},
      "tsv:1: .*header",
    ),
    ({"train__tsv": "x\ta\nx\tb\n"}, "one class"),
    ({"train__tsv": "0.5\ta\n1\tb\n"}, "tsv:1: .*whole number"),
    ({"train__tsv": "nan\ta\n1\tb\n"}, "tsv:1: .*whole number"),
    (GOOD | {"valid__tsv": "0\ta\n7\tb\n"}, "valid.tsv:2: label '7'"),
    # An id is a label only with a labels.txt.
    (
      {"train__tsv": "x\ta\ny\tb\n", "valid__tsv": "0\tb\n"},
      "valid.tsv:1: label '0'",
    ),
    (GOOD | {"labels__txt": "a\n"}, "one class"),
    (
      GOOD | {"train__tsv": "0\ta\n2\tb\n", "labels__txt": "a\nb\n"},
      "train.tsv:2: label '2'",
    ),
    ({"train__tsv": "1\ta\n2\tb\n", "labels__txt": "a\nb\nc\n"}, "start at 0"),
    # Ids would be second names of other classes.
    (GOOD | {"labels__txt": "1\n2\n"}, "train.tsv:1: label '0'"),
    (GOOD | {"labels__txt": "a\n\n \nb\na\n"}, "'a' twice"),
    ({"train__csv": "id,body,label\na1,a,0\n"}, "several columns of text"),
    ({"train__csv": "text,label,text\na,0,b\n"}, "'text'; rename"),
    ({"train__csv": "text;label\na;0\n"}, "commas"),
    ({"train__csv": "text,label\n"}, "no rows"),
    ({"train__csv": "text,label\na,0\nb\n"}, "csv:3: .* 2 columns"),
    ({"train__csv": "text,label\na,0,1\n"}, "csv:2: .* 2 columns"),
    ({"train__csv": 'text,label\n"a"b,1\n'}, "csv:2: not valid CSV"),
    ({"train__csv": "body,kind\na,0\n"}, "'label'.*'body', 'kind'"),
    ({"train__csv": "text,label\na,0\ntext,label\nb,1\n"}, "csv:3: .*repeated"),
    ({"train__tsv": "label\ttext\nx\ta\nlabel\ttext\n"}, "tsv:3: .*repeated"),
    ({"train__csv": "text,label\na,1e0\n"}, "csv:2: .*whole number"),
    ({"train__jsonl": '{"text": "a"\n'}, "jsonl:1: not JSON"),
    ({"train__jsonl": '{"text": "a", "text": "b"}\n'}, "jsonl:1: .*twice"),
    ({"train__jsonl": '["a"]\n'}, "jsonl:1: .*object"),
    ({"train__jsonl": '{"text": "a"}\n'}, "jsonl has no column 'label'"),
    (
      {"train__csv": "sentence1,sentence2,score\na,b,1\n"},
      "'label' .task 'regress' reads 'score'.;",
    ),
    ({"train__jsonl": '{"text": "a", "label": " "}\n'}, "jsonl:1: .*no label"),
    ({"train__jsonl": '{"text": "a", "label": 1.0}\n'}, "jsonl:1: .*whole"),
    ({"train__jsonl": '{"text": "a", "label": NaN}\n'}, "jsonl:1: .*whole"),
    ({"train__jsonl": '{"text": "a", "label": true}\n'}, "jsonl:1: .*whole"),
    ({"train__jsonl": '{"text": "a", "label": [1]}\n'}, "jsonl:1: .*whole"),
    (
      {"train__jsonl": _jsonl(*({"text": "a", "label": x} for x in (1, "2")))},
      "jsonl:2: .*one kind",
    ),
    ({"train__jsonl": '{"label": 1}\n'}, "no text column"),
    ({"train__jsonl": '{"data": {}, "label": 1}\n'}, "to one of 'data'"),
    # The blank of a name is visible.
    ({"train__csv": "text, label\na, x\n"}, "'text', ' label'"),
    ({"train__jsonl": '{"label": 1, "text": null}\n'}, "jsonl:1 .*'text'"),
    (
      {"train__jsonl": '{"text": "a", "label": 1}\n{"label": 1}\n'},
      "jsonl:2 .*'text'",
    ),
    (
      {"train__jsonl": '{"text": "a \\ud83d b", "label": 1}\n'},
      "jsonl:1: half a character",
    ),
  ],
)
def test_malformed_files_are_refused(tmp_path, files, match):
  with pytest.raises(ConfigError, match=match) as caught:
    sources.load_texts(text_files.write(tmp_path, **files), "classify")
  assert "\n" not in str(caught.value)


def _classes(kind, **columns):
  """Returns a table whose classes Hugging Face has named "x" and "y"."""
  label = {"_type": "ClassLabel", "names": ["x", "y"]}
  if kind == "labels":
    label = {"_type": "Sequence", "feature": label}
  info = json.dumps({"info": {"features": {kind: label}}})
  return pa.table(columns).replace_schema_metadata({"huggingface": info})


def _described(text):
  table = pa.table({"text": ["a"]})
  return table.replace_schema_metadata({"huggingface": text})


@pytest.mark.parametrize(
  ("table", "task", "match"),
  [
    (_classes("label", text=["a", "b"], label=[0, 2]), "classify", ":2: .* 2 is"),
    (_classes("label", text=["a"], label=["x"]), "classify", "'x' is not the"),
    (_classes("label", text=["a"], label=[1.0]), "classify", "1.0 is not the"),
    (_classes("labels", text=["a"], labels=[[0, 2]]), "multilabel", "2 is not"),
    # -1 is not the last class.
    (_classes("labels", text=["a"], labels=[[-1]]), "multilabel", ":1: .*None"),
    (pa.table([["a"], ["x"], ["b"]], ["text", "label", "text"]), "lm", "2 times"),
    (_described("{"), "lm", "by Hugging Face is damaged"),
    (_described('{"info": {"features": [1]}}'), "lm", "by Hugging Face is damaged"),
  ],
)  # fmt: skip
def test_malformed_parquet_is_refused(tmp_path, table, task, match):
  parquet.write_table(table, tmp_path / "train.parquet")
  with pytest.raises(ConfigError, match=match) as caught:
    text_files.read(DataConfig(path=str(tmp_path)), task)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_damaged_text_is_refused(tmp_path, ending):
  path = tmp_path / f"train{ending}"
  table = pa.table({"text": ["abcdefgh"] * 9})
  if ending == ".parquet":
    parquet.write_table(table, path, use_dictionary=False, compression="none")
  else:
    with pa.ipc.new_stream(path, table.schema) as writer:
      writer.write_table(table)
  path.write_bytes(path.read_bytes().replace(b"abcd", b"a\xffcd"))
  with pytest.raises(ConfigError, match="cannot read .*UTF"):
    corpus.load_documents(DataConfig(path=str(path)))


def test_only_the_chosen_column_is_checked(tmp_path):
  path = tmp_path / "train.arrow"
  table = pa.table({"text": ["a", "b"], "other": ["abcdefgh"] * 2})
  with pa.ipc.new_stream(path, table.schema) as writer:
    writer.write_table(table)
  path.write_bytes(path.read_bytes().replace(b"abcd", b"a\xffcd"))
  found = [row for _, row in local_files.rows_of([path], "text")]
  assert found == [{"text": "a"}, {"text": "b"}]


def test_damaged_offsets_are_refused(tmp_path):
  table = pa.table({"text": ["a" * 1000, "b" * 1000]})
  with pa.ipc.new_stream(tmp_path / "train.arrow", table.schema) as writer:
    writer.write_table(table)
  content = (tmp_path / "train.arrow").read_bytes()
  ends = [size.to_bytes(4, "little") for size in (1000, 2000, 1 << 30)]
  content = content.replace(b"".join(ends[:2]), ends[0] + ends[2])
  (tmp_path / "train.arrow").write_bytes(content)
  with pytest.raises(ConfigError, match="cannot read"):
    corpus.load_documents(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
  "name", ["train-00001-of-00002.parquet", "train/data-00000-of-00002.arrow"]
)
def test_incomplete_download_is_refused(tmp_path, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).touch()
  with pytest.raises(ConfigError, match="is one of 2 files, .* has 1"):
    corpus.load_documents(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_mistake_in_a_later_file_names_that_file(tmp_path, task):
  for number, text in enumerate(("a", None)):
    table = pa.table({"text": ["b", text], "label": ["x", "y"]})
    path = tmp_path / f"train-0000{number}-of-00002.parquet"
    parquet.write_table(table, path)
  with pytest.raises(
    ConfigError, match="train-00001-of-00002.parquet:2 has no"
  ):
    text_files.read(DataConfig(path=str(tmp_path)), task)


def test_wrong_paths_and_columns_are_refused(tmp_path):
  (tmp_path / "a.pdf").write_text("text")
  (tmp_path / "a.csv").write_text("text,label\na,0\n")
  (tmp_path / "a.tsv").write_text("0\ta\n1\tb\n")  # without a header
  (tmp_path / "a.txt").write_text("text")
  os.mkfifo(tmp_path / "pipe.csv")
  for fields, match in (
    ({"path": "none"}, "neither a file"),
    ({"path": "pipe.csv"}, "neither a file"),
    ({"path": "a.pdf"}, "extension"),
    ({"path": "a.csv", "text_field": "x"}, "no text column 'x'.*: 'text'"),
    ({"path": "a.csv", "label_field": "x"}, "no label column 'x'.*'label'"),
    ({"path": "a.tsv", "text_field": "x"}, "no header.*'x'"),
    ({"path": "a.tsv", "text_field": ("x", "y")}, "no header.*'x', 'y'"),
    ({"path": "a.tsv", "label_field": "x"}, "no header.*'x'"),
    ({"path": "a.txt", "text_field": "x"}, "without columns"),
    ({"path": "a.txt", "label_field": "x"}, "without columns"),
  ):
    data = DataConfig(**fields)
    data = dataclasses.replace(data, path=str(tmp_path / data.path))
    with pytest.raises(ConfigError, match=match):
      sources.load_texts(data, "classify")


# Splits.


def test_one_text_is_cut_in_order_at_line_ends(tmp_path):
  lines = [f"line {i} " + "x" * (i % 7) + "\n" for i in range(1000)]
  (tmp_path / "book.txt").write_text("".join(lines))
  data = DataConfig(path=str(tmp_path / "book.txt"), test_fraction=0.2)
  [train], [valid], [test] = corpus.load_documents(data).values()
  assert train + valid + test == "".join(lines)
  assert train.endswith("\n") and valid.endswith("\n")
  total = sum(map(len, lines))
  # A line is at most 16 characters.
  assert abs(len(train) - 0.7 * total) < 17
  assert abs(len(valid) - 0.1 * total) < 17


def test_a_single_text_of_an_encoder_stays_whole(tmp_path):
  data = text_files.write(tmp_path, train__txt="one line " * 9)
  texts = sources.load_texts(data, "embed").texts
  assert texts == {"train": ["one line " * 9], "valid": [], "test": []}


@pytest.mark.parametrize("lines", [1, 5])
def test_long_lines_are_cut_within(tmp_path, lines):
  text = ("x" * (60_000 // lines - 1) + "\n") * lines
  data = text_files.write(tmp_path, train__txt=text)
  parts = [p for [p] in corpus.load_documents(data).values()]
  assert "".join(parts) == text
  assert [round(len(p) / 60_000, 2) for p in parts] == [0.8, 0.1, 0.1]


def test_a_missing_split_alone_is_set_aside(tmp_path):
  data = text_files.write(tmp_path, train__txt="ab\n" * 100, valid__txt="v\n")
  texts = corpus.load_documents(data)
  expected = {"train": "ab\n" * 90, "valid": "v\n", "test": "ab\n" * 10}
  assert texts == {split: [text] for split, text in expected.items()}


def test_rows_are_set_aside_by_class_and_hash(tmp_path):
  rows = [(i % 3, f"text number {i}") for i in range(57)]
  rows += [(0, f"more {i}") for i in range(40)]
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  texts = sources.load_texts(data, "classify")
  found = {s: pairs(texts, s) for s in sources.SPLITS}
  counts = {
    s: collections.Counter(label for label, _ in found[s]) for s in found
  }
  assert counts["valid"] == counts["test"] == {"0": 6, "1": 2, "2": 2}
  together = found["train"] + found["valid"] + found["test"]
  assert sorted(together) == sorted((str(a), b) for a, b in rows)
  # In another order of rows, each text is in the same split.
  data = text_files.write(tmp_path, train__tsv=_tsv(rows[::-1]))
  again = sources.load_texts(data, "classify")
  for split in sources.SPLITS:
    assert pairs(again, split) == found[split][::-1]


@pytest.mark.parametrize("of_both", [0, 50])
def test_equal_texts_stay_in_one_split(tmp_path, of_both):
  rows = [(i // 4 % 2, f"text {i // 4}") for i in range(400)]
  rows += [(1 - i % 2, f"text {i}") for i in range(of_both)]
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  texts = sources.load_texts(data, "classify").texts
  parts = [set(texts[split]) for split in sources.SPLITS]
  assert min(map(len, parts)) >= 10
  assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("often", ["ok", "thanks"])
def test_a_text_that_is_most_of_a_class_stays_in_train(tmp_path, often):
  rows = [(0, often)] * 60 + [(0, f"text {i}") for i in range(40)]
  rows += [(1, f"other {i}") for i in range(100)]
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  texts = sources.load_texts(data, "classify")
  for split, count in zip(sources.SPLITS, (80, 10, 10), strict=True):
    assert np.bincount(texts.labels[split]).tolist() == [count, count]
  assert texts.texts["train"].count(often) == 60


def test_setting_aside_everything_is_refused(tmp_path):
  data = text_files.write(tmp_path, train__tsv="0\tonly\n1\tonly\n")
  data = dataclasses.replace(data, valid_fraction=0.9)
  with pytest.raises(ConfigError, match="no text is left"):
    sources.load_texts(data, "classify")


def test_max_bytes_cuts_a_stream_at_a_line_end(tmp_path):
  texts = load(
    tmp_path,
    "lm",
    {"max_bytes": 16},
    train__jsonl='{"text": "aaaa\\n"}\n{"text": "bb\\ncc\\u00e9\\nddd\\n"}',
    valid__txt="v\nw\n" + "x" * 50,
    test__txt="y" * 9,
  ).texts
  assert texts["train"] == ["aaaa\n", "bb\ncc\u00e9\n"]
  assert texts["valid"] == ["v\n"]
  assert texts["test"] == ["yy"]  # without a line end, at the character


def test_max_bytes_keeps_whole_texts_of_every_class(tmp_path):
  rows = sorted((i % 3, f"{i:02} word é") for i in range(90))  # 10 bytes each
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  full = sources.load_texts(data, "classify")
  data = dataclasses.replace(data, max_bytes=300)
  texts = sources.load_texts(data, "classify")
  sizes = {
    s: sum(len(t.encode()) for t in texts.texts[s]) for s in sources.SPLITS
  }
  assert sizes["train"] == 300
  assert 27 <= sizes["valid"] <= 37
  assert set(texts.labels["train"].tolist()) == {0, 1, 2}
  assert set(pairs(texts)) <= set(pairs(full))


def test_max_bytes_skips_a_long_text_and_keeps_the_others(tmp_path):
  rows = [(i % 2, f"word {i:02}") for i in range(40)]  # 7 bytes each
  for n in range(100, 105):  # at some places in the order of hashes
    long = _tsv([(0, "long " * n), *rows])
    texts = load(tmp_path, fields={"max_bytes": 400}, train__tsv=long)
    assert sorted(texts.texts["train"]) == sorted(text for _, text in rows)


def test_max_bytes_keeps_the_classes_that_it_empties(tmp_path):
  rows = [(f"c{i % 21}", f"text number {i}") for i in range(3000)]
  texts = load(tmp_path, fields={"max_bytes": 300}, train__tsv=_tsv(rows))
  assert len(set(texts.labels["train"].tolist())) < 21
  assert len(texts.label_names) == 21


def test_max_bytes_without_room_for_a_text_is_refused(tmp_path):
  tsv = _tsv([(i % 2, f"{i:02}" + "x" * 40) for i in range(40)])
  for limit, match in ((300, "valid, which gets 37 bytes"), (3, "too small")):
    with pytest.raises(ConfigError, match=match):
      load(
        tmp_path, fields={"max_bytes": limit}, train__tsv=tsv, valid__tsv=tsv
      )


def test_trec_has_the_documented_counts(shared_data):
  data = DataConfig(path=str(shared_data / "trec"))
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
  counts = {s: np.bincount(ids).tolist() for s, ids in texts.labels.items()}
  assert counts == {
    "train": [1046, 1125, 77, 1101, 751, 806],
    "valid": [116, 125, 9, 122, 84, 90],
    "test": [138, 94, 9, 65, 81, 113],
  }


def test_tiny_shakespeare_has_the_documented_sizes(shared_data):
  data = DataConfig(path=str(shared_data / "tiny_shakespeare"))
  texts = corpus.load_documents(data)
  sizes = {split: sum(map(len, texts[split])) for split in texts}
  assert sizes == {"train": 1_003_854, "valid": 55_770, "test": 55_770}


# TFDS, by builders that need no download.

FEATURES = {
  "idx": tfds.features.Scalar(np.int32),
  "title": tfds.features.Text(),
  "text": tfds.features.Text(),
  "fine": tfds.features.ClassLabel(names=list("abcdef")),
  "coarse": tfds.features.ClassLabel(names=["bad", "good"]),
}


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """Two class columns, and a test split without labels."""

  VERSION = tfds.core.Version("1.0.0")
  FEATURES = FEATURES

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(self.FEATURES)
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(40, 2),
      "validation_matched": self._generate_examples(6, 2),
      "test": self._generate_examples(6, 0),
    }

  def _generate_examples(self, size, num_classes):
    for i in range(size):
      label = i % 2 if num_classes else -1
      row = {"text": f"text {i} \u00e9 {label}", "title": f"title {i}"}
      yield i, row | {"idx": i, "fine": i % 6, "coarse": label}


class TinyTweets(TinyReviews):
  """A plain integer as the class, and a class that train lacks."""

  FEATURES = {"text": tfds.features.Text(), "polarity": np.int32}

  def _split_generators(self, dl_manager):
    return {"train": self._rows([0, 4] * 10), "test": self._rows([0, 2, 4])}

  def _rows(self, labels):
    for i, label in enumerate(labels):
      yield i, {"text": f"tweet {i} is {label}", "polarity": label}


class TinyPairs(TinyReviews):
  """Two texts in a row, and neither is called text."""

  FEATURES = {
    "question": tfds.features.Text(),
    "answer": tfds.features.Text(),
    "label": FEATURES["coarse"],
  }

  def _split_generators(self, dl_manager):
    rows = {"question": "q", "answer": "a"}
    return {"train": ((i, {**rows, "label": i % 2}) for i in range(20))}


class TinySimilarity(TinyReviews):
  """Pairs with scores, and a test split without; also lists of classes."""

  FEATURES = {
    "premise": tfds.features.Text(),
    "hypothesis": tfds.features.Text(),
    "label": np.float32,
    "kinds": tfds.features.Sequence(FEATURES["fine"]),
  }

  def _split_generators(self, dl_manager):
    return {"train": self._rows(20), "test": self._rows(5, -1.0)}

  def _rows(self, size, label=None):
    for i in range(size):
      texts = {"premise": f"p{i}", "hypothesis": f"h{i}"}
      kinds = [j for j in range(6) if i >> j & 1]
      yield i, {**texts, "label": label or i / 4, "kinds": kinds}


class BrokenReviews(TinyReviews):
  """Cannot be prepared."""

  def _split_generators(self, dl_manager):
    raise RuntimeError("the page has moved\nand more")


class PackedReviews(TinyReviews):
  """Comes in an archive, which TFDS opens by TensorFlow."""

  def _split_generators(self, dl_manager):
    path = pathlib.Path(self.data_dir).parents[1] / "reviews.tar.gz"
    tarfile.open(path, "w:gz").close()
    dl_manager.extract(path)
    return {"train": self._generate_examples(40, 2)}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp("tfds"))


def test_tfds_takes_text_and_the_coarsest_class(tfds_dir):
  data = DataConfig(name="tiny_reviews", dir=tfds_dir)
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("bad", "good")
  assert sorted(texts.texts["valid"]) == [
    f"text {i} é {i % 2}" for i in range(6)
  ]
  # The test split has no labels: a tenth of train replaces it.
  assert [len(texts.texts[s]) for s in sources.SPLITS] == [36, 6, 4]
  for split in sources.SPLITS:
    written = [int(text[-1]) for text in texts.texts[split]]
    assert texts.labels[split].tolist() == written


def test_tfds_takes_the_configured_columns(tfds_dir):
  data = DataConfig(name="tiny_reviews", dir=tfds_dir)
  data = dataclasses.replace(data, text_field="title", label_field="fine")
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == tuple("abcdef")
  assert {t.split()[0] for t in texts.texts["train"]} == {"title"}
  written = [int(t.split()[1]) % 6 for t in texts.texts["test"]]
  assert texts.labels["test"].tolist() == written


def test_tfds_for_lm_has_the_unlabelled_split(tfds_dir):
  data = DataConfig(name="tiny_reviews", dir=tfds_dir)
  texts = corpus.load_documents(data)
  assert sorted(texts["test"]) == [f"text {i} é -1" for i in range(6)]


def test_tfds_plain_integers_are_classes_of_train(tfds_dir):
  data = DataConfig(name="tiny_tweets", dir=tfds_dir)
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("0", "4")
  found = sorted(pairs(texts, "test"))
  assert found == [("0", "tweet 0 is 0"), ("4", "tweet 2 is 4")]


def test_tfds_has_pairs_with_scores_or_lists_of_classes(tfds_dir):
  data = DataConfig(name="tiny_similarity", dir=tfds_dir)
  texts = sources.load_texts(data, "regress")
  for split, size in (("train", 16), ("valid", 2), ("test", 2)):
    assert len(texts.texts[split]) == size  # the test split has no scores
    for (premise, hypothesis), score in zip(
      texts.texts[split], texts.labels[split], strict=True
    ):
      assert premise[1:] == hypothesis[1:] == f"{4 * score:.0f}"
  data = dataclasses.replace(data, label_field="kinds", text_field="premise")
  texts = sources.load_texts(data, "multilabel")
  assert texts.label_names == tuple("abcdef")
  for text, row in zip(
    texts.texts["train"], texts.labels["train"], strict=True
  ):
    assert int(text[1:]) == sum(2**j for j in range(6) if row[j])


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_tfds_reads_max_bytes_beside_the_splits_set_aside(tfds_dir, task):
  data = DataConfig(name="tiny_reviews", dir=tfds_dir, max_bytes=200)
  texts = text_files.read(data, task).texts
  # A text is at most 12 bytes.
  assert 188 < sum(len(t.encode()) for t in texts["train"]) <= 200


@pytest.mark.parametrize(
  ("task", "change", "match"),
  [
    ("lm", {"name": ""}, "data.path"),
    (
      "lm",
      {"name": "no_such_set"},
      "no data set 'no_such_set'.*no such file or folder",
    ),
    ("lm", {"name": "broken_reviews"}, "the page has moved"),
    ("lm", {"name": "glue/no_such"}, "'glue/no_such'"),
    ("lm", {"text_field": "body"}, "'body'.*columns are: 'title', 'text'"),
    ("classify", {"name": "tiny_pairs"}, r"\(question, answer\)"),
    ("classify", {"label_field": "stars"}, "no class column stars.*coarse"),
    ("multilabel", {}, "no list of classes column that can be guessed"),
  ],
)
def test_tfds_mistakes_are_refused(tfds_dir, task, change, match):
  fields = {"name": "tiny_reviews", "dir": tfds_dir} | change
  with pytest.raises(ConfigError, match=match) as caught:
    text_files.read(DataConfig(**fields), task)
  assert "\n" not in str(caught.value)


@pytest.mark.skipif(
  bool(importlib.util.find_spec("tensorflow")), reason="TensorFlow is installed"
)
def test_tfds_archive_asks_for_tensorflow(tmp_path):
  data = DataConfig(name="packed_reviews", dir=str(tmp_path))
  with pytest.raises(ConfigError, match="pip install tensorflow"):
    sources.load_texts(data, "classify")


def test_lines_of_a_text_are_texts_of_sentences_kept_whole(tmp_path):
  lines = [f"text number {i}" for i in range(40)]
  path = tmp_path / "texts.txt"
  path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
  found = sources.load_texts(DataConfig(path=str(path)), "embed")
  assert sorted(sum(map(list, found.texts.values()), [])) == sorted(lines)
  assert {s: len(x) for s, x in found.texts.items()} == {
    "train": 32,
    "valid": 4,
    "test": 4,
  }
  assert (found.labels, found.label_names) == (None, ())
  data = DataConfig(path=str(path), max_bytes=128)
  few = sources.load_texts(data, "embed").texts["train"]
  assert 0 < len(few) < 10 and {*few} <= {*lines}


def test_scored_pairs_are_read_by_their_columns(tmp_path):
  path = tmp_path / "sts.tsv"
  rows = "score\tsentence1\tsentence2\n4.5\ta b\tb\n1\tc\td\n"
  path.write_text(rows, encoding="utf-8")
  found = sources.load_scored_pairs(str(path))
  assert (found.firsts, found.seconds) == (["a b", "c"], ["b", "d"])
  assert found.scores.tolist() == [4.5, 1.0]
  path.write_text(rows.replace("4.5", "1"), encoding="utf-8")
  with pytest.raises(ConfigError, match="all 1.0"):
    sources.load_scored_pairs(str(path))
