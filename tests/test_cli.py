import os
import subprocess
import sys
from importlib import metadata

import pytest

from folding import cli
from tests.reporting import synthetic_run


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      '{"format": "folding", "config": {}}',
      "is an export or another library's",
    ),
    ('{"model_type": "bert"}', "is an export or another library's checkpoint"),
    ('{"schema": 1}', "config has no field"),
    ("{", "config.json is damaged"),
  ],
)
def test_what_is_no_run_is_told(text, message, tmp_path, capsys):
  (tmp_path / "config.json").write_text(text)
  assert cli.main(["evaluate", str(tmp_path)]) == 2
  assert message in _one_error_line(capsys)


def _one_error_line(capsys) -> str:
  out, err = capsys.readouterr()
  assert out == ""
  assert err.endswith("\n")
  (line,) = err.splitlines()
  assert line.startswith("folding: error: ")
  return line


def test_report_writes_the_page_and_prints_the_summary(tmp_path, capsys):
  workdir = synthetic_run.write(tmp_path / "a")
  assert cli.main(["report", workdir]) == 0
  out = capsys.readouterr().out
  assert "1.903 bits per byte (perplexity 18.20" in out
  assert f"The report is in {workdir}/report.md" in out
  assert (tmp_path / "a" / "report.md").is_file()


def test_compare_prints_the_table(tmp_path, capsys):
  dense = synthetic_run.config(dense=True)
  workdirs = [
    synthetic_run.write(tmp_path / "dense", dense),
    synthetic_run.write(tmp_path / "paper"),
  ]
  output = str(tmp_path / "out")
  assert cli.main(["compare", *workdirs, "--output", output]) == 0
  out = capsys.readouterr().out
  assert (tmp_path / "out" / "compare.md").read_text() in out
  assert "337,920" in out


@pytest.mark.parametrize(
  "verb",
  [["report"], ["compare"], ["resume"], ["shrink", "--output=none"]],
  ids=lambda verb: verb[0],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, verb):
  assert cli.main([*verb, str(tmp_path)]) == 2
  assert "has no config.json" in _one_error_line(capsys)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
  workdir = synthetic_run.write(tmp_path / "a")
  (tmp_path / "file").write_text("")
  output = str(tmp_path / "file" / "out")
  assert cli.main(["compare", workdir, "--output", output]) == 2
  assert "Not a directory" in _one_error_line(capsys)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "VERB"),
    (["fold"], "invalid choice: 'fold'"),
    (["report"], "RUN"),
    (["report", "a", "--fast"], "unrecognized arguments: --fast"),
  ],
)
def test_a_wrong_argument_is_one_line(capsys, argv, message):
  with pytest.raises(SystemExit) as stop:
    cli.main(argv)
  assert stop.value.code == 2
  assert message in _one_error_line(capsys)


def test_the_version_is_that_of_the_package(capsys):
  with pytest.raises(SystemExit, match="0"):
    cli.main(["--version"])
  expected = f"folding {metadata.version('folding')}\n"
  assert capsys.readouterr().out == expected


def test_ctrl_c_has_no_traceback():
  def call():
    raise KeyboardInterrupt

  assert cli.exit_status(call) == 130


def test_a_letter_that_cannot_be_printed_is_told():
  program = """
import sys
from folding import cli
sys.exit(cli.exit_status(lambda: print("na\\xefve")))
"""
  found = subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    text=True,
  )
  assert (found.returncode, found.stdout) == (2, "")
  [line] = found.stderr.splitlines()
  assert "cannot print: 'ascii' codec" in line
  assert "PYTHONIOENCODING=utf-8" in line


def test_a_reader_that_leaves_is_no_mistake():
  program = """
import sys
from folding import cli
sys.exit(cli.exit_status(lambda: print("a line")))
"""
  reader, writer = os.pipe()
  os.close(reader)
  found = subprocess.run(
    [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE
  )
  os.close(writer)
  assert (found.returncode, found.stderr) == (0, b"")
