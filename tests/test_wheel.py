"""The wheel holds the package and its config files, and works without a clone."""

import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import hatch_build
from tests.training.test_distributed import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
  subprocess.run([*command, str(folder)], cwd=ROOT, check=True)
  (found,) = folder.glob("folding_jax-*.whl")
  return found


@pytest.mark.slow
def test_wheel_holds_the_package_and_configs(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  wanted = {f"folding/{x}" for x in _files(ROOT / "folding")}
  wanted |= {f"folding/shipped/configs/{x}" for x in _files(ROOT / "configs")}
  assert {name for name in names if ".dist-info/" not in name} == wanted


@pytest.mark.slow
def test_readme_of_the_wheel_has_no_relative_link(wheel):
  archive = zipfile.ZipFile(wheel)
  (name,) = (x for x in archive.namelist() if x.endswith("/METADATA"))
  readme = archive.read(name).decode().partition("\n\n")[2]
  assert "# folding" in readme
  links = re.findall(r"\]\((.*?)\)", readme)
  assert links
  assert all(re.match("https://|#", link) for link in links)


@pytest.mark.parametrize(
  ("address", "expected"),
  [
    (None, "a b  [c](https://c) [d](#d)"),
    (
      "https://e/f",
      "[a b](https://e/f/blob/main/docs/a.md#b) "
      "![p](https://e/f/raw/main/p.svg) [c](https://c) [d](#d)",
    ),
  ],
)
def test_links_of_the_readme_begin_with_the_address(address, expected):
  text = "[a b](docs/a.md#b) ![p](p.svg) [c](https://c) [d](#d)"
  assert hatch_build.with_address(text, address) == expected


def _files(folder):
  found = [
    *folder.rglob("*.py"),
    *folder.rglob("*.html"),
    *folder.rglob("py.*"),
  ]
  return {path.relative_to(folder).as_posix() for path in found}


@pytest.mark.slow
def test_wheel_trains_and_studies_in_an_empty_folder(wheel, tmp_path):
  package, work = tmp_path / "package", tmp_path / "work"
  zipfile.ZipFile(wheel).extractall(package)
  (work / "data").mkdir(parents=True)
  (work / "data" / "train.txt").write_text("Some text of a file.\n" * 200)
  commands = [
    ["train", "--config=configs/lm.py:data/train.txt", "--workdir=run"]
    + ["--config.data.tokenizer=bytes", "--config.data.length=16"]
    + ["--config.train.steps=2", "--config.train.eval_every=2"]
    + ["--config.model.width=16", "--config.model.num_heads=2"]
    + ["--config.model.num_layers=1"],
    ["study", "configs/studies/smoke.py:data/train.txt", "--workdir=smoke"],
    # It imports another file of configs/.
    ["study", "configs/studies/short.py:no_such_folder", "--workdir=short"],
  ]
  done = subprocess.run(
    [sys.executable, "-c", COMMANDS, json.dumps(commands)],
    cwd=work,
    env=os.environ | {"PYTHONPATH": str(package), "JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  for _, _, err in found:
    assert f"{package}/folding/shipped/configs" in err, err
  assert [status for status, _, _ in found] == [0, 0, 2], found
  assert "no folder 'no_such_folder'" in found[-1][2]
