"""What is read of TFDS, from builders that need no download."""

import importlib.util
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from folding.config import DataConfig
from folding.data import sources
from folding.schema import ConfigError
from tests.data import text_files

FEATURES = {
  "idx": tfds.features.Scalar(np.int32),
  "title": tfds.features.Text(),
  "text": tfds.features.Text(),
  "fine": tfds.features.ClassLabel(names=list("abcdef")),
  "coarse": tfds.features.ClassLabel(names=["bad", "good"]),
}


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """Two class columns, a test split without labels."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description="For a test.",
      features=tfds.features.FeaturesDict(FEATURES),
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
      text = f"text {i} \u00e9 {label}"
      yield (
        i,
        {
          "idx": i,
          "title": f"title {i}",
          "text": text,
          "fine": i % 6,
          "coarse": label,
        },
      )


class TinyTweets(tfds.core.GeneratorBasedBuilder):
  """A plain integer as the class, and a class that train lacks."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"text": tfds.features.Text(), "polarity": np.int32}
    return tfds.core.DatasetInfo(
      builder=self,
      description="For a test.",
      features=tfds.features.FeaturesDict(features),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples([0, 4] * 10),
      "test": self._generate_examples([0, 2, 4]),
    }

  def _generate_examples(self, labels):
    for i, label in enumerate(labels):
      yield i, {"text": f"tweet {i} is {label}", "polarity": label}


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


@pytest.mark.skipif(
  bool(importlib.util.find_spec("tensorflow")), reason="TensorFlow is installed"
)
def test_an_archive_of_tfds_asks_for_tensorflow(tmp_path):
  data = DataConfig(name="packed_reviews", dir=str(tmp_path))
  with pytest.raises(ConfigError, match="pip install tensorflow, which only"):
    sources.load_texts(data, "classify")


def test_tfds_takes_text_and_the_coarsest_class(tmp_path):
  data = DataConfig(name="tiny_reviews", dir=str(tmp_path))
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("bad", "good")
  assert sorted(texts.texts["valid"]) == [
    f"text {i} é {i % 2}" for i in range(6)
  ]
  # The test split has no labels: it is absent, and a tenth of train stands in.
  assert [len(texts.texts[s]) for s in sources.SPLITS] == [36, 6, 4]
  for split in sources.SPLITS:
    written = [int(text[-1]) for text in texts.texts[split]]
    assert texts.labels[split].tolist() == written


def test_tfds_takes_the_columns_asked_for(tmp_path):
  data = DataConfig(name="tiny_reviews", dir=str(tmp_path))
  data.text_field, data.label_field = "title", "fine"
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == tuple("abcdef")
  assert {t.split()[0] for t in texts.texts["train"]} == {"title"}
  written = [int(t.split()[1]) % 6 for t in texts.texts["test"]]
  assert texts.labels["test"].tolist() == written


class TinyPairs(TinyReviews):
  """Two texts a row, and none is called text."""

  def _info(self):
    features = {n: tfds.features.Text() for n in ("question", "answer")}
    features["label"] = FEATURES["coarse"]
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._rows(dl_manager)}

  def _rows(self, _):
    for i in range(20):
      yield i, {"question": f"q {i}", "answer": f"a {i}", "label": i % 2}


def test_tfds_with_two_texts_has_to_be_told_which(tmp_path):
  data = DataConfig(name="tiny_pairs", dir=str(tmp_path))
  with pytest.raises(
    ConfigError, match=r"several columns of text \(question, answer\)"
  ):
    sources.load_texts(data, "classify")
  data.text_field = "answer"
  texts = sources.load_texts(data, "classify").texts
  assert {t[0] for t in texts["train"]} == {"a"}


def test_tfds_for_lm_has_the_unlabelled_test_split(tmp_path):
  data = DataConfig(name="tiny_reviews", dir=str(tmp_path))
  texts = sources.load_texts(data, "lm").texts
  assert sorted(texts["test"]) == [f"text {i} é -1" for i in range(6)]


def test_tfds_plain_integer_classes(tmp_path):
  data = DataConfig(name="tiny_tweets", dir=str(tmp_path))
  texts = sources.load_texts(data, "classify")
  assert texts.label_names == ("0", "4")
  assert sorted(text_files.pairs(texts, "test")) == [
    ("0", "tweet 0 is 0"),
    ("4", "tweet 2 is 4"),  # and no tweet 1 of class 2
  ]


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_tfds_with_max_bytes_has_that_much_to_train_on(tmp_path, task):
  data = DataConfig(name="tiny_reviews", dir=str(tmp_path), max_bytes=200)
  texts = sources.load_texts(data, task).texts
  # Though the test split of "classify" is set aside from train first. A text
  # is at most 12 bytes.
  assert 188 < sum(len(t.encode()) for t in texts["train"]) <= 200


@pytest.mark.parametrize(
  ("task", "change", "match"),
  [
    ("lm", {"name": "no_such_set"}, "no data set 'no_such_set'.*data.path"),
    ("lm", {"name": "broken_reviews"}, "the page has moved; check the name"),
    ("lm", {"name": "glue/no_such"}, "cannot fetch or prepare.*'glue/no_such'"),
    ("lm", {"text_field": "body"}, "'body'.*columns are: title, text"),
    ("classify", {"label_field": "stars"}, "no class column stars.*coarse"),
    ("lm", {"max_bytes": 3}, "max_bytes 3 is too small"),
  ],
)
def test_tfds_mistakes_are_one_line(tmp_path, task, change, match):
  fields = {"name": "tiny_reviews", "dir": str(tmp_path)} | change
  with pytest.raises(ConfigError, match=match) as caught:
    sources.load_texts(DataConfig(**fields), task)
  assert "\n" not in str(caught.value)
