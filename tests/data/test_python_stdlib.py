import collections
import pathlib
import platform
import subprocess
import sys
import sysconfig

import pytest

from folding import schema
from folding.data import python_stdlib

STDLIB = pathlib.Path(sysconfig.get_paths()["stdlib"])
SPLITS = ("train", "validation", "test")


def _examples(builder, split):
  return [
    {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    for row in builder.as_data_source(split)
  ]


@pytest.fixture(scope="module")
def source(stdlib_dir):
  builder = python_stdlib.prepare("source", stdlib_dir)
  return {split: _examples(builder, split) for split in SPLITS}


@pytest.fixture(scope="module")
def topic(stdlib_dir):
  builder = python_stdlib.prepare("topic", stdlib_dir)
  return {split: _examples(builder, split) for split in SPLITS}


def test_source_has_the_files_as_they_are_on_disk(source):
  found = {e["path"]: e["text"] for split in SPLITS for e in source[split]}
  on_disk = {path: (STDLIB / path).read_bytes().decode() for path in found}
  assert found == on_disk


def test_source_has_every_plain_module(source):
  found = {e["path"] for split in SPLITS for e in source[split]}
  modules = {
    file.name
    for file in STDLIB.glob("*.py")
    if not file.name.startswith("_sysconfigdata") and file.stat().st_size
  }
  assert modules <= found


def test_source_leaves_out_tests_and_tables(source):
  folders = {
    part
    for split in SPLITS
    for e in source[split]
    for part in e["path"].split("/")[:-1]
  }
  assert {"email", "json"} <= folders
  assert not folders & {"site-packages", "test", "tests", "idlelib"}
  assert not folders & {"encodings", "lib2to3", "pydoc_data", "turtledemo"}


def test_source_splits_are_disjoint_by_file(source):
  paths = [e["path"] for split in SPLITS for e in source[split]]
  assert len(paths) == len(set(paths))


def test_source_splits_are_about_80_10_10(source):
  sizes = {split: len(source[split]) for split in SPLITS}
  total = sum(sizes.values())
  # Binomial: 450 files at 10% have a standard deviation of 1.4 points.
  assert 0.74 < sizes["train"] / total < 0.86
  assert 0.05 < sizes["validation"] / total < 0.15
  assert 0.05 < sizes["test"] / total < 0.15


def test_version_is_the_interpreters(stdlib_dir):
  folder = pathlib.Path(python_stdlib.prepare("topic", stdlib_dir).data_dir)
  version = platform.python_version()
  assert version.startswith(folder.name)


def test_topic_is_balanced_in_every_split(topic):
  counts = {
    split: collections.Counter(e["label"] for e in topic[split])
    for split in SPLITS
  }
  for split in SPLITS:
    assert sorted(counts[split]) == list(range(8))
    assert len(set(counts[split].values())) == 1
  size = counts["train"][0]
  assert size > 50
  assert counts["validation"][0] == counts["test"][0]
  assert 0.1 < counts["test"][0] / size < 0.15  # a tenth of the whole


def test_topic_shares_no_text_between_splits_or_classes(topic):
  texts = [" ".join(e["text"].split()) for s in SPLITS for e in topic[s]]
  assert len(texts) == len(set(texts))


def test_topic_label_is_the_package_of_the_path(topic, stdlib_dir):
  builder = python_stdlib.prepare("topic", stdlib_dir)
  names = builder.info.features["label"].names
  assert names == sorted(names)
  for split in SPLITS:
    for e in topic[split]:
      package = e["path"].split("/")[0].removesuffix(".py")
      assert names[e["label"]] == package


def test_topic_texts_stand_in_their_files(topic):
  files = {}
  hits = total = 0
  for e in topic["train"]:
    if e["path"] not in files:
      words = (STDLIB / e["path"]).read_text("utf-8").split()
      files[e["path"]] = " ".join(words)
    hits += e["text"] in files[e["path"]]
    total += 1
    assert len(e["text"].split()) >= 6
  assert hits / total > 0.95  # not all: an escape is spelled differently


def test_docstrings_are_distinct_and_belong_to_one_package():
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
    assert len(pairs) == len(set(pairs)) == 16  # all that h has
    assert set(pairs) <= set(docstrings[name])


def test_too_few_docstrings_is_an_error():
  with pytest.raises(schema.ConfigError, match="too few docstrings"):
    python_stdlib.choose_topics({"a": [("x", "a.py")] * 99})


def test_folder_that_cannot_be_written_is_an_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(schema.ConfigError, match="set data.dir to a folder"):
    python_stdlib.prepare("source", str(tmp_path / "file"))


def test_processes_may_prepare_at_once_and_need_no_tensorflow(tmp_path):
  code = (
    "import sys\n"
    "from folding.data import batches, python_stdlib\n"
    "builder = python_stdlib.prepare('source', sys.argv[1])\n"
    "assert 'tensorflow' not in sys.modules\n"
    "print(len(builder.as_data_source('train')))\n"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  outputs = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  # The count, and no progress bar around it.
  assert outputs[0] == outputs[1]
  assert int(outputs[0][0]) > 100
  assert outputs[0][1] == ""
