"""The source of Python's library: text that each machine has.

It is a few megabytes of code and prose, read from the interpreter. So it depends
on the interpreter's version.
"""

import ast
import collections
import hashlib
import os
import pathlib
import sysconfig
import warnings
from typing import TypeAlias

from folding.config import DataConfig
from folding.data.rows import Rows, choose_texts
from folding.errors import ConfigError
from folding.tasks import Task

NAME = "python_stdlib"  # as `DataConfig.name`
NUM_TOPICS = 8
MIN_WORDS = 6  # a shorter docstring says too little about its package

# Tests, vendored tools and generated tables: little to learn, much to store.
_SKIPPED_FOLDERS = frozenset(
  "site-packages dist-packages __pycache__ test tests idlelib lib2to3 "
  "pydoc_data encodings turtledemo msilib".split()
)
_SKIPPED_FILES = ("_sysconfigdata*.py", "html/entities.py")
_DOCUMENTED = (
  ast.Module,
  ast.ClassDef,
  ast.FunctionDef,
  ast.AsyncFunctionDef,
)


_Example: TypeAlias = tuple[str, str | None]  # text, topic


def read(
  data: DataConfig, task: Task
) -> tuple[dict[str, Rows], list[str] | None]:
  """Returns the rows of each split, and the names of the topics.

  A text of a language model is a file. Files are split 80/10/10 by a hash of their
  path. Texts of other tasks are docstrings, labelled with their package: of
  the 8 packages with the most docstrings, equally many of each. They are distinct,
  so no two splits share one.

  Args:
    data: Its section of the config.
    task: The row of the task.

  Raises:
    ConfigError: the library has no source files or too few docstrings, or no
      labels for the task.
  """
  place, columns, names = "Python's library", ["text"], None
  kind = task.labels and task.labels.kind
  if kind not in (None, "class"):
    raise ConfigError(
      f"{place} has packages as classes, and no labels for task {task.name!r}; set "
      "data.path or another data.name"
    )
  splits: dict[str, list[_Example]] = {"train": [], "valid": [], "test": []}
  if task.predicts_tokens:
    for path, text in library_files().items():
      splits[_split_of(path)].append((text, None))
  else:
    topics = choose_topics(library_docstrings(library_files()))
    names = list(topics) if kind else None
    for topic, docstrings in topics.items():
      # A tenth of each class: every split has the same balance.
      tenth = round(len(docstrings) / 10)
      for index, (text, _) in enumerate(docstrings):
        split = {0: "valid", 1: "test"}.get(index // tenth, "train")
        splits[split].append((text, topic))
  chosen = choose_texts(place, columns, columns, data, task)
  return {
    split: _rows(f"{place}[{split}]", _shuffled(split, examples), kind, chosen)
    for split, examples in splits.items()
  }, names


def _rows(
  source: str,
  examples: list[_Example],
  kind: str | None,
  columns: tuple[str, ...],
) -> Rows:
  return Rows(
    source,
    [text for text, _ in examples],
    [topic or "" for _, topic in examples] if kind else None,
    [source] * len(examples),
    columns,
  )


def _shuffled(split: str, examples: list[_Example]) -> list[_Example]:
  """Returns examples in the order in which TFDS would keep them.

  Earlier versions read this text through TFDS, and the digest of a run's text
  depends on the order.
  """
  salt = {"valid": "validation"}.get(split, split)

  def key(numbered):
    return hashlib.md5(f"{salt}{numbered[0]}".encode()).digest()

  return [example for _, example in sorted(enumerate(examples), key=key)]


def library_files() -> dict[str, str]:
  """Returns the text of the library's files by path.

  Raises:
    ConfigError: the interpreter has no source files to read.
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  found, files = [], {}
  for folder, folders, names in os.walk(root):
    # Packages that are installed may be many times the library.
    folders[:] = [x for x in folders if x not in _SKIPPED_FOLDERS]
    found += [pathlib.Path(folder, x) for x in names if x.endswith(".py")]
  for file in sorted(found):
    path = file.relative_to(root)
    if any(path.match(pattern) for pattern in _SKIPPED_FILES):
      continue
    try:
      text = file.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
      continue  # another encoding, or not readable
    if text:
      files[path.as_posix()] = text
  if len(files) < 20:
    raise ConfigError(
      f"this Python keeps no source files in {root}, so 'python_stdlib' is "
      "empty; set data.path or another data.name"
    )
  return files


def library_docstrings(
  files: dict[str, str],
) -> dict[str, list[tuple[str, str]]]:
  """Returns distinct (docstring, path) pairs by top-level package or module.

  A docstring of two packages is dropped: its label would be ambiguous.
  """
  found = collections.defaultdict(dict)
  for path, source in files.items():
    package = path.partition("/")[0].removesuffix(".py")
    with warnings.catch_warnings():
      # Old modules have escapes that newer compilers warn about.
      warnings.simplefilter("ignore")
      try:
        tree = ast.parse(source)
      except SyntaxError:  # a template
        continue
    for node in ast.walk(tree):
      if isinstance(node, _DOCUMENTED):
        words = (ast.get_docstring(node) or "").split()
        if len(words) >= MIN_WORDS:
          found[" ".join(words)].setdefault(package, path)
  docstrings = collections.defaultdict(list)
  for text, packages in found.items():
    if len(packages) == 1:
      [(package, path)] = packages.items()
      docstrings[package].append((text, path))
  return dict(docstrings)


def choose_topics(
  docstrings: dict[str, list[tuple[str, str]]],
) -> dict[str, list[tuple[str, str]]]:
  """Returns the largest packages, by name, cut to the size of the smallest.

  A hash of the text decides which docstrings stay, and in which order.
  """
  sizes = sorted((-len(texts), name) for name, texts in docstrings.items())
  chosen = sizes[:NUM_TOPICS]
  size = -chosen[-1][0] if len(chosen) == NUM_TOPICS else 0
  if size < 10:
    raise ConfigError(
      "this Python's library has too few docstrings for 'python_stdlib' as a "
      "classification task; set data.path or another data.name"
    )
  return {
    name: sorted(docstrings[name], key=lambda pair: digest(pair[0]))[:size]
    for _, name in sorted(chosen, key=lambda pair: pair[1])
  }


def _split_of(path: str) -> str:
  """Returns the split of a file: the same on every machine."""
  tenth = int.from_bytes(digest(path)[:4], "big") % 10
  return {0: "valid", 1: "test"}.get(tenth, "train")


def digest(text: str) -> bytes:
  """Returns an 8-byte hash of a text, the same on every machine."""
  return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
