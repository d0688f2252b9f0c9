"""Real runs: in processes of this machine, and on two nodes of Ray."""

import concurrent.futures
import os
import pathlib
import signal
import tempfile
import threading
import time

import pytest

from folding import config as c
from folding.errors import ConfigError, TrainingError
from folding.studies import grid, methods
from folding.studies.tables import collect
from folding.training import loop
from folding.training.checkpoint import has_checkpoint
from folding.typed import edited
from tests.training.conftest import write_text


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Gives the runs one device each, not the eight of the tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_NUM_CPU_DEVICES", "1")
    yield


def make_study(folder, *names, steps=60, seeds=(0,)):
  train = c.TrainConfig(
    steps=steps,
    eval_every=5,
    log_every=10,
    eval_batches=1,
    tensorboard=False,
    learning_rate=1e-2,
  )
  data = c.DataConfig(
    path=str(write_text(folder / "text.txt", lines=60)),
    tokenizer="bytes",
    length=8,
    batch_size=4,
    eval_batch_size=64,
  )
  model = c.ModelConfig(num_layers=1, width=16, num_heads=4, mlp_width=32)
  fpp = c.FPPConfig(begin=0.2, end=0.7, checks=3)
  base = c.Config(data=data, model=model, fpp=fpp, train=train)
  return grid.Study({"text": base}, methods.pick(*names), (0.5,), seeds)


def wait_for_checkpoints(trials, timeout=300.0):
  end = time.monotonic() + timeout
  while not all(has_checkpoint(trial.run) for trial in trials):
    assert time.monotonic() < end
    time.sleep(0.02)  # no event tells of another process's file


def in_background(function, *args):
  thread = threading.Thread(target=function, args=args, daemon=True)
  thread.start()
  return thread


def read_log(trial):
  return pathlib.Path(trial.log).read_text(encoding="utf-8")


def interrupt_after_checkpoint(trial):
  wait_for_checkpoints([trial])
  os.kill(os.getpid(), signal.SIGINT)


def test_pool_returns_the_error_of_a_run_in_another_process(tmp_path):
  (trial,) = make_study(tmp_path, "dense").trials(str(tmp_path))
  config = trial.config()
  config = edited(config, {"data.path": "nowhere.txt"})
  os.makedirs(tmp_path / "logs")
  future = grid.Pool(1).submit(config, trial)
  assert "nowhere.txt" in future.result()
  assert "nowhere.txt" in read_log(trial)


@pytest.mark.slow
def test_pool_resumes_what_ctrl_c_stopped(tmp_path):
  names = ("dense", "wanda")
  study = make_study(tmp_path, *names)
  workdir = str(tmp_path / "study")
  first, *others = study.trials(workdir)
  in_background(interrupt_after_checkpoint, first)
  with pytest.raises(KeyboardInterrupt):
    grid.run_study(study, workdir, grid.Pool(1))
  assert "stopped by a signal" in read_log(first)
  assert not any(trial.result for trial in (first, *others))
  assert grid.run_study(study, workdir, grid.Pool(2)) == {}
  assert "resumed at step" in read_log(first)
  assert not any("resumed" in read_log(trial) for trial in others)
  found = {row.method: row for row in collect(study, workdir)}
  assert tuple(found) == names
  assert {row.steps for row in found.values()} == {60}
  assert found["wanda"].compression == pytest.approx(0.5, abs=2e-3)


@pytest.mark.slow
def test_pool_survives_a_killed_run(tmp_path):
  study = make_study(tmp_path, "dense", seeds=(0, 1))
  pool = grid.Pool(2)
  os.makedirs(tmp_path / "logs")
  first, second = study.trials(str(tmp_path))
  futures = [pool.submit(trial.config(), trial) for trial in (first, second)]
  processes = [pool.processes[future] for future in futures]
  processes[0].kill()
  assert isinstance(futures[0].exception(), concurrent.futures.BrokenExecutor)
  assert not futures[1].done()
  pool.stop()
  assert futures[1].done()
  for _ in range(300):
    if not processes[1].is_alive():
      break
    time.sleep(0.1)  # a stopped process takes a while to end
  assert not processes[1].is_alive()


def test_train_returns_an_error_in_one_line(tmp_path, monkeypatch):
  def fail(config, workdir):
    raise TrainingError("the loss\nis nan")

  monkeypatch.setattr(loop, "run", fail)
  (trial,) = make_study(tmp_path, "dense").trials(str(tmp_path))
  os.makedirs(tmp_path / "logs")
  error = grid.train(trial.config(), trial.run, trial.log)
  assert error == "TrainingError: the loss is nan"
  assert "Traceback" in read_log(trial)


@pytest.fixture
def ray(monkeypatch):
  """Returns the module, with a folder of its own: another has an old cluster."""
  ray = pytest.importorskip("ray")
  # Sockets need a short path.
  with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings(  # JAX may run in this process; Ray starts others
  "ignore:os.fork:RuntimeWarning"
)
def test_ray_saves_what_ctrl_c_stopped(tmp_path, ray):
  study = make_study(tmp_path, "dense", steps=9000)
  workdir = str(tmp_path / "study")
  (trial,) = study.trials(workdir)
  in_background(interrupt_after_checkpoint, trial)
  with pytest.raises(KeyboardInterrupt):
    grid.run_study(study, workdir, grid.Ray())
  assert "stopped by a signal" in read_log(trial)
  with pytest.raises(ConfigError, match="1000 GPU"):
    grid.Ray(gpus=1000.0)


@pytest.mark.slow
@pytest.mark.filterwarnings(  # JAX may run in this process; Ray starts others
  "ignore:os.fork:RuntimeWarning"
)
def test_ray_completes_a_study_of_which_a_node_dies(tmp_path, ray):
  from ray.cluster_utils import Cluster

  cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
  node = cluster.add_node(num_cpus=1)
  ray.init(address=cluster.address, log_to_driver=False)
  try:
    study = make_study(tmp_path, "dense", steps=400, seeds=(0, 1))
    workdir = str(tmp_path / "study")
    trials = study.trials(workdir)

    def kill():
      wait_for_checkpoints(trials)
      cluster.remove_node(node, allow_graceful=False)

    thread = in_background(kill)
    assert grid.run_study(study, workdir, grid.Ray()) == {}
    thread.join()
    resumed = ["resumed at step" in read_log(trial) for trial in trials]
    assert sorted(resumed) == [False, True]
    assert all(trial.result for trial in trials)
  finally:
    ray.shutdown()
    cluster.shutdown()
