"""Real studies, in processes of their own: killed, resumed, and shared."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from folding.reporting import runs
from folding.schema import ConfigError
from folding.studies import gather, runner, study
from folding.training.checkpoint import has_checkpoint
from tests.training.conftest import write_text

pytestmark = pytest.mark.slow

_STUDY = """
import pathlib

from folding import config as c
from folding.studies.methods import Method, pick
from folding.studies.study import Study

def get_study(path):
  base = c.Config(
    data=c.DataConfig(
      path=path, tokenizer="bytes", length=8, batch_size=4, eval_batch_size=64
    ),
    model=c.ModelConfig(num_layers=1, width=16, num_heads=4, mlp_width=32),
    fpp=c.FPPConfig(begin=0.2, end=0.7, checks=3),
    train=c.TrainConfig(
      steps=100, eval_every=5, log_every=10, eval_batches=1,
      tensorboard=False, learning_rate=1e-2,
    ),
  )
  broken = {
    "no-such-fold": Method("3 of 4 channels", {"fold.groups": 3}),
    "too-fast": Method("its loss is infinite", {"train.learning_rate": 1e30}),
  }
  methods = {
    "text": pick("dense") | broken | pick("ours"),
    "alone": pick("dense"),
    "shared": pick("dense", "wanda"),
    "seeds": pick("dense"),
  }[name := pathlib.Path(path).stem]
  seeds = (0, 1) if name == "seeds" else (0,)
  return Study({"text": base}, methods, levels=(0.5,), seeds=seeds)
"""


class Place:
  """A study file and the text that it reads."""

  def __init__(self, folder: pathlib.Path, text: str = "text.txt"):
    self.file, self.text = folder / "given.py", folder / text
    self.file.write_text(_STUDY)
    write_text(self.text)
    self.workdir = folder / "study"

  @property
  def study(self) -> study.Study:
    return study.load_study(f"{self.file}:{self.text}")

  def start(self, *flags: str) -> subprocess.Popen:
    where = f"{self.file}:{self.text}"
    command = [sys.executable, "-m", "folding.cli", "study", where]
    return subprocess.Popen([*command, f"--workdir={self.workdir}", *flags])

  def run(self, **options) -> str:
    """Runs the study here and returns what it said."""
    said = io.StringIO()
    console = rich.console.Console(file=said, width=200)
    options = runner.Options(**options)
    assert runner.run_study(self.study, str(self.workdir), options, console)
    return said.getvalue()

  def rows(self) -> dict[str, gather.Row]:
    found = gather.gather(self.study, str(self.workdir))
    return {row.method: row for row in found}

  def path(self, folder: str, method: str, ending: str = "") -> pathlib.Path:
    level = "" if method.startswith("dense") else "--50"
    return self.workdir / folder / f"text--{method}{level}--s0{ending}"


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Lets the runs have one device, not the eight of the tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_NUM_CPU_DEVICES", "1")
    yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Place, str]:
  """Returns a study whose first run was killed in the middle, and resumed."""
  place = Place(tmp_path_factory.mktemp("killed"))
  process = place.start()
  first = place.path("runs", "dense")
  while not has_checkpoint(str(first)):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  result = first / "result.json"
  assert not (result.exists() and json.loads(result.read_text())["finished"])
  return place, place.run()


def test_a_killed_run_goes_on_where_it_was(killed):
  place, said = killed
  assert said.count("text--dense--s0  bits per byte") == 1
  log = place.path("logs", "dense", ".log").read_text()
  assert "resumed at step" in log


def test_a_failing_run_is_reported_and_stops_no_other(killed):
  rows = killed[0].rows()
  found = {method: row.status for method, row in rows.items()}
  assert found == {
    "dense": "finished",
    "no-such-fold": "failed",
    "too-fast": "failed",
    "ours": "finished",
  }
  assert "fold.groups 3 does not divide the head size 4" in (
    rows["no-such-fold"].error or ""
  )
  assert "the loss is nan" in (rows["too-fast"].error or "")


def test_a_finished_method_reached_its_level(killed):
  rows = killed[0].rows()
  assert rows["dense"].compression == 0
  # Whole neurons are rounded down.
  assert 0.5 - 0.01 <= rows["ours"].compression <= 0.5 + 2e-3
  assert rows["ours"].steps == rows["dense"].steps == 100


def test_what_is_over_is_not_repeated(killed):
  place, _ = killed

  def seen():
    files = [*place.workdir.glob("runs/*/*"), *place.workdir.glob("*/*.log")]
    return {path: path.stat().st_mtime_ns for path in files}

  before = seen()
  assert place.run() == ""
  assert seen() == before


def test_a_failed_run_is_tried_again_on_request(killed):
  place, _ = killed
  failure = place.path("failed", "no-such-fold", ".json")
  before = failure.stat().st_mtime_ns
  # The other one takes a process, which its own error keeps from starting.
  place.path("runs", "too-fast").joinpath("config.json").write_text("{")
  said = place.run(retry=True)
  assert "text--no-such-fold--50--s0  failed: fold.groups 3" in said
  assert "text--too-fast--50--s0  failed: " in said
  assert failure.stat().st_mtime_ns > before


def test_two_shards_share_out_the_runs(tmp_path):
  place = Place(tmp_path, "shared.txt")
  page = tmp_path / "pages" / "page.md"
  page.parent.mkdir()
  processes = [place.start(f"--shard={i}/2") for i in (1, 2)]
  assert [process.wait() for process in processes] == [0, 0]
  for method in ("dense", "dense-part", "wanda"):
    log = place.path("logs", method, ".log").read_text()
    assert len(re.findall(r"^step +\d+ +test", log, re.M)) == 1
    assert "resumed" not in log
  rows = place.rows()
  assert rows["wanda"].compression == pytest.approx(0.5, abs=2e-3)
  # The steps and the time of the dense part count.
  assert rows["wanda"].steps == rows["dense"].steps == 100
  part = runs.load_run(str(place.path("runs", "dense-part")))
  assert rows["wanda"].seconds > part.result.seconds > 0
  # A third one only looks.
  assert place.start("--jobs=0", f"--results={page}").wait() == 0
  text = page.read_text()
  assert text == (place.workdir / "results.md").read_text().replace(
    "results/", "page/"
  )
  assert "2 of 2 runs are finished" in text
  assert f"`folding study {place.file.name}:shared.txt`" in text


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/task").exists() or (os.cpu_count() or 1) < 2,
  reason="needs two cores, and Linux, which shares them out",
)
def test_a_run_has_as_many_threads_as_it_has_cores(tmp_path, monkeypatch):
  monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
  process = Place(tmp_path, "seeds.txt").start("--jobs=2")
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  found: dict[str, int] = {}
  while len(found) < 2:
    assert process.poll() is None
    time.sleep(0.01)
    for pid in children.read_text().split():
      folder = pathlib.Path("/proc") / pid
      with contextlib.suppress(OSError):  # it may have ended
        argv = (folder / "cmdline").read_text().split("\0")
        environ = (folder / "environ").read_text().split("\0")
        for arg in argv:
          if arg.startswith("--cores="):
            own = arg.removeprefix("--cores=").split(",")
            found[arg] = len(own)
            assert f"OMP_NUM_THREADS={len(own)}" in environ
  assert sum(found.values()) == len(os.sched_getaffinity(0))
  process.terminate()
  assert process.wait() == 0


def test_a_signal_saves_what_runs(killed, tmp_path):
  place = Place(tmp_path, "alone.txt")
  process = place.start()
  run = place.path("runs", "dense")
  while not has_checkpoint(str(run)):
    assert process.poll() is None
    time.sleep(0.01)
  process.terminate()
  assert process.wait() == 0
  assert (
    "stopped by a signal" in place.path("logs", "dense", ".log").read_text()
  )
  assert place.rows()["dense"].status == "open"
  place.run()
  # As the same run that was killed and resumed elsewhere, and at another step.
  here, there = place.rows()["dense"], killed[0].rows()["dense"]
  assert here.status == there.status == "finished"
  assert (here.quality, here.halfway) == (there.quality, there.halfway)


def test_seeds_share_what_is_compiled(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")
  place = Place(tmp_path, "seeds.txt")
  place.run()
  hit = "compilation cache hit for 'jit_train_step'"
  logs = [
    (place.workdir / "logs" / f"text--dense--s{seed}.log").read_text()
    for seed in (0, 1)
  ]
  assert [hit in log for log in logs] == [False, True]


def test_a_run_of_another_text_fails_at_once(tmp_path):
  place = Place(tmp_path, "seeds.txt")
  place.run()
  second = place.workdir / "runs" / "text--dense--s1"
  shutil.rmtree(second)
  whole = place.text.read_text()
  place.text.write_text(whole + "and more")
  assert "failed: the text is not that of the other runs" in place.run()
  assert not second.exists()
  gather.gather(place.study, str(place.workdir))  # what there is is shown
  place.text.write_text(whole)
  assert "text--dense--s1  bits per byte" in place.run(retry=True)


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_there_is_not_is_told(shard):
  with pytest.raises(ConfigError, match="a shard is 1/n to n/n"):
    runner.Options(shard)
