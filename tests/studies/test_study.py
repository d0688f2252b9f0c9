"""The grid of a study: which runs, by what names, and from which file."""

import subprocess
import sys

import numpy as np
import pytest

from folding import config as c
from folding.schema import ConfigError
from folding.studies.methods import Method, pick
from folding.studies.study import Study, load_study


def _study(**fields):
  values = {
    "datasets": {"a": c.Config(), "b": c.Config(task="classify")},
    "methods": pick("dense", "ours", "fold", "wanda", "sparsegpt"),
    "levels": (0.3, 0.375),
    "seeds": (0, 7),
  }
  return Study(**(values | fields))


def test_every_combination_is_one_run():
  names = [t.name for t in _study().trials("DIR")]
  expected = set()
  for seed in ("s0", "s7"):
    for data in ("a", "b"):
      for method in ("dense", "fold", "dense-part"):
        expected.add(f"{data}--{method}--{seed}")
      for method in ("ours", "wanda", "sparsegpt"):
        for level in ("30", "37.5"):
          expected.add(f"{data}--{method}--{level}--{seed}")
  assert len(names) == len(set(names))
  assert set(names) == expected


def test_a_seed_is_over_before_the_next_begins():
  seeds = [t.seed for t in _study().trials("DIR")]
  assert seeds == sorted(seeds)


def test_what_a_run_starts_from_comes_before_it_and_has_its_seed():
  trials = _study().trials("DIR")
  names = [t.name for t in trials]
  for i, trial in enumerate(trials):
    if trial.method not in ("wanda", "sparsegpt"):
      assert trial.needs is None
      continue
    assert names.index(trial.needs.name) < i
    assert (trial.needs.dataset, trial.needs.seed) == (
      trial.dataset,
      trial.seed,
    )
    assert trial.config().pretrained == trial.needs.run


def test_both_parts_together_have_the_steps_of_the_others(tmp_path):
  study = _study(pretrain=0.6)
  trials = {t.name: t for t in study.trials(str(tmp_path))}
  whole = trials["a--ours--30--s7"].config()
  first = trials["a--dense-part--s7"].config()
  rest = trials["a--wanda--30--s7"].config()
  assert first.train.steps == round(0.6 * whole.train.steps)
  assert first.train.steps + rest.train.steps == whole.train.steps
  assert first.data.first_batch == whole.data.first_batch == 0
  assert rest.data.first_batch == first.train.steps  # no text comes again
  assert first.dense
  assert not rest.dense
  assert {x.seed for x in (whole, first, rest)} == {7}


def test_a_checkpoint_has_no_small_twin():
  datasets = {"a": c.Config(), "b": c.Config(pretrained="PATH")}
  trials = _study(datasets=datasets, methods=pick("dense", "dense-small"))
  small = [t for t in trials.trials("DIR") if t.method == "dense-small"]
  assert {t.dataset for t in small} == {"a"}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"methods": pick("ours")}, "needs the method 'dense'"),
    ({"levels": (0.0,)}, "a level is a fraction"),
    ({"levels": (70.0,)}, "a level is a fraction"),
    ({"levels": (0.7, 0.7000001)}, "two levels are called alike: 70, 70%"),
    (
      {"methods": pick("dense") | {"dense-part": Method("none")}},
      "'dense-part' is what methods after training start from",
    ),
    ({"pretrain": 1.0}, "pretrain is a fraction"),
    ({"seeds": ()}, "a data set and a seed"),
    ({"datasets": {}}, "a data set and a seed"),
    ({"datasets": {"a/b": c.Config()}}, "no part of a file name"),
    ({"datasets": {"a--b": c.Config()}}, "no part of a file name"),
    (
      {"methods": pick("dense") | {"x ": Method("none")}},
      "no part of a file name",
    ),
  ],
)
def test_a_mistake_is_told(fields, message):
  with pytest.raises(ConfigError, match=message):
    _study(**fields)


def test_levels_of_numpy_are_levels():
  study = _study(levels=tuple(np.linspace(0.3, 0.7, 3)))
  assert [type(level) for level in study.levels] == [float] * 3
  trial = next(t for t in study.trials("DIR") if t.level == 0.5)
  assert trial.config().fpp.overall == 0.5


_FILE = """
from folding import config as c
from folding.studies.methods import pick
from folding.studies.study import Study

def get_study({argument}):
  return Study({{name: c.Config()}}, pick("dense"))
"""


def test_a_file_gives_a_study_by_its_argument(tmp_path):
  path = tmp_path / "given.py"
  path.write_text(_FILE.format(argument="name='plain'"))
  assert list(load_study(str(path)).datasets) == ["plain"]
  assert list(load_study(f"{path}:other").datasets) == ["other"]


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (None, "there is no file"),
    ("x = 1", "no attribute .get_study"),
    ("def get_study(: pass", "fails: SyntaxError: invalid syntax"),
    ("import no_such_module", "fails: ModuleNotFoundError: No module"),
    ("def get_study(): return 1 / 0", "fails: ZeroDivisionError: division"),
    ("def get_study(): return 3", "gives no Study"),
    (
      _FILE.format(argument="name"),
      "fails: .*missing 1 required",
    ),  # one is needed
  ],
)
def test_a_file_that_gives_none_is_told(source, message, tmp_path):
  path = tmp_path / "given.py"
  if source is not None:
    path.write_text(source)
  with pytest.raises(ConfigError, match=message):
    load_study(str(path))


@pytest.mark.parametrize(
  ("field", "message"),
  [
    ("levels=('0.7',)", "a level is a fraction to save; it is '0.7'"),
    ("seeds=(0.5,)", "a seed is a whole number; it is 0.5"),
  ],
)
def test_fields_of_the_wrong_kind_are_told(field, message, tmp_path):
  path = tmp_path / "given.py"
  text = _FILE.format(argument="name='plain'")
  path.write_text(text.replace('pick("dense")', f'pick("dense"), {field}'))
  command = ["folding.cli", "study", str(path), "--workdir=DIR", "--list"]
  # Types are not checked there, as they are in tests.
  found = subprocess.run(
    [sys.executable, "-m", *command],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.endswith(message)
