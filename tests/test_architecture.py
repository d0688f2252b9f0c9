"""The rules of import: pyproject.toml has the layers, import-linter checks them."""

import os
import pathlib
import pkgutil
import subprocess
import sys

from importlinter import cli

import folding

ROOT = pathlib.Path(__file__).parents[1]


def test_imports_follow_the_layers_of_pyproject(monkeypatch):
  monkeypatch.chdir(ROOT)
  # It disables the loggers that exist, which later tests read.
  monkeypatch.setattr("logging.config.dictConfig", lambda options: None)
  status = cli.lint_imports(
    config_filename="pyproject.toml", no_cache=True, is_debug_mode=False
  )
  assert status == cli.EXIT_STATUS_SUCCESS


def test_compression_imported_alone_loads_no_heavy_library():
  heavy = ["orbax", "tensorflow_datasets", "matplotlib", "folding.config"]
  code = (
    "import sys, folding, folding.compression.fpp\n"
    f"loaded = [name for name in {heavy} if name in sys.modules]\n"
    "assert not loaded, loaded\n"
  )
  _run(code)


def test_import_of_all_modules_starts_no_backend_and_no_tensorflow(tmp_path):
  names = [
    module.name
    for module in pkgutil.walk_packages(folding.__path__, "folding.")
    if not module.name.endswith("__main__")
  ]
  (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow')")
  # A backend that does not exist: to start one is an error.
  _run(
    f"import {', '.join(names)}",
    PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    JAX_PLATFORMS="no_such_platform",
  )


def _run(code: str, **environment: str) -> None:
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert (done.returncode, done.stderr) == (0, "")
