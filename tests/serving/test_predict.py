import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import folding
from folding import config as c
from folding.errors import ConfigError
from folding.serving import batched
from folding.serving import predict as predict_lib
from folding.training import compress_trained as pipeline
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


@pytest.mark.parametrize(("batch_size", "at_once"), [(4, True), (5, False)])
def test_prediction_is_that_of_the_text_alone(model, batch_size, at_once):
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


def test_model_predicts_what_the_function_yields(model):
  texts = models.random_texts(5)
  found = model.predict(texts, batch_size=4)
  assert [one.label for one in found] == [
    model.labels[int(_alone(model, text).argmax())] for text in texts
  ]


@pytest.mark.parametrize("task", ["regress", "multilabel"])
def test_scores_and_several_labels_of_a_text(task):
  model = models.make(task)
  texts = ["the cat", "a dog ran to the mat"]
  for one in predict_lib.predict(model, texts, batch_size=2):
    logits = models.logits(model, one.text)
    if task == "regress":
      assert one.label == pytest.approx(float(logits[0]), abs=2e-6)
      continue
    expected = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    np.testing.assert_allclose(one.probabilities, expected, atol=2e-6)
    named = [x for x, p in zip(model.labels, expected, strict=True) if p > 0.5]
    assert list(one.label) == named


def test_pairs_are_read_with_their_segments():
  shape = c.bert(**models.SHAPE, segments=2)
  model = models.make(model=shape)
  model = dataclasses.replace(model, pair=("a", "b"))
  pair = ("the cat", "a dog ran")
  # The shorter pair comes first in the batch.
  [one, _] = predict_lib.predict(model, [pair, ("a", "a")], batch_size=2)
  tokenizer = model.tokenizer
  ids = [tokenizer.encode_batch([text], 9)[0].tolist() for text in pair]
  joined = np.array([[*ids[0], *ids[1][1:]]])
  types = (np.arange(joined.size) >= len(ids[0]))[None].astype(int)
  apply = jax.jit(model.module.apply, static_argnums=3)
  logits = apply({"params": model.params}, joined, None, True, types)
  expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
  np.testing.assert_allclose(one.probabilities, expected, atol=2e-6)
  for wrong in ("the cat", None, (), ("the cat",), ("a", None), (None, "a")):
    with pytest.raises(ConfigError, match="reads pairs .a and b.") as caught:
      list(predict_lib.predict(model, iter([wrong])))
    assert repr(wrong) in str(caught.value)
  for wrong in (pair, None):  # None: a missing value, which types exclude
    with pytest.raises(ConfigError, match=re.escape(f"{wrong!r} is not")):
      list(predict_lib.predict(models.make(), iter(["the cat", wrong])))


def test_text_without_tokens_is_read_as_an_end():
  model = models.make()
  plain = models.word_pieces()
  values = json.loads(plain) | {"post_processor": None}
  bare = models.with_tokenizer(model, json.dumps(values))
  [empty, other] = predict_lib.predict(bare, ["", "the cat"], batch_size=2)
  np.testing.assert_allclose(empty.probabilities, _alone(bare, ""), atol=2e-6)
  assert np.abs(empty.probabilities - other.probabilities).max() > 1e-3


def test_long_text_is_cut_inside_its_frame(model):
  cut = "the cat " * 19  # 38 words, [CLS] and [SEP]
  [long, short] = predict_lib.predict(model, [cut + "dog ran", cut])
  np.testing.assert_array_equal(long.probabilities, short.probabilities)


def test_predict_compiles_few_shapes(model, caplog):
  texts = models.random_texts(200)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    for _ in range(2):
      list(predict_lib.predict(model, texts, batch_size=8))
  compiled = [
    r for r in caplog.messages if r.startswith("Compiling jit(forward)")
  ]
  assert 1 <= len(compiled) <= 3  # buckets of 16, 32 and 40 tokens


@pytest.mark.parametrize(("at_once", "read"), [(True, 3), (False, 9)])
def test_predict_sorts_texts_of_several_batches_unless_at_once(
  model, at_once, read
):
  taken = []

  def texts():
    for i in range(9):
      taken.append(i)
      yield "the cat"

  answers = predict_lib.predict(model, texts(), batch_size=3, at_once=at_once)
  next(answers)
  assert len(taken) == read


def test_damaged_weights_are_refused():
  damaged = models.make("multilabel")
  damaged.params["head"]["bias"][0] = np.nan  # one of the probabilities
  with pytest.raises(ConfigError, match="NaN"):
    list(predict_lib.predict(damaged, ["the cat"]))


def test_predict_refuses_what_it_cannot_do(model):
  for size in (0, 10**12, "3"):
    with pytest.raises(ConfigError, match=f"1 to 65,536; it is {size!r}"):
      predict_lib.predict(model, ["a"], batch_size=size)
  for call in (predict_lib.predict, folding.compress):
    with pytest.raises(ConfigError, match="one text"):
      call(model, "the cat")
  with pytest.raises(ConfigError, match="no classes to predict"):
    predict_lib.predict(models.make("lm"), ["a"])


@pytest.mark.parametrize("mark", ["\t", " "])
def test_predict_of_lines_with_labels_warns_once(model, caplog, mark):
  texts = [f"{label}{mark}the cat" for label in model.labels] * 2
  list(predict_lib.predict(model, texts, batch_size=2, at_once=True))
  assert len(caplog.messages) == (mark == "\t")


def test_predict_of_some_lines_with_labels_does_not_warn(model, caplog):
  texts = ["the cat", *(f"{label}\tthe cat" for label in model.labels)]
  list(predict_lib.predict(model, texts))
  assert not caplog.messages


def test_compress_fits_evenly_spaced_pairs_with_their_segments(monkeypatch):
  shape = c.bert(**models.SHAPE, segments=2)
  dense = c.FoldConfig(groups=0, values="dense")
  model = models.make(model=shape, fold=dense)
  model = dataclasses.replace(model, pair=("a", "b"))
  pairs = [("the cat", "a dog ran to the barn"), ("a", "a"), ("cat", "old")]
  pairs += pairs[1:2]
  seen = []

  def compress_sizes(sizes, model, batches, usage_V, **_):
    seen.extend(batches)
    yield model, []

  monkeypatch.setattr(pipeline, "compress_sizes", compress_sizes)
  folding.compress(model, pairs, max_texts=2)
  rows = model.tokenizer.encode_rows(pairs[::2], 40)
  [batch] = seen
  sizes = [row.size for row in rows.ids]
  # The shorter pair comes first.
  assert batch["mask"].sum(1).tolist() == sorted(sizes)
  seconds = [
    row.size - n for row, n in zip(rows.ids, rows.seconds, strict=True)
  ]
  assert batch["segments"].sum(1).tolist() == sorted(seconds)
  with pytest.raises(ConfigError, match="reads pairs"):
    folding.compress(model, ["the cat", "a dog"])


def test_compress_names_weights_that_are_not_finite():
  dense = c.FoldConfig(groups=0, values="dense")
  damaged = models.make(model=c.bert(**models.SHAPE), fold=dense)
  damaged.params["blocks_1"]["mlp"]["up"]["kernel"][0, 0] = np.nan
  with pytest.raises(ConfigError, match="blocks_1/mlp/up/kernel is not finite"):
    folding.compress(damaged, ["the cat", "a dog"])


def test_long_texts_share_a_batch_with_fewer():
  sizes = [3, 2000, 700, 5, 500, 9, 4096]
  rows = [np.zeros(size, np.int32) for size in sizes]
  buckets = [8, 16, 512, 1024, 2048, 4096]
  found = list(batched._batches(rows, buckets, 4))
  assert sorted(np.concatenate([at for at, _ in found])) == [*range(7)]
  for members, bucket in found:
    assert max(sizes[i] for i in members) <= bucket
    assert len(members) * bucket <= max(bucket, 4 * 512)
