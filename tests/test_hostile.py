"""Files from elsewhere that lie, and mistakes that would pass in silence.

A row of `REFUSED` is a call that must end with one line, and a row of `SAID`
one that warns. A call takes an empty folder, writes its files there, and reads
them.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import constants
from pyarrow import parquet

import folding
from configs import embed, pretrained
from folding import config as config_lib
from folding.config import DataConfig
from folding.data import corpus, sources, tfds_sets, tokenizers
from folding.models import hf_weights, sentence
from folding.reporting import compare, report
from folding.serving import lines, predict
from folding.serving.generate import Generator
from folding.serving.sampling import Sampling
from folding.studies import grid, methods
from folding.training import loop, run_dir
from folding.typed import edited
from tests.data import text_files
from tests.models import checkpoints
from tests.reporting import synthetic_run
from tests.serving import models
from tests.training.conftest import tiny_config, write_text

ROOT = pathlib.Path(__file__).parents[1]


def write(folder: pathlib.Path, **contents) -> pathlib.Path:
  """Writes {"name__ending": text or JSON}, and returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    text = content if isinstance(content, str) else json.dumps(content)
    path = folder / name.replace("__", ".")
    path.write_text(text, encoding="utf-8")
  return folder


# Code.


def evil_set(tmp_path):
  """Returns the fields of a TFDS data set whose feature is a class of ours."""
  write(
    tmp_path, evil_payload__py="import pathlib; pathlib.Path('RAN').touch()"
  )
  write(
    tmp_path / "evilset" / "1.0.0",
    features__json={"pythonClassName": "evil_payload.Evil"},
    dataset_info__json={
      "name": "evilset",
      "version": "1.0.0",
      "fileFormat": "array_record",
    },
  )
  sys.path.insert(0, str(tmp_path))
  sys.modules.pop("evil_payload", None)
  return DataConfig(name="evilset", dir=str(tmp_path))


def tfds_set_of_a_run(tmp_path):
  tfds_sets.require_prepared(evil_set(tmp_path), "RUN")


def tfds_set_of_the_user(tmp_path):
  corpus.load_documents(evil_set(tmp_path))


# Files outside.


def weights_index(*names):
  """Returns the call that reads an index of these files."""

  def index(tmp_path):
    folder = tmp_path / "model"
    checkpoints.write(folder, "bert")
    (folder / hf_weights.WEIGHTS).rename(tmp_path / "other.safetensors")
    where = {f"tensor {n}": name for n, name in enumerate(names)}
    write(folder, **{"model__safetensors__index__json": {"weight_map": where}})
    hf_weights.load_pretrained(folder)

  return index


def pooling_outside(tmp_path):
  folder = tmp_path / "model"
  write(
    folder,
    modules__json=[{"type": "a.Pooling", "path": "../elsewhere"}],
  )
  write(tmp_path / "elsewhere", config__json={"pooling_mode": "cls"})
  sentence.read(folder)


def link(name):
  """Returns the call that reads a run of which a file is a link out of it."""

  def read(tmp_path):
    workdir = synthetic_run.write(tmp_path / "run")
    target = tmp_path / "target"
    target.write_text("{}", encoding="utf-8")
    path = pathlib.Path(workdir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    run_dir.load_order(workdir)

  return read


def missing_folder(tmp_path):
  (tmp_path / "runs").mkdir()
  folding.load("runs/tuned")


def missing_folder_of_three(tmp_path):
  folding.load("a/b/c")


# Checkpoints.


def checkpoint(head="none", config=None, **contents):
  """Returns the call that loads a BERT with changed or added files."""

  def load(tmp_path):
    folder = tmp_path / "model"
    checkpoints.write(folder, "bert", head)
    values = json.loads((folder / "config.json").read_text("utf-8"))
    write(folder, config__json=values | (config or {}), **contents)
    return folding.load(folder)

  return load


def labels_of_a_run(tmp_path):
  write(tmp_path, labels__json=["good", " "])
  run_dir.load_labels(str(tmp_path))


def token_map(tmp_path):
  checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  write(tmp_path, token_map__json=[0.5] * len(checkpoints.WORDS))
  tokenizers.load_tokenizer(tmp_path / "tokenizer.json")


def emptied_tokenizer(tmp_path):
  path = checkpoints.write_tokenizer(
    tmp_path / "tokenizer.json", checkpoints.WORDS[:4]
  )
  found = tokenizers.load_tokenizer(path)
  found.encode_batch(["", " "], 8)
  found.encode_batch(["some text", "another"], 8)


# Texts and labels.


def texts(task, fields=None, **contents):
  """Returns the call that reads training text."""

  def load(tmp_path):
    write(tmp_path, **contents)
    data = DataConfig(path=str(tmp_path), **(fields or {}))
    return text_files.read(data, task)

  return load


def tsv(*labels):
  rows = [f"{label}\ttext {i}" for i, label in enumerate(labels * 12)]
  return "\n".join(["label\ttext", *rows, ""])


def jsonl(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def class_minus_one(tmp_path):
  table = {"text": [f"text {i}" for i in range(30)], "label": [-1, 0, 1] * 10}
  parquet.write_table(pa.table(table), tmp_path / "train.parquet")
  sources.load_texts(DataConfig(path=str(tmp_path)), "classify")


# Studies.


def seeds(*seeds):
  def study(tmp_path):
    grid.Study({"a": config_lib.Config()}, methods.pick("dense"), (), seeds)

  return study


def edits(edit):
  def study(tmp_path):
    bad = {"bad": methods.Method("", lambda base, level: edit(), False)}
    found = methods.pick("dense") | bad
    made = grid.Study({"a": config_lib.Config()}, found, (), (0,))
    grid.run_study(made, str(tmp_path / "w"), None)

  return study


# Arrays.


def call(function, **options):
  """Returns a call of the public interface, which needs no folder."""
  return lambda tmp_path: function(**options)


def generator(chunk=8, **options):
  def generate(tmp_path):
    model = models.make("lm")
    values = {"prompts": [np.array([3])], "max_new_tokens": 1} | options
    return Generator(model.module, chunk=chunk)(model.params, **values)

  return generate


def few_labels(tmp_path):
  model = models.make()
  model = dataclasses.replace(model, labels=model.labels[:2])
  list(predict.predict(model, ["the cat"]))


def empty_batch(tmp_path):
  model = models.make("lm")
  model.module.apply({"params": model.params}, jnp.zeros((0, 4), jnp.int32))


def mask_of_no_layer(tmp_path):
  model = models.make("lm")
  tokens = jnp.zeros((2, 4), jnp.int32)
  apply = folding.observe(model.module.apply)
  jax.eval_shape(
    lambda p: apply({"params": p}, tokens, keep=np.ones(7, bool)), model.params
  )


def mask_of_more_tokens(tmp_path):
  model = models.make()
  tokens = jnp.zeros((2, 4), jnp.int32)
  apply = folding.observe(model.module.apply)
  jax.eval_shape(
    lambda p: apply({"params": p}, tokens, keep=np.ones((2, 5), bool)),
    model.params,
  )


# {name: (call, a part of its only line)}
REFUSED = {
  "tfds_of_a_run": (tfds_set_of_a_run, "TFDS_DATA_DIR"),
  "tfds_of_the_user": (tfds_set_of_the_user, "evil_payload.Evil"),
  "index_number": (weights_index(5), "weight_map"),
  "index_list": (weights_index(["a.safetensors"]), "weight_map"),
  "index_above": (weights_index("../other.safetensors"), "weight_map"),
  "index_absolute": (weights_index("/etc/hosts"), "weight_map"),
  "pooling_outside": (pooling_outside, "outside of its own"),
  "link_config": (link("text.sha256"), "is a link out of"),
  "link_metrics": (link("checkpoints/5/metrics/metrics"), "is a link out of"),
  "folder_of_runs": (missing_folder, "hub is named ORG/MODEL"),
  "folder_deep": (missing_folder_of_three, "hub is named ORG/MODEL"),
  "adapter": (checkpoint(adapter_config__json={}), "adapter_config.json"),
  "options": (checkpoint(tokenizer_config__json="{"), "tokenizer_config.json"),
  "generation": (checkpoint(generation_config__json="["), "is damaged"),
  "pad_token": (checkpoint(config={"pad_token_id": 30}), "pad_token_id 30"),
  "empty_class": (
    checkpoint("classify", {"id2label": {"0": "a", "1": "", "2": "c"}}),
    "id2label",
  ),
  "empty_label": (labels_of_a_run, "labels.json"),
  "token_map": (token_map, "token_map.json"),
  "one_number": (texts("classify", train__tsv=tsv("1", "+1")), "'+1' and '1'"),
  "leading_zero": (
    texts("classify", train__tsv=tsv("1", "01")),
    "'01' and '1'",
  ),
  "fullwidth": (texts("classify", train__tsv=tsv("1", "\uff11")), "\\uff11"),
  "invisible_part": (
    texts("classify", train__tsv=tsv("a", "a\u200b")),
    "\\u200b",
  ),
  "invisible": (
    texts("classify", train__tsv=tsv("a", "\u200b")),
    "neither a text",
  ),
  "indicators": (texts("multilabel", train__tsv=tsv("0,1", "1,0")), "0 or 1"),
  "equal_scores": (texts("regress", train__tsv=tsv("2.5")), "all 2.5"),
  "text_twice": (
    texts(
      "classify", {"text_field": ("text", "text")}, train__tsv=tsv("a", "b")
    ),
    "'text' twice",
  ),
  "later_text": (
    texts(
      "classify",
      train__jsonl=jsonl(
        {"label": "a", "sentence1": "x"},
        {"label": "b", "sentence1": "x", "sentence2": "y"},
      ),
    ),
    "jsonl:2: the text 'sentence2'",
  ),
  "seed_below_0": (seeds(0, -1), "not -1"),
  "seed_fraction": (seeds(0.5), "not 0.5"),
  "edits_raise": (edits(lambda: 1 // 0), "a--bad--s0: ZeroDivisionError"),
  "edits_no_field": (edits(lambda: {"x": 1}), "a--bad--s0: ConfigError"),
  "mask": (mask_of_no_layer, "keep has the shape (7,)"),
  "mask_beside_pooled": (mask_of_more_tokens, "keep has the shape (2, 5)"),
  "empty_batch": (empty_batch, "tokens have the shape (0, 4)"),
  "chunk_0": (generator(0), "chunk"),
  "chunk_below_0": (generator(-8), "chunk"),
  "prompt_of_text": (generator(prompts=["text"]), "prompt 1"),
  "end_of_text": (generator(end_id="x"), "end_id"),
  "top_k": (call(Sampling, top_k=1.5), "top-k"),
  "few_labels": (few_labels, "2 labels for the 3 outputs"),
  "no_params": (
    call(
      folding.shrink,
      shape=folding.shape_of(config_lib.resolve(config_lib.Config())),
      params=None,
    ),
    "no arrays",
  ),
  "overall": (
    call(folding.account, params={}, dense={}, kinds={"overall": ".*"}),
    "without 'overall'",
  ),
}

# {name: (call, a part of the warning)}
SAID = {
  "minus_one": (class_minus_one, "-1 is read as a class"),
  "no_token": (emptied_tokenizer, "no known token in any of 2 texts"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Runs each call in its folder, and without the type checks of the tests."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.chdir(tmp_path)
  yield
  assert not pathlib.Path("RAN").exists(), "code of the attacker ran"


@pytest.mark.parametrize(("call", "line"), REFUSED.values(), ids=REFUSED)
def test_hostile_input_is_refused_in_one_line(call, line, tmp_path):
  with pytest.raises(ValueError, match=re.escape(line)) as caught:
    call(tmp_path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("call", "line"), SAID.values(), ids=SAID)
def test_doubtful_input_is_warned_of_in_one_line(call, line, tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  call(tmp_path)
  assert [x for x in caplog.messages if line in x and "\n" not in x]


@pytest.mark.parametrize("command", [["-m", "folding"], ["train.py"]])
def test_command_imports_nothing_from_the_current_folder(tmp_path, command):
  # gettext imports it when it translates the first message.
  write(tmp_path, locale__py="import pathlib; pathlib.Path('RAN').touch()")
  write(tmp_path, train__py=(ROOT / "train.py").read_text("utf-8"))
  found = subprocess.run(
    [sys.executable, *command, "--help"],
    env={**os.environ, "PYTHONPATH": str(ROOT), "LANG": "de_DE.UTF-8"},
    capture_output=True,
    text=True,
  )
  assert (found.returncode, found.stderr) == (0, "")


def test_recipe_trains_on_fewer_tokens_than_a_checkpoint_reads(tmp_path):
  config = {"max_position_embeddings": 300}
  folder = tmp_path / "model"
  checkpoints.write(folder, "bert")
  values = json.loads((folder / "config.json").read_text("utf-8"))
  write(
    folder,
    config__json=values | config,
    modules__json=[
      {"type": f"sentence_transformers.models.{kind}", "path": path}
      for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ],
    sentence_bert_config__json={"max_seq_length": 256},
  )
  write(folder / "1_Pooling", config__json={"pooling_mode_mean_tokens": True})
  for module, length in ((embed, 128), (pretrained, 64)):
    assert module.get_config(str(folder)).data.length == length


SECRET = "precious ssh keys"
MARKUP = "![x](SECRET) [y](http://evil.test) <b>`z`</b>\n\n[w]: q \x1b[31m"


@pytest.mark.parametrize("make", ["report", "compare"])
def test_page_shows_what_a_run_says_as_text(make, tmp_path):
  (tmp_path / "SECRET").write_text(SECRET, encoding="utf-8")
  markup = MARKUP.replace("SECRET", str(tmp_path / "SECRET"))
  config = synthetic_run.config()
  config = edited(config, {"data.path": markup})
  changes = {"device": markup, "commit": markup, "versions": {markup: markup}}
  workdirs = [
    synthetic_run.write(tmp_path / "a", synthetic_run.config()),
    synthetic_run.write(tmp_path / "b [l](http:evil)", config, **changes),
  ]
  if make == "report":
    report.write_report(workdirs[1])
    page, figures = pathlib.Path(workdirs[1], "report.html"), 4
  else:
    compare.compare(workdirs, str(tmp_path / "out"))
    page, figures = tmp_path / "out" / "compare.html", 1
  html = page.read_text("utf-8")
  assert html.count("<img") == html.count('src="data:image/png') == figures
  assert "href" not in html.split("<body", 1)[-1]
  assert "<b>" not in html
  assert "\x1b" not in html
  assert html.count("![x](") >= 1


def test_labels_are_printed_without_their_control_characters():
  model = models.make()
  names = ("\x1b[31mred", "so so", "\x9b2J")
  model = dataclasses.replace(model, labels=names)
  found = list(predict.predict(model, ["the cat", "a mat\x9b"]))
  for form in ("tsv", "jsonl"):
    shown = list(lines.of_predictions(model, found, form))
    assert not {"\x1b", "\x9b"} & {*"".join(shown)}
  for line, one in zip(shown, found, strict=True):
    record = json.loads(line)
    assert (record["text"], record["label"]) == (one.text, one.label)


@pytest.mark.slow
def test_evaluate_writes_no_tokens_where_the_run_says(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus, "LARGE", 0)
  path = write_text(tmp_path / "text.txt")
  config = tiny_config(path)
  loop.run(config, str(tmp_path / "run"))
  expected = loop.evaluate_run(str(tmp_path / "run"))
  for folder in tmp_path.glob(corpus.FOLDER):
    shutil.rmtree(folder)
  before = {*tmp_path.rglob("*")}
  assert loop.evaluate_run(str(tmp_path / "run")) == expected
  assert {*tmp_path.rglob("*")} == before
