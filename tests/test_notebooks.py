"""The notebooks fit the code, and run from the first cell to the last."""

import ast
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import folding
from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.serving import export as export_lib

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))

# Runs the code cells like a kernel, and saves the plots to a folder. Commands
# run in the same process, which has imported and compiled what they need.
_RUN = """
import json, pathlib, re, shlex, sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from folding import cli

def shell(line):
  assert cli.main(shlex.split(line)) == 0, line

names = {"__name__": "__main__", "shell": shell}
with open(sys.argv[1], encoding="utf-8") as file:
  cells = json.load(file)["cells"]
for number, cell in enumerate(cells):
  if cell["cell_type"] == "code":
    code = "".join(cell["source"])
    code = code.replace("%pip install", "raise SystemExit('no folding') #")
    code = re.sub("^!folding (.*)$", r"shell(f'\\1')", code, flags=re.M)
    exec(compile(code, f"cell {number}", "exec"), names)
folder = pathlib.Path(sys.argv[2])
for number in plt.get_fignums():
  plt.figure(number).savefig(folder / f"{number}.png", dpi=110)
"""


def _run(path, folder, checkpoint=""):
  environment = {**os.environ, "NOTEBOOK_STEPS": "4", "PYTHONPATH": str(ROOT)}
  environment["NOTEBOOK_CHECKPOINT"] = str(checkpoint)
  del environment["JAX_NUM_CPU_DEVICES"]  # a notebook sets the number it needs
  return subprocess.run(
    [sys.executable, "-c", _RUN, str(path), str(folder)],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=500,
  )


def _sources(path):
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_of_notebook_name_what_exists(path):
  for kind, source in _sources(path)[2:]:
    if kind == "code":
      for node in ast.walk(ast.parse(re.sub("^!.*", "", source, flags=re.M))):
        if isinstance(node, ast.ImportFrom):
          assert not any(alias.name.startswith("_") for alias in node.names)


def test_address_of_notebooks_is_that_of_the_project():
  written = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))["notebook"]
  for path in NOTEBOOKS:
    assert path.read_text(encoding="utf-8") == written(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_all_of_its_outputs_or_none(path):
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  ran = {bool(cell["execution_count"]) for cell in code}
  assert len(ran) == 1
  for cell in code:
    assert "error" not in {o["output_type"] for o in cell["outputs"]}
    if ran == {True} and "plt.show()" in "".join(cell["source"]):
      assert any("image/png" in o.get("data", {}) for o in cell["outputs"])


def _checkpoint(folder, task):
  """Writes a tiny BERT for transformers and returns its folder."""
  has_classes = task == "classify"
  config = c.resolve(
    c.Config(
      task=task,
      preset="none",
      data=c.DataConfig(vocab_size=400, length=64),
      model=c.bert(num_layers=2, width=64, num_heads=4, pooler=has_classes),
    )
  )
  labels = ["a", "b"] if has_classes else []
  tokenizer = train_tokenizer(config.data, [pathlib.Path(__file__).read_text()])
  model = folding.make_model(
    folding.shape_of(config), tokenizer.vocab_size, len(labels)
  )
  tokens = jnp.zeros((1, 64), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  export_lib.export(
    folder / "a", folding.Model.of(config, params, tokenizer, labels)
  )
  export_lib.export_hf(folder / "b", folding.load(folder / "a"))
  return folder / "b"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws(path, tmp_path_factory, tmp_path):
  checkpoint = ""
  if "NOTEBOOK_CHECKPOINT" in path.read_text(encoding="utf-8"):
    task = "embed" if path.stem == "compress_encoder" else "classify"
    checkpoint = _checkpoint(tmp_path_factory.mktemp("checkpoint"), task)
  done = _run(path, tmp_path, checkpoint)
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
