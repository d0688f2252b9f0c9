import io
import json

import jax
import numpy as np
import pytest

from folding.schema import ConfigError
from folding.serving import predict as predict_lib
from tests.serving import models


@pytest.fixture(scope="module")
def model():
  made = models.with_zeros(models.make(), [7, 9])
  texts = [text for text in models.random_texts(23) if text]
  found = np.array([models.logits(made, text) for text in texts])
  made.params["head"]["bias"] -= np.median(found, axis=0)  # so that all occur
  return made


def _alone(model, text):
  """Returns the probabilities of a text by itself, in float64."""
  z = np.asarray(models.logits(model, text), np.float64)
  p = np.exp(z - z.max())
  return p / p.sum()


@pytest.mark.parametrize(
  ("batch_size", "at_once"), [(1, True), (4, True), (5, False), (64, False)]
)
def test_predictions_are_those_of_each_text_alone(model, batch_size, at_once):
  texts = models.random_texts(23)
  texts[3] = texts[11] = ""
  found = list(
    predict_lib.predict(model, texts, batch_size=batch_size, at_once=at_once)
  )
  assert [one.text for one in found] == texts
  for one in found:
    expected = _alone(model, one.text)
    # Padding and rows of others: float32 sums in another order.
    np.testing.assert_allclose(one.probabilities, expected, atol=2e-6)
    assert one.label == model.labels[int(expected.argmax())]
  assert {one.label for one in found} == set(model.labels)


def test_a_text_that_gives_no_token_is_read_as_an_end():
  model = models.make()
  plain = models.word_pieces()
  values = json.loads(plain) | {"post_processor": None}
  bare = models.with_tokenizer(model, json.dumps(values))
  [empty, other] = predict_lib.predict(bare, ["", "the cat"], batch_size=2)
  np.testing.assert_allclose(empty.probabilities, _alone(bare, ""), atol=2e-6)
  assert np.abs(empty.probabilities - other.probabilities).max() > 1e-3


def test_a_long_text_is_cut_inside_its_frame(model):
  cut = "the cat " * 19  # 38 words, [CLS] and [SEP]
  [long, short] = predict_lib.predict(model, [cut + "dog ran", cut])
  np.testing.assert_array_equal(long.probabilities, short.probabilities)


def test_few_shapes_are_compiled(model, caplog):
  texts = models.random_texts(200)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    list(predict_lib.predict(model, texts, batch_size=8))
  compiled = [
    r for r in caplog.messages if r.startswith("Compiling jit(forward)")
  ]
  assert 1 <= len(compiled) <= 3  # buckets of 16, 32 and 40 tokens


def test_answers_come_before_the_input_ends(model):
  taken = []

  def texts():
    for i in range(9):
      taken.append(i)
      yield "the cat"

  answers = predict_lib.predict(model, texts(), batch_size=3, at_once=True)
  next(answers)
  assert len(taken) == 3


def test_numbers_that_are_none_are_no_answer():
  damaged = models.make()
  damaged.params["head"]["bias"] += np.nan
  with pytest.raises(
    ConfigError, match=r"gives no numbers \(NaN\); its weights"
  ):
    list(predict_lib.predict(damaged, ["the cat"]))


def test_no_text_is_no_answer(model):
  assert list(predict_lib.predict(model, [])) == []


@pytest.mark.parametrize("size", [0, -1, 10**12])
def test_a_batch_of_no_or_of_all_too_many_texts_is_refused(model, size):
  with pytest.raises(ConfigError, match=f"must be 1 to 65,536; it is {size}"):
    predict_lib.predict(model, ["a"], batch_size=size)


def test_a_language_model_is_refused():
  with pytest.raises(ConfigError, match="has no classes to predict"):
    predict_lib.predict(models.make("lm"), ["a"])


def test_lines_are_read_as_they_are(tmp_path):
  raw = "\ufeffone\r\n\ntwo\u2028\x0btwo\n  three\t".encode()
  (tmp_path / "t.txt").write_bytes(raw)
  expected = ["one", "", "two\u2028\x0btwo", "  three\t"]
  for path in (str(tmp_path / "t.txt"), "-"):
    with predict_lib.open_lines(path, io.BytesIO(raw)) as lines:
      assert list(lines) == expected


def test_a_line_that_is_no_text_is_named(tmp_path):
  (tmp_path / "t.txt").write_bytes(b"one\n\xff\n")
  with predict_lib.open_lines(str(tmp_path / "t.txt"), []) as lines:
    assert next(lines) == "one"
    with pytest.raises(ConfigError, match="t.txt, line 2, is not UTF-8"):
      next(lines)


_ANSWERS = [
  predict_lib.Prediction("a\tb", "bad", np.array([0.75, 0.25], np.float32)),
  predict_lib.Prediction("é", "so\tso", np.array([0, 1], np.float32)),
]


def test_tsv_has_a_header_and_one_line_a_text():
  assert list(predict_lib.tsv_lines(_ANSWERS, ("bad", "so\tso"))) == [
    "label\tbad\tso so",
    "bad\t0.750000\t0.250000",
    "so so\t0.000000\t1.000000",
  ]


def test_jsonl_has_text_label_and_probabilities():
  lines = list(predict_lib.jsonl_lines(_ANSWERS, ("bad", "so\tso")))
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
