import json
import pathlib
import struct
import subprocess
import sys

import pytest
from scipy import stats

from folding import config as config_lib
from folding import schema
from folding.reporting import plots, report
from tests.reporting import synthetic_run


def _page(workdir: str) -> str:
  return (pathlib.Path(workdir) / "report.md").read_text()


def test_report_json_holds_the_measured_figures(tmp_path):
  workdir = synthetic_run.write(
    tmp_path / "a",
    parameters={
      "qkv": {"dense": 1000, "stored": 100},
      "linear": {"dense": 4000, "stored": 1000},
      "embedding": {"dense": 2000, "stored": 700},
      "other": {"dense": 0, "stored": 0},
      "overall": {"dense": 7000, "stored": 1800},
    },
  )
  summary = report.write_report(workdir)
  assert json.loads((tmp_path / "a" / "report.json").read_text()) == summary
  assert summary["parameters"] == {
    "qkv": {"dense": 1000, "stored": 100, "compression": pytest.approx(0.9)},
    "linear": {
      "dense": 4000,
      "stored": 1000,
      "compression": pytest.approx(0.75),
    },
    "embedding": {
      "dense": 2000,
      "stored": 700,
      "compression": pytest.approx(0.65),
    },
    "other": {"dense": 0, "stored": 0, "compression": None},
    "overall": {
      "dense": 7000,
      "stored": 1800,
      "compression": pytest.approx(26 / 35),
    },
  }
  # Four bytes a parameter, and one bit of mask for each of 589,824.
  linear = summary["bytes"]["linear"]
  assert linear["dense"] == 4 * 589824
  assert linear["masks"] == 589824 // 8
  assert linear["compression_with_masks"] == pytest.approx(
    linear["compression"] - 1 / 32
  )
  assert summary["test"] == synthetic_run.LM_TEST
  expected = {"steps": 600, "seconds": 231.2, "preset": "paper", "dense": False}
  assert {name: summary[name] for name in expected} == expected


def test_accuracy_has_the_interval_of_scipy(tmp_path):
  config = synthetic_run.config(task="classify")
  workdir = synthetic_run.write(tmp_path / "a", config)
  test = report.write_report(workdir)["test"]
  expected = stats.binomtest(434, 500).proportion_ci(method="wilson")
  assert test["accuracy"] == 0.868
  assert test["accuracy_low"] == pytest.approx(expected.low)
  assert test["accuracy_high"] == pytest.approx(expected.high)
  assert (
    "**86.8% accuracy** (95% interval 83.6% to 89.5%, 500 examples)"
    in _page(workdir)
  )


def test_the_page_says_what_was_measured(tmp_path):
  workdir = synthetic_run.write(tmp_path / "my-run")
  summary = report.write_report(workdir)
  page = _page(workdir)
  overall = summary["parameters"]["overall"]
  assert page.startswith("# my-run\n")
  assert (
    f"It stores {overall['stored']:,} of the 920,704 parameters of its dense "
    f"twin: **{100 * (1 - overall['stored'] / 920704):.1f}% smaller**." in page
  )
  assert "**1.903 bits per byte** (perplexity 18.20 over 123,456 tok" in page
  assert "on python_stdlib for 600 steps, in 3 min 51 s" in page
  assert "cpu x1 (AMD EPYC)" in page
  assert "3f2a9c1" in page
  assert "measured on the checkpoint of step 500." in page
  assert "Unfinished" not in page
  # One row for each of the arrays in the folded table.
  arrays = synthetic_run.layers(synthetic_run.config())
  assert page.count("\n| `blocks_") + page.count("\n| `embedding/") == (
    len(arrays) - 1
  )


def test_a_measured_sparsity_is_not_the_one_asked_for(tmp_path):
  config = synthetic_run.config(
    fpp=config_lib.FPPConfig(linear=0.45, embedding=0.45)
  )
  workdir = synthetic_run.write(tmp_path / "a", config, steps=600)
  page = _page_after_report(workdir)
  assert "70.0% of the parameters that FPP may prune were zero" in page
  assert [line for line in page.splitlines() if "45.0%" in line] == [
    "| target of linear    | 45.0%                        |",
    "| target of embedding | 45.0%                        |",
  ]


def test_what_was_pruned_at_once_was_not_pruned_while_training(tmp_path):
  config = synthetic_run.config(
    preset="none",
    pretrained="x",
    fpp=config_lib.FPPConfig(overall=0.7, embedding_granularity="weight"),
    compress=config_lib.CompressConfig(prune="sparsegpt"),
  )
  page = _page_after_report(synthetic_run.write(tmp_path / "a", config))
  assert "Weights are pruned by sparsegpt before the first step." in page
  assert "| pruned before the first step by | sparsegpt |" in page
  assert "begins at step" not in page
  run = report.load_run(str(tmp_path / "a"))
  assert not plots.curves(run).axes[0].texts


def test_nothing_was_pruned_where_folding_alone_saves_enough(tmp_path):
  config = synthetic_run.config(fpp=config_lib.FPPConfig(overall=0.05))
  workdir = pathlib.Path(synthetic_run.write(tmp_path / "a", config))
  path = workdir / "metrics.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records:
    for name in ("sparsity", "frozen", "trainable"):
      record.pop(name, None)
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  page = _page_after_report(str(workdir))
  assert "pruned by FPP" not in page
  assert "## Pruning" not in page
  assert "sparsity.png" not in page
  run = report.load_run(str(workdir))
  assert not plots.curves(run).axes[0].texts


def _page_after_report(workdir: str) -> str:
  report.write_report(workdir)
  return _page(workdir)


def test_an_unfinished_run_says_so_and_has_no_test_figure(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a", steps=300)
  summary = report.write_report(workdir)
  page = _page(workdir)
  assert summary["test"] is None
  assert summary["finished"] is False
  assert "**Unfinished:** step 300 of 600." in page
  assert "There is no test figure." in page
  assert "perplexity" not in page


def test_a_run_that_logged_nothing_yet_has_a_report(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a", steps=0)
  assert report.write_report(workdir)["sparsity"] is None
  assert "step 0 of 600" in _page(workdir)


def test_the_page_embeds_just_the_plots_that_are_there(tmp_path):
  for name, config in (
    ("paper", synthetic_run.config()),
    ("dense", synthetic_run.config(dense=True)),
  ):
    folder = tmp_path / name
    page = _page_after_report(synthetic_run.write(folder, config))
    drawn = sorted(path.name for path in folder.glob("*.png"))
    embedded = sorted(part.partition(")")[0] for part in page.split("](")[1:])
    assert embedded == drawn
    assert ("sparsity.png" in drawn) == (name == "paper")
    for drawing in drawn:
      head = (folder / drawing).read_bytes()[:24]
      assert head[:8] == b"\x89PNG\r\n\x1a\n"
      assert struct.unpack(">II", head[16:]) == (960, 540)
    assert not list(folder.glob("*.tmp"))


def test_a_dense_run_is_not_called_smaller(tmp_path):
  config = synthetic_run.config(dense=True)
  page = _page_after_report(synthetic_run.write(tmp_path / "a", config))
  assert "It is the dense twin: nothing is folded, nothing pruned." in page
  assert "smaller" not in page
  assert "## Pruning" not in page


@pytest.mark.parametrize(
  "chosen",
  [
    {},
    {"model": config_lib.ModelConfig(width=256)},
    {"fpp": config_lib.FPPConfig(linear=0.5)},
    {"preset": "moderate", "seed": 3},
    {"dense": True},
    {"data": config_lib.DataConfig(path="corpus.txt")},
    {
      "fold": config_lib.FoldConfig(axis="input", groups=4),
      "model": config_lib.ModelConfig(num_layers=2),
    },
  ],
  ids=lambda chosen: "-".join(chosen) or "nothing",
)
def test_settings_alone_give_the_config_again(chosen):
  config = config_lib.resolve(config_lib.Config(**chosen))
  again = config_lib.to_dict(config_lib.Config())
  for line in report.settings(config):
    name, _, change = line.partition(": ")
    place = again
    *sections, last = name.split(".")
    for section in sections:
      place = place[section]
    place[last] = eval(change.partition(" -> ")[2])  # a repr we wrote
  assert config_lib.resolve(config_lib.from_dict(again)) == config


def test_settings_leave_out_what_others_imply():
  config = config_lib.resolve(
    config_lib.Config(model=config_lib.ModelConfig(width=256))
  )
  assert report.settings(config) == ["model.width: 128 -> 256"]


def test_load_run_refuses_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(schema.ConfigError, match="has no config.json"):
    report.load_run(str(tmp_path))


def test_importing_report_imports_neither_jax_nor_matplotlib():
  # A bare package, since `folding` itself may well import jax.
  folder = pathlib.Path(report.__file__).parents[1]
  code = (
    "import sys, types\n"
    "package = types.ModuleType('folding')\n"
    f"package.__path__ = [{str(folder)!r}]\n"
    "sys.modules['folding'] = package\n"
    "import folding.reporting.report\n"
    "print(sorted({'jax', 'matplotlib'} & set(sys.modules)))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"
