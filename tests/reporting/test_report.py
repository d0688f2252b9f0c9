import base64
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest

from folding import config as config_lib
from folding.errors import ConfigError
from folding.reporting import page, plots, report
from folding.training import run_dir
from tests.reporting import synthetic_run


def test_report_json_holds_the_measured_values(tmp_path):
  counts = {g: {"dense": 0, "stored": 0} for g in report.KINDS}
  counts["qkv"] = {"dense": 1000, "stored": 100}
  counts["linear"] = {"dense": 4000, "stored": 1000}
  counts["overall"] = {"dense": 5000, "stored": 1100}
  sizes = {g: {"dense": 800, "stored": 200, "masks": 50} for g in report.KINDS}
  layer = {"path": "x", "group": "linear", "dense": 4000, "stored": 1000}
  workdir = synthetic_run.write(
    tmp_path / "a",
    parameters=counts,
    bytes=sizes,
    layers=[
      {**layer, "shape": [40, 100], "zeros": 0.75},
      {**layer, "shape": [], "zeros": 0.0},
    ],
  )
  written = report.write_report(workdir)
  assert json.loads((tmp_path / "a" / "report.json").read_text()) == written
  parameters = written["parameters"]
  assert parameters["qkv"]["compression"] == pytest.approx(0.9)
  assert parameters["linear"]["compression"] == pytest.approx(0.75)
  assert parameters["overall"]["compression"] == pytest.approx(0.78)
  assert parameters["other"] == {"dense": 0, "stored": 0, "compression": None}
  assert written["bytes"]["linear"]["compression"] == pytest.approx(0.75)
  with_masks = written["bytes"]["linear"]["compression_with_masks"]
  assert with_masks == pytest.approx(1 - 250 / 800)
  assert written["allocated_parameters"] == 40 * 100 + 1
  page = (tmp_path / "a" / "report.md").read_text()
  (row,) = re.findall(r"^\|? *linear .*", page, re.MULTILINE)
  assert re.findall(r"[\d.,%]+", row) == [
    *("4,000", "1,000", "75.0%"),
    *("800", "200", "50", "68.8%"),
  ]
  assert written["test"] == synthetic_run.LM_TEST
  assert written["sparsity"] == pytest.approx(0.7)
  expected = synthetic_run.result(synthetic_run.config())
  for name in ("finished", "steps", "seconds", "device", "versions", "commit"):
    assert written[name] == expected[name]


def test_report_of_a_classifier_has_the_interval_of_its_accuracy(tmp_path):
  config = synthetic_run.config(task="classify")
  run = report.load_run(synthetic_run.write(tmp_path / "a", config))
  test = report.summarize(run)["test"]
  # Wilson solves |p - accuracy| = z sqrt(p (1 - p) / n) for both ends.
  for name in ("accuracy_low", "accuracy_high"):
    p = test[name]
    z = abs(p - 434 / 500) / math.sqrt(p * (1 - p) / 500)
    assert z == pytest.approx(1.959964, abs=1e-6)
  assert test["accuracy_low"] < 434 / 500 < test["accuracy_high"]


@pytest.mark.parametrize("steps", [0, 300])
def test_unfinished_run_has_a_report_without_a_test(tmp_path, steps):
  workdir = synthetic_run.write(
    tmp_path / "a", steps=steps, test=synthetic_run.LM_TEST
  )
  written = report.write_report(workdir)
  assert written["test"] is None
  assert not written["finished"]
  assert written["sparsity"] == (pytest.approx(0.35) if steps else None)


@pytest.mark.parametrize("dense", [False, True])
def test_page_embeds_the_plots_that_exist(tmp_path, dense):
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(dense=dense)
  )
  report.write_report(workdir)
  page = (tmp_path / "a" / "report.md").read_text()
  drawn = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
  assert sorted(re.findall(r"\]\((\S*) \".*\"\)", page)) == drawn
  assert ("sparsity.png" in drawn) == (not dense)
  result = synthetic_run.result(synthetic_run.config(dense=dense))
  assert f"{result['parameters']['overall']['stored']:,}" in page
  assert "1.903" in page
  # The HTML page has the same cells and pictures, and needs no other file.
  html = (tmp_path / "a" / "report.html").read_text()
  pictures = re.findall(r'src="data:image/png;base64,(.*?)"', html)
  assert {base64.b64decode(picture) for picture in pictures} == {
    (tmp_path / "a" / name).read_bytes() for name in drawn
  }
  assert not re.findall(r"(?:src|href)=(?!\"data:)|https?:", html)
  cells = re.findall(r"<td.*?>(.*?)</td>", html)
  assert f"{result['parameters']['overall']['stored']:,}" in cells


def test_plots_show_the_records_and_when_fpp_prunes(tmp_path, monkeypatch):
  drawings, save = {}, plots.save
  monkeypatch.setattr(
    plots,
    "save",
    lambda drawing, path: save(drawings.setdefault(path, drawing), path),
  )
  report.write_report(synthetic_run.write(tmp_path / "a"))
  curves, sizes, sparsity = (
    drawings[str(tmp_path / "a" / f"{name}.png")].axes[0]
    for name in ("curves", "parameters", "sparsity")
  )
  # See `synthetic_run`; FPP prunes from 0.1 to 0.7 of 600 steps.
  found = {line.get_label(): line.get_ydata() for line in curves.lines[:2]}
  train, valid = np.arange(20, 601, 20), np.arange(100, 601, 100)
  np.testing.assert_allclose(found["training"], 5 - train / 600)
  np.testing.assert_allclose(found["validation"], 5.1 - valid / 600)
  found = {line.get_label(): line.get_ydata() for line in sparsity.lines[:2]}
  np.testing.assert_allclose(found["zero"], 70 * train / 600)
  np.testing.assert_allclose(found["frozen"], 10 - 10 * train / 600, atol=1e-9)
  for axes in (curves, sparsity):
    marks = [line.get_xdata()[0] for line in axes.lines[2:]]
    assert marks == pytest.approx([60, 420])
  counts = synthetic_run.result(synthetic_run.config())["parameters"]
  widths = [bar.get_width() for bar in sizes.containers[1]]
  assert widths == [counts[kind]["stored"] for kind in report.KINDS]


@pytest.mark.parametrize(
  ("seconds", "text"), [(230.6, "0:03:51"), (90_061, "25:01:01")]
)
def test_duration_is_in_hours(seconds, text):
  assert report.duration(seconds) == text  # pages sort by three numbers


def test_one_layer_is_in_the_singular(tmp_path):
  model = config_lib.ModelConfig(num_layers=1)
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(model=model)
  )
  text = report.describe(report.load_run(workdir))
  assert text.startswith(
    "A language model with 1 layer, width 128 and 16 heads,"
  )


def test_settings_are_the_fields_that_differ_from_the_default_run(tmp_path):
  config = synthetic_run.config(
    model=config_lib.ModelConfig(width=256), seed=3, preset="moderate"
  )
  workdir = synthetic_run.write(tmp_path / "a", config)
  settings = report.summarize(report.load_run(workdir))["settings"]
  assert {"model.width: 128 -> 256", "seed: 0 -> 3"} < set(settings)
  assert not any("rope_base" in line for line in settings)


def test_load_run_reads_the_files_of_a_run(tmp_path):
  config = synthetic_run.config(seed=7)
  workdir = synthetic_run.write(tmp_path / "a", config)
  (tmp_path / "a" / "text.sha256").write_text("ab12\n")
  run = report.load_run(workdir + "/")
  assert (run.name, run.config, run.digest) == ("a", config, "ab12")
  assert [r["step"] for r in run.train] == list(range(20, 601, 20))
  assert [r["step"] for r in run.valid] == list(range(100, 601, 100))
  assert run.test == synthetic_run.LM_TEST


@pytest.mark.parametrize(
  ("name", "content", "word"),
  [
    ("config.json", None, "config.json"),
    ("metrics.jsonl", None, "metrics.jsonl"),
    ("result.json", None, "result.json"),
    ("config.json", "{", "config.json"),
    ("result.json", "[]", "result.json"),
    ("metrics.jsonl", '{"split": "tr\n{}\n', "line 1"),
  ],
)
def test_load_run_refuses_a_missing_or_damaged_file(
  tmp_path, name, content, word
):
  workdir = synthetic_run.write(tmp_path / "a")
  path = tmp_path / "a" / name
  path.unlink()
  if content is not None:
    path.write_text(content)
  with pytest.raises(ConfigError, match=word):
    report.load_run(workdir)


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"schema": 3}, "schema 3"),
    ({"parameters": {}}, "qkv"),
    ({"layers": [{"path": "x"}]}, "shape"),
    ({"layers": [{"path": "x", "shape": [1]}]}, "stored"),
    ({"test": "?"}, "damaged"),
    ({"test": {"accuracy": "?"}}, "test is"),
    ({"test": {"loss": 1.0}}, "damaged"),
    ({"seconds": math.inf}, "damaged"),
    ({"versions": []}, "damaged"),
    ({"layers": [{"path": [], "shape": [1], "stored": 1}]}, "damaged"),
  ],
)
def test_load_run_refuses_a_damaged_result(tmp_path, change, word):
  workdir = synthetic_run.write(tmp_path / "a", **change)
  with pytest.raises(ConfigError, match=word):
    report.load_run(workdir)


@pytest.mark.parametrize("name", ["kwh", "kg_co2e", "country", "by"])
def test_load_run_refuses_damaged_energy(tmp_path, name):
  workdir = synthetic_run.write(tmp_path / "a")
  energy = {"kwh": 1.5, "kg_co2e": 0.2, "country": "Sweden", "by": "?"}
  path = tmp_path / "a" / "energy.json"
  path.write_text(json.dumps(energy))
  assert report.load_run(workdir).energy == energy
  path.write_text(json.dumps(energy | {name: None}))
  with pytest.raises(ConfigError, match=f"energy.json is damaged: {name}"):
    report.load_run(workdir)


def test_table_is_aligned_markdown():
  assert report.table(("a", "long"), [("x|y", "1")]) == (
    "| a    | long |\n| ---- | ---: |\n| x\\|y |    1 |\n"
  )


def test_report_leaves_pyplot_alone(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # not importable
  report.write_report(synthetic_run.write(tmp_path / "a"))


def test_html_of_a_page_escapes_what_a_run_says():
  html = page.to_html("# a<b>&\n\n| x<i> |\n| --- |\n| <script> |\n", "", [])
  assert "<title>a&lt;b&gt;&amp;</title>" in html
  assert "<td>&lt;script&gt;</td>" in html


def test_plan_has_the_heads_rows_ranks_and_nonzero_neurons_of_a_layer(tmp_path):
  config = synthetic_run.config(
    model=config_lib.ModelConfig(
      num_layers=2, width=64, num_heads=4, mlp_width=80, heads=((0, 1, 3), (2,))
    ),
    fold=config_lib.FoldConfig(
      groups=(8, 0), values=("dense", "diagonal"), value_rank=(6, 0)
    ),
    fpp=config_lib.FPPConfig(saving=0.5, granularity="neuron"),
  )
  arrays = [
    {"path": f"blocks_{n}/mlp/down/kernel", "shape": [80, 64], "stored": stored}
    for n, stored in enumerate((64 * 20, 64 * 80))
  ]
  arrays[0]["shape"] = [24, 64]  # with `train.compact` four are zero, 56 left
  run = report.load_run(
    synthetic_run.write(tmp_path / "a", config, layers=arrays)
  )
  found = {
    name: [(row.dense, row.size) for row in rows]
    for name, rows in report.plan(run).items()
  }
  assert found == {
    "heads": [(4, 3), (4, 1)],
    "rows of W_Q, W_K": [(16, 8), (16, 16)],
    "rank of W_V": [(16, 6), (16, 0)],
    "neurons": [(80, 20), (80, 80)],
  }


def test_plan_of_inputs_that_share_rows_counts_inputs(tmp_path):
  config = synthetic_run.config(
    model=config_lib.ModelConfig(num_layers=2, width=64, num_heads=4),
    fold=config_lib.FoldConfig(groups=(32, 0), axis="input"),
  )
  run = report.load_run(synthetic_run.write(tmp_path / "a", config))
  [first, second] = report.plan(run)["inputs of W_Q, W_K"]
  assert [first[:2], second[:2]] == [(64, 32), (64, 64)]


def test_plan_of_a_dense_run_is_empty(tmp_path):
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(dense=True)
  )
  assert not report.plan(report.load_run(workdir))


@pytest.mark.parametrize(
  ("digest", "found"), [("ab", synthetic_run.LM_TEST), ("cd", None)]
)
def test_dense_result_is_that_of_a_run_on_the_same_data(
  tmp_path, digest, found
):
  dense = synthetic_run.write(
    tmp_path / "dense", synthetic_run.config(dense=True)
  )
  small = synthetic_run.write(
    tmp_path / "small", synthetic_run.config(pretrained=dense)
  )
  (tmp_path / "dense" / "text.sha256").write_text(digest)
  (tmp_path / "small" / "text.sha256").write_text("ab")
  assert report.dense_test(small) == found
  shutil.rmtree(dense)
  assert report.dense_test(small) is None


def test_report_has_the_dense_result_that_training_kept(tmp_path):
  workdir = synthetic_run.write(tmp_path / "a")
  test = {**synthetic_run.LM_TEST, "bits_per_byte": 1.75}
  run_dir.write_command(workdir, "folding train", [], test)
  assert report.write_report(workdir)["dense_test"] == test
  assert (
    "dense run has 1.750 bits per byte"
    in (tmp_path / "a" / "report.md").read_text()
  )


def test_page_has_the_command_and_its_edits_instead_of_all_fields(tmp_path):
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(preset="moderate")
  )
  report.write_report(workdir)
  page = (tmp_path / "a" / "report.md").read_text()
  assert "| `preset` " in page
  edits = ["seed: 0 -> 3", "no edit"]
  run_dir.write_command(workdir, "folding train a`b", edits, None)
  report.write_report(workdir)
  page = (tmp_path / "a" / "report.md").read_text()
  assert "`` folding train a`b ``" in page
  assert re.findall(
    r"^\| `(.*?)` .*\| (\d) .*\| (\d) ", page, re.MULTILINE
  ) == [("seed", "0", "3")]


@pytest.mark.parametrize(
  "content",
  [
    "[]",
    "{}",
    '{"command": "a", "edits": [1]}',
    '{"command": "a", "edits": [], "dense_test": []}',
    '{"command": "a", "edits": [], "dense_test": {}}',
  ],
)
def test_damaged_command_is_reported(tmp_path, content):
  workdir = synthetic_run.write(tmp_path / "a")
  (tmp_path / "a" / "command.json").write_text(content)
  with pytest.raises(ConfigError, match="command.json"):
    report.load_run(workdir)


@pytest.mark.parametrize(
  ("fields", "steps", "verb"),
  [
    ({}, 300, "resume"),
    ({"dense": True}, None, "train"),
    ({"fpp": config_lib.FPPConfig(granularity="neuron")}, None, "shrink"),
    ({"fpp": config_lib.FPPConfig(granularity="weight")}, None, "export"),
  ],
)
def test_next_command_fits_the_run(tmp_path, fields, steps, verb):
  workdir = synthetic_run.write(
    tmp_path / "a", synthetic_run.config(**fields), steps
  )
  report.write_report(workdir)
  page = (tmp_path / "a" / "report.md").read_text()
  assert f"`folding {verb} " in page


def test_share_is_of_removed_parameters_where_none_is_zero(tmp_path):
  for name, zeros in (("a", 0.0), ("b", 0.7)):
    c = synthetic_run.config()
    arrays = synthetic_run.layers(c)
    size = sum(math.prod(array["shape"]) for array in arrays)
    counts = {g: {"dense": size, "stored": 0} for g in report.KINDS}
    counts["overall"]["stored"] = size - round(zeros * size)
    workdir = synthetic_run.write(tmp_path / name, c, parameters=counts)
    report.write_report(workdir)
  pages = [(tmp_path / x / "report.md").read_text() for x in "ab"]
  assert ["are removed" in x for x in pages] == [True, False]
  assert ["are zero" in x for x in pages] == [False, True]


def test_dense_test_of_a_run_from_scratch_is_not_that_of_the_current_folder(
  tmp_path, monkeypatch
):
  config = synthetic_run.config(dense=True)
  workdir = synthetic_run.write(tmp_path / "a", config)
  (tmp_path / "a" / "text.sha256").write_text("0")
  monkeypatch.chdir(workdir)
  assert report.dense_test(workdir) is None
