"""Grids of runs, and the loop over them with an engine that trains nothing."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal

import pytest

from folding import cli
from folding import config as c
from folding.errors import ConfigError
from folding.studies import grid
from folding.studies.methods import Method, pick


def make_study(**fields):
  values = {
    "datasets": {"a": c.Config(), "b": c.Config(task="classify")},
    "methods": pick("dense", "ours", "wanda"),
    "savings": (0.3, 0.375),
    "seeds": (0, 7),
  }
  return grid.Study(**(values | fields))


def write_result(trial, *, test=None, **changes):
  """Leaves what a finished run leaves."""
  config = dataclasses.replace(c.resolve(trial.config()), **changes)
  os.makedirs(trial.run, exist_ok=True)
  c.save(config, os.path.join(trial.run, "config.json"))
  result = {
    "finished": True,
    "seconds": 1.0,
    "test": {c.quality(config): 0.5} if test is None else test,
    "parameters": {"overall": {"stored": 10}},
  }
  path = pathlib.Path(trial.run, "result.json")
  path.write_text(json.dumps(result), encoding="utf-8")


class FakeEngine:
  """Writes results in place of training, and notes what was submitted."""

  def __init__(self, errors=None, limit=1):
    self.limit, self.errors, self.names = limit, errors or {}, []
    self.stopped = False

  def submit(self, config, trial):
    self.names.append(trial.name)
    future = concurrent.futures.Future()
    error = self.errors.get(trial.name, "")
    if isinstance(error, Exception):
      future.set_exception(error)
    else:
      if error == "damaged":
        write_result(trial, test={})
        error = ""
      elif not error:
        write_result(trial)
      future.set_result(error if error != "unfinished" else "")
    return future

  def stop(self):
    self.stopped = True


def test_trials_are_all_combinations_with_shared_starts_first():
  names = [trial.name for trial in make_study().trials("DIR")]
  starts = [f"{d}--dense-part--s{s}" for s in (0, 7) for d in "ab"]
  rest = [
    f"{data}--{method}--s{seed}"
    for seed in (0, 7)
    for data in "ab"
    for method in (
      "dense",
      *(
        f"{m}--{saving}" for m in ("ours", "wanda") for saving in ("30", "37.5")
      ),
    )
  ]
  assert names == [*starts, *rest]


def test_start_and_method_share_steps_data_and_seed():
  trials = {t.name: t for t in make_study().trials("DIR")}
  whole = trials["a--ours--30--s7"].config()
  first, trial = trials["a--dense-part--s7"], trials["a--wanda--30--s7"]
  part, rest = first.config(), trial.config()
  assert trial.start == first
  assert part.dense and not rest.dense
  assert part.train.steps == round(0.6 * whole.train.steps)
  assert part.train.steps + rest.train.steps == whole.train.steps
  assert (part.data.first_batch, rest.data.first_batch) == (
    0,
    part.train.steps,
  )
  assert rest.pretrained == first.run == os.path.abspath(first.run)
  assert rest.data.tokenizer == f"{first.run}/tokenizer.json"
  assert {x.seed for x in (whole, part, rest)} == {7}
  assert (whole.fpp.saving, rest.fpp.saving) == (0.3, 0.3)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"methods": pick("ours")}, "'dense'"),
    ({"methods": pick("dense") | {"dense-part": pick("fpp")["fpp"]}}, "part"),
    ({"savings": (70.0,)}, "fraction"),
    ({"pretrain": 1.0}, "fraction"),
    ({"seeds": ()}, "a seed"),
    ({"seeds": (1, 1)}, "twice"),
    ({"methods": pick("dense") | {"ours": "ours"}}, "a Method"),
    ({"datasets": {}}, "a data set"),
    ({"datasets": {"a--b": c.Config()}}, "names a folder"),
    ({"datasets": {"a/b": c.Config()}}, "names a folder"),
  ],
)
def test_study_refuses_a_mistake(fields, message):
  with pytest.raises(ConfigError, match=message):
    make_study(**fields)


def test_load_study_refuses_a_file_without_a_study(tmp_path):
  path = tmp_path / "given.py"
  with pytest.raises(ConfigError, match="there is no file"):
    grid.load_study(str(path))
  path.write_text("def get_study(): return 3")
  with pytest.raises(ConfigError, match="no Study"):
    grid.load_study(str(path))


def test_run_study_trains_starts_first_and_skips_what_is_finished(
  tmp_path, capsys
):
  study = make_study(datasets={"a": c.Config()}, savings=(0.3,), seeds=(0,))
  first = FakeEngine()
  assert grid.run_study(study, str(tmp_path), first) == {}
  names = ["dense-part", "dense", "ours--30", "wanda--30"]
  assert first.names == [f"a--{name}--s0" for name in names]
  assert first.stopped
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == [
    f"[{i}/4]" for i in (1, 2, 3, 4)
  ]
  os.remove(tmp_path / "runs" / "a--ours--30--s0" / "result.json")
  second = FakeEngine()
  grid.run_study(study, str(tmp_path), second)
  assert second.names == ["a--ours--30--s0"]
  assert capsys.readouterr().out.startswith(
    "[4/4] a--ours--30--s0: bits_per_byte"
  )


def test_run_study_reports_failures_and_trains_the_others(tmp_path, capsys):
  methods = pick("dense", "ours", "wanda", "random", "movement", "magnitude")
  study = make_study(
    datasets={"a": c.Config()}, methods=methods, savings=(0.5,), seeds=(0,)
  )
  engine = FakeEngine(
    limit=100,
    errors={
      "a--dense-part--s0": "the loss is nan",
      "a--random--50--s0": concurrent.futures.BrokenExecutor("killed"),
      "a--movement--50--s0": "unfinished",
      "a--magnitude--50--s0": "damaged",
    },
  )
  failed = grid.run_study(study, str(tmp_path), engine)
  assert set(failed) == {
    f"a--{name}--s0"
    for name in (
      "dense-part",
      "wanda--50",
      "random--50",
      "movement--50",
      "magnitude--50",
    )
  }
  assert "dense-part" in failed["a--wanda--50--s0"]
  assert "killed" in failed["a--random--50--s0"]
  assert "stopped" in failed["a--movement--50--s0"]
  assert "a--wanda--50--s0" not in engine.names
  lines = capsys.readouterr().out.splitlines()
  total = len(lines)
  assert [line.split()[0] for line in lines] == [
    f"[{i}/{total}]" for i in range(1, total + 1)
  ]
  assert sum("failed: " in line for line in lines) == 5
  assert sum("parameters" in line for line in lines) == 2  # dense, ours


@pytest.mark.parametrize(
  ("edits", "message"),
  [
    (lambda base, saving: {"x": 1 // 0}, "a--bad--50--s0: ZeroDivisionError"),
    (lambda base, saving: {"x": 1}, "a--bad--50--s0: ConfigError"),
  ],
)
@pytest.mark.parametrize("after", [False, True])
def test_run_study_refuses_edits_before_it_trains(
  tmp_path, edits, message, after
):
  methods = pick("dense") | {"bad": Method("fails", edits, after=after)}
  study = make_study(methods=methods, savings=(0.5,))
  engine = FakeEngine()
  with pytest.raises(ConfigError, match=message):
    grid.run_study(study, str(tmp_path / "w"), engine)
  assert engine.names == []
  assert not (tmp_path / "w").exists()


def test_run_study_refuses_finished_runs_of_another_config(tmp_path):
  study = make_study(datasets={"a": c.Config()}, savings=(0.3,), seeds=(0,))
  for trial in study.trials(str(tmp_path)):
    mesh = c.MeshConfig(fsdp=2)  # where it was trained makes no difference
    write_result(trial, mesh=mesh)
  engine = FakeEngine()
  assert grid.run_study(study, str(tmp_path), engine) == {}
  assert engine.names == []
  other = c.Config(train=c.TrainConfig(steps=7))
  changed = dataclasses.replace(study, datasets={"a": other})
  with pytest.raises(ConfigError, match="train.steps"):
    grid.run_study(changed, str(tmp_path), engine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_study_stops_at_a_signal(number, tmp_path, capsys):
  class Engine(FakeEngine):
    def submit(self, config, trial):
      signal.raise_signal(number)
      return super().submit(config, trial)

  study = make_study()
  # The run stops by the same signal.
  first = study.trials(str(tmp_path))[0]
  engine = Engine({first.name: "unfinished"})
  before = signal.getsignal(number)
  with pytest.raises(KeyboardInterrupt):
    grid.run_study(study, str(tmp_path), engine)
  assert (engine.names, engine.stopped) == ([first.name], True)
  assert signal.getsignal(number) == before
  assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--jobs=0", "jobs"),
    ("--gpus=1", "--engine=ray"),
    ("--cpus=0", "--engine=ray"),
    ("--engine=ray --jobs=2", "--engine=pool"),
    ("--workdir=gs://x", "gs://"),
  ],
)
def test_study_verb_refuses_a_flag(argument, message, tmp_path, capsys):
  path = tmp_path / "given.py"
  path.write_text(
    "from folding import config, studies\n"
    "from folding.studies import grid, methods\n"
    "def get_study():\n"
    "  return grid.Study({'a': config.Config()}, methods.pick('dense'))\n"
  )
  argv = ["study", str(path), f"--workdir={tmp_path / 'w'}", *argument.split()]
  assert cli.main(argv) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "w").exists()
