"""Rows of a study, from run directories that were written by hand."""

import dataclasses
import io
import json
import math
import os
import shutil
import statistics

import pytest
import rich.console

from folding import config as c
from folding.reporting import runs, words
from folding.schema import ConfigError
from folding.studies import board, gather, runner
from folding.studies.methods import pick
from folding.studies.study import Study
from tests.reporting import synthetic_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Returns a study of which some runs are finished, and where it is."""
  base = synthetic_run.config()
  study = Study(
    {"text": base},
    pick("dense", "ours", "wanda", "random", "dense-small"),
    levels=(0.7,),
    seeds=(0, 1),
  )
  folder = tmp_path_factory.mktemp("study")
  trials = {t.name: t for t in study.trials(str(folder))}
  for name in (
    *("text--dense--s0", "text--ours--70--s0"),
    *("text--dense-part--s0", "text--wanda--70--s0", "text--random--70--s1"),
    *("text--dense-small--70--s0", "text--dense-small--70--s1"),
  ):
    values = c.resolve(trials[name].config())
    steps = values.train.steps
    changes = {"seconds": 10.0 * len(name), "steps": steps}
    run = folder / "runs" / name
    synthetic_run.write(run, values, **changes)
  (folder / "failed").mkdir()
  failure = folder / "failed" / "text--random--70--s0.json"
  failure.write_text(json.dumps({"error": "the disk is full"}))
  return study, str(folder)


@pytest.fixture(scope="module")
def rows(place):
  """Returns the rows by the name of the run."""
  return {row.run: row for row in gather.gather(*place)}


def _load(place, name):
  return runs.load_run(f"{place[1]}/runs/{name}")


def test_a_row_is_finished_failed_or_open(rows):
  assert {name: row.status for name, row in rows.items()} == {
    "text--dense--s0": "finished",
    "text--ours--70--s0": "finished",
    "text--wanda--70--s0": "finished",
    "text--dense-small--70--s0": "finished",
    "text--dense-small--70--s1": "finished",
    "text--random--70--s0": "failed",
    "text--dense--s1": "open",
    "text--ours--70--s1": "open",
    "text--wanda--70--s1": "open",
    "text--random--70--s1": "finished",
  }
  assert rows["text--random--70--s0"].error == "the disk is full"


def test_a_dense_part_that_was_deleted_is_told(place, tmp_path):
  study, folder = place
  copy = shutil.copytree(folder, tmp_path / "study")
  shutil.rmtree(copy / "runs" / "text--dense-part--s0")
  with pytest.raises(
    ConfigError, match="wanda.* started from text--dense-part"
  ):
    gather.gather(study, str(copy))


def test_runs_of_other_text_are_refused(place, tmp_path):
  study, folder = place
  copy = shutil.copytree(folder, tmp_path / "study")
  names = ("dense--s0", "wanda--70--s0", "dense-part--s0")
  for name in names:
    (copy / "runs" / f"text--{name}" / "text.sha256").write_text("a")
  assert len(gather.gather(study, str(copy))) == 10  # some say nothing
  (copy / "runs" / "text--dense-part--s0" / "text.sha256").write_text("b")
  message = "text--dense--s0 and .*dense-part.* different text of 'text'"
  with pytest.raises(ConfigError, match=message):
    gather.gather(study, str(copy))


def test_how_far_runs_are_is_a_line_each(place, tmp_path):
  study, folder = place
  copy = shutil.copytree(folder, tmp_path / "study")
  begun = copy / "runs" / "text--ours--70--s1"
  synthetic_run.write(begun, synthetic_run.config(seed=1), steps=300)
  (begun / "result.json").unlink()
  lines = board.Board(study.trials(str(copy))).lines()
  assert lines.count("finished  text--dense-part--s0") == 1
  assert lines.count("begun     text--ours--70--s1  step 300 of 600") == 1
  assert lines.count("waiting   text--dense--s1") == 1
  assert lines.count("failed    text--random--70--s0  the disk is full") == 1
  assert lines[-1].startswith("8 of 12 runs are over, 1 failed; about ")
  assert len(lines) == 13


def test_a_terminal_shows_counts_what_runs_and_when_it_will_be_over(place):
  study, folder = place
  found = board.Board(study.trials(folder))
  running = {"text--dense--s1", "text--ours--70--s1"}
  assert found.counts(running) == {
    "text": {"finished": 7, "running": 2, "failed": 1, "waiting": 2}
  }
  terminal = rich.console.Console(
    file=io.StringIO(), force_terminal=True, width=100
  )
  with board.Show(found, terminal) as show:
    show.update(running)
    show.say("a line above")
  shown = terminal.file.getvalue()
  for name in running:
    assert f"{name}  starting" in shown
  assert "a line above" in shown
  # Four runs are left, two at a time; seconds are 10 a letter of the name.
  mean = statistics.fmean(10 * len(name) for name in found.seconds)
  assert f"about {words.duration(2 * mean)} to go" in shown


def test_a_failure_that_was_tried_again_elsewhere_is_none(place, tmp_path):
  study, folder = place
  copy = shutil.copytree(folder, tmp_path / "study")
  found = board.Board(study.trials(str(copy)))
  assert found.errors == {"text--random--70--s0": "the disk is full"}
  (copy / "failed" / "text--random--70--s0.json").unlink()
  found.refresh()
  assert found.errors == {}


def test_what_is_finished_of_another_tokenizer_is_refused(place):
  study, folder = place
  for trial in study.trials(folder):
    if os.path.isdir(trial.run):
      plan = os.path.join(folder, "plans", f"{trial.name}.json")
      os.makedirs(os.path.dirname(plan), exist_ok=True)
      c.save(trial.config(), plan)
  runner.require_same(study, folder)
  other = dataclasses.replace(study, datasets=dict(study.datasets))
  other.datasets["text"] = synthetic_run.config(
    data=c.DataConfig(tokenizer="bytes")
  )
  with pytest.raises(ConfigError, match=r"of another study \(data.tokenizer:"):
    runner.require_same(other, folder)


def test_what_is_finished_without_a_plan_is_refused(place, tmp_path):
  study, folder = place
  shutil.copytree(folder, tmp_path / "copy")
  shutil.rmtree(tmp_path / "copy" / "plans", ignore_errors=True)
  with pytest.raises(ConfigError, match="which says what .* was; put it"):
    runner.require_same(study, str(tmp_path / "copy"))


def test_figures_are_those_of_the_run(place, rows):
  row, run = rows["text--ours--70--s0"], _load(place, "text--ours--70--s0")
  whole = run.result.parameters.overall
  assert row.quality == synthetic_run.LM_TEST["bits_per_byte"]
  assert row.perplexity == synthetic_run.LM_TEST["perplexity"]
  assert row.compression == 1 - whole.stored / whole.dense
  assert row.parameters == whole.stored
  size = run.result.bytes.overall
  assert row.bytes == size.stored + size.masks
  assert (row.level, row.seed, row.metric) == (0.7, 0, "bits_per_byte")


def test_what_is_dense_and_small_is_compared_with_what_is_dense(place, rows):
  row = rows["text--dense-small--70--s0"]
  small = _load(place, row.run).result.parameters
  dense = _load(place, "text--dense--s0").result.parameters
  for name, group in (("compression", "overall"), ("qkv", "qkv")):
    stored, whole = getattr(small, group).stored, getattr(dense, group).dense
    assert getattr(row, name) == 1 - stored / whole > 0
  size = sum(
    math.prod(layer.shape) for layer in _load(place, row.run).result.layers
  )
  assert row.trainable == pytest.approx(size / dense.overall.dense)
  # Without a dense run of its seed it is compared with nothing.
  assert rows["text--dense-small--70--s1"].compression is None


def test_the_dense_part_counts(place, rows):
  row = rows["text--wanda--70--s0"]
  names = ("text--dense-part--s0", "text--wanda--70--s0")
  assert row.seconds == sum(10.0 * len(name) for name in names)
  assert row.steps == 600


def test_trainable_is_the_mean_over_steps(place, rows):
  run = _load(place, "text--ours--70--s0")
  size = sum(math.prod(layer.shape) for layer in run.result.layers)
  each_step, now = [], size
  found = {r["step"]: r.get("trainable", size) for r in run.train}
  for step in range(600):
    now = found.get(step, now)
    each_step.append(now)
  dense = run.result.parameters.overall.dense
  expected = sum(each_step) / 600 / dense
  assert rows["text--ours--70--s0"].trainable == pytest.approx(expected)
  assert expected < 1


def _with(place, losses, steps=600):
  run = _load(place, "text--dense--s0")
  train = [
    {"split": "train", "step": step, "loss": loss} for step, loss in losses
  ]
  result = dataclasses.replace(run.result, steps=steps)
  return dataclasses.replace(run, train=train, result=result)


def test_halfway_is_between_the_first_and_the_lowest_loss(place):
  # Means of up to three: 8, 7, 6, 4, 2; halfway is 5.
  twin = _with(place, [(10, 8.0), (20, 6.0), (30, 4.0), (40, 2.0), (50, 0.0)])
  assert gather.halfway([twin], twin) == pytest.approx(35)
  # 9, 8, 7, 5: between the last two records that is not yet reached.
  slow = _with(place, [(10, 9.0), (20, 7.0), (30, 5.0), (40, 3.0)])
  assert gather.halfway([slow], twin) == pytest.approx(40)
  never = _with(place, [(10, 9.0), (20, 8.0)])
  assert gather.halfway([never], twin) is None
  at_once = _with(place, [(10, 1.0)])
  assert gather.halfway([at_once], twin) == 10


def test_a_run_that_begins_below_half_the_loss_has_not_come_down(place):
  twin = _with(place, [(10, 8.0), (20, 6.0), (30, 4.0), (40, 2.0), (50, 0.0)])
  # Means: 4, 7, 8, 6, 4.
  lucky = [(10, 4.0), (20, 10.0), (30, 10.0), (40, -2.0), (50, 4.0)]
  assert gather.halfway([_with(place, lucky)], twin) == pytest.approx(45)


def test_halfway_counts_the_steps_of_the_dense_part(place):
  twin = _with(place, [(10, 8.0), (20, 6.0), (30, 4.0), (40, 2.0), (50, 0.0)])
  before = _with(place, [(10, 9.0), (20, 8.0)], steps=25)
  after = _with(place, [(10, 8.0), (20, 4.0), (30, 0.0)])  # 8, 6, 4
  assert gather.halfway([before, after], twin) == pytest.approx(25 + 25)


def test_halfway_in_a_dense_part_says_nothing_of_a_method(place, rows):
  parts = [_load(place, f"text--{n}--s0") for n in ("dense-part", "wanda--70")]
  reached = gather.halfway(parts, _load(place, "text--dense--s0"))
  assert 0 < reached < parts[0].result.steps
  assert rows["text--wanda--70--s0"].halfway is None
  assert rows["text--ours--70--s0"].halfway is not None


def test_rows_come_back_from_csv(place, tmp_path):
  rows = gather.gather(*place)
  rows.append(dataclasses.replace(rows[0], about="", error=None))
  path = tmp_path / "study.csv"
  path.write_text(gather.to_csv(rows))
  assert gather.read_csv(str(path)) == rows


@pytest.mark.parametrize(
  "text",
  [
    "dataset,method,about,level,seed,status,luck\na,b,c,0.7,0,open,1\n",
    "dataset,method,about,level,seed,status\na,b,c,much,0,open\n",
    "dataset,method\na,b\n",
  ],
  ids=["unknown-column", "no-number", "missing-column"],
)
def test_a_damaged_csv_is_told(text, tmp_path):
  path = tmp_path / "study.csv"
  path.write_text(text)
  with pytest.raises(ConfigError, match="is damaged"):
    gather.read_csv(str(path))
