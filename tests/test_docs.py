"""The Python and the commands of README.md and docs/ fit the code."""

import os
import pathlib
import pkgutil
import re
import runpy
import shlex
import tomllib

import pytest

from folding import cli, typed
from folding import config as c
from folding.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_README = [ROOT / "README.md", *PAGES]
FIELDS = typed.fields(c.Config)


def _blocks(page, language):
  """Yields (line number, text) of the fenced blocks of a language."""
  text = page.read_text(encoding="utf-8")
  for found in re.finditer(rf"```{language}\n(.*?)```", text, re.S):
    yield text.count("\n", 0, found.start(1)), found[1]


def _commands(page):
  """Yields the commands of the shell blocks, as lists of words."""
  for _, text in _blocks(page, "sh"):
    for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
      words = shlex.split(line, comments=True)
      while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)  # an environment variable
      if words:
        yield words


def _check(words):
  """Raises unless the files and flags that a command names exist."""
  match words:
    case ["folding", *rest]:
      _check_verb(rest)
    case ["pip", "install", *rest]:
      with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
      for names in re.findall(r"\[(.*?)\]", " ".join(rest)):
        assert set(names.split(",")) <= extras.keys()
    case ["python", "-m", module, *_]:
      assert (ROOT / f"{module.replace('.', os.sep)}.py").is_file()
    case _:
      assert words[0] in ("pytest", "mkdocs")


def _check_verb(words):
  rest, edits = cli.split_edits(words)
  args = vars(cli.make_parser().parse_args(rest))
  for name, text in edits.items():
    typed.parse(FIELDS[name], text, name)
  path = (args.get("config") or args.get("study") or "").partition(":")[0]
  if path.startswith("configs/"):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", WITH_README, ids=lambda page: page.stem)
def test_commands_of_page_name_existing_flags(page):
  for words in _commands(page):
    _check(words)


@pytest.mark.parametrize(
  "command",
  [
    "folding no-such-verb runs/a",
    "folding generate runs/a --top-k=many",
    "folding train --workdir=a --config=configs/lm.py --config.no.such=1",
    "folding train --workdir=a --config=configs/lm.py --config.seed=many",
    "folding train --workdir=a --config=configs/no_such.py",
    "folding study configs/studies/no_such.py --workdir=a",
    "pip install -e .[no_such_extra]",
    "python -m benchmarks.no_such_benchmark",
    "no_such_program",
  ],
)
def test_stale_command_is_seen(command):
  with pytest.raises((AssertionError, SystemExit, ConfigError, KeyError)):
    _check(command.split())


@pytest.mark.parametrize(
  "page", [ROOT / "CONTRIBUTING.md", *WITH_README], ids=lambda page: page.stem
)
def test_names_in_page_exist(page):
  text = page.read_text(encoding="utf-8")
  sections = {name.partition(".")[0] for name in FIELDS}
  for name in re.findall(r"--config\.([\w.]*\w)", text):
    assert name in FIELDS or name in sections
  for name in re.findall(r"`((?:fold|fpp|compress|distill)\.\w+)", text):
    assert name in FIELDS or name == "fold.json"
  for name in re.findall(r"\bfolding(?:\.\w+)+", text):
    pkgutil.resolve_name(name)


def test_flags_for_trained_models_fit_together(tmp_path):
  (tmp_path / "checkpoints").mkdir()  # as a run of a classifier
  shape = c.bert(num_layers=2, width=384, num_heads=12)
  run = c.resolve(c.Config(task="classify", preset="none", model=shape))
  c.save(run, str(tmp_path / "config.json"))
  table = (ROOT / "docs/how-to/pretrained.md").read_text(encoding="utf-8")
  flags = re.findall(r"^\| `(--config\..*?)` \|", table, re.M)
  for page in PAGES:
    for words in _commands(page):
      if "--config=configs/pretrained.py:runs/dense" in words:
        flags.append(" ".join(w for w in words if w.startswith("--config.")))
  assert len(flags) >= 5
  for text in flags:
    _, edits = cli.split_edits(text.split())
    c.resolve(c.read(f"configs/pretrained.py:{tmp_path}", edits))


def test_files_written_by_scripts_are_current():
  names, diagrams = (
    runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    for name in ("names", "diagrams")
  )
  assert names["PAGE"].read_text(encoding="utf-8") == names["page"]()
  for function in diagrams["DIAGRAMS"]:
    path = ROOT / "docs" / "diagrams" / f"{function.__name__}.svg"
    assert path.read_text(encoding="utf-8") == function()


@pytest.mark.slow
@pytest.mark.filterwarnings(  # by qwix 0.1.8
  "ignore:.VariableState. was removed:DeprecationWarning"
)
@pytest.mark.parametrize(
  "page",
  [page for page in PAGES if any(_blocks(page, "python"))],
  ids=lambda page: page.stem,
)
def test_python_blocks_of_page_run_in_order(page, tmp_path, monkeypatch):
  if page.stem == "quantise":
    pytest.importorskip("qwix", reason="the page is about the package qwix")
  monkeypatch.chdir(tmp_path)  # some blocks write files
  names = {"__name__": page.stem}
  for line, text in _blocks(page, "python"):
    # On its own line of the page, so that a traceback points there.
    exec(compile("\n" * line + text, str(page), "exec"), names)
