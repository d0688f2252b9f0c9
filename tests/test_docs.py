"""The documentation runs as it stands, and names no flag that there is not."""

import os
import pathlib
import re
import shlex
import tomllib

import pytest

from folding import cli, typed
from folding import config as config_lib
from folding.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def _blocks(path, language):
  """Yields (line number, text) of the fenced blocks of a language."""
  text = path.read_text(encoding="utf-8")
  for found in re.finditer(rf"```{language}\n(.*?)```", text, re.S):
    yield text.count("\n", 0, found.start(1)), found[1]


def _commands(path):
  """Returns the commands of the shell blocks, as lists of words."""
  found = []
  for _, text in _blocks(path, "sh"):
    for line in text.replace("\\\n", " ").splitlines():
      for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
          words.pop(0)  # the environment
        if words:
          found.append(words)
  return found


SHELL = [
  pytest.param(words, id=f"{path.relative_to(ROOT)}-{' '.join(words)[:60]}")
  for path in [ROOT / "README.md", *PAGES]
  for words in _commands(path)
]


@pytest.mark.slow
@pytest.mark.filterwarnings(  # by qwix 0.1.8
  "ignore:.VariableState. was removed:DeprecationWarning"
)
@pytest.mark.parametrize(
  "path",
  [path for path in PAGES if any(_blocks(path, "python"))],
  ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_blocks_of_a_page_run_one_after_the_other(
  path, tmp_path, monkeypatch
):
  if path.stem == "quantise":
    pytest.importorskip("qwix", reason="the page is about the package qwix")
  monkeypatch.chdir(tmp_path)  # some write files
  names = {"__name__": path.stem}
  for line, text in _blocks(path, "python"):
    # On its own line of the page, so that a traceback points there.
    exec(compile("\n" * line + text, str(path), "exec"), names)


def _check_folding(words, folder, monkeypatch):
  """There is nothing to work on here, so a known command says so at once."""
  monkeypatch.chdir(folder)
  assert cli.main(words[1:]) == 2  # a flag that is unknown exits instead


def _check_train(words):
  rest, edits = cli.split_edits(words)
  files = [word for word in rest if word.startswith("--config=")]
  known = typed.fields(config_lib.Config)
  for name, text in edits.items():
    assert name in known
    typed.parse(known[name], text, name)
  for word in files:
    path = word.removeprefix("--config=").partition(":")[0]
    assert (ROOT / path).is_file()
  assert all(word in files or word.startswith("--workdir=") for word in rest)


def _check_pip(words):
  with open(ROOT / "pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
  for word in words:
    for names in re.findall(r"^\.\[(.*)\]$", word):
      assert set(names.split(",")) <= extras.keys()


@pytest.mark.parametrize("words", SHELL)
def test_a_command_has_no_stale_flag(words, tmp_path, monkeypatch):
  if words[0] == "folding":
    _check_folding(words, tmp_path, monkeypatch)
  elif words[:2] == ["python", "train.py"]:
    _check_train(words[2:])
  elif words[:2] == ["pip", "install"]:
    _check_pip(words)
  elif words[:2] == ["python", "-m"]:
    assert (ROOT / f"{words[2].replace('.', os.sep)}.py").is_file()
  else:
    assert words == ["pytest", "-n", "2", "--dist=loadfile"]


@pytest.mark.parametrize(
  "command",
  [
    "folding report --no-such-flag runs/a",
    "folding no-such-verb runs/a",
    "folding generate runs/a --top-k=many",
    "python train.py --config=configs/lm.py --config.no.such=1",
    "python train.py --config=configs/no_such.py",
    "python train.py --config=configs/lm.py --config.train.steps=many",
    "pip install -e .[no_such_extra]",
    "python -m benchmarks.no_such_benchmark",
    "no_such_program",
  ],
)
def test_a_stale_flag_is_seen(command, tmp_path, monkeypatch):
  with pytest.raises((AssertionError, SystemExit, ConfigError)):
    test_a_command_has_no_stale_flag(command.split(), tmp_path, monkeypatch)
