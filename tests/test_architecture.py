"""The rules of the house: who may import whom, and how long a file may be."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Each file imports only files that stand before it: a new file is added here,
# where its imports allow it to stand.
ORDER = {
  "": [
    *("version", "errors", "typed", "files", "config", "paths"),
  ],
  "compression": [
    *("threshold", "scores", "sites", "observe", "fpp"),
    "fold",
    *("oneshot", "lowrank", "accounting", "shrink"),
  ],
  "data": ["python_stdlib", "sources", "tokenizers", "trim", "batches"],
  "models": [
    *("params", "projections", "chebyshev", "linear_attention", "decode"),
    *("attention", "transformer", "shrink"),
    *("hf_config", "hf_weights"),
  ],
  "training": [
    *("losses", "distributed", "run_dir", "sharding", "checkpoint"),
    *(
      "energy",
      "optimizer",
      "fold_pretrained",
      "allocate",
      "prune_trained",
      "compress",
    ),
    *("progress", "evaluate", "step", "plan"),
    *("loop", "shrinking"),
  ],
  "serving": [
    *("export", "predict"),
    *("sampling", "generate"),
  ],
  "reporting": [
    *("plots", "report", "compare"),
  ],
  "studies": [
    *("methods", "grid", "tables", "verb"),
  ],
}
FILES = [
  f"folding.{room}.{name}" if room else f"folding.{name}"
  for room, names in ORDER.items()
  for name in names
] + ["folding.cli", "folding.__main__", "train"]

# Seen by everything below it, and importing nothing of the library or jax.
PLAIN = (
  *("folding.errors", "folding.typed", "folding.files"),
  "folding.config",
)
# Not importable by name from inside: the public names come last.
PACKAGES = ["folding", *(f"folding.{room}" for room in ORDER if room)]


def _path(module):
  path = ROOT / module.replace(".", "/")
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _on_disk():
  """Returns the modules that there are, packages themselves left out."""
  paths = [*(ROOT / "folding").rglob("*.py"), ROOT / "train.py"]
  names = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in paths
    if path.name != "__init__.py"
  ]
  return sorted(names)


def _is_module(name):
  path = ROOT / name.replace(".", "/")
  return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(tree, package=""):
  """Returns {name as bound: what} of every import, wherever it stands.

  What is the dotted name of a module, or of an object in it where the name
  imported is no module of ours.
  """
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        bound = alias.asname or alias.name
        found[bound] = alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *([base] if base else [])])
      for alias in node.names:
        found[alias.asname or alias.name] = f"{base}.{alias.name}"
  return found


def _module_of(what):
  """Returns the module of ours that an import loads by this name, or None."""
  if what.split(".")[0] not in ("folding", "train", "configs", "benchmarks"):
    return None
  return what if _is_module(what) else what.rpartition(".")[0]


def _parse(module):
  return ast.parse(_path(module).read_text(encoding="utf-8"))


def _ours(module):
  imports = _imports(_parse(module), module.rpartition(".")[0])
  return {_module_of(what) for what in imports.values()} - {None}


def _third_party(module):
  return {what.split(".")[0] for what in _imports(_parse(module)).values()}


def test_the_order_names_every_file():
  assert sorted(FILES) == _on_disk()


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_files_before_it(module):
  assert _ours(module) <= set(FILES[: FILES.index(module)])


@pytest.mark.parametrize("module", PLAIN)
def test_the_configuration_needs_no_library(module):
  theirs = _third_party(module) - {"folding"}
  assert theirs <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
  "module", [name for name in FILES if ".compression." in name]
)
def test_compression_serves_models_of_others(module):
  rooms = {name.split(".")[1] for name in _ours(module)}
  assert rooms <= {"paths", "compression"}
  # Statistics come from Linen calls; all else works on any tree.
  assert ("flax" in _third_party(module)) == module.endswith(".observe")


def test_a_package_holds_no_code():
  for package in PACKAGES[1:]:
    if _path(package).is_file():
      assert not _parse(package).body[1:]


def _private(tree):
  """Returns the names with an underscore that a file takes from elsewhere."""
  imports = _imports(tree)
  taken = [
    what
    for what in imports.values()
    if any(part[:1] == "_" and part[:2] != "__" for part in what.split("."))
  ]
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr[:1] == "_":
      owner = imports.get(ast.unparse(node.value))
      if owner and node.attr[:2] != "__":
        taken.append(f"{owner}.{node.attr}")
  return taken


@pytest.mark.parametrize(
  "folder", ["folding", "configs", "benchmarks", "tests"]
)
def test_what_starts_with_an_underscore_stays_in_its_file(folder):
  taken = {
    str(path.relative_to(ROOT)): names
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (names := _private(ast.parse(path.read_text(encoding="utf-8"))))
  }
  assert taken == {}


@pytest.mark.parametrize(
  ("source", "imported", "private"),
  [
    ("import folding.paths", "folding.paths", []),
    ("import folding.paths as p\np._x()", "folding.paths", ["_x"]),
    ("from folding import paths\npaths._x", "folding.paths", ["_x"]),
    ("from folding import fpp", "folding", []),
    ("from folding.paths import flatten", "folding.paths", []),
    ("from folding.paths import _x", "folding.paths", ["_x"]),
    ("def f():\n  from . import losses", "folding.training.losses", []),
    ("from ..models import attention", "folding.models.attention", []),
    ("from ..models.attention import attend", "folding.models.attention", []),
    ("import jax\nself._x\njax.__version__", None, []),
  ],
)
def test_the_rules_see_every_spelling(source, imported, private):
  tree = ast.parse(source)
  (what, *_) = _imports(tree, "folding.training").values()
  assert _module_of(what) == imported
  assert [name.rpartition(".")[2] for name in _private(tree)] == private


def _python(code, folder, **environment):
  """Runs code in a new interpreter in which tensorflow is a tripwire."""
  tripwire = folder / "tensorflow"
  tripwire.mkdir(exist_ok=True)
  (tripwire / "__init__.py").write_text("raise SystemExit('tensorflow!')")
  search = os.pathsep.join([str(folder), str(ROOT)])
  return subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"PYTHONPATH": search} | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_importing_starts_no_backend_and_no_tensorflow(tmp_path):
  # A backend that does not exist: to start one would be an error.
  modules = ", ".join(["folding", *FILES[:-1]])
  done = _python(
    f"import {modules}", tmp_path, JAX_PLATFORMS="no_such_platform"
  )
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
  ("code", "sign"),
  [
    ("import jax; jax.numpy.zeros(1)", "no_such_platform"),
    ("import tensorflow", "tensorflow!"),
  ],
  ids=["backend", "tensorflow"],
)
def test_the_import_check_can_fail(code, sign, tmp_path):
  done = _python(code, tmp_path, JAX_PLATFORMS="no_such_platform")
  assert done.returncode != 0
  assert sign in done.stderr
