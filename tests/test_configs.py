"""Every file of configs/: it resolves, reads the right columns, and trains."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

# Registers the text builders.
import tensorflow_datasets.text

from configs import classify, lm, pretrained, quickstart
from folding import config as config_lib
from folding.data import sources
from folding.schema import ConfigError
from folding.training import loop
from tests.data.conftest import prepare_stdlib
from tests.models import checkpoints

LM_NAMES = ("python_stdlib", "tiny_shakespeare", "lm1b", "wiki40b")
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
CASES = {
  "quickstart": quickstart.get_config(),
  **{f"lm:{name}": lm.get_config(name) for name in LM_NAMES},
  **{
    f"classify:{name}": classify.get_config(name)
    for name in ("python_stdlib", *COLUMNS)
  },
}


@pytest.fixture(scope="module")
def stdlib_dir(tmp_path_factory) -> str:
  return prepare_stdlib(tmp_path_factory)


def test_no_config_file_is_left_out():
  folder = pathlib.Path(lm.__file__).parent
  files = {p.stem for p in folder.glob("[!_]*.py")}
  # It needs a checkpoint: tests/training/test_start.py has some.
  assert files - {"pretrained"} == {name.split(":")[0] for name in CASES}


@pytest.mark.parametrize(
  ("family", "K", "groups"),
  [
    *(("bert", 32, 8), ("bert", 26, 2), ("bert", 25, 5), ("bert", 3, 1)),
    *(("llama", 64, 16), ("llama", 20, 4), ("llama", 6, 2)),  # whole pairs
  ],
)
def test_a_trained_head_is_folded_to_about_a_quarter(
  tmp_path, family, K, groups
):
  spec = checkpoints.FAMILIES[family] | {"hidden_size": K * checkpoints.H}
  (tmp_path / "config.json").write_text(json.dumps(spec))
  checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  config = pretrained.get_config(str(tmp_path))
  config.data.path = "a.txt"
  config = config_lib.resolve(config)
  assert config.fold.groups == groups
  assert config.model.head_dim == K


@pytest.mark.parametrize(
  ("level", "groups", "values"),
  [("0.3", 0, "dense"), (".5", 2, "dense"), ("0.80", 2, "diagonal")],
)
def test_less_is_saved_by_another_recipe(tmp_path, level, groups, values):
  checkpoints.write(tmp_path / "a,b", "llama", "lm")
  config = pretrained.get_config(f"{tmp_path}/a,b,{level}")
  assert config.pretrained == f"{tmp_path}/a,b"
  config.data.path = "a.txt"
  config = config_lib.resolve(config)
  assert config.fpp.overall == float(level)
  assert (config.fold.groups, config.fold.values) == (groups, values)
  assert config.train.learning_rate == 5e-4  # of a language model


@pytest.mark.parametrize(
  ("family", "values"),
  [("qwen2", "dense"), ("llama", "diagonal"), ("gpt2", "diagonal")],
)
def test_a_value_bias_without_one_of_the_output_stays(tmp_path, family, values):
  checkpoints.write(tmp_path / "model", family, "lm")
  config = pretrained.get_config(str(tmp_path / "model"))
  config.data.path = "a.txt"
  assert config_lib.resolve(config).fold.values == values


@pytest.mark.parametrize("level", ["0", "1", "1.5", "30"])
def test_what_is_to_be_saved_is_a_fraction(tmp_path, level):
  with pytest.raises(ConfigError, match=f",{level}': .* between 0 and 1"):
    pretrained.get_config(f"{tmp_path},{level}")


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_a_decoder_is_trained_for_what_it_is(tmp_path, task):
  checkpoints.write(tmp_path / "gpt2", "gpt2", task)
  config = pretrained.get_config(str(tmp_path / "gpt2"))
  assert config.task == task
  assert (config.distill.logits > 0) == (task == "lm")


@pytest.mark.parametrize("name", CASES)
def test_config_resolves_to_a_folded_and_pruned_model(name):
  config = config_lib.resolve(CASES[name])
  assert config.task == ("classify" if name.startswith("classify") else "lm")
  assert (config.fold.groups, config.fold.values) == (1, "diagonal")
  assert config.fpp.overall == 0.7
  again = config_lib.from_dict(config_lib.to_dict(config))
  assert config_lib.resolve(again) == config


@pytest.mark.parametrize("module", [lm, classify], ids=["lm", "classify"])
def test_names_of_the_docstring_are_those_tested(module):
  kind = module.__name__.split(".")[-1]
  listed = module.__doc__.split("NAME is ")[1].split(", any other")[0]
  names = {n.strip() for n in listed.replace("\n", " ").split(",")}
  assert names == {c.split(":")[1] for c in CASES if c.startswith(f"{kind}:")}


@pytest.mark.parametrize("get_config", [lm.get_config, classify.get_config])
def test_a_path_wins_over_a_name(get_config, tmp_path):
  file = tmp_path / "text.tsv"
  file.write_text("0\ttext\n")
  assert get_config(str(file)).data.path == str(file)
  assert get_config("trec").data.path is None


def twin(name: str, text: str, label: str | None) -> type:
  """Registers a data set with the columns of another.

  Every text says its column's name; labels differ in the label column alone.
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
  "name", [n for n in CASES if ":" in n and "stdlib" not in n]
)
def test_columns_are_the_text_and_its_class(name, tmp_path):
  kind, source = name.split(":")
  data = config_lib.resolve(CASES[name]).data
  text, label = COLUMNS.get(source, ("text", None))
  builder = twin(data.name, text, label)(
    data_dir=str(tmp_path), file_format="array_record"
  )
  builder.download_and_prepare()
  data.name, data.dir = builder.name, str(tmp_path)
  texts = sources.load_texts(data, kind)
  rows = texts.texts["train"]
  assert {row.split()[0] for row in rows} == {text}
  if label:
    written = [int(row.split()[1]) % 2 for row in rows]
    np.testing.assert_array_equal(texts.labels["train"], written)


@pytest.mark.parametrize(
  "name", ["quickstart", "lm:python_stdlib", "classify:python_stdlib"]
)
def test_config_takes_two_steps(name, stdlib_dir, tmp_path):
  config = config_lib.from_dict(config_lib.to_dict(CASES[name]))
  config.data.dir = stdlib_dir
  config.data.max_bytes = 60_000
  config.data.vocab_size = 300
  config.data.length = 16
  config.data.batch_size = 8
  config.data.eval_batch_size = 64
  config.model.num_layers, config.model.width = 1, 32
  config.model.num_heads = 4
  config.train.steps, config.train.eval_every = 2, 2
  config.train.eval_batches = 1
  result = loop.run(config, str(tmp_path))
  assert result["steps"] == 2
  assert result["finished"]
  # An untrained model guesses: log of 300 tokens or 8 classes.
  guess = np.log(8 if config.task == "classify" else 300)
  assert result["test"]["loss"] == pytest.approx(guess, abs=0.5)
  zeros = {x["path"]: x["zeros"] for x in result["layers"]}
  share = config_lib.resolve(config).fpp.embedding_share
  kept = 1 - zeros["blocks_0/attn/o/kernel"]
  assert zeros["embed/embedding"] == pytest.approx(1 - kept**share, abs=2e-3)
  overall = result["parameters"]["overall"]
  neuron = 2 * 32 + 1  # of which the last may be too many
  assert -1 <= overall["stored"] - 0.3 * overall["dense"] <= neuron
