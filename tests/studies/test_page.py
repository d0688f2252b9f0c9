"""Page and figures, from a CSV that was written by hand."""

import json
import re
import statistics

import numpy as np
import pytest
import scipy.stats
from matplotlib import colors
from matplotlib.text import Text

from folding.reporting import plots
from folding.studies import drawings, gather, page, tables
from tests.studies.pages import cells_of


@pytest.fixture(scope="module")
def text(results):
  """Returns the page."""
  return page.page(results, "results", "folding study given.py")


def _section(text, title):
  return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def test_each_level_has_a_table_of_all_data_sets(results, text):
  section = _section(text, "All data sets together")
  parts = section.split("\n\n")
  assert [part for part in parts if part.startswith("At ")] == [
    "At 30%, or at its one size:",
    "At 70%, or at its one size:",
  ]
  at_70 = section.split("At 70%, or at its one size:")[1]
  assert at_70.strip() == tables.summary_table(results, 0.7).strip()
  assert at_70.strip() != tables.summary_table(results, 0.3).strip()


def test_each_claim_has_what_was_measured(text):
  section = _section(text, "What the paper claims, and what was measured")
  cells = cells_of(section.split("\n\n", 1)[1])
  found = [cells[claim][0] for claim in list(cells)[2:]]
  assert found == [
    # Points: of means; perplexity: 10.8 / 10.
    "70.0% [70.0% to 70.0%]; accuracy -0.4 points; perplexity +8.0%",
    "30.2% [30.1% to 30.3%]; accuracy +0.4 points; perplexity +1.0%",
    "98.5% [98.0% to 99.0%]",
    "70.0% [70.0% to 70.0%]",
    "on the Pareto front of quality against bytes in 1 of 2 cases (data set and "
    "level); significantly best of its level in 1 of the 1 where all methods "
    "have several seeds",
    "55.0% [50.0% to 60.0%] of dense's parameters train, on average; "
    "0.93 [0.80 to 1.05] times the time; "
    "0.80 [0.50 to 1.10] times the steps to half the loss; "
    "1.07 [0.95 to 1.20] times the tokens a second",
  ]


def test_what_did_not_hold_is_told(text):
  # TREC holds: within a point, on the front, faster, and better at 30%.
  assert _section(text, "What did not hold").splitlines() == [
    "- text, 70%: +8.0% to dense (one seed, so no test); not on the Pareto "
    "front of quality against bytes, behind magnitude at 70%; 1.05 times "
    "dense's time; 1.10 times dense's steps to half the loss",
    "- text, 30%: +1.0% to dense (one seed, so no test)",
    "- W_Q, W_K and W_V are 98.5% [98.0% to 99.0%] smaller, not 99%",
  ]


def _without(rows, **fields):
  """Returns the rows that do not have these values."""
  return [
    row
    for row in rows
    if any(getattr(row, name) != value for name, value in fields.items())
  ]


def test_nothing_failed_is_not_nothing_measured(rows):
  trec = [row for row in rows if row.dataset == "trec"]
  held = "No quality, size or time, on these data sets."
  assert held in page.page(tables.Results(trec), "f", "c")
  for method in ("ours", "dense"):
    text = page.page(tables.Results(_without(trec, method=method)), "f", "c")
    assert "Nothing was compared with dense at 20 to 40% or at about" in text
    assert held not in text
    assert text.count("not measured") == (6 if method == "ours" else 0)


def test_a_worse_mean_has_its_p(rows):
  worse = [
    row
    if (row.method, row.level) != ("ours", 0.7) or row.quality is None
    else gather.Row(**{**vars(row), "quality": row.quality - 0.1})
    for row in rows
  ]
  found = page.did_not_hold(tables.Results(worse))
  p = scipy.stats.ttest_ind([0.796, 0.798], [0.9, 0.902], equal_var=False)
  expected = f"-10.4 points to dense (p = {p.pvalue:.2g} by Welch's t-test)"
  assert found[0].startswith(f"trec, 70%: {expected}")


def test_the_page_tells_where_its_figures_come_from(text):
  assert "Written by `folding study given.py` from [study.csv]" in text
  assert "15 of 17 runs are finished" in text
  assert "Version 0.1.0, commit abc, on cpu; seeds 0, 1" in text
  # The sum of the column.
  assert "32 min 58 s of training, in which what several runs start" in text
  failed = _section(text, "Runs that failed")
  assert failed.strip() == "- `text--magnitude--30--s0`: `the disk is full`"
  assert "`2-of-4`: half" in _section(text, "Methods")


def test_the_page_tells_how_much_the_choice_of_examples_makes(rows):
  few = [gather.Row(**{**vars(row), "examples": 1000}) for row in rows]
  text = page.page(tables.Results(few), "f", "c")
  # Wilson, of 901 right ones.
  low, high = scipy.stats.binomtest(901, 1000).proportion_ci(method="wilson")
  half = 100 * (high - low) / 2
  assert f"1,000 examples, whose choice alone makes ± {half:.1f} points" in text


def test_a_study_without_a_finished_run_has_a_page(rows, tmp_path):
  waiting = [
    gather.Row(r.dataset, r.method, r.about, r.level, r.seed, "open")
    for r in rows
  ]
  page.publish(waiting, str(tmp_path / "page.md"), "c")
  assert "0 of 17 runs are finished" in (tmp_path / "page.md").read_text()


def test_everything_is_published_side_by_side(rows, tmp_path):
  page.publish(rows, str(tmp_path / "page.md"), "folding study given.py")
  text = (tmp_path / "page.md").read_text()
  links = re.findall(r"\]\((\S+)\)", text)
  assert len(links) == 5
  for link in links:
    assert (tmp_path / link).stat().st_size > 0
  for figure in (tmp_path / "page").glob("*.png"):
    assert figure.read_bytes().startswith(b"\x89PNG")
  assert gather.read_csv(str(tmp_path / "page" / "study.csv")) == rows
  values = json.loads((tmp_path / "page" / "study.json").read_text())
  assert [gather.Row(**value) for value in values] == rows
  again = tmp_path / "again"
  again.mkdir()
  page.publish(rows, str(again / "page.md"), "folding study given.py")
  for file in (tmp_path / "page").iterdir():
    assert (again / "page" / file.name).read_bytes() == file.read_bytes()


def _lines(axes, colour):
  """Returns the points of each line of a colour, rising."""
  return sorted(
    list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    for line in axes.get_lines()
    if colors.to_hex(line.get_color()).upper() == colour
  )


def test_quality_is_drawn_over_compression(results):
  figure = drawings.quality(results)
  trec, text = figure.axes
  (ours,) = _lines(trec, plots.BLUE)
  expected = [(30.1, 90.5), (70.0, statistics.fmean([89.6, 89.8]))]
  np.testing.assert_allclose(ours, expected)
  assert not trec.yaxis_inverted()
  assert text.yaxis_inverted()  # so that up is better
  labels = [t.get_text() for t in figure.legends[0].get_texts()]
  assert labels == ["ours", "magnitude", "2-of-4"]


def test_means_are_of_all_data_sets_that_have_a_figure_of_a_kind(rows):
  def row(dataset, method, level, seed, value, compression=None):
    metric = (
      "accuracy" if dataset in ("trec", "mr", "sst2") else "bits_per_byte"
    )
    given = next(r for r in rows if r.metric == metric)
    changed = {"dataset": dataset, "method": method, "level": level}
    changed |= {"seed": seed, "quality": value, "compression": compression}
    if metric == "bits_per_byte":
      changed |= {"perplexity": 10 * value}
    return gather.Row(**{**vars(given), **changed})

  given = [row("trec", "dense", None, seed, 0.9) for seed in (0, 1)]
  given += [row("mr", "dense", None, 0, 0.8), row("mr", "dense", None, 1, 0.7)]
  given += [row("text", "dense", None, 0, 2.0)]
  for name, loss in (("ours", 0.01), ("other", 0.03)):
    given += [row("trec", name, 0.3, 0, 0.9 - loss, 0.3)]
    given += [row("mr", name, 0.3, 1, 0.7 - 3 * loss, 0.32)]  # its seed's 0.7
    given += [row("text", name, 0.3, 0, 2.0 + loss, 0.31)]
  given += [row("trec", "ours", 0.7, 0, 0.5, 0.7)]  # MR is not finished
  given += [row("sst2", "ours", 0.7, 0, 0.5, 0.7)]  # and has no dense run
  figure = drawings.means(tables.Results(given))
  classifiers, text = figure.axes
  for axes, y in ((classifiers, (-2.0, -6.0)), (text, (0.5, 1.5))):
    assert axes.yaxis_inverted() == (axes is text)
    found = [
      (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
      for line in axes.get_lines()
      if line.get_marker() in ("*", "o")
    ]
    np.testing.assert_allclose(found, [(31, y[0]), (31, y[1])], atol=1e-9)
    assert [t.get_text() for t in axes.texts] == ["other", "ours"]  # rising


def test_names_of_means_are_written_apart(rows):
  given = next(r for r in rows if r.metric == "accuracy" and r.level == 0.7)
  pairs = [("dense", None, 0.9)]
  pairs += [(f"m{n}", 0.7, 0.8 + n * 1e-4) for n in range(20)]
  pairs += [("ours", 0.7, 0.8005)]
  found = tables.Results(
    [
      gather.Row(
        **{**vars(given), "method": m, "level": at, "quality": q, "seed": 0}
      )
      for m, at, q in pairs
    ]
  )
  figure = drawings.means(found)
  figure.draw_without_rendering()
  (axes,) = figure.axes
  assert len(axes.texts) == 21
  boxes = [Text.get_window_extent(text) for text in axes.texts]  # no arrows
  inside = axes.get_window_extent()
  for n, box in enumerate(boxes):
    assert inside.y0 - 10 < box.y0 and box.y1 < inside.y1 + 10
    assert not any(box.overlaps(other) for other in boxes[:n])


def test_what_was_measured_is_in_sight(results):
  for figure in (
    drawings.means(results),
    drawings.quality(results),
    drawings.front(results, "bytes"),
  ):
    for axes in figure.axes:
      low, high = sorted(axes.get_ylim())
      for line in axes.get_lines():
        y = np.asarray(line.get_ydata(), float)
        assert ((low <= y) & (y <= high)).all()
  for axes in drawings.front(results, "seconds").axes:  # whole markers
    slowest = max(max(line.get_xdata()) for line in axes.get_lines())
    assert axes.get_xlim() == pytest.approx((0, 1.05 * slowest))


def test_what_is_far_worse_is_named_and_presses_nothing_together(rows):
  (given,) = [
    row
    for row in rows
    if (row.dataset, row.method, row.level, row.seed)
    == ("trec", "ours", 0.7, 0)
  ]
  others = [
    gather.Row(**{**vars(given), "method": f"m{n}", "quality": 0.8 + n / 1000})
    for n in range(20)
  ]
  far = gather.Row(**{**vars(given), "method": "lost", "quality": 0.45})
  results = tables.Results([*others, far])
  for figure in (drawings.quality(results), drawings.front(results, "bytes")):
    (axes,) = figure.axes
    assert axes.get_ylim() == pytest.approx((79.848, 82.052))
    assert [t.get_text() for t in axes.texts] == ["lost 45.0%"]


def test_levels_of_one_percent_are_told_apart(rows):
  def row(method, level, seed, quality, size):
    given = next(r for r in rows if r.dataset == "trec" and r.level == 0.7)
    changed = {"method": method, "level": level, "seed": seed}
    changed |= {"quality": quality, "bytes": size}
    return gather.Row(**{**vars(given), **changed})

  given = [row("dense", None, seed, 0.91, 1000) for seed in range(3)]
  given += [row("ours", 0.7, seed, 0.885, 300) for seed in range(3)]
  given += [row("magnitude", 0.7, 0, 0.903, 290)]
  given += [row("magnitude", 0.695, 0, 0.805, 305)]  # dominates nothing
  results = tables.Results(given)
  assert page.did_not_hold(results) == [
    "trec, 70%: -2.5 points to dense (no spread over seeds, so no test); not on "
    "the Pareto front of quality against bytes, behind magnitude at 70%"
  ]
  cells = cells_of(tables.quality_table(results, "trec"))
  assert cells[""] == ["69.5%", "70%", "one size"]


@pytest.mark.parametrize(
  ("cost", "on_front"),
  [
    # (cost, quality): ours at 70% is the smallest, and at 30% the best.
    ("bytes", {(300, 89.7), (701, 90.5)}),
    ("seconds", {(84, 89.7), (90, 90.5)}),
  ],
)
def test_points_of_the_front_are_filled(results, cost, on_front):
  trec = drawings.front(results, cost).axes[0]
  filled, total = set(), 0
  for line in trec.get_lines():
    if line.get_marker() in (None, "None", "none", ""):
      continue  # the steps
    total += 1
    if line.get_markerfacecolor() != "none":
      x, y = line.get_xdata()[0], line.get_ydata()[0]
      filled.add((round(float(x), 6), round(float(y), 6)))
  assert total == 6
  assert filled == on_front


def test_a_method_looks_the_same_in_all_figures(results):
  looks = []
  for figure in (drawings.quality(results), drawings.front(results, "bytes")):
    legend = figure.legends[0]
    names = [t.get_text() for t in legend.get_texts()]
    looks.append(
      {
        name: (line.get_color(), line.get_marker())
        for name, line in zip(names, legend.get_lines(), strict=True)
        if name != "dense"
      }
    )
  assert looks[0] == looks[1]
  assert len(set(looks[0].values())) == len(looks[0])
