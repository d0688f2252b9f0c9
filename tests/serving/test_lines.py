"""Lines that the command line reads and prints."""

import dataclasses
import io
import json
import types

import numpy as np
import pytest

from folding.errors import ConfigError
from folding.serving import lines as lines_lib
from folding.serving.predict import Prediction
from tests.serving import models


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_open_lines_keeps_all_but_line_ends_and_the_first_mark(
  tmp_path, monkeypatch, where
):
  # A byte order mark in a later line is text.
  raw = "\ufeffone\r\n\n\ufefftwo\u2028\x0btwo\n  three\t".encode()
  path = "-" if where == "stdin" else str(tmp_path / "t.txt")
  (tmp_path / "t.txt").write_bytes(raw)
  stdin = types.SimpleNamespace(buffer=io.BytesIO(raw))
  monkeypatch.setattr("sys.stdin", stdin if where == "stdin" else None)
  expected = ["one", "", "\ufefftwo\u2028\x0btwo", "  three\t"]
  with lines_lib.open_lines(path) as lines:
    assert list(lines) == expected


def test_open_lines_splits_at_the_line_ends_of_old_macs(tmp_path):
  (tmp_path / "t.txt").write_bytes(b"one\rtwo\r")
  with lines_lib.open_lines(str(tmp_path / "t.txt")) as lines:
    assert list(lines) == ["one", "two"]


def test_open_lines_names_what_it_cannot_read(tmp_path, monkeypatch):
  (tmp_path / "t.txt").write_bytes(b"one\n\xff\n")
  with lines_lib.open_lines(str(tmp_path / "t.txt")) as lines:
    assert next(lines) == "one"
    with pytest.raises(ConfigError, match="t.txt, line 2, is not UTF-8"):
      next(lines)
  (tmp_path / "t.txt").write_bytes(b"")
  with lines_lib.open_lines(str(tmp_path / "t.txt")) as lines:
    with pytest.raises(ConfigError, match="no text in .*t.txt"):
      next(lines)
  monkeypatch.setattr("sys.stdin", None)  # as in a daemon
  for path, message in (("-", "no standard input"), ("t.csv", "t.csv: a text")):
    with (
      pytest.raises(ConfigError, match=message),
      lines_lib.open_lines(path),
    ):
      pass


_ANSWERS = [
  Prediction("a\tb", "bad", np.array([0.75, 0.25], np.float32)),
  Prediction("é", "so\tso", np.array([0, 1], np.float32)),
]


def _lines(form, answers=_ANSWERS, labels=("bad", "so\tso"), **fields):
  """Returns the lines of answers of a model with these fields."""
  made = models.make()
  task, pair = fields.get("task", "classify"), fields.get("text_field")
  loaded = dataclasses.replace(made, task=task, pair=pair, labels=labels)
  return list(lines_lib.of_predictions(loaded, answers, form))


def test_tsv_has_a_header_and_a_line_per_text():
  assert _lines("tsv") == [
    "label\tbad\tso so",
    "bad\t0.750000\t0.250000",
    "so so\t0.000000\t1.000000",
  ]


def test_jsonl_has_text_label_and_probabilities():
  lines = _lines("jsonl")
  assert "é" in lines[1]
  assert [json.loads(line) for line in lines] == [
    {
      "text": "a\tb",
      "label": "bad",
      "probabilities": {"bad": 0.75, "so\tso": 0.25},
    },
    {
      "text": "é",
      "label": "so\tso",
      "probabilities": {"bad": 0.0, "so\tso": 1.0},
    },
  ]


def test_scores_and_several_labels_have_columns_of_their_own():
  score = [Prediction(("a", "b"), 2.5, np.zeros(0, np.float32))]
  options = {"task": "regress", "text_field": ("p", "q"), "labels": ("score",)}
  assert _lines("tsv", score, **options) == ["score", "2.500000"]
  [line] = _lines("jsonl", score, **options)
  assert json.loads(line) == {"p": "a", "q": "b", "score": 2.5}
  share = np.array([0.75, 0.625], np.float32)
  both = [Prediction("t", ("x", "y"), share)]
  options = {"task": "multilabel", "labels": ("x", "y")}
  assert _lines("tsv", both, **options) == [
    "labels\tx\ty",
    "x,y\t0.750000\t0.625000",
  ]
  [line] = _lines("jsonl", both, **options)
  assert json.loads(line) == {
    "text": "t",
    "labels": ["x", "y"],
    "probabilities": {"x": 0.75, "y": 0.625},
  }


def test_pairs_need_one_tab_per_line():
  lines = lines_lib.pairs(["x\ty", "x"], ("a", "b"))
  assert next(lines) == ("x", "y")
  with pytest.raises(ConfigError, match="line 2 has 1 texts .*a<TAB>b"):
    next(lines)
