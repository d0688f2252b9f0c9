"""The studies in configs/: each method of each study resolves."""

import pytest

from configs.studies import (
  ablations,
  budgets,
  from_scratch,
  pretrained,
  short,
  smoke,
)
from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Returns a folder of data sets of which only the names are read."""
  folder = tmp_path_factory.mktemp("data")
  for name in ("words/train.txt", "topics/train.tsv", "no-data/README.md"):
    path = folder / name
    path.parent.mkdir()
    path.write_text("")
  return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a directory that looks like the run of a trained classifier."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "checkpoints").mkdir()
  base = c.Config(
    task="classify", model=c.ModelConfig(num_layers=2, causal=False)
  )
  c.save(c.resolve(base), str(folder / "config.json"))
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])
  tokenizer.save(str(folder / "tokenizer.json"))
  return str(folder)


def resolved(study, saving=None):
  """Returns {method: resolved config} at one saving, of the first data set."""
  first = next(iter(study.datasets))
  saving = saving or study.savings[-1]
  return {
    trial.method: c.resolve(trial.config())
    for trial in study.trials("DIR")
    if trial.dataset == first
    and trial.seed == 0
    and trial.saving in (None, saving)
  }


@pytest.mark.parametrize(
  ("study_file", "argument", "count"),
  [
    (from_scratch, "{data},words", 153),
    (from_scratch, "{data},topics", 153),
    (short, "{data},words", 78),
    (short, "{data},python_stdlib", 78),
    (budgets, "{data},words,topics", 63),
    (smoke, "{data}", 4),
    (ablations, "{data},topics", 120),
    (pretrained, "{run},{data}", 66),
  ],
)
def test_every_method_of_a_study_resolves(
  study_file, argument, count, data, run
):
  study = study_file.get_study(argument.format(data=data, run=run))
  assert len(study.trials("DIR")) == count
  configs = resolved(study)
  assert set(configs) - {None} == set(study.methods)
  sized = [configs[n] for n, m in study.methods.items() if m.has_savings]
  assert all(config.dense or config.fpp.saving for config in sized)


def test_folders_become_data_sets_in_the_order_of_their_names(data):
  found = from_scratch.datasets(data)
  tasks = {name: base.task for name, base in found.items()}
  assert tasks == {"topics": "classify", "words": "lm"}
  assert found["words"].data.path == f"{data}/words"
  assert list(from_scratch.datasets(f"{data},words,topics")) == [
    "words",
    "topics",
  ]
  assert len(from_scratch.datasets("")) == 11  # of TFDS


@pytest.mark.parametrize(
  ("study_file", "argument", "message"),
  [
    (from_scratch, "{data}/nowhere", "no folder"),
    (from_scratch, "{data},no-data", "neither"),
    (from_scratch, "{data}/words", "no folder in '.*words' has train.tsv"),
    (pretrained, "{run},{data},words", "no data of"),
    (pretrained, "{run}", "CHECKPOINT"),
  ],
)
def test_a_study_file_refuses_missing_data(
  study_file, argument, message, data, run
):
  with pytest.raises(ConfigError, match=message):
    study_file.get_study(argument.format(data=data, run=run))


def test_pretrained_methods_recover_with_the_dense_start_as_teacher(data, run):
  study = pretrained.get_study(f"{run},{data}")
  found = resolved(study, saving=0.8)
  dense, part = found.pop("dense"), found.pop(None)
  assert dense.pretrained == part.pretrained == run
  assert (dense.distill.logits, dense.distill.hidden) == (0, 0)
  for config in found.values():
    assert config.pretrained.endswith("/runs/topics--dense-part--s0")
    assert config.distill.logits > 0
    assert config.train.steps + part.train.steps == dense.train.steps
    assert config.data.first_batch == 1000 + part.train.steps
  rates = {name: round(x.train.learning_rate, 5) for name, x in found.items()}
  assert rates == {**dict.fromkeys(found, 2e-4), "sparsegpt": 5e-4}


@pytest.mark.parametrize(("saving", "rate"), [(0.5, 1e-4), (0.8, 2e-4)])
def test_pretrained_ours_is_planned_and_others_are_not(saving, rate, data, run):
  found = resolved(pretrained.get_study(f"{run},{data}"), saving)
  plans = {name: config.compress.plan for name, config in found.items()}
  assert {name for name, plan in plans.items() if plan == "auto"} == {"ours"}
  assert found["ours"].train.learning_rate == rate
  assert found["ours"].fpp.saving == saving


def test_ablations_differ_from_ours_and_have_their_dense_baselines(data):
  study = ablations.get_study(f"{data},topics")
  found = resolved(study)
  pairs = [name for name in study.methods if name.startswith("dense-")]
  assert len(pairs) == 6
  for name in pairs:
    own = found[name.removeprefix("dense-")]
    assert found[name].dense
    assert found[name].model == own.model != found["ours"].model
  sized = [found[n] for n, m in study.methods.items() if m.has_savings]
  assert all(sized.count(config) == 1 for config in sized)
