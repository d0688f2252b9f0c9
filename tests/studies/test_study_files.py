"""The studies in configs/: each run can be made, and is as small as asked."""

import pathlib

import pytest

from configs.studies import (
  ablations,
  all_methods,
  from_scratch,
  pretrained,
  short,
  smoke,
)
from folding import cli
from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.schema import ConfigError
from tests.studies.shapes import smaller

FOLDER = pathlib.Path(from_scratch.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Returns a folder of data sets, of which nothing but the names is read."""
  folder = tmp_path_factory.mktemp("data")
  for name in ("words/train.txt", "topics/train.tsv", "no-data/README.md"):
    path = folder / name
    path.parent.mkdir()
    path.write_text("")
  return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns what passes for a run of a trained classifier."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "checkpoints").mkdir()
  base = c.Config(
    task="classify", model=c.ModelConfig(num_layers=2, causal=False)
  )
  c.save(c.resolve(base), str(folder / "config.json"))
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])
  tokenizer.save(str(folder / "tokenizer.json"))
  return str(folder)


def test_no_study_file_is_left_out():
  files = {path.stem for path in FOLDER.glob("[!_]*.py")}
  assert files == {
    *(
      "ablations",
      "all_methods",
      "from_scratch",
      "pretrained",
      "short",
      "smoke",
    )
  }


def test_folders_are_data_sets_by_what_is_in_them(data):
  found = from_scratch.datasets(data)
  assert {name: base.task for name, base in found.items()} == {
    "topics": "classify",
    "words": "lm",
  }
  assert found["words"].data.path == f"{data}/words"
  # As they are named.
  assert list(from_scratch.datasets(f"{data},words,topics")) == [
    *("words", "topics")
  ]
  assert list(from_scratch.datasets(f"{data},topics")) == ["topics"]


def test_without_a_folder_there_are_three_and_eight_of_tfds():
  found = from_scratch.datasets("")
  tasks = [base.task for base in found.values()]
  assert (tasks.count("lm"), tasks.count("classify")) == (3, 8)


@pytest.mark.parametrize(
  ("where", "message"),
  [
    ("{data}/nowhere", "there is no folder"),
    ("{data},no-data", "has neither train.tsv nor train.txt"),
    ("{data},nothing", "has neither train.tsv nor train.txt"),
  ],
)
def test_data_that_there_is_not_is_told(where, message, data):
  with pytest.raises(ConfigError, match=message):
    from_scratch.get_study(where.format(data=data))


@pytest.mark.parametrize(
  "study_file", [all_methods, from_scratch, short, smoke]
)
def test_every_run_of_a_study_resolves(study_file, data):
  for trial in study_file.get_study(data).trials("DIR"):
    c.resolve(trial.config())


def test_an_ablation_is_as_small_as_ours_whatever_it_changes(data):
  study = ablations.get_study(f"{data},topics")
  (base,) = study.datasets.values()
  ours = None
  for name, method in study.methods.items():
    if method.kind == "fixed":
      continue
    config = c.resolve(method.config(base, 0.7, 0, "RUN"))
    # Whole neurons are rounded down.
    slack = 0.002 if name == "weights" else 0.01
    assert smaller(config) == pytest.approx(0.7, abs=slack), name
    ours = config if name == "ours" else ours
    assert name == "ours" or config != ours, name


def test_a_dense_twin_has_the_shape_of_its_ablation(data):
  study = ablations.get_study(f"{data},topics")
  (base,) = study.datasets.values()
  pairs = [n for n in study.methods if n.startswith("dense-")]
  assert len(pairs) == 6
  for name in pairs:
    twin = study.methods[name].config(base, None, 0)
    own = study.methods[name.removeprefix("dense-")].config(base, 0.7, 0)
    assert twin.dense
    assert twin.model == own.model != base.model


def test_a_checkpoint_is_tuned_and_then_every_method_recovers_from_it(
  data, run
):
  study = pretrained.get_study(f"{run},{data}")
  assert list(study.datasets) == ["topics"]  # the checkpoint's task
  trials = study.trials("DIR")
  dense, part, *rest = (trial.config() for trial in trials[:8])
  assert trials[1].method is None
  assert dense.dense and part.dense
  assert dense.pretrained == part.pretrained == run
  assert (dense.distill.logits, dense.distill.hidden) == (0, 0)
  assert [config.dense for config in rest] == [True, *5 * [False]]
  for config in rest:
    assert config.pretrained == trials[1].run
    assert config.data.tokenizer == f"{trials[1].run}/tokenizer.json"
    assert config.distill.logits > 0
    assert config.train.steps + part.train.steps == dense.train.steps
    assert config.data.first_batch == 1000 + part.train.steps  # reads on
    assert config.data.path == f"{data}/topics"
  for trial in trials:
    c.resolve(trial.config())


def test_what_is_folded_of_a_checkpoint_depends_on_how_much_is_saved(data, run):
  study = pretrained.get_study(f"{run},{data}")
  found = {}
  for trial in study.trials("DIR"):
    config = c.resolve(trial.config())
    rate = round(config.train.learning_rate, 5)
    folded = (bool(config.fold.groups), config.fold.values != "dense")
    found[trial.method, trial.level] = (*folded, rate)
  assert found["dense-again", None] == (False, False, 1e-4)
  assert found["ours", 0.3] == (False, False, 1e-4)
  assert found["ours", 0.5] == (True, False, 1e-4)
  assert found["ours", 0.8] == (True, True, 2e-4)
  assert found["neuron", 0.3] == (False, False, 1e-4)
  assert found["magnitude", 0.7] == (False, False, 2e-4)
  assert found["sparsegpt", 0.7] == (False, False, 5e-4)


def test_a_checkpoint_without_data_of_its_task_is_told(data, run):
  with pytest.raises(ConfigError, match="no data of"):
    pretrained.get_study(f"{run},{data},words")
  with pytest.raises(ConfigError, match="give configs/studies/pretrained.py"):
    pretrained.get_study(run)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--list", "--retry"], "run nothing; leave out --retry"),
    (["--jobs=0", "--shard=2/2"], "run nothing"),
    (["--shard=3/2"], "a shard is 1/n to n/n; it is 3/2"),
    (["--results=page.txt"], "--results is a PAGE.md; it is 'page.txt'"),
    (["--results=~/page.md"], "would be a folder called ~"),
  ],
)
def test_flags_that_would_do_nothing_or_harm_are_refused(
  data, tmp_path, capsys, flags, message
):
  argv = [
    "study",
    f"{FOLDER / 'smoke.py'}:{data}",
    f"--workdir={tmp_path / 'w'}",
  ]
  assert cli.main([*argv, *flags]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "w").exists()
  assert cli.main([*argv, "--list"]) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[-1] == f"0 of {len(out) - 1} runs are over"
  assert all(line.startswith("waiting   ") for line in out[:-1])
