import collections
import pathlib
import sysconfig

import numpy as np
import pytest

from folding.config import DataConfig
from folding.data import corpus, python_stdlib, sources
from folding.errors import ConfigError
from folding.tasks import TASKS

STDLIB = pathlib.Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def source():
  """Returns the files of each split, the text of the default config."""
  return corpus.load_documents(DataConfig())


def test_source_has_each_plain_file_once(source):
  found = collections.Counter(text for x in source.values() for text in x)
  files = python_stdlib.library_files()
  assert found == collections.Counter(files.values())
  on_disk = {path: (STDLIB / path).read_bytes().decode() for path in files}
  assert files == on_disk
  modules = {
    file.name
    for file in STDLIB.glob("*.py")
    if not file.name.startswith("_sysconfigdata") and file.stat().st_size
  }
  assert modules <= set(files)
  folders = {part for path in files for part in path.split("/")[:-1]}
  assert {"email", "json"} <= folders
  assert not folders & {"site-packages", "test", "tests", "idlelib"}
  assert not folders & {"encodings", "lib2to3", "pydoc_data", "turtledemo"}


def test_source_splits_are_about_80_10_10(source):
  sizes = {split: len(texts) for split, texts in source.items()}
  total = sum(sizes.values())
  # Binomial: 450 files at 10% have a standard deviation of 1.4 points.
  assert 0.74 < sizes["train"] / total < 0.86
  assert 0.05 < sizes["valid"] / total < 0.15
  assert 0.05 < sizes["test"] / total < 0.15


def test_topic_is_balanced_and_shares_no_text(monkeypatch):
  read, parse = [], python_stdlib.library_docstrings

  def keep(files):
    read.append(parse(files))
    return read[0]

  monkeypatch.setattr(python_stdlib, "library_docstrings", keep)
  found = sources.load_texts(DataConfig(), "classify")
  names, labels = found.label_names, found.labels
  assert labels is not None
  assert names == tuple(sorted(names)) and len(names) == 8
  packages = collections.defaultdict(set)
  for package, pairs in read[0].items():
    for text, _ in pairs:
      packages[text].add(package)
  sizes = {}
  for split, texts in found.texts.items():
    [sizes[split]] = set(np.bincount(labels[split], minlength=8))
    for text, label in zip(texts, labels[split], strict=True):
      assert packages[text] == {names[label]}
  assert sizes["train"] > 50
  assert sizes["valid"] == sizes["test"]
  assert 0.1 < sizes["test"] / sizes["train"] < 0.15  # a tenth of the whole
  texts = [text for part in found.texts.values() for text in part]
  assert len(texts) == len(set(texts))


def test_examples_are_in_the_order_of_tfds(monkeypatch):
  """The digest of a run's text, which `resume` compares, depends on the order."""
  from tensorflow_datasets.core import hashing

  files = {f"{i}.py": f"text {i}" for i in range(100)}
  monkeypatch.setattr(python_stdlib, "library_files", lambda: files)
  splits, _ = python_stdlib.read(DataConfig(), TASKS["lm"])
  for split, salt in (("train", "train"), ("valid", "validation")):
    found = splits[split].texts
    hasher = hashing.Hasher(salt)
    in_order = sorted(found, key=lambda text: int(text.split()[1]))
    keys = {text: hasher.hash_key(n) for n, text in enumerate(in_order)}
    assert len(found) > 1
    assert found == sorted(found, key=keys.__getitem__)


@pytest.mark.parametrize("task", ["regress", "multilabel"])
def test_a_task_without_labels_here_is_refused(task):
  with pytest.raises(ConfigError, match="packages as classes"):
    python_stdlib.read(DataConfig(), TASKS[task])


def test_docstrings_are_distinct_and_of_one_package():
  once = "Does one thing that nothing else in the library does."
  twice = "Does a thing that two packages both say they do."
  files = {
    "a/x.py": f'def f():\n  """{once}"""\n\ndef g():\n  """{once}"""\n',
    "a/y.py": f'"""{twice}"""\n',
    "b.py": f'class C:\n  """{twice}"""\n  def h(self):\n    """Short."""\n',
    "c.py": "this is not python",
  }
  found = python_stdlib.library_docstrings(files)
  assert found == {"a": [(once, "a/x.py")]}


def test_topics_are_the_largest_cut_to_the_smallest():
  docstrings = {
    name: [(f"{name} text {i}", f"{name}.py") for i in range(size)]
    for name, size in zip("abcdefghi", range(30, 12, -2), strict=True)
  }
  topics = python_stdlib.choose_topics(docstrings)
  assert list(topics) == list("abcdefgh")  # i has the fewest
  for name, pairs in topics.items():
    assert len(pairs) == len(set(pairs)) == 16  # all of h
    assert set(pairs) <= set(docstrings[name])


def test_a_small_library_is_refused():
  with pytest.raises(ConfigError, match="too few docstrings"):
    python_stdlib.choose_topics({"a": [("x", "a.py")] * 99})
