import collections

import numpy as np
import pytest

from folding.config import DataConfig
from folding.data import sources
from folding.schema import ConfigError
from tests.data import text_files

ROWS = [(i % 3, f"text number {i} of {i % 3}") for i in range(60)]


def _tsv(rows):
  return "".join(f"{label}\t{text}\n" for label, text in rows)


def test_one_text_is_cut_in_order_at_line_ends(tmp_path):
  lines = [f"line {i} " + "x" * (i % 7) + "\n" for i in range(1000)]
  (tmp_path / "book.txt").write_text("".join(lines))
  data = DataConfig(path=str(tmp_path / "book.txt"), test_fraction=0.2)
  [train], [valid], [test] = sources.load_texts(data, "lm").texts.values()
  assert train + valid + test == "".join(lines)
  assert train.endswith("\n") and valid.endswith("\n")
  total = sum(map(len, lines))
  # A line is at most 16 characters.
  assert abs(len(train) - 0.7 * total) < 17
  assert abs(len(valid) - 0.1 * total) < 17


@pytest.mark.parametrize("lines", [1, 5])
def test_long_lines_are_cut_where_a_split_would_be_empty(tmp_path, lines):
  text = ("x" * (60_000 // lines - 1) + "\n") * lines
  (tmp_path / "long.txt").write_text(text)
  data = DataConfig(path=str(tmp_path / "long.txt"))
  parts = [p for [p] in sources.load_texts(data, "lm").texts.values()]
  assert "".join(parts) == text
  assert [round(len(p) / 60_000, 2) for p in parts] == [0.8, 0.1, 0.1]


def test_a_missing_test_split_alone_is_set_aside(tmp_path):
  data = text_files.write(tmp_path, train__txt="ab\n" * 100, valid__txt="v\n")
  texts = sources.load_texts(data, "lm").texts
  assert texts["valid"] == ["v\n"]
  assert texts["train"] == ["ab\n" * 90]
  assert texts["test"] == ["ab\n" * 10]


def test_rows_are_dealt_out_by_class_and_alike_each_time(tmp_path):
  rows = ROWS + [(0, f"more {i}") for i in range(40)]
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  texts = sources.load_texts(data, "classify")
  dealt = {s: text_files.pairs(texts, s) for s in sources.SPLITS}
  counts = {
    s: collections.Counter(label for label, _ in dealt[s]) for s in dealt
  }
  assert counts["valid"] == counts["test"] == {"0": 6, "1": 2, "2": 2}
  together = dealt["train"] + dealt["valid"] + dealt["test"]
  assert sorted(together) == sorted((str(a), b) for a, b in rows)
  # In another order of rows each text still lands in the same split.
  data = text_files.write(tmp_path, train__tsv=_tsv(rows[::-1]))
  again = sources.load_texts(data, "classify")
  for split in sources.SPLITS:
    assert text_files.pairs(again, split) == dealt[split][::-1]


@pytest.mark.parametrize("of_both", [0, 50])
def test_equal_texts_stay_in_one_split(tmp_path, of_both):
  rows = [(i // 4 % 2, f"text {i // 4}") for i in range(400)]
  rows += [(1 - i % 2, f"text {i}") for i in range(of_both)]  # and so twice
  texts = sources.load_texts(
    text_files.write(tmp_path, train__tsv=_tsv(rows)), "classify"
  ).texts
  parts = [set(texts[split]) for split in sources.SPLITS]
  assert min(map(len, parts)) >= 10
  assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("often", ["ok", "n/a", "thanks", "good"])
def test_a_text_that_is_most_of_a_class_stays_in_train(tmp_path, often):
  rows = [(0, often)] * 60 + [(0, f"text {i}") for i in range(40)]
  rows += [(1, f"other {i}") for i in range(100)]
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  texts = sources.load_texts(data, "classify")
  for split, count in zip(sources.SPLITS, (80, 10, 10), strict=True):
    assert np.bincount(texts.labels[split]).tolist() == [count, count]
  assert texts.texts["train"].count(often) == 60


def test_max_bytes_cuts_a_stream_at_a_line_end(tmp_path):
  data = text_files.write(
    tmp_path,
    train__jsonl='{"text": "aaaa\\n"}\n{"text": "bb\\ncc\\u00e9\\nddd\\n"}',
    valid__txt="v\nw\n" + "x" * 50,
    test__txt="y" * 9,
  )
  data.max_bytes = 16
  texts = sources.load_texts(data, "lm").texts
  assert texts["train"] == ["aaaa\n", "bb\ncc\u00e9\n"]
  assert texts["valid"] == ["v\n"]
  assert texts["test"] == ["yy"]  # no line end: at the character


def test_max_bytes_keeps_whole_labelled_texts_of_every_class(tmp_path):
  rows = sorted((i % 3, f"{i:02} word é") for i in range(90))  # by class
  data = text_files.write(tmp_path, train__tsv=_tsv(rows))
  full = sources.load_texts(data, "classify")
  data.max_bytes = 300
  texts = sources.load_texts(data, "classify")
  sizes = {
    s: sum(len(t.encode()) for t in texts.texts[s]) for s in sources.SPLITS
  }
  assert 290 <= sizes["train"] <= 300  # a row is 10 bytes
  assert 27 <= sizes["valid"] <= 37
  assert set(texts.labels["train"].tolist()) == {0, 1, 2}
  assert set(text_files.pairs(texts, "train")) <= set(
    text_files.pairs(full, "train")
  )


def test_a_text_beyond_max_bytes_takes_no_other_with_it(tmp_path):
  rows = [(i % 2, f"word {i:02}") for i in range(40)]  # 7 bytes each
  for n in range(100, 120):  # whatever its hash is
    folder = tmp_path / str(n)
    folder.mkdir()
    tsv = _tsv([(0, "long " * n), *rows])
    data = text_files.write(folder, train__tsv=tsv)
    data.max_bytes, data.valid_fraction, data.test_fraction = 400, 0.0, 0.0
    texts = sources.load_texts(data, "classify").texts["train"]
    assert sorted(texts) == sorted(text for _, text in rows)


def test_max_bytes_without_room_for_a_text_is_told(tmp_path):
  tsv = _tsv([(i % 2, f"{i:02}" + "x" * 40) for i in range(40)])
  data = text_files.write(tmp_path, train__tsv=tsv, valid__tsv=tsv)
  data.max_bytes = 300
  message = "max_bytes leaves no text of valid, which gets 37 bytes"
  with pytest.raises(ConfigError, match=message):
    sources.load_texts(data, "classify")


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
  texts = sources.load_texts(data, "lm").texts
  sizes = {split: sum(map(len, texts[split])) for split in texts}
  assert sizes == {"train": 1_003_854, "valid": 55_770, "test": 55_770}


def test_python_stdlib_gives_source_or_topics(stdlib_dir):
  data = DataConfig(dir=stdlib_dir)
  lm = sources.load_texts(data, "lm")
  assert any("def " in text for text in lm.texts["test"])
  assert lm.labels is None
  topics = sources.load_texts(data, "classify")
  assert len(topics.label_names) == 8
  assert np.ptp(np.bincount(topics.labels["valid"], minlength=8)) == 0
  assert len(topics.texts["valid"]) == len(topics.labels["valid"]) > 0


def test_setting_aside_everything_is_an_error(tmp_path):
  data = text_files.write(tmp_path, train__tsv="0\tonly\n1\tonly\n")
  data.valid_fraction = 0.9
  with pytest.raises(ConfigError, match="no text is left to train on"):
    sources.load_texts(data, "classify")
