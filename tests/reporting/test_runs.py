import dataclasses
import json
import pathlib

import pytest
from scipy import stats

from folding import config as c
from folding import files, schema
from folding.reporting import runs
from tests.reporting import synthetic_run


@pytest.mark.parametrize(
  ("right", "num"),
  [(0, 10), (10, 10), (1, 3), (434, 500), (9999, 10000)],
)
def test_wilson_is_that_of_scipy(right, num):
  expected = stats.binomtest(right, num).proportion_ci(method="wilson")
  low, high = runs.wilson(right / num, num)
  assert low == pytest.approx(expected.low, abs=1e-12)
  assert high == pytest.approx(expected.high, abs=1e-12)


def test_what_was_measured_is_in_its_interval():
  for num in range(1, 3000):
    for right in (0, num // 3, num):
      low, high = runs.wilson(right / num, num)
      assert low <= right / num <= high


def test_load_run_reads_what_was_written(tmp_path):
  config = synthetic_run.config(seed=7)
  run = runs.load_run(synthetic_run.write(tmp_path / "a", config))
  assert run.name == "a"
  assert run.config == config
  assert [r["step"] for r in run.train] == list(range(20, 601, 20))
  assert [r["step"] for r in run.valid] == list(range(100, 601, 100))
  assert run.test == runs.LmTest(**synthetic_run.LM_TEST)
  # q of the default model, 128 x 128, folded to one group in 16 heads.
  assert run.result.layers[1].dense == 16384
  assert run.result.layers[1].compression == 1 - 2048 / 16384


def test_a_slash_at_the_end_is_no_part_of_the_name(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a")
  assert runs.load_run(workdir + "/").name == "a"


@pytest.mark.parametrize(
  "name", ["config.json", "metrics.jsonl", "result.json"]
)
def test_a_missing_file_is_named(tmp_path, name):
  workdir = synthetic_run.write(tmp_path / "a")
  (tmp_path / "a" / name).unlink()
  with pytest.raises(schema.ConfigError, match=f"has no {name}"):
    runs.load_run(workdir)


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(schema.ConfigError, match="no run directory.*nowhere"):
    runs.load_run(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_json_is_named(tmp_path, name, content):
  workdir = synthetic_run.write(tmp_path / "a")
  (tmp_path / "a" / name).write_text(content)
  with pytest.raises(schema.ConfigError, match=f"{name}.* is damaged"):
    runs.load_run(workdir)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"schema": 2}, "schema 2; this version reads schema 1"),
    ({"total_steps": "many"}, "total_steps must be int"),
    ({"parameters": {}}, "parameters is damaged: it has no 'qkv'"),
    ({"layers": [{"path": "x"}]}, r"layers\[0\].*has no 'group'"),
    ({"test": {"loss": 1.0}}, "test of result.json.*has no 'bits_per_byte'"),
  ],
)
def test_a_wrong_result_says_what_is_wrong(tmp_path, change, message):
  workdir = synthetic_run.write(tmp_path / "a", **change)
  with pytest.raises(schema.ConfigError, match=message):
    runs.load_run(workdir)


@pytest.mark.parametrize(("accuracy", "examples"), [(2.0, 9), (0.5, 0)])
def test_an_accuracy_of_no_examples_is_damage(tmp_path, accuracy, examples):
  test = {"loss": 1.0, "accuracy": accuracy, "num_examples": examples}
  config = synthetic_run.config(task="classify")
  workdir = synthetic_run.write(tmp_path / "a", config, test=test)
  with pytest.raises(
    schema.ConfigError, match="result.json is damaged: an acc"
  ):
    runs.load_run(workdir)


def test_layers_and_digests_that_are_damaged_say_so(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a")
  (tmp_path / "a" / "text.sha256").write_bytes(b"\xff\xfe")
  assert runs.load_run(workdir).digest  # only compared with that of others
  layer = {"path": "x", "group": "y", "shape": [], "dense": 1, "stored": 1}
  synthetic_run.write(tmp_path / "b", layers=[{**layer, "zeros": 0.0}])
  with pytest.raises(schema.ConfigError, match="x is of the group 'y'"):
    runs.load_run(str(tmp_path / "b"))


def test_fields_of_a_later_writer_are_ignored(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a", later="?")
  assert runs.load_run(workdir).result.steps == 600


def _append(workdir: str, text: str) -> None:
  with open(pathlib.Path(workdir) / "metrics.jsonl", "a") as file:
    file.write(text)


@pytest.mark.parametrize("torn", ['{"split": "tr', "{", '{"split": "train"}'])
def test_a_torn_last_line_is_ignored(tmp_path, torn):
  workdir = synthetic_run.write(tmp_path / "a")
  before = runs.load_run(workdir)
  _append(workdir, torn)
  assert runs.load_run(workdir) == before


def test_a_damaged_line_in_the_middle_is_not_ignored(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a", steps=40)
  _append(workdir, '{"split": "tr\n{"split": "train", "step": 60, "loss": 1}\n')
  with pytest.raises(schema.ConfigError, match="damaged at line 3"):
    runs.load_run(workdir)


def test_a_step_measured_again_after_resuming_counts_once(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a", steps=60)
  again = {"split": "train", "step": 40, "loss": 1.5}
  _append(workdir, json.dumps(again) + "\n")
  run = runs.load_run(workdir)
  assert [r["step"] for r in run.train] == [20, 40, 60]
  assert run.train[1] == again


def test_a_test_figure_before_the_end_is_not_believed(tmp_path):
  workdir = synthetic_run.write(
    tmp_path / "a", steps=300, test=synthetic_run.LM_TEST
  )
  assert runs.load_run(workdir).test is None


def test_masks_count_only_where_they_are_asked_for():
  count = runs.Count(dense=1000, stored=200, masks=50)
  assert count.compression == pytest.approx(0.8)
  assert count.compression_with_masks == pytest.approx(0.75)
  assert runs.Count(dense=0, stored=0).compression is None


@pytest.mark.parametrize(
  ("section", "fields", "prunes", "folds"),
  [
    ("fpp", {"linear_layers": (0.5, 0.0)}, True, False),
    ("fpp", {"linear_layers": (0.0, 0.0)}, False, False),
    ("fold", {"groups": (0, 0), "v_block": (0, 0)}, False, False),
    ("fold", {"groups": (0, 2)}, False, True),
    ("fold", {"v_block": 1, "first_dense": True}, False, True),
  ],
)
def test_what_was_asked_of_layers_is_seen(
  section, fields, prunes, folds, tmp_path
):
  workdir = synthetic_run.write(tmp_path / "a")
  run = runs.load_run(workdir)
  config = c.Config(preset="none", model=c.ModelConfig(num_layers=2))
  for name, value in fields.items():
    setattr(getattr(config, section), name, value)
  run = dataclasses.replace(run, config=c.resolve(config))
  assert (run.prunes, run.folds) == (prunes, folds)


def test_write_file_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "page"
  files.write_file(str(path), "old")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    files.write_file(str(path), "new")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_becomes_what_it_is_to_be_or_nothing(tmp_path):
  with pytest.raises(OSError, match="full"):
    with files.becoming(str(tmp_path / "new")) as part:
      pathlib.Path(part, "a").write_text("a")
      raise OSError("the disk is full")
  assert list(tmp_path.iterdir()) == []
  with files.becoming(str(tmp_path / "new")) as part:
    pathlib.Path(part, "a").write_text("a")
  assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("a")] == [
    "new/a"
  ]
