import csv
import json

import numpy as np
import pytest

from folding.config import DataConfig
from folding.data import sources
from folding.schema import ConfigError
from tests.data import text_files


def test_tsv_folder_is_read_as_written(tmp_path):
  quoted = "0\t\"an open quote\n1\tit 's\u2028one line\x85still\n"
  data = text_files.write(
    tmp_path, train__tsv=quoted, dev__tsv="1\tv\n", test__tsv="0\tt\r\n1\tu"
  )
  texts = sources.load_texts(data, "classify")
  assert texts.texts == {
    "train": ['"an open quote', "it 's\u2028one line\x85still"],
    "valid": ["v"],
    "test": ["t", "u"],
  }
  labels = {split: ids.tolist() for split, ids in texts.labels.items()}
  assert labels == {"train": [0, 1], "valid": [1], "test": [0, 1]}
  assert texts.labels["train"].dtype == np.int32
  assert texts.label_names == ("0", "1")


@pytest.mark.parametrize("rows", ["0\ta\n2\tb\n", "up\ta\nflat\tb\n"])
def test_labels_txt_names_ids_in_its_order(tmp_path, rows):
  names = "up\ndown\nflat\n"
  data = text_files.write(tmp_path, train__tsv=rows, labels__txt=names)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("up", "down", "flat")
  assert texts.labels["train"].tolist() == [0, 2]


@pytest.mark.parametrize(
  ("labels", "names"),
  [(("b", "a", "c"), ("a", "b", "c")), (("10", "9", "2"), ("2", "9", "10"))],
  ids=["words", "numbers"],
)
def test_labels_without_a_list_are_numbered_in_order(tmp_path, labels, names):
  data = text_files.write(
    tmp_path, train__tsv="".join(f"{x}\ttext\n" for x in labels)
  )
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == names
  assert texts.labels["train"].tolist() == [names.index(x) for x in labels]


def test_csv_reads_quoted_fields_and_guesses_columns(tmp_path):
  content = 'label,id,sentence\nyes,1,"a, b\r\nand c"\nno,2,"say ""x"""\n'
  data = text_files.write(tmp_path, train__csv=content)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [
    ("yes", "a, b\r\nand c"),
    ("no", 'say "x"'),
  ]


def test_csv_takes_the_columns_asked_for(tmp_path):
  data = text_files.write(
    tmp_path, train__csv="text,body,stars\nt,b1,1\nt,b2,5\n"
  )
  data.valid_fraction = data.test_fraction = 0.0
  data.text_field, data.label_field = "body", "stars"
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("1", "b1"), ("5", "b2")]


@pytest.mark.parametrize(
  ("header", "text"),
  [("Text,LABEL,Title", "t"), ("TEXT,label,text", "u"), ("Text,Label", "t")],
)
def test_a_header_may_be_in_capitals(header, text, tmp_path):
  rows = [header, *("t,yes,u", "t,no,u")]
  content = "\n".join(
    ",".join(r.split(",")[: header.count(",") + 1]) for r in rows
  )
  data = text_files.write(tmp_path, train__csv=content)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("yes", text), ("no", text)]


def test_jsonl_holds_to_the_column_of_its_first_row(tmp_path):
  lines = [
    {"label": 1, "body": "b1"},
    {"title": "t2", "label": 0, "body": "b2"},
  ]
  content = "\n".join(json.dumps(line) for line in lines)
  data = text_files.write(tmp_path, train__jsonl=content)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("1", "b1"), ("0", "b2")]


def test_a_column_of_numbers_is_no_text(tmp_path):
  rows = "id,review,label,stars\n1,bad,0,4.5\n2,7,1,\n3,good,1,-1e3\n"
  data = text_files.write(tmp_path, train__csv=rows)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  expected = [("0", "bad"), ("1", "7"), ("1", "good")]
  assert text_files.pairs(texts, "train") == expected


def test_a_column_called_text_is_text_whatever_it_holds(tmp_path):
  rows = "text,label,note\n123,a,x\n456,b,y\n"
  data = text_files.write(tmp_path, train__csv=rows)
  data.valid_fraction = data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("a", "123"), ("b", "456")]


def test_empty_lines_are_no_rows(tmp_path):
  data = text_files.write(
    tmp_path,
    train__jsonl='\n{"text": "a", "label": 0}\n\n{"text": "b", "label": 1}\n\n',
    valid__tsv="0\tc\r\n\r\n1\td\n\n",
  )
  data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("0", "a"), ("1", "b")]
  assert text_files.pairs(texts, "valid") == [("0", "c"), ("1", "d")]


def test_a_class_may_be_called_label(tmp_path):
  rows = "label\ta\nother\tb\nlabel\tc\n"
  data = text_files.write(tmp_path, train__tsv=rows)
  assert sources.load_texts(data, "classify").label_names == ("label", "other")


def test_lm_reads_txt_whole_and_rows_without_labels(tmp_path):
  data = text_files.write(
    tmp_path,
    train__txt="one\r\n\n two\n",
    valid__jsonl='{"text": "three"}\n{"text": "four"}\n',
    test__tsv="0\tfive\n",
  )
  texts = sources.load_texts(data, "lm")
  assert texts.texts == {
    "train": ["one\r\n\n two\n"],
    "valid": ["three", "four"],
    "test": ["five"],
  }
  assert texts.labels is None
  assert texts.label_names == ()


def test_lm_does_not_read_labels(tmp_path):
  data = text_files.write(tmp_path, train__txt="one", labels__txt="a\na\n")
  assert sources.load_texts(data, "lm").labels is None


def test_lm_takes_rows_without_the_label_that_others_have(tmp_path):
  lines = [{"text": "one", "label": 1}, {"text": "two"}]
  content = "\n".join(json.dumps(line) for line in lines)
  data = text_files.write(tmp_path, train__jsonl=content)
  data.valid_fraction = data.test_fraction = 0.0
  assert sources.load_texts(data, "lm").texts["train"] == ["one", "two"]
  with pytest.raises(ConfigError, match="jsonl:2.* no label"):
    sources.load_texts(data, "classify")


def test_csv_and_jsonl_take_long_texts_and_spaced_labels(tmp_path):
  long = "x" * 200_000  # the csv module stops at 131,072 unless told otherwise
  data = text_files.write(
    tmp_path,
    train__csv=f"text,label\n{long},1\nb, 0\n",
    valid__jsonl='{"text": "c", "label": " 1"}\n',
  )
  data.test_fraction = 0.0
  texts = sources.load_texts(data, "classify")
  assert text_files.pairs(texts, "train") == [("1", long), ("0", "b")]
  assert text_files.pairs(texts, "valid") == [("1", "c")]
  assert csv.field_size_limit() > 131_072  # which other readers may need


def test_numbers_that_are_equal_have_one_order(tmp_path):
  labels = ["1", "001", "2", "01", "0"]
  rows = "".join(f"{label}\ttext {label}\n" for label in labels)
  data = text_files.write(tmp_path, train__tsv=rows)
  names = sources.load_texts(data, "classify").label_names
  assert names == ("0", "001", "01", "1", "2")
  many = "1" * 5000  # more digits than Python turns into a number
  data = text_files.write(tmp_path, train__tsv=rows + f"{many}\tlong\n")
  assert many in sources.load_texts(data, "classify").label_names


def test_a_class_that_max_bytes_takes_away_is_a_class(tmp_path):
  rows = [f"c{i % 21}\ttext number {i}" for i in range(3000)]
  data = text_files.write(tmp_path, train__tsv="\n".join(rows))
  data.max_bytes = 300
  texts = sources.load_texts(data, "classify")
  assert len({label for label, _ in text_files.pairs(texts, "train")}) < 21
  assert len(texts.label_names) == 21


GOOD = {"train__tsv": "0\ta\n1\tb\n", "valid__tsv": "0\tc\n"}


@pytest.mark.parametrize(
  ("files", "match"),
  [
    ({}, "no training text; name it train.*txt, .tsv, .csv, .jsonl"),
    (GOOD | {"train__csv": "text\n"}, "several train files .*keep one"),
    ({"train__txt": "text"}, "train.txt has no labels.*use .tsv"),
    ({"train__tsv": ""}, "train.tsv is empty"),
    ({"train__tsv": " \n\n"}, "train.tsv is empty"),
    ({"train__tsv": b"0\tab\xff"}, r"train.tsv is not UTF-8 \(byte 4\)"),
    ({"train__tsv": "0\ta\nb\n"}, "train.tsv:2: no tab; want label<TAB>text"),
    ({"train__tsv": "0\ta\n\tb\n"}, "train.tsv:2: the row has no label"),
    ({"train__tsv": "Label\ttext\n0\ta\n"}, "train.tsv:1: .* like a header"),
    (
      {"train__tsv": "sentence\tlabel\nso good\t1\nso bad\t0\n"},
      "train.tsv:1: .* a header.*labels come after texts; put them before",
    ),
    (
      {"train__jsonl": '{"label": 1, "id": "x", "text": null}\n'},
      "train.jsonl:1 has no text column 'text'",
    ),
    (
      {"train__csv": "id,body,label\na1,a,0\n"},
      r"several columns of text \(id, body\); say which in data.text_field",
    ),
    (
      {"train__jsonl": '{"id": "a1", "label": 0, "body": "a"}\n'},
      r"train.jsonl:1 has several columns of text \(id, body\)",
    ),
    (
      {"train__csv": "text,label,text\na,0,b\n"},
      "train.csv: two columns are called 'text'; rename one",
    ),
    (
      {"train__csv": "text;label\na;0\n"},
      "train.csv: columns are separated by ';'; save it with commas",
    ),
    ({"train__tsv": "0\ta\n0\t \n"}, "train.tsv:2: the text is empty"),
    (GOOD | {"valid__tsv": "0\ta\n7\tb\n"}, "valid.tsv:2: label '7'.*train"),
    # Not an id either: ids count only with a labels.txt.
    (
      {"train__tsv": "x\ta\ny\tb\n", "valid__tsv": "0\tb\n"},
      "valid.tsv:1: label '0' is not one of the 2 of train: x, y",
    ),
    (
      GOOD | {"train__tsv": "0\ta\n2\tb\n", "labels__txt": "a\nb\n"},
      "train.tsv:2: label '2'.*labels.txt",
    ),
    # Names that are numbers: ids would be a second name of another class.
    (
      {"train__tsv": "0\ta\n1\tb\n", "labels__txt": "1\n2\n"},
      "train.tsv:1: label '0'.*labels.txt",
    ),
    ({"train__tsv": "x\ta\nx\tb\n"}, "one class, x; a classifier needs two"),
    (
      {"train__jsonl": '{"text": "a", "label": " "}\n'},
      "train.jsonl:1: the row has no label",
    ),
    (GOOD | {"labels__txt": "a\n\n \nb\na\n"}, "labels.txt names 'a' twice"),
    ({"train__csv": "text,label\n"}, "train.csv has a header and no rows"),
    ({"train__csv": "text,label\na,0\nb\n"}, "train.csv:3: .* 2 columns"),
    ({"train__csv": "text,label\na,0,1\n"}, "train.csv:2: .* 2 columns"),
    (
      {"train__csv": 'text,label\n"a"b,1\n'},
      "train.csv: not valid CSV after line 1",
    ),
    ({"train__csv": "text,kind\na,0\n"}, "train.csv:2: the row has no label"),
    ({"train__jsonl": '{"text": "a"\n'}, "train.jsonl:1: not JSON"),
    (
      {"train__jsonl": '{"text": "a \\ud83d b", "label": 1}\n'},
      "train.jsonl:1: half a character, which UTF-8 cannot say",
    ),
    ({"train__jsonl": '["a"]\n'}, "train.jsonl:1: not a JSON object"),
    ({"train__jsonl": '{"text": "a"}\n'}, "train.jsonl:1: .* no label"),
    ({"train__jsonl": '{"label": 1}\n'}, "train.jsonl:1 has no text column"),
    (
      {"train__jsonl": '{"text": "a", "label": 1}\n{"label": 1}\n'},
      "train.jsonl:2 has no text column 'text'",
    ),
  ],
)
def test_bad_files_are_one_line(tmp_path, files, match):
  with pytest.raises(ConfigError, match=match) as caught:
    sources.load_texts(text_files.write(tmp_path, **files), "classify")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("field", "match"),
  [
    ("text_field", r"no text column 'x' \(data.text_field\).*: text$"),
    ("label_field", r"no label column 'x' \(data.label_field\).*text, label"),
  ],
)
def test_wrong_csv_column_lists_the_columns(tmp_path, field, match):
  data = text_files.write(tmp_path, train__csv="text,label\na,0\n")
  setattr(data, field, "x")
  with pytest.raises(ConfigError, match=match):
    sources.load_texts(data, "classify")


def test_missing_path_is_an_error(tmp_path):
  data = DataConfig(path=str(tmp_path / "none"))
  with pytest.raises(ConfigError, match="none does not exist"):
    sources.load_texts(data, "lm")


def test_unknown_extension_lists_the_known(tmp_path):
  (tmp_path / "a.pdf").write_text("text")
  data = DataConfig(path=str(tmp_path / "a.pdf"))
  with pytest.raises(ConfigError, match="use one of .txt, .tsv, .csv, .jsonl"):
    sources.load_texts(data, "lm")
