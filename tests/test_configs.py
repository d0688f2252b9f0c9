"""Files of configs/ that read TFDS data sets: the right columns, and a run."""

import dataclasses

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

# Registers the text builders.
import tensorflow_datasets.text

from configs import classify, lm, long_lm, small_lm
from folding import config as config_lib
from folding.data import sources
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.training import loop
from folding.typed import edited

LM_NAMES = ("tiny_shakespeare", "lm1b", "wiki40b")
COLUMNS = {  # by the description of each data set in the catalog of TFDS
  "trec": ("text", "label-coarse"),
  "ag_news_subset": ("description", "label"),
  "imdb_reviews": ("text", "label"),
  "yelp_polarity_reviews": ("text", "label"),
  "glue/sst2": ("sentence", "label"),
  "glue/cola": ("sentence", "label"),
  "sentiment140": ("text", "polarity"),
  "clinc_oos": ("text", "intent"),
}
CASES = [
  *((lm, "lm", name, "text", None) for name in LM_NAMES),
  *((classify, "classify", name, *COLUMNS[name]) for name in COLUMNS),
]


@pytest.mark.parametrize("module", [lm, classify], ids=["lm", "classify"])
def test_config_file_lists_the_names_tested_here(module):
  listed = module.__doc__.split("NAME is ")[1].split(", any other")[0]
  names = {name.strip() for name in listed.replace("\n", " ").split(",")}
  tested = {case[2] for case in CASES if case[0] is module}
  assert names == tested | {"python_stdlib"}


def _twin(name: str, text: str, label: str | None) -> type:
  """Registers a data set with the columns of another.

  Each text begins with its column's name; only the label column varies.
  """
  real = tfds.builder(name).info.features
  assert text in real
  assert label is None or label in real

  def info(self):
    features = tfds.features.FeaturesDict(dict(real.items()))
    return tfds.core.DatasetInfo(
      builder=self, description="For a test.", features=features
    )

  def value(column, feature, i):
    if isinstance(feature, tfds.features.Text):
      return f"{column} {i}"
    return i % 2 if column == label else 0

  def examples():
    for i in range(40):
      yield i, {column: value(column, f, i) for column, f in real.items()}

  methods = {
    "VERSION": tfds.core.Version("1.0.0"),
    "_info": info,
    "_split_generators": lambda self, _: {"train": examples()},
    "_generate_examples": lambda self: examples(),
  }
  # Each of its own name, under which TFDS finds it.
  unique = "Twin" + "".join(c for c in name.title() if c.isalnum())
  return type(unique, (tfds.core.GeneratorBasedBuilder,), methods)


@pytest.mark.parametrize(
  ("module", "task", "name", "text", "label"),
  CASES,
  ids=[case[2] for case in CASES],
)
def test_columns_are_the_text_and_its_class(
  module, task, name, text, label, tmp_path
):
  data = config_lib.resolve(module.get_config(name)).data
  builder = _twin(data.name, text, label)(
    data_dir=str(tmp_path), file_format="array_record"
  )
  builder.download_and_prepare()
  data = dataclasses.replace(data, name=builder.name, dir=str(tmp_path))
  texts = sources.load_texts(data, task)
  rows = texts.texts["train"]
  assert {row.split()[0] for row in rows} == {text}
  if label:
    written = [int(row.split()[1]) % 2 for row in rows]
    np.testing.assert_array_equal(texts.labels["train"], written)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "guess"), [(lm, 300), (classify, 8)])
def test_config_file_trains(module, guess, tmp_path):
  config = module.get_config()
  config = edited(
    config,
    {
      "data.max_bytes": 60_000,
      "data.vocab_size": 300,
      "data.length": 16,
      "data.batch_size": 8,
      "model.num_layers": 1,
      "model.width": 32,
      "model.num_heads": 4,
      "train.steps": 2,
      "train.eval_every": 2,
      "train.eval_batches": 1,
    },
  )
  result = loop.run(config, str(tmp_path / "run"))
  assert result["finished"]
  # An untrained model guesses among all tokens or classes.
  assert result["test"]["loss"] == pytest.approx(np.log(guess), abs=0.5)
  overall = result["parameters"]["overall"]
  neuron = 2 * 32 + 1  # the last neuron may be one too many
  assert -1 <= overall["stored"] - 0.3 * overall["dense"] <= neuron


def test_long_config_is_valid_with_and_without_compression():
  for dense, groups in ((False, 1), (True, 0)):
    config = long_lm.get_config()
    config = edited(config, {"dense": dense})
    config = config_lib.resolve(config)
    layers = shape_of(config).layers
    assert {layer.groups for layer in layers} == {groups}


def test_small_config_has_the_size_that_pruning_leaves():
  def size(config):
    shape = shape_of(config_lib.resolve(config))
    model = make_model(shape, config.data.vocab_size, num_classes=0)
    return sum(x.size for x in jax.tree.leaves(param_shapes(model)))

  pruned = lm.get_config()
  dense = config_lib.dense_baseline(config_lib.resolve(pruned))
  left = (1 - config_lib.resolve(pruned).fpp.saving) * size(dense)
  assert size(small_lm.get_config()) == pytest.approx(left, rel=1e-3)
