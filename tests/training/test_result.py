import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from importlib import metadata

import jax
import pytest

from folding.training.result import read_result, write_result


def test_result_comes_back_with_its_provenance(tmp_path):
  figures = {"steps": 7, "test": {"loss": 1.5}, "layers": [{"path": "a/b"}]}
  write_result(str(tmp_path), figures)
  result = read_result(str(tmp_path))
  assert result == json.loads((tmp_path / "result.json").read_text())
  assert {name: result[name] for name in figures} == figures
  assert result["schema"] == 1
  assert result["versions"]["jax"] == jax.__version__
  assert result["versions"]["optax"] == metadata.version("optax")
  assert re.fullmatch(r"cpu x8 \(.+, \d+ cores\)", result["device"])


def test_commit_is_that_of_the_source(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  head = ["git", "-C", str(root), "rev-parse", "HEAD"]
  found = subprocess.run(head, capture_output=True, text=True, check=False)
  write_result(str(tmp_path), {})
  commit = read_result(str(tmp_path))["commit"]
  if found.returncode:
    assert commit is None
  else:
    assert len(commit) == 12
    assert found.stdout.startswith(commit)


def test_installed_in_a_project_its_commit_is_not_that_of_the_project(tmp_path):
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
  for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
    subprocess.run([*git, *words], check=True, capture_output=True)
  package = pathlib.Path(__file__).parents[2] / "folding"
  shutil.copytree(package, tmp_path / "site" / "folding")
  code = "from folding.training import result; print(result.source_commit())"
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path / "site",
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout.strip() == "None"


def test_result_is_written_whole_or_not_at_all(tmp_path):
  write_result(str(tmp_path), {"steps": 1})
  before = (tmp_path / "result.json").read_bytes()
  with pytest.raises(TypeError, match="not JSON serializable"):
    write_result(str(tmp_path), {"steps": 2, "bad": object()})
  assert (tmp_path / "result.json").read_bytes() == before


def test_result_replaces_the_one_before(tmp_path):
  for steps in (1, 2):
    write_result(str(tmp_path), {"steps": steps})
  assert os.listdir(tmp_path) == ["result.json"]
  assert read_result(str(tmp_path))["steps"] == 2
