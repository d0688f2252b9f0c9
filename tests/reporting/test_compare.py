import dataclasses
import json
import math
import os

import numpy as np
import pytest

from folding import config as config_lib
from folding.errors import ConfigError
from folding.reporting import compare, plots, report
from tests.reporting import synthetic_run


@pytest.fixture
def three_kinds(tmp_path) -> list[str]:
  """Returns a dense run, three seeds of one config, and an unfinished run."""

  def lm(name, bits, **fields):
    test = {**synthetic_run.LM_TEST, "bits_per_byte": bits}
    test["perplexity"] = 100 * (bits - 1)
    config = synthetic_run.config(**fields)
    return synthetic_run.write(tmp_path / name, config, test=test)

  seeds = [lm(f"paper-seed{i}", 1.90 + 0.05 * i, seed=i) for i in range(3)]
  cut = synthetic_run.config(fpp=config_lib.FPPConfig(saving=0.5))
  return [
    lm("dense", 1.80, dense=True),
    seeds[2],
    synthetic_run.write(tmp_path / "cut", cut, steps=300),
    *seeds[:2],
  ]


@pytest.mark.parametrize(
  ("reference", "change"), [(0.4, "-25.0%"), (-0.4, "–"), (0.0, "–")]
)
def test_change_of_a_negative_correlation_is_left_out(
  tmp_path, reference, change
):
  runs = []
  for seed, value in enumerate((reference, 0.3)):
    test = {"loss": 1.0, "spearman": value, "num_examples": 9}
    config = synthetic_run.config(task="regress", seed=seed, dense=seed == 0)
    runs.append(synthetic_run.write(tmp_path / f"{seed}", config, test=test))
  text = compare.compare(runs, str(tmp_path / "out"))
  [row] = [line for line in text.splitlines() if line.startswith("| 1 ")]
  assert row.split("|")[4].strip() == change


@pytest.mark.parametrize(
  ("digest", "tokenizer", "change"),
  [
    ("a", "a", "+25.0% (perplexity +50.0%)"),
    ("a", "b", "+25.0%"),
    ("b", "a", "–"),
  ],
)
def test_change_needs_equal_data_and_that_of_perplexity_equal_tokens(
  tmp_path, digest, tokenizer, change
):
  runs = []
  for data, tokens, bits in (("a", "a", 2.0), (digest, tokenizer, 2.5)):
    folder = tmp_path / f"{len(runs)}"
    config = synthetic_run.config(dense=not runs)
    test = {**synthetic_run.LM_TEST, "bits_per_byte": bits}
    test["perplexity"] = 20 * (bits - 1)
    runs.append(synthetic_run.write(folder, config, test=test))
    (folder / "text.sha256").write_text(data)
    (folder / "tokenizer.json").write_text(tokens)
  text = compare.compare(runs, str(tmp_path / "out"))
  [row] = [line for line in text.splitlines() if line.startswith("| 1 ")]
  assert row.split("|")[4].strip() == change


def test_accuracy_of_one_run_has_its_interval(tmp_path, monkeypatch):
  drawings, save = [], plots.save
  monkeypatch.setattr(
    plots,
    "save",
    lambda figure, path: save(drawings.append(figure) or figure, path),
  )
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(task="classify")
  )
  text = compare.compare([workdir], str(tmp_path / "out"))
  test = report.load_run(workdir).test or {}
  low, high = test["accuracy_low"], test["accuracy_high"]
  assert f"86.8% ({100 * low:.1f} to {high:.1%})" in text
  _, _, (_, bar) = drawings[0].axes[1].containers[0]
  [[_, bottom], [_, top]] = bar.get_segments()[0]
  assert (bottom, top) == pytest.approx((low, high))


def test_change_of_accuracy_is_in_points(tmp_path):
  runs = []
  for value in (0.8, 0.784):
    test = {**synthetic_run.CLASSIFY_TEST, "accuracy": value}
    config = synthetic_run.config(task="classify", dense=not runs)
    folder = tmp_path / f"{len(runs)}"
    runs.append(synthetic_run.write(folder, config, test=test))
  text = compare.compare(runs, str(tmp_path / "out"))
  [row] = [line for line in text.splitlines() if line.startswith("| 1 ")]
  assert row.split("|")[4].strip() == "-1.6 points"


def test_compare_shows_the_metric_of_the_reference(tmp_path):
  runs = []
  for name, metric in (("a", "macro_f1"), ("b", "accuracy")):
    test = {"loss": 1.0, "accuracy": 0.9, "macro_f1": 0.5, "num_examples": 9}
    train = config_lib.TrainConfig(metric=metric)
    config = synthetic_run.config(task="classify", train=train)
    runs.append(synthetic_run.write(tmp_path / name, config, test=test))
  text = compare.compare(runs, str(tmp_path / "out"))
  cells = [line.split("|") for line in text.splitlines() if line[0:1] == "|"]
  assert [c.strip() for c in cells[3][3:5]] == ["0.500", "+0.0%"]


def test_compare_shows_the_measured_values(three_kinds, tmp_path, monkeypatch):
  drawings, save = [], plots.save
  monkeypatch.setattr(
    plots,
    "save",
    lambda figure, path: save(drawings.append(figure) or figure, path),
  )
  out = tmp_path / "made" / "here"
  text = compare.compare(three_kinds, str(out))
  assert (out / "compare.md").read_text() == text
  assert "1.950 ± 0.050</td>" in (out / "compare.html").read_text()
  arrays = synthetic_run.layers(synthetic_run.config())
  stored = sum(array["stored"] for array in arrays)
  total = sum(array["dense"] for array in arrays)
  allocated = sum(math.prod(array["shape"]) for array in arrays)
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  found = {row[0]: row[1:] for row in rows[2:]}
  assert found == {
    "dense": [
      *("0", "1.800", "+0.0% (perplexity +0.0%)", "0.0%"),
      *(f"{total:,}", f"{total:,}"),
      *(f"{4 * total:,}", "600", "0:03:51", "10,234"),
    ],
    # Bits 2.00, 1.90 and 1.95; the standard deviation of a sample.
    "paper": [
      *("2, 0, 1", "1.950 ± 0.050", "+8.3% (perplexity +18.8%)"),
      *(
        f"{1 - stored / total:.1%}",
        f"{stored:,}",
        f"{allocated:,}",
        f"{4 * stored + total // 8:,}",
      ),
      *("600", "0:03:51", "10,234"),
    ],
    "cut": [
      *("0", "–", "–", f"{1 - stored / total:.1%}"),
      *(f"{stored:,}", f"{allocated:,}", f"{4 * stored + total // 8:,}"),
      *("300", "0:01:56", "10,234"),
    ],
  }
  assert "fpp.saving: None -> 0.5" in text

  curves, sizes = drawings[0].axes
  # Validation of seed s at step t: 0.6 (5.1 - t / 600 + s), a mean over seeds.
  expected = [(t, 0.6 * (6.1 - t / 600)) for t in range(100, 601, 100)]
  np.testing.assert_allclose(curves.lines[1].get_xydata(), expected)
  points = [container[0].get_xydata()[0] for container in sizes.containers]
  np.testing.assert_allclose(points, [(total, 1.80), (stored, 1.95)])


@pytest.mark.parametrize(
  ("seeds", "steps", "digests", "sizes"),
  [
    ((0, 1, 2), (None, None, None), "aaa", [3]),
    ((0, 0, 1), (None, None, None), "aaa", [2, 1]),  # a seed twice
    ((0, 1, 2), (None, 300, None), "aaa", [2, 1]),
    ((0, 1, 2), (None, None, None), "aba", [2, 1]),
  ],
)
def test_group_joins_finished_runs_of_one_config_and_text(
  tmp_path, seeds, steps, digests, sizes
):
  workdirs = []
  for i, seed in enumerate(seeds):
    folder = tmp_path / f"run{i}"
    config = synthetic_run.config(seed=seed)
    workdirs.append(synthetic_run.write(folder, config, steps[i]))
    (folder / "text.sha256").write_text(digests[i])
  found = compare.group(workdirs)
  assert sorted((len(v.runs) for v in found), reverse=True) == sizes


def test_group_joins_seeds_whose_plans_differ(tmp_path):
  workdirs = []
  for seed in range(2):
    folder = tmp_path / f"run{seed}"
    config = synthetic_run.config(
      seed=seed,
      pretrained="dense",
      compress=config_lib.CompressConfig(plan="auto"),
      fpp=config_lib.FPPConfig(attention="output"),
    )
    workdirs.append(synthetic_run.write(folder, config))
    m = config.model
    values = {
      "model": dataclasses.asdict(m),
      "fold": dataclasses.asdict(config.fold),
      "targets": {
        "layers": [0.1 + seed / 2] * m.num_layers,
        "head": 0.5,
        "embedding": 0.5,
      },
      "pair": None,
    }
    (folder / "model.json").write_text(json.dumps(values))
  [variant] = compare.group(workdirs)
  assert len(variant.runs) == 2


@pytest.mark.parametrize(
  ("first", "second", "name"),
  [
    ("lm-seed1", "lm-seed2", "lm"),
    ("lm--70--s0", "lm--70--s1", "lm--70"),
    ("ours-1", "ours-2", "ours"),
    ("s1", "s2", "s1"),
  ],
)
def test_group_names_seeds_by_what_they_share(tmp_path, first, second, name):
  runs = [
    synthetic_run.write(tmp_path / folder, synthetic_run.config(seed=seed))
    for seed, folder in enumerate((first, second))
  ]
  assert [variant.name for variant in compare.group(runs)] == [name]


def test_group_names_runs_of_one_name_by_their_folders(tmp_path):
  workdirs = [
    synthetic_run.write(tmp_path / place / "run", synthetic_run.config(dense=d))
    for place, d in (("x", True), ("y", False))
  ]
  assert [v.name for v in compare.group(workdirs)] == workdirs


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({}, None),
    ({"digest": "b"}, "different data"),
    ({"tokenizer": "b"}, "tokenizers"),
    ({"device": "gpu"}, "device"),
    ({"steps": 300}, "unfinished"),
  ],
)
def test_notes_name_what_cannot_be_compared(tmp_path, change, word):
  workdirs = []
  for name, options in (("a", {}), ("b", change)):
    folder = tmp_path / name
    workdirs.append(
      synthetic_run.write(
        folder,
        steps=options.get("steps"),
        device=options.get("device", "cpu"),
      )
    )
    (folder / "text.sha256").write_text(options.get("digest", "a"))
    (folder / "tokenizer.json").write_text(options.get("tokenizer", "a"))
  notes = compare.notes(compare.group(workdirs))
  assert len(notes) == (word is not None)
  assert all(word in note for note in notes)


def test_compare_of_classifiers_has_accuracy(tmp_path):
  config = synthetic_run.config(task="classify")
  out = tmp_path / "out"
  text = compare.compare(
    [synthetic_run.write(tmp_path / "a", config)], str(out)
  )
  assert "86.8%" in text
  assert (out / "compare.png").is_file()


def test_compare_refuses_what_it_cannot_compare(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  lm = synthetic_run.write(tmp_path / "a")
  classify = synthetic_run.write(
    tmp_path / "b", synthetic_run.config(task="classify")
  )
  for workdirs, output, word in (
    ([lm, classify], "out", "task"),
    ([lm, lm + "/"], "out", "twice"),
    ([lm], "~/out", "~"),
    ([lm], "gs://bucket/out", "gs:"),
  ):
    with pytest.raises(ConfigError, match=word):
      compare.compare(workdirs, output)
  assert sorted(os.listdir()) == ["a", "b"]
