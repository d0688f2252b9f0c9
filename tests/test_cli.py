"""The command line: its grammar, its errors, and what a verb prints."""

import logging
import os
import platform
import shlex
import subprocess
import sys

import pytest

from folding import __version__, cli, typed
from folding import config as config_lib
from folding.errors import ConfigError, TrainingError
from folding.training import loop, run_dir
from tests.reporting import synthetic_run

QUICKSTART = ("train", "--config=configs/quickstart.py")


def _error(capsys) -> str:
  out, err = capsys.readouterr()
  assert out == ""
  (line,) = err.splitlines()
  assert line.startswith("folding: error: ")
  return line


def test_split_edits_takes_both_forms_and_the_last_value():
  rest, edits = cli.split_edits(
    ["train", "--config.a=1", "--config=F", "--config.b.c", "-2"]
    + ["--config.a", "None", "--workdir", "W", "--config.d=x=y"]
  )
  assert rest == ["train", "--config=F", "--workdir", "W"]
  assert edits == {"a": "None", "b.c": "-2", "d": "x=y"}


def test_name_of_a_field_may_be_the_value_of_a_flag():
  argv = ["generate", "RUN", "--prompt", "data.path"]
  assert cli.split_edits(argv) == (argv, {})


def test_train_runs_the_config_that_the_flags_ask_for(
  monkeypatch, capsys, tmp_path
):
  calls, folder = [], synthetic_run.write(tmp_path / "a")
  monkeypatch.setattr(loop, "run", lambda *args: calls.append(args))
  monkeypatch.setattr(cli, "show_report", lambda workdir: print(workdir))
  flags = ["--config.model.width=64", "--config.data.path", "None"]
  flags += ["--config.fold.groups=2,1,0", "--config.dense=False"]
  assert cli.main([*QUICKSTART, f"--workdir={folder}", *flags]) == 0
  [(config, workdir)] = calls
  assert (workdir, capsys.readouterr().out) == (folder, f"{folder}\n")
  whole = config_lib.read("configs/quickstart.py")
  edits = ["model.width: 128 -> 64", "fold.groups: None -> (2, 1, 0)"]
  assert typed.differences(whole, config) == edits
  command = run_dir.read_command(folder)
  assert shlex.split(command["command"])[-5:] == flags
  assert command["edits"] == edits


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "VERB"),
    (["fold"], "'fold'"),
    (["report"], "RUN"),
    (["report", "a", "--fast"], "--fast"),
    (["report", "a", "--config.seed=1"], "--config.seed"),
    (["train", "--workdir=W"], "--config"),
    (QUICKSTART, "--workdir"),
    ([*QUICKSTART, "--work=W"], "--work"),
    ([*QUICKSTART, "--workdir=W", "--confg.seed=1"], "--confg.seed"),
    ([*QUICKSTART, "--workdir=W", "--config.seed"], "needs a value"),
    ([*QUICKSTART, "--config.seed", "--workdir=W"], "needs a value"),
    ([*QUICKSTART, "--workdir=W", "--config.widht=1"], "mean model.width?"),
    ([*QUICKSTART, "--workdir=W", "--config.seed=None"], "it is None"),
    ([*QUICKSTART, "--workdir=W", "--config.seed=-1"], "it is -1"),
    ([*QUICKSTART, "--workdir=W", "--config.fold.axis=x"], "'input'"),
    ([*QUICKSTART, "--workdir=W", "--config.model.width=100"], "divisible"),
    ([*QUICKSTART, "--workdir=W", "--config.pretrained="], "it is empty"),
    ([*QUICKSTART, "--workdir=W", "--config.data.path="], "it is empty"),
    ([*QUICKSTART, "--workdir=W", "--config.model.num_layers=9999"], "1024"),
    (
      [*QUICKSTART, "--workdir=W", "--config.trian.steps=1"],
      "mean train.steps?",
    ),
    ([*QUICKSTART, "--workdir=x\udcff"], "UTF-8"),
    ([*QUICKSTART, "--workdir="], "empty"),
    (
      [*QUICKSTART, "--workdir=README.md"],
      "README.md is there already and not a folder",
    ),
    ([*QUICKSTART, "--workdir=W", "--data.path=x"], "--config.data.path"),
    (["train", "--config=nowhere.py", "--workdir=W"], "nowhere.py"),
    (["train", "--config=classify", "--workdir=W"], "configs/classify.py"),
    (["study", "short", "--workdir=W"], "configs/studies/short.py"),
    (["train", "--config=nowhere.json", "--workdir=W"], "nowhere.json"),
    (["train", "--config=README.md", "--workdir=W"], "README.md"),
    (["compare", "nowhere"], "nowhere"),
    (["resume", "configs"], "has no config.json"),
    (["report", "configs"], "has no config.json"),
    (["report", ""], "'' is not a run"),
    (["shrink", "configs", "--output=W"], "has no config.json"),
    (["generate", "configs", "--top-k=many"], "many"),
  ],
  ids=lambda x: " ".join(x) if isinstance(x, list | tuple) else "",
)
def test_mistake_is_one_line_and_status_2(argv, message, capsys):
  try:
    status = cli.main(argv)
  except SystemExit as stop:  # by argparse
    status = stop.code
  assert status == 2
  assert message in _error(capsys)
  assert not os.path.exists("W")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"format": "folding", "config": {}}', "export"),
    ('{"model_type": "bert"}', "another library's"),
    ('{"schema": 1}', "c6086e3"),
    ("{", "damaged"),
  ],
)
def test_folder_of_another_kind_is_one_line(text, message, tmp_path, capsys):
  (tmp_path / "config.json").write_text(text)
  assert cli.main(["evaluate", str(tmp_path)]) == 2
  assert message in _error(capsys)


def test_help_of_train_lists_every_field(capsys):
  with pytest.raises(SystemExit, match="0"):
    cli.main(["train", "--help"])
  out = capsys.readouterr().out
  for name in typed.fields(config_lib.Config):
    assert f"\n  {name}=" in out
  assert "train.steps=1000  (int in [1, 2^31))" in out
  assert "mesh axis or None" in out  # a comment
  assert "D, channels per token" in out  # of a field that `model` inherits


def test_help_after_a_config_shows_its_values(tmp_path, capsys):
  with pytest.raises(SystemExit, match="0"):
    cli.main(["train", "--config=configs/classify.py", "--help"])
  out = capsys.readouterr().out
  assert "\n  task=classify  (one of 'lm', 'embed'" in out
  assert cli.main(["train", f"--config={tmp_path}/no.py", "--help"]) == 2
  assert "no.py" in _error(capsys)


def test_report_writes_the_page_and_prints_the_summary(tmp_path, capsys):
  workdir = synthetic_run.write(tmp_path / "a")
  assert cli.main(["report", workdir]) == 0
  out = capsys.readouterr().out
  assert "1.903 bits per byte" in out
  assert f"{workdir}/report.html" in out
  assert (tmp_path / "a" / "report.md").is_file()


def test_line_about_a_run_is_shown_once_per_command(
  tmp_path, capsys, monkeypatch
):
  workdir = synthetic_run.write(tmp_path / "a")  # without checksums
  for _ in range(2):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["report", workdir]) == 0
    assert capsys.readouterr().err.count("cannot be verified") == 1


def test_compare_prints_the_table(tmp_path, capsys):
  workdirs = [
    synthetic_run.write(tmp_path / "dense", synthetic_run.config(dense=True)),
    synthetic_run.write(tmp_path / "paper"),
  ]
  output = str(tmp_path / "out")
  assert cli.main(["compare", *workdirs, "--output", output]) == 0
  out = capsys.readouterr().out
  assert (tmp_path / "out" / "compare.md").read_text() in out


@pytest.mark.parametrize(
  ("error", "status"),
  [
    (ConfigError("a\nb"), 2),
    (FileNotFoundError(2, "No such file", "x"), 2),
    (TrainingError("nan"), 1),
    (KeyboardInterrupt(), 130),
  ],
  ids=lambda x: type(x).__name__,
)
def test_exit_status_of_an_error(error, status, capsys):
  def call():
    raise error

  assert cli.exit_status(call) == status
  assert capsys.readouterr().err.count("\n") == (status != 130)


def test_closed_output_is_refused_before_the_work(capsys, monkeypatch):
  monkeypatch.setattr("sys.stdout", None)
  assert cli.exit_status(lambda: 1 / 0) == 2
  assert "standard output is closed" in capsys.readouterr().err


def test_other_errors_are_not_hidden():
  with pytest.raises(ZeroDivisionError):
    cli.exit_status(lambda: 1 / 0)


def test_interrupt_while_a_program_compiles_ends_the_process(tmp_path):
  script = tmp_path / "script.py"
  script.write_text("""\
import os, signal, threading
import jax, jax.numpy as jnp
from folding import cli

def long(x):
  for n in range(600):
    x = jnp.sin(x * n) @ x
  return x

lowered = jax.jit(long).lower(jnp.ones((4, 4)))

def call():
  threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
  lowered.compile()

# A shell's background job ignores it, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.leave(cli.exit_status(call))
""")
  found = subprocess.run(
    [sys.executable, script],
    env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    capture_output=True,
  )
  assert found.returncode == 130, found.stderr


def test_character_that_cannot_be_printed_is_one_line():
  program = "import sys; from folding import cli; sys.exit("
  program += "cli.exit_status(lambda: print('na\\xefve')))"
  found = subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    text=True,
  )
  assert (found.returncode, found.stdout) == (2, "")
  [line] = found.stderr.splitlines()
  assert "PYTHONIOENCODING=utf-8" in line


def test_warning_begins_with_its_level_and_names_no_logger():
  program = "import logging; from folding import cli; "
  program += "cli.main(['train', '--config=no.py', '--workdir=W']); "
  program += "logging.getLogger('folding.data').warning('a.csv: b')"
  found = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert found.stderr.splitlines()[1:] == ["WARNING: a.csv: b"]


def test_closed_pipe_is_no_error():
  reader, writer = os.pipe()
  os.close(reader)
  found = subprocess.run(
    [sys.executable, "-m", "folding", "--version"],
    stdout=writer,
    stderr=subprocess.PIPE,
  )
  os.close(writer)
  assert (found.returncode, found.stderr) == (0, b"")


def test_module_and_script_are_the_command():
  version = f"folding {__version__}\n"
  for command in (["-m", "folding", "--version"], ["train.py", "--help"]):
    found = subprocess.run(
      [sys.executable, *command], capture_output=True, text=True
    )
    assert found.returncode == 0
    assert found.stdout.startswith((version, "usage: folding train"))


MEMORY = """
import resource
import numpy as np
from folding import memory

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):
    np.ones(1 << 23)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
memory.keep_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_mapped_again():
  found = subprocess.run(
    [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
  )
  before, after = map(int, found.stdout.split())
  assert after < before / 4


GAPS = """
import numpy as np
from folding import memory

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * 4096 / 2**20

memory.keep_freed()
arrays = [np.ones(1 << 20) for _ in range(32)]
last = arrays.pop()
del arrays
before = resident()
memory.return_freed()
print(before - resident())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc" or not os.path.exists("/proc/self/statm"),
  reason="needs glibc on Linux",
)
def test_freed_memory_below_an_array_is_returned():
  found = subprocess.run(
    [sys.executable, "-c", GAPS], capture_output=True, text=True, check=True
  )
  assert float(found.stdout) > 200  # of 31 arrays of 8 MiB
