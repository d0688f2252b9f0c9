"""A TFDS data set without a download: the source of Python's library.

It is a few megabytes of code and prose. Its version is the interpreter's, so
two interpreters never share prepared data. No TensorFlow is imported.
"""

import ast
import collections
import contextlib
import hashlib
import io
import pathlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import tensorflow_datasets as tfds

from folding.errors import ConfigError

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


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """The standard library as text (`source`) and as a topic task (`topic`).

  `source`: one example per file, split 80/10/10 by a hash of the file's path.
  `topic`: one example per docstring, labelled with its package. It has the 8
  packages with the most docstrings, equally many of each. Texts are distinct,
  so no two splits share one.
  """

  VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="source", description="Whole files."),
    tfds.core.BuilderConfig(name="topic", description="Docstring to package."),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    features: dict[str, tfds.features.FeatureConnector] = {
      "text": tfds.features.Text(),
      "path": tfds.features.Text(),
    }
    if self._config_name == "topic":
      # The names are set in `_split_generators`, and stored with the data.
      features["label"] = tfds.features.ClassLabel(num_classes=NUM_TOPICS)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Python's standard library, read from the interpreter.",
      features=tfds.features.FeaturesDict(features),
    )

  @property
  def _config_name(self) -> str:
    config = self.builder_config
    assert config is not None
    return config.name

  def _split_generators(self, dl_manager):
    del dl_manager
    splits = {"train": [], "validation": [], "test": []}
    if self._config_name == "source":
      for path, text in library_files().items():
        splits[_split_of(path)].append({"text": text, "path": path})
    else:
      topics = choose_topics(library_docstrings(library_files()))
      features: Any = self.info.features
      features["label"].names = list(topics)
      for topic, docstrings in topics.items():
        # A tenth of each class: every split has the same balance.
        tenth = round(len(docstrings) / 10)
        for index, (text, path) in enumerate(docstrings):
          split = {0: "validation", 1: "test"}.get(index // tenth, "train")
          splits[split].append({"text": text, "path": path, "label": topic})
    return {
      name: self._generate_examples(examples)
      for name, examples in splits.items()
    }

  def _generate_examples(self, examples) -> Iterator[tuple[int, dict]]:
    yield from enumerate(examples)


def prepare(
  config: Literal["source", "topic"], data_dir: str | None = None
) -> PythonStdlib:
  """Returns the builder with its data on disk; prepares it if needed.

  Args:
    config: Name of the builder config.
    data_dir: Where TFDS keeps prepared data; None: its default.

  Raises:
    ConfigError: the folder cannot be written.
  """
  tfds.disable_progress_bar()  # drawing it takes a second
  try:
    with contextlib.suppress(OSError):  # another process may finish first
      return _prepared(config, data_dir)
    return _prepared(config, data_dir)
  except OSError as error:
    raise ConfigError(
      f"cannot write prepared data under {data_dir or 'the TFDS folder'} "
      f"({error}); set data.dir to a folder that can be written"
    ) from error
  finally:
    tfds.enable_progress_bar()


def _prepared(config: str, data_dir: str | None) -> PythonStdlib:
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
    builder(config, data_dir).download_and_prepare()
  # The first builder has no splits if another process prepared the data meanwhile.
  return builder(config, data_dir)


def builder(config: str, data_dir: str | None) -> PythonStdlib:
  """Returns the builder, whether or not its data is on disk."""
  return PythonStdlib(
    config=config, data_dir=data_dir, file_format="array_record"
  )


def library_files() -> dict[str, str]:
  """Returns the text of the library's files by path.

  Raises:
    ConfigError: the interpreter has no source files to read.
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = {}
  for file in sorted(root.rglob("*.py")):
    path = file.relative_to(root)
    if _SKIPPED_FOLDERS.intersection(path.parts[:-1]):
      continue
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
  return {0: "validation", 1: "test"}.get(tenth, "train")


def digest(text: str) -> bytes:
  """Returns an 8-byte hash of a text, the same on every machine."""
  return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
