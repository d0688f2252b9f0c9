"""The command line of train.py; runs are in training/test_loop.py."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def train(*flags):
  return subprocess.run(
    [sys.executable, str(ROOT / "train.py"), *flags],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--workdir={workdir}"], "give --config=FILE and --workdir=DIR"),
    (["--config=configs/lm.py"], "give --config=FILE and --workdir=DIR"),
    (["--config=nowhere.py", "--workdir={workdir}"], "nowhere.py is not there"),
    (["--config=nowhere.py", "--workdir", "config.run"], "nowhere.py is not"),
    (["--config={other}", "--workdir={workdir}"], "gives a Config"),
    (
      ["--config=configs/lm.py", "--workdir={workdir}", "--confg.seed=1"],
      "confg.seed",
    ),
    (
      [
        *("--config=configs/quickstart.py", "--workdir={workdir}"),
        *("--config.train.eval_batches=None", "--config.seed=None"),
      ],
      "config.seed must be int; it is None",
    ),
    (
      [
        *("--config=configs/quickstart.py", "--workdir={workdir}"),
        *("--config.data.path", "None", "--config.seed", "None"),
      ],
      "config.seed must be int; it is None",
    ),
    (
      [
        *("--config=configs/quickstart.py", "--workdir={workdir}"),
        *("--config.seed=None", "--config.seed=-1"),  # the last one counts
      ],
      "a seed is a number of 0 to 2^32 - 1; it is -1",
    ),
  ],
  ids=[
    "no-config",
    "no-workdir",
    "no-file",
    "spaced",
    "other-file",
    "flag",
    "none",
    "spaced-none",
    "none-first",
  ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, flags, message):
  other = tmp_path / "other.py"
  other.write_text("def get_config():\n  return {'steps': 1}\n")
  workdir = tmp_path / "run"
  process = train(*(f.format(workdir=workdir, other=other) for f in flags))
  assert process.returncode == 2, process.stderr
  assert process.stdout == ""
  assert process.stderr.startswith("folding: error: ")
  assert process.stderr.count("\n") == 1
  assert message in process.stderr
  assert not workdir.exists()
