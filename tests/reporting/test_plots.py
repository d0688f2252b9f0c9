import subprocess
import sys

import numpy as np
import pytest

from folding import config as config_lib
from folding.reporting import heatmap, plots, runs
from tests.reporting import synthetic_run


@pytest.fixture
def run(tmp_path) -> runs.Run:
  return runs.load_run(synthetic_run.write(tmp_path / "a"))


def _line(axes, label):
  (line,) = [line for line in axes.lines if line.get_label() == label]
  return np.asarray(line.get_xydata())


def test_curves_show_the_logged_losses(run):
  axes = plots.curves(run).axes[0]
  for label, records in (("train", run.train), ("valid", run.valid)):
    expected = [(r["step"], r["loss"]) for r in records]
    np.testing.assert_array_equal(_line(axes, label), expected)
  assert axes.get_ylabel() == "loss (nats per token)"


def test_curves_mark_where_fpp_begins_and_ends(run):
  axes = plots.curves(run).axes[0]
  marks = [
    line.get_xdata()[0]
    for line in axes.lines
    if line.get_label().startswith("_")
  ]
  # 0.1 and 0.7 of 600 steps.
  assert marks == pytest.approx([60, 420])
  assert [text.get_text() for text in axes.texts] == [
    "FPP begins",
    "FPP ends, healing",
  ]


def test_curves_of_a_dense_run_mark_nothing(tmp_path):
  config = synthetic_run.config(dense=True)
  run = runs.load_run(synthetic_run.write(tmp_path / "a", config))
  axes = plots.curves(run).axes[0]
  assert len(axes.lines) == 2
  assert not axes.texts


def test_sparsity_areas_are_the_logged_fractions(run):
  top, bottom = plots.sparsity(run).axes
  first, last = run.train[9], run.train[-1]
  heights = {}
  for area in top.collections:
    vertices = area.get_paths()[0].vertices
    for record in (first, last):
      ys = vertices[vertices[:, 0] == record["step"], 1]
      heights[area.get_label(), record["step"]] = ys.max() - ys.min()
  for record in (first, last):
    step = record["step"]
    zero, frozen = 100 * record["sparsity"], 100 * record["frozen"]
    assert heights["zero", step] == pytest.approx(zero)
    assert heights["frozen", step] == pytest.approx(frozen, abs=1e-9)
    assert heights["trainable", step] == pytest.approx(100 - zero - frozen)
  expected = [(r["step"], r["trainable"]) for r in run.train]
  np.testing.assert_array_equal(bottom.lines[0].get_xydata(), expected)


def test_parameters_are_bars_of_what_was_counted(run):
  axes = plots.parameters(run).axes[0]
  widths = [patch.get_width() for patch in axes.patches]
  counts = [getattr(run.result.parameters, g) for g in runs.GROUPS]
  assert widths == [n for c in counts for n in (c.dense, c.stored)]
  assert [t.get_text() for t in axes.get_yticklabels()] == list(runs.GROUPS)


@pytest.mark.parametrize("num_layers", [1, 4, 24])
def test_layers_has_a_cell_for_each_projection_of_each_block(
  tmp_path, num_layers
):
  config = synthetic_run.config(
    model=config_lib.ModelConfig(num_layers=num_layers)
  )
  run = runs.load_run(synthetic_run.write(tmp_path / "a", config))
  left, right = heatmap.layers(run).axes[:2]
  shades = left.images[0].get_array()
  assert shades.shape == (6, num_layers)
  labels = [text.get_text() for text in left.get_yticklabels()]
  assert labels == "attn/q attn/k attn/v attn/o mlp/up mlp/down".split()
  by_path = {layer.path: layer for layer in run.result.layers}
  last = by_path[f"blocks_{num_layers - 1}/mlp/up/kernel"]
  assert shades[4, -1] == pytest.approx(1 - last.stored / last.dense)
  embedding = by_path["embedding/embedding"]
  assert right.images[0].get_array()[0, 0] == pytest.approx(
    1 - embedding.stored / embedding.dense
  )


def test_layers_adds_the_arrays_of_one_projection(tmp_path):
  def array(leaf, dense, stored):
    return {
      "path": f"blocks_0/attn/o/{leaf}",
      "group": "linear",
      "shape": [dense],
      "dense": dense,
      "stored": stored,
      "zeros": 1 - stored / dense,
    }

  arrays = [array("kernel", 900, 100), array("bias", 100, 100)]
  workdir = synthetic_run.write(tmp_path / "a", layers=arrays)
  left, right = heatmap.layers(runs.load_run(workdir)).axes[:2]
  assert left.images[0].get_array()[0, 0] == pytest.approx(0.8)
  assert [text.get_text() for text in left.texts] == ["80"]
  assert not right.texts


def test_drawing_leaves_pyplot_and_its_style_alone(run, tmp_path):
  import matplotlib

  before = dict(matplotlib.rcParams)
  plots.save(plots.curves(run), str(tmp_path / "x.png"))
  assert dict(matplotlib.rcParams) == before


def test_drawing_does_not_import_pyplot(run):
  # In a process of its own: here, another library may have imported it.
  code = (
    "import sys\n"
    "from folding.reporting import report\n"
    f"report.write_report({run.workdir!r})\n"
    "print('matplotlib.pyplot' in sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "False\n"


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
  for name in "xy":
    plots.save(plots.sparsity(run), str(tmp_path / name))
  assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
