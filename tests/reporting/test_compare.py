import io
import json
import os

import numpy as np
import pytest

from folding import config as config_lib
from folding import schema
from folding.reporting import compare, grouping, overlay
from tests.reporting import synthetic_run


def _lm(folder, bits, perplexity=18.0, **options):
  test = synthetic_run.LM_TEST | {
    "bits_per_byte": bits,
    "perplexity": perplexity,
  }
  return synthetic_run.write(folder, test=test, **options)


@pytest.fixture
def three_kinds(tmp_path) -> list[str]:
  """Returns a dense run, three seeds of one config, and an unfinished run."""
  dense = synthetic_run.config(dense=True)
  seeds = [
    _lm(
      tmp_path / f"paper-seed{i}",
      1.90 + 0.05 * i,
      run_config=synthetic_run.config(seed=i),
    )
    for i in range(3)
  ]
  cut = synthetic_run.config(fpp=config_lib.FPPConfig(overall=0.5))
  return [
    _lm(tmp_path / "dense", 1.80, run_config=dense),
    seeds[2],
    synthetic_run.write(tmp_path / "cut", cut, steps=300),
    *seeds[:2],
  ]


def test_runs_that_differ_only_in_seed_are_one_column(three_kinds):
  found = grouping.columns(three_kinds)
  assert [c.name for c in found] == ["dense", "paper", "cut"]
  assert [r.name for r in found[1].members] == [
    "paper-seed2",
    "paper-seed0",
    "paper-seed1",
  ]
  spread = found[1].spread(grouping.quality)
  values = [2.00, 1.90, 1.95]
  assert spread.mean == pytest.approx(np.mean(values))
  assert spread.sd == pytest.approx(np.std(values, ddof=1))
  assert spread.n == 3


def test_the_reference_is_the_first_run(three_kinds):
  found = grouping.columns(three_kinds)
  assert grouping.relative(found) == [
    0.0,
    pytest.approx((1.95 - 1.80) / 1.80),
    None,
  ]


def test_one_seed_twice_is_no_sample(tmp_path):
  workdirs = [synthetic_run.write(tmp_path / name) for name in "ab"]
  assert [len(c.members) for c in grouping.columns(workdirs)] == [1, 1]


def test_an_unfinished_seed_is_a_column_of_its_own(tmp_path):
  workdirs = [
    synthetic_run.write(tmp_path / "a", synthetic_run.config(seed=0)),
    synthetic_run.write(tmp_path / "b", synthetic_run.config(seed=1), 300),
  ]
  assert [len(c.members) for c in grouping.columns(workdirs)] == [1, 1]


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path):
  workdirs = [
    synthetic_run.write(tmp_path / "x" / "run"),
    synthetic_run.write(
      tmp_path / "y" / "run", synthetic_run.config(dense=True)
    ),
  ]
  names = [c.name for c in grouping.columns(workdirs)]
  assert names == ["x/run", "y/run"]


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
  configs = [synthetic_run.config(dense=dense) for dense in (True, False)]
  workdirs = [
    synthetic_run.write(tmp_path / place / "runs" / "run", config)
    for place, config in zip("12", configs, strict=True)
  ]
  names = [c.name for c in grouping.columns(workdirs)]
  assert names == ["1/runs/run", "2/runs/run"]


def _with_texts(folder, digests, **data):
  """Returns columns of runs, one a seed, that read these texts."""
  workdirs = []
  for seed, digest in enumerate(digests):
    path = {"path": data["path"][seed]} if data else {}
    config = synthetic_run.config(seed=seed, data=config_lib.DataConfig(**path))
    workdirs.append(synthetic_run.write(folder / f"run{seed}", config))
    if digest:
      (folder / f"run{seed}" / "text.sha256").write_text(digest)
  return grouping.columns(workdirs)


@pytest.mark.parametrize(
  ("digests", "sizes"),
  [("aaa", [3]), ("aba", [2, 1]), (("a", "", "a"), [3])],
)
def test_seeds_that_read_other_text_are_no_sample(tmp_path, digests, sizes):
  found = _with_texts(tmp_path, digests)
  assert [len(c.members) for c in found] == sizes
  assert len(compare.notes(found)) == len(sizes) - 1


@pytest.mark.parametrize(("digests", "count"), [("aa", 0), ("ab", 1)])
def test_the_text_and_not_its_place_tells_what_was_tested(
  tmp_path, digests, count
):
  found = _with_texts(tmp_path, digests, path=["x.txt", "y.txt"])
  assert len(found) == 2
  notes = compare.notes(found)
  assert len(notes) == count
  assert all("had different data" in note for note in notes)


def test_mixed_tasks_are_refused(tmp_path):
  workdirs = [
    synthetic_run.write(tmp_path / "a"),
    synthetic_run.write(tmp_path / "b", synthetic_run.config(task="classify")),
  ]
  with pytest.raises(schema.ConfigError, match="'lm' and .*'classify'"):
    compare.compare(workdirs, str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["~/out", "gs://bucket/out"])
def test_a_folder_of_no_machine_is_refused(tmp_path, monkeypatch, output):
  monkeypatch.chdir(tmp_path)
  workdirs = [synthetic_run.write(tmp_path / name) for name in "ab"]
  with pytest.raises(schema.ConfigError, match=f"^{output} "):
    compare.compare(workdirs, output)
  assert sorted(os.listdir()) == ["a", "b"]


def test_a_run_given_twice_is_refused(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a")
  with pytest.raises(schema.ConfigError, match="given twice"):
    grouping.columns([workdir, workdir + "/"])


def test_compare_writes_the_table(three_kinds, tmp_path):
  out = tmp_path / "made" / "here"
  text = compare.compare(three_kinds, str(out))
  assert (out / "compare.md").read_text() == text
  assert sorted(path.name for path in out.iterdir()) == [
    "compare.json",
    "compare.md",
    "compare.png",
  ]
  rows = {
    cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
    for cells in (line.split("|") for line in text.splitlines())
    if len(cells) > 2
  }
  assert rows["seeds"] == ["0", "2, 0, 1 (n = 3)", "0"]
  assert rows["preset"] == ["dense twin", "paper", "paper"]
  assert rows["test bits per byte"] == ["1.800", "1.950 ± 0.050", "–"]
  assert rows["difference to the first"] == ["reference", "+8.3%", "–"]
  assert rows["steps"] == ["600", "600", "300 of 600"]
  assert rows["stored parameters"][0] == "920,704"
  # q and k: 2 x 2048 of 16384; v: 128 of 16384; no seed changes that.
  qkv = 1 - (2 * 2048 + 128) / (3 * 16384)
  assert rows["compression, qkv"] == ["0.0%", f"{100 * qkv:.1f}%"] + [
    f"{100 * qkv:.1f}%"
  ]
  assert "  - `fpp.overall: None -> 0.5`" in text
  assert "unfinished runs have no test figure" in text


def test_compare_json_holds_the_same_figures(three_kinds, tmp_path):
  compare.compare(three_kinds, str(tmp_path / "out"))
  values = json.loads((tmp_path / "out" / "compare.json").read_text())
  dense, paper, cut = values["columns"]
  assert values["task"] == "lm"
  assert paper["bits_per_byte"] == {
    "mean": pytest.approx(1.95),
    "sd": pytest.approx(0.05),
    "n": 3,
  }
  assert paper["seeds"] == [2, 0, 1]
  assert dense["compression"]["overall"] == {"mean": 0.0, "sd": None, "n": 1}
  assert cut["bits_per_byte"]["mean"] is None
  assert cut["finished"] is False
  masks = (589824 + 131072) // 8
  assert cut["stored_bytes_with_masks"]["mean"] == (
    4 * cut["stored_parameters"]["mean"] + masks
  )


def test_stored_in_the_default_folder(three_kinds, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  compare.compare(three_kinds[:2])
  assert (tmp_path / "comparison" / "compare.png").is_file()


def test_accuracy_has_an_interval_for_one_run_and_a_spread_for_two(tmp_path):
  test = synthetic_run.CLASSIFY_TEST
  workdirs = [
    synthetic_run.write(
      tmp_path / name,
      synthetic_run.config(task="classify", dense=dense, seed=seed),
      test=test | {"accuracy": accuracy},
    )
    for name, dense, seed, accuracy in (
      ("dense", True, 0, 0.868),
      ("a", False, 0, 0.80),
      ("b", False, 1, 0.82),
    )
  ]
  found = grouping.columns(workdirs)
  (row,) = [r for r in compare.rows(found) if r[0] == "test accuracy"]
  assert row[1:] == ["86.8% (83.6% to 89.5%)", "81.0% ± 1.4%"]


@pytest.mark.parametrize(
  ("data", "note"),
  [
    ({"name": "glue/sst2"}, "had different data"),
    ({"valid_fraction": 0.2}, "had different data"),
    ({"max_bytes": 2000}, "had different data"),
    ({"vocab_size": 512}, "compare bits per byte"),
    ({"batch_size": 8}, None),
  ],
)
def test_notes_say_what_may_not_be_compared(tmp_path, data, note):
  other = synthetic_run.config(data=config_lib.DataConfig(**data))
  found = grouping.columns(
    [
      synthetic_run.write(tmp_path / "a"),
      synthetic_run.write(tmp_path / "b", other),
    ]
  )
  for name, run in zip("ab", ("1", data.get("vocab_size", "1")), strict=True):
    (tmp_path / name / "tokenizer.json").write_text(f"{run}")
  notes = compare.notes(found)
  assert len(notes) == (note is not None)
  assert note is None or note in notes[0]


def test_classifiers_that_read_copies_of_a_tokenizer_may_be_compared(tmp_path):
  folders = []
  for name in ("a", "b"):
    data = config_lib.DataConfig(tokenizer=f"{name}/tokenizer.json")
    config = synthetic_run.config(task="classify", data=data)
    folders.append(synthetic_run.write(tmp_path / name, config))
  assert compare.notes(grouping.columns(folders)) == []


def test_where_one_run_was_not_evaluated_all_curves_are_of_training(tmp_path):
  found = grouping.columns(
    [
      synthetic_run.write(tmp_path / "whole"),
      synthetic_run.write(tmp_path / "cut", steps=60),
    ]
  )
  curves, _ = overlay.overlay(found).axes
  assert curves.get_ylabel() == "training loss (nats per token)"
  for column, line in zip(found, curves.lines, strict=True):
    (run,) = column.members
    assert line.get_ydata().tolist() == [r["loss"] for r in run.train]


def test_a_classifier_that_gets_everything_right_is_drawn(tmp_path):
  test = synthetic_run.CLASSIFY_TEST | {"accuracy": 1.0, "num_examples": 60}
  config = synthetic_run.config(task="classify")
  workdir = synthetic_run.write(tmp_path / "a", config, test=test)
  overlay.overlay(grouping.columns([workdir]))


def test_the_figure_has_a_curve_a_run_and_a_point_a_finished_column(
  three_kinds,
):
  found = grouping.columns(three_kinds)
  drawing = overlay.overlay(found)
  curves, sizes = drawing.axes
  ends = [tuple(line.get_xydata()[-1]) for line in curves.lines]
  assert ends == [
    (r["step"], r["bits_per_byte"])
    for column in found
    for r in [run.valid[-1] for run in column.members]
  ]
  points = [container[0].get_xydata()[0] for container in sizes.containers]
  expected = [
    (c.spread(grouping.stored_parameters).mean, bits)
    for c, bits in zip(found, (1.80, 1.95), strict=False)
  ]
  np.testing.assert_allclose(points, expected)


def test_a_name_is_drawn_and_no_formula(tmp_path):
  workdir = synthetic_run.write(tmp_path / "cost $x_{$")
  drawing = overlay.overlay(grouping.columns([workdir]))
  drawing.savefig(io.BytesIO())


def test_show_draws_names_as_they_are(tmp_path):
  found = grouping.columns([synthetic_run.write(tmp_path / "[red]a")])
  file = io.StringIO()
  compare.show(found, file)
  assert "[red]a" in file.getvalue()
  assert "1.903" in file.getvalue()
