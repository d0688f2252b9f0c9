import io
import runpy
import sys

import matplotlib
import numpy as np
import pytest

from folding.errors import ConfigError
from folding.reporting import plots


def test_draw_lines_names_the_first_seven_series():
  series = {f"_s{i} $x_{{$": [(0, i), (10, i + 1)] for i in range(10)}
  before = dict(matplotlib.rcParams)
  with plots.figure() as drawing:
    axes = drawing.subplots()
    plots.draw_lines(
      axes, series, x_label="step", y_label="loss (nats)", marks={"end": 5}
    )
    drawing.legend()
  drawing.savefig(io.BytesIO())  # a name is not read as a formula
  assert dict(matplotlib.rcParams) == before
  for line, points in zip(axes.lines[:-1], series.values(), strict=True):
    np.testing.assert_array_equal(line.get_xydata(), points)
  labels = axes.get_legend_handles_labels()[1]
  assert len(labels) == 8
  assert labels[-1] == "others"
  assert len({line.get_color() for line in axes.lines[:7]}) == 7
  assert np.asarray(axes.lines[-1].get_xdata())[0] == 5
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats)")


def test_steps_of_a_short_run_are_whole_numbers():
  with plots.figure() as drawing:
    axes = drawing.subplots()
    plots.draw_lines(axes, {"a": [(1, 1), (4, 2)]}, x_label="step", y_label="")
  assert [x for x in axes.get_xticks() if 1 <= x <= 4] == [1, 2, 3, 4]


def test_draw_points_keeps_the_color_of_a_missing_point():
  points = {"a": None, "b": plots.Point(4, 2, 0.5, (0.25, 0.5))}
  with plots.figure() as drawing:
    axes = drawing.subplots()
    plots.draw_points(axes, points, x_label="size", y_label="accuracy")
  (container,) = axes.containers
  mark, _, bars = container
  np.testing.assert_array_equal(mark.get_xydata(), [(4, 2)])
  assert mark.get_color() == plots.CYCLE[1]
  ends = [bar.get_segments()[0] for bar in bars]
  assert [text.get_text() for text in axes.texts] == ["b"]
  np.testing.assert_array_equal(ends[0], [(3.5, 2), (4.5, 2)])
  np.testing.assert_array_equal(ends[1], [(4, 1.75), (4, 2.5)])


def test_curve_of_one_point_has_a_marker():
  with plots.figure() as drawing:
    axes = drawing.subplots()
    curves = {"a": [(1, 2)], "b": [(1, 2), (2, 3)]}
    plots.draw_lines(axes, curves, x_label="step", y_label="")
  assert [line.get_marker() for line in axes.lines] == ["o", "None"]


def test_draw_bars_has_a_bar_for_each_value():
  bars = {"qkv": {"dense": 9, "stored": 1}, "linear": {"dense": 8, "stored": 2}}
  with plots.figure() as drawing:
    axes = drawing.subplots()
    plots.draw_bars(axes, bars, x_label="parameters")
  found = {}
  for container in axes.containers:
    for row, bar in enumerate(container):
      found[row, container.get_label()] = bar.get_width()
      assert abs(bar.get_y() + bar.get_height() / 2 - row) < 0.5
  assert found == {
    (0, "dense"): 9, (0, "stored"): 1, (1, "dense"): 8, (1, "stored"): 2,
  }  # fmt: skip
  assert [t.get_text() for t in axes.get_yticklabels()] == ["qkv", "linear"]


def test_save_writes_equal_files_for_equal_figures(tmp_path):
  for name in "xy":
    with plots.figure() as drawing:
      plots.draw_lines(drawing.subplots(), {"a": []}, x_label="", y_label="")
    plots.save(drawing, str(tmp_path / name))
  assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_unknown_backend_is_one_line(monkeypatch):
  monkeypatch.setenv("MPLBACKEND", "nothing")
  monkeypatch.delitem(sys.modules, "matplotlib")
  with pytest.raises(ConfigError, match="MPLBACKEND"):
    runpy.run_path(plots.__file__)
