import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import files, paths
from folding.config import DataConfig, FPPConfig, MeshConfig
from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError, TrainingError
from folding.models.shape import shape_of
from folding.training import run_dir, sharding
from folding.training.checkpoint import Checkpoints, load_run
from tests.training import tiny
from tests.training.conftest import save_run, set_loss, warnings_of

ROOT = pathlib.Path(__file__).parents[2]


def like(state, mesh=None):
  """Returns shapes and shardings of a state, by default on one device."""
  mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    sharding.tree_shardings(mesh, state),
  )


def small(value):
  return {"w": jnp.full((3,), value, jnp.float32)}


LIKE = like(small(0.0))


def damage(folder, step, item=""):
  """Cuts the files of a checkpoint in half."""
  path = pathlib.Path(folder) / "checkpoints" / str(step) / item
  for file in path.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder, step, item="default"):
  """Flips one bit in the middle of the largest file of a checkpoint."""
  path = pathlib.Path(folder) / "checkpoints" / str(step) / item
  found = [p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"]
  file = max(found, key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def lose(folder, step, item="default"):
  """Removes an item of a checkpoint, as an interrupted copy may."""
  shutil.rmtree(pathlib.Path(folder) / "checkpoints" / str(step) / item)


@pytest.fixture(scope="module")
def state():
  """Returns a training state with noise for its masks."""
  state = tiny.make(tiny.config()).init()
  rng = np.random.default_rng(0)
  suspected = {
    name: jnp.asarray(rng.integers(0, 256, bits.shape), jnp.uint8)
    for name, bits in state.opt_state.suspected.items()
  }
  assert "embed/embedding" in suspected
  return state._replace(opt_state=state.opt_state._replace(suspected=suspected))


def test_restore_returns_the_saved_state_bit_for_bit(state, tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(3, state, None)
  with Checkpoints(str(tmp_path)) as checkpoints:
    step, found = checkpoints.restore_latest(like(state))
  assert step == 3
  chex.assert_trees_all_equal(found, state, strict=True)


def test_restore_places_the_state_on_another_mesh(state, tmp_path):
  meshes = [
    sharding.make_mesh(config, jax.devices()[:count])
    for count, config in (
      (4, MeshConfig(2, 1, 2)),
      (8, MeshConfig(2, 4)),
      (1, MeshConfig()),
    )
  ]
  now = state
  for index, mesh in enumerate(meshes):
    there = like(state, mesh)
    with Checkpoints(str(tmp_path / str(index))) as checkpoints:
      checkpoints.save(3, now, None)
      checkpoints.wait()
      now = checkpoints.restore(3, there)
    chex.assert_trees_all_equal(now, state)
    for x, place in zip(
      jax.tree.leaves(now), jax.tree.leaves(there), strict=True
    ):
      assert x.sharding == place.sharding


def test_restore_of_averages_per_weight_starts_those_of_units_at_0(tmp_path):
  fpp = FPPConfig(linear=0.7, granularity="neuron", score="saliency")
  state = tiny.make(tiny.config(fpp=fpp)).init()
  ones = {
    name: jnp.ones_like(w)
    for name, w in paths.flatten(state.params).items()
    if "/mlp/" in name or name in state.opt_state.averages
  }

  def with_averages(averages):
    fpp_state = state.opt_state._replace(averages=averages)
    return state._replace(opt_state=fpp_state)

  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(3, with_averages(ones), None)
    checkpoints.wait()
    found = checkpoints.restore(3, like(state))
  up, averages = "blocks_0/mlp/up/kernel", state.opt_state.averages
  assert averages[up].shape == (1, ones[up].shape[1])
  of_weights = {name: ones[name] for name in averages if name != up}
  expected = with_averages(averages | of_weights)
  chex.assert_trees_all_equal(found, expected, strict=True)


def test_save_keeps_the_state_of_its_call_while_training_continues(tmp_path):
  # The loop donates the state to the next step while the save is under way.
  add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros(1 << 20)
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(0, {"x": x}, None)
    for _ in range(20):
      x = add_one(x)
    checkpoints.wait()
    found = checkpoints.restore(0, like({"x": x}))["x"]
  assert x[0] == 20
  np.testing.assert_array_equal(found, 0)


def test_restore_returns_empty_parts_of_a_state(tmp_path):
  run = tiny.make(tiny.config(preset="none", fpp=FPPConfig()))
  state = run.init()
  assert state.opt_state.suspected == {}
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(0, state, None)
    checkpoints.wait()
    found = checkpoints.restore(0, like(state))
  chex.assert_trees_all_equal(found, state, strict=True)


@pytest.mark.parametrize(
  ("losses", "kept", "best"),
  [
    ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
    ([5.0, 4.0, 3.0, 2.0, 1.0], [4, 5], 5),
    ([None, None, 2.0, 3.0, 3.0], [3, 4, 5], 3),
    ([0.0, -1.0, 2.0, 3.0, 4.0], [2, 4, 5], 2),
  ],
  ids=["best-between", "best-last", "none-at-first", "negative"],
)
def test_save_keeps_the_last_two_and_the_best(tmp_path, losses, kept, best):
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step, loss in enumerate(losses, 1):
      checkpoints.save(step, small(step), loss)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert checkpoints.best_step() == best
    assert checkpoints.restore(best, LIKE)["w"][0] == best
  with Checkpoints(str(tmp_path)) as checkpoints:  # read from disk
    assert checkpoints.steps() == kept
    assert checkpoints.best_step() == best


def test_best_step_is_none_without_losses(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.best_step() is None
    with pytest.raises(ConfigError, match="no checkpoint yet"):
      checkpoints.restore_latest(LIKE)
    for step in range(1, 4):
      checkpoints.save(step, small(step), None)
    checkpoints.wait()
    assert checkpoints.best_step() is None
    assert checkpoints.steps()[-2:] == [2, 3]
    assert checkpoints.restore_best(LIKE)[0] == 3


def test_save_ignores_a_step_that_is_saved(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, small(1.0), None)
    checkpoints.save(1, small(2.0), None)
    checkpoints.wait()
    assert checkpoints.restore(1, LIKE)["w"][0] == 1


@pytest.mark.parametrize("damage", [damage, flip, lose])
def test_restore_latest_moves_a_damaged_checkpoint_aside(
  damage, tmp_path, caplog, capfd
):
  for _ in range(2):  # the second time replaces the folder moved aside
    with Checkpoints(str(tmp_path)) as checkpoints:
      checkpoints.save(1, small(1.0), None)
      checkpoints.save(2, small(2.0), None)
    damage(tmp_path, 2, "default")
    caplog.clear()
    with Checkpoints(str(tmp_path)) as checkpoints:
      step, found = checkpoints.restore_latest(LIKE)
      assert (step, found["w"][0]) == (1, 1.0)
      (line,) = warnings_of(caplog)
      assert "damaged checkpoint 2" in line
      assert checkpoints.steps() == [1]
      assert (tmp_path / "checkpoints" / "damaged-2").is_dir()
      checkpoints.save(2, small(2.5), None)
      checkpoints.wait()
      assert checkpoints.restore(2, LIKE)["w"][0] == 2.5
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", [damage, flip, lose])
def test_restore_best_takes_the_newest_if_the_best_is_damaged(
  damage, tmp_path, caplog
):
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], 1):
      checkpoints.save(step, small(step), loss)
    assert checkpoints.restore_best(LIKE)[0] == 2
  damage(tmp_path, 2, "default")
  with Checkpoints(str(tmp_path), cleans=False) as checkpoints:
    step, found = checkpoints.restore_best(LIKE)
    assert (step, found["w"][0]) == (4, 4.0)
    assert "damaged checkpoint 2" in caplog.text
    assert checkpoints.steps() == [3, 4]
  assert (tmp_path / "checkpoints" / "2").is_dir()


def test_restore_without_a_readable_checkpoint_is_an_error(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, small(1.0), None)
    checkpoints.save(2, small(2.0), None)
  damage(tmp_path, 1)
  damage(tmp_path, 2)
  with (
    Checkpoints(str(tmp_path)) as checkpoints,
    pytest.raises(TrainingError, match=r"none .* can be read; 2: "),
  ):
    checkpoints.restore_latest(LIKE)
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2"}


def test_step_with_damaged_metrics_is_not_the_best(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
      checkpoints.save(step, small(step), loss)
  (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"lo')
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.best_step() == 3
    assert checkpoints.restore(2, LIKE)["w"][0] == 2


def files_of(folder):
  """Returns {path: content} of the files of a folder."""
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("content", ['{"loss": 0.5}', '{"lo', None])
def test_reader_warns_of_damaged_metrics_each_time_and_leaves_them(
  content, tmp_path, caplog
):
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
      checkpoints.save(step, small(step), loss)
  path = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
  path.unlink() if content is None else path.write_text(content)
  before = files_of(tmp_path)
  for _ in range(2):
    caplog.clear()
    with Checkpoints(str(tmp_path), cleans=False) as checkpoints:
      assert checkpoints.best_step() == 3
      assert checkpoints.restore(2, LIKE)["w"][0] == 2
    (line,) = warnings_of(caplog)
    assert "metrics is damaged" in line
  assert files_of(tmp_path) == before


def test_writer_keeps_a_checkpoint_with_damaged_metrics(tmp_path, caplog):
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
      checkpoints.save(step, small(step), loss)
  path = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
  victim = tmp_path / "victim"
  victim.write_text("precious")
  path.unlink()
  path.symlink_to(victim)
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step in (4, 5):
      checkpoints.save(step, small(step), 4.0)
  assert victim.read_text() == "precious"
  with Checkpoints(str(tmp_path)) as checkpoints:
    caplog.clear()
    assert checkpoints.best_step() == 3
    assert checkpoints.steps() == [2, 3, 4, 5]
  (line,) = warnings_of(caplog)
  assert "2/metrics/metrics is damaged" in line


def test_reader_makes_no_folder(tmp_path):
  with Checkpoints(str(tmp_path), cleans=False) as checkpoints:
    assert checkpoints.best_step() is None
  assert not list(tmp_path.iterdir())


def test_checkpoint_without_checksums_is_read_with_a_line(tmp_path, caplog):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, small(1.0), None)
    checkpoints.wait()
    path = tmp_path / "checkpoints" / "1" / "checksums.json"
    assert len(json.loads(path.read_text())) > 5
    path.unlink()
    assert checkpoints.restore_latest(LIKE)[0] == 1
  (line,) = warnings_of(caplog)
  assert "checkpoint 1" in line and "cannot be verified" in line


def test_checksums_that_name_a_file_elsewhere_are_refused(tmp_path):
  for name in ("../x", "/etc/hostname", "a/../../x"):
    (tmp_path / "checksums.json").write_text(json.dumps({name: None}))
    with pytest.raises(ConfigError, match="it names"):
      files.require_intact(str(tmp_path))


def test_save_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
  flushed = set()
  fsync = os.fsync

  def record(handle):
    flushed.add(pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    fsync(handle)

  monkeypatch.setattr("os.fsync", record)
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, small(1.0), None)
  assert {"_METADATA", "metrics", "default"} <= flushed
  assert any(name.startswith("1.") for name in flushed)  # not "1" yet


def test_unfinished_save_is_not_a_checkpoint(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, small(1.0), None)
  folder = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  folder.mkdir()
  (folder / "half").write_text("half")
  # Another process may be writing it at this moment.
  metrics = folder / "metrics" / "metrics"
  metrics.parent.mkdir()
  metrics.touch()
  with Checkpoints(str(tmp_path), cleans=False) as checkpoints:
    assert checkpoints.steps() == [1]
  assert metrics.read_text() == ""
  with Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.steps() == [1]
    assert checkpoints.restore_latest(LIKE)[0] == 1
    checkpoints.save(3, small(3.0), None)  # waits for the removal
  assert not folder.exists()


def test_warnings_of_orbax_and_errors_of_others_are_shown(tmp_path, caplog):
  with Checkpoints(str(tmp_path)):
    pass
  orbax, ours = "/orbax/checkpoint/manager.py", "/my-orbax-project/train.py"
  for logger, place, level, text in (
    ("absl", orbax, logging.WARNING, "text"),
    ("absl", orbax, logging.ERROR, "text"),
    ("absl", ours, logging.ERROR, "text"),
    ("asyncio", "events.py", logging.ERROR, "at 3.orbax-checkpoint-tmp"),
  ):
    record = logging.LogRecord(logger, level, place, 1, text, (), None)
    logging.getLogger(logger).handle(record)
  assert [(x.levelname, x.filename) for x in caplog.records] == [
    ("WARNING", "manager.py"),
    ("ERROR", "train.py"),
  ]


@pytest.mark.slow
def test_failed_save_leaves_the_checkpoints_before(tmp_path, caplog):
  resource = pytest.importorskip("resource", reason="POSIX alone")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  random = np.random.default_rng(0).random(1 << 18, np.float32)
  with Checkpoints(str(tmp_path)) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"w": jnp.full(1 << 18, step, jnp.float32)}, None)
    checkpoints.wait()
    try:  # a limit on file sizes simulates a full disk
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
      with pytest.raises(OSError, match="File too large"):
        checkpoints.save(3, {"w": jnp.asarray(random)}, None)
        checkpoints.wait()
      assert checkpoints.steps() == [1, 2]
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not caplog.records  # no tracebacks of Orbax
  with Checkpoints(str(tmp_path)) as again:
    assert again.steps() == [1, 2]


_SAVES = """
import sys
import jax.numpy as jnp
from folding.training.checkpoint import Checkpoints

with Checkpoints(sys.argv[1]) as checkpoints:
  for step in range(1, 100):
    state = {str(i): jnp.full(1 << 16, step, jnp.float32) for i in range(16)}
    checkpoints.save(step, state, None)
"""


@pytest.mark.slow
def test_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _SAVES, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  folder = tmp_path / "checkpoints"
  deadline = time.monotonic() + 240
  # Until one save is finished and another is not.
  while time.monotonic() < deadline:
    names = os.listdir(folder) if folder.is_dir() else []
    if any(n.isdecimal() for n in names) and any("tmp" in n for n in names):
      break
    assert process.poll() is None
  process.kill()
  process.wait()
  shapes = {
    str(i): jax.ShapeDtypeStruct((1 << 16,), jnp.float32) for i in range(16)
  }
  with Checkpoints(str(tmp_path)) as checkpoints:
    step, found = checkpoints.restore_latest(like(shapes))
  for name, x in found.items():
    np.testing.assert_array_equal(x, step, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a run directory, its config, and its states at steps 5 and 10."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.config(data=DataConfig(tokenizer="bytes", length=8))
  made = tiny.make(config)
  states = {step: made.init(seed=step) for step in (5, 10)}
  with Checkpoints(str(workdir)) as checkpoints:
    for step, loss in ((5, 1.0), (10, 2.0)):
      checkpoints.save(step, states[step], loss)
  tokenizer = train_tokenizer(config.data, [])
  save_run(workdir, config, tokenizer)
  return workdir, config, jax.device_get(states)


@pytest.fixture
def copy(run, tmp_path):
  """Returns a copy of the run that a test may damage."""
  return shutil.copytree(run[0], tmp_path / "copy")


def assert_is_step(found, run, step):
  """Checks parameters, on the host, against those of a saved step."""
  chex.assert_trees_all_equal(found, run[2][step].params)
  assert all(isinstance(w, np.ndarray) for w in jax.tree.leaves(found))


@pytest.mark.parametrize(
  ("losses", "step"),
  [
    (('{"loss": 1.0}', '{"loss": 2.0}'), 5),
    (('{"loss": 2.0}', '{"loss": 1.0}'), 10),
    (('{"loss": Infinity}', '{"loss": Infinity}'), 10),
    (("{", '{"loss": NaN}'), 10),
    (('{"loss": 1.0}', '{"loss": NaN}'), 5),
    (('{"loss": 1.0}', '{"loss": 1.0}'), 5),
  ],
  ids=["first", "last", "none", "damaged", "nan", "equal"],
)
def test_load_run_reads_the_best_parameters(run, copy, losses, step):
  for at, text in zip((5, 10), losses, strict=True):
    set_loss(copy, at, text)
  before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
  found = load_run(str(copy))
  assert found.shape == shape_of(run[1])
  assert found.tokenizer.vocab_size == 258
  assert_is_step(found.params, run, step)
  assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


@pytest.mark.parametrize("damage", [damage, flip])
def test_load_run_skips_a_damaged_checkpoint(damage, run, copy, caplog, capfd):
  damage(copy, 5, "default")
  params = load_run(str(copy)).params
  assert_is_step(params, run, 10)
  (line,) = warnings_of(caplog)
  assert "damaged checkpoint 5" in line
  assert "Traceback" not in capfd.readouterr().err


def test_load_run_warns_of_a_run_that_has_not_finished(copy, caplog):
  load_run(str(copy))
  assert not warnings_of(caplog)
  shutil.rmtree(copy / "checkpoints" / "10")
  load_run(str(copy))
  (line,) = warnings_of(caplog)
  assert "step 5 of 8" in line


def lose_checkpoint(folder):
  shutil.rmtree(folder)


def lose_metrics(folder):
  (folder / "metrics" / "metrics").unlink()


def empty_checksums(folder):
  (folder / "checksums.json").write_text("{}")


@pytest.mark.parametrize(
  "harm", [lose_checkpoint, lose_metrics, empty_checksums]
)
def test_load_run_warns_each_time_of_another_than_the_tested_checkpoint(
  harm, run, copy, caplog
):
  result = {"finished": True, "test": {"loss": 1.5, "checkpoint_step": 5}}
  run_dir.write_result(str(copy), result)
  load_run(str(copy))
  assert not warnings_of(caplog)
  harm(copy / "checkpoints" / "5")
  for _ in range(2):
    caplog.clear()
    params = load_run(str(copy)).params
    assert_is_step(params, run, 10)
    assert "tested at its best checkpoint, 5" in warnings_of(caplog)[-1]
    with Checkpoints(str(copy), cleans=False) as checkpoints:
      assert checkpoints.best_step() == 10
    assert "tested at its best checkpoint, 5" in warnings_of(caplog)[-1]


def test_load_run_warns_of_a_damaged_result(copy, caplog):
  (copy / "result.json").write_text("{")
  load_run(str(copy))
  (line,) = warnings_of(caplog)
  assert "result.json is damaged" in line


def test_load_run_without_a_readable_checkpoint_is_one_line(copy):
  for step in (5, 10):
    lose(copy, step)
  with pytest.raises(ConfigError, match="none of the checkpoints"):
    load_run(str(copy))
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(ConfigError, match="no checkpoint yet"):
    load_run(str(copy))


@pytest.mark.parametrize(
  "name", ["checkpoints", "checkpoints/5/metrics/metrics", "text.sha256"]
)
def test_run_with_a_link_to_another_place_is_refused(name, copy, tmp_path):
  path, elsewhere = copy / name, tmp_path / "elsewhere"
  path.rename(elsewhere)
  path.symlink_to(elsewhere)
  for read in (load_run, run_dir.load_order):
    with pytest.raises(ConfigError, match=f"{name} is a link"):
      read(str(copy))
  with pytest.raises(ConfigError, match=f"{name} is a link"):
    run_dir.is_begun(str(copy), tiny.config())


def test_run_may_be_a_link_and_have_links_to_itself(run, copy, tmp_path):
  path = copy / "checkpoints" / "5" / "metrics" / "metrics"
  path.rename(copy / "kept")
  path.symlink_to("../../../kept")
  (tmp_path / "link").symlink_to(copy)
  params = load_run(str(tmp_path / "link")).params
  assert_is_step(params, run, 5)


def test_load_run_warns_each_time_of_a_run_without_checksums(copy, caplog):
  (copy / "checksums.json").unlink()
  for _ in range(2):
    caplog.clear()
    load_run(str(copy))
    (line,) = warnings_of(caplog)
    assert "cannot be verified: it has no checksums.json" in line
