import collections
import pathlib
import platform
import subprocess
import sys
import sysconfig

import pytest

from folding.data import python_stdlib
from folding.errors import ConfigError

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


def test_source_has_each_plain_file_once(source):
  examples = [e for split in SPLITS for e in source[split]]
  found = {e["path"]: e["text"] for e in examples}
  assert len(found) == len(examples)
  on_disk = {path: (STDLIB / path).read_bytes().decode() for path in found}
  assert found == on_disk
  modules = {
    file.name
    for file in STDLIB.glob("*.py")
    if not file.name.startswith("_sysconfigdata") and file.stat().st_size
  }
  assert modules <= set(found)
  folders = {part for path in found for part in path.split("/")[:-1]}
  assert {"email", "json"} <= folders
  assert not folders & {"site-packages", "test", "tests", "idlelib"}
  assert not folders & {"encodings", "lib2to3", "pydoc_data", "turtledemo"}


def test_source_splits_are_about_80_10_10(source):
  sizes = {split: len(source[split]) for split in SPLITS}
  total = sum(sizes.values())
  # Binomial: 450 files at 10% have a standard deviation of 1.4 points.
  assert 0.74 < sizes["train"] / total < 0.86
  assert 0.05 < sizes["validation"] / total < 0.15
  assert 0.05 < sizes["test"] / total < 0.15


def test_topic_is_balanced_and_shares_no_text(topic, stdlib_dir):
  builder = python_stdlib.prepare("topic", stdlib_dir)
  version = pathlib.Path(builder.data_dir).name
  assert platform.python_version().startswith(version)
  names = builder.info.features["label"].names
  assert names == sorted(names)
  sizes = {}
  for split in SPLITS:
    count = collections.Counter(e["label"] for e in topic[split])
    assert sorted(count) == list(range(8))
    [sizes[split]] = set(count.values())
    for e in topic[split]:
      package = e["path"].split("/")[0].removesuffix(".py")
      assert names[e["label"]] == package
  assert sizes["train"] > 50
  assert sizes["validation"] == sizes["test"]
  assert 0.1 < sizes["test"] / sizes["train"] < 0.15  # a tenth of the whole
  texts = [" ".join(e["text"].split()) for s in SPLITS for e in topic[s]]
  assert len(texts) == len(set(texts))


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


def test_a_small_library_or_a_closed_folder_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="too few docstrings"):
    python_stdlib.choose_topics({"a": [("x", "a.py")] * 99})
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(ConfigError, match="data.dir"):
    python_stdlib.prepare("source", str(tmp_path / "file"))


def test_data_that_another_process_prepared_meanwhile_is_read(
  tmp_path, monkeypatch
):
  files, builder = (
    {f"{i}.py": "text" for i in range(100)},
    python_stdlib.builder,
  )
  monkeypatch.setattr(python_stdlib, "library_files", lambda: files)

  def overtaken(*args):
    made = builder(*args)
    builder(*args).download_and_prepare()  # as another process does
    return made

  monkeypatch.setattr(python_stdlib, "builder", overtaken)
  found = python_stdlib.prepare("source", str(tmp_path))
  assert 60 < len(found.as_data_source("train")) < 100


@pytest.mark.slow  # two processes, each of which imports TFDS
def test_processes_prepare_at_once_and_need_no_tensorflow(tmp_path):
  code = (
    "import sys\n"
    "from folding.data import python_stdlib\n"
    "files = {f'{i}.py': 'text' for i in range(100)}\n"
    "python_stdlib.library_files = lambda: files\n"
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
  # The number, and no progress bar around it.
  assert outputs[0] == outputs[1]
  assert 60 < int(outputs[0][0]) < 100
  assert outputs[0][1] == ""
