"""Charts and pages of all reports: that they can be read, and that they say what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from foldserve.loadtest.micro.openvino.engines import Contender
from foldserve.loadtest.micro.openvino.report import Cell, read_results, results
from foldserve.loadtest.micro.openvino.report import charts as openvino_charts
from foldserve.loadtest.micro.openvino.runs import LoadRun
from foldserve.loadtest.plots import charts
from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.report.charts import Axis, ChartLine, ChartPoint, DrawnChart, Panel, bars, heat_map, line_chart
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.labels import spread
from foldserve.loadtest.report.side_by_side import difference, ratio
from foldserve.loadtest.report.theme import SERIES
from foldserve.loadtest.summary import PointSummary
from tests.loadtest.made_up import about, rows
from tests.loadtest.readable import check, unreadable

BENCHMARKS = Path(__file__).parents[2] / "docs/explanation/benchmarks"
METHODS = ("folder", "folder_cls", "tome", "turbo", "prumerge", "pool", "visionzip", "illava_decoder")


@pytest.mark.parametrize("methods", [("folder",), METHODS], ids=["one method", "eight"])
def test_a_load_test_can_be_read(methods: Sequence[str]) -> None:
    accuracy = [Accuracy(method, r, about(1 - r / 3)) for method in methods for r in (0, 0.25, 0.5, 0.9)]
    found = {chart.stem: chart for chart in charts({"": rows(methods)}, accuracy)}
    assert list(found) == ["throughput", "accuracy", "ttft", "kv", "resident"]
    for chart in found.values():
        check(chart)
    assert [len(chart.panels) for chart in found.values()] == [3, 1, 3, 1, 1]
    left_out = re.search(r"Not drawn, since others are faster: (.*)\.", found["throughput"].note)
    assert (left_out is not None) == (len(methods) > 1)
    if left_out:
        assert left_out[1] == "folder, folder_cls, tome"


def test_a_load_test_of_ratio_0_and_two_side_by_side_can_be_read() -> None:
    for chart in charts({"": rows((), ratios=())}):
        check(chart)
        assert "\N{MINUS SIGN}0" not in chart.whole().svg()  # no negative ratios
    both = {"results-2026-11-29-of": rows(METHODS), "results-2026-11-30-of": rows(METHODS, (8, 64, 256))}
    found = charts(both)
    for chart in found:
        check(chart)
    assert [(chart.stem, len(chart.panels)) for chart in found] == [("throughput", 4), ("ttft", 4)]


def test_what_was_not_measured_is_not_drawn() -> None:
    """An empty panel would be read as nothing."""
    found = {chart.stem: chart for chart in charts({"": rows(("folder",), (1, 64))})}
    assert len(found["throughput"].panels) == 2 and len(found["resident"].panels) == 1
    bare = [row for row in rows(("folder",), (1,)) if row.load.concurrency == 1]
    assert [chart.stem for chart in charts({"": [replace_figures(row) for row in bare]})] == ["throughput"]


def replace_figures(row: PointSummary) -> PointSummary:
    figures = {"requests_per_s": row.figures["requests_per_s"]}
    return PointSummary(row.variant, row.load, 1, 1, 0, figures, row.to_ratio_0, {}, {})


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_any_size_of_numbers_fits(scale: float) -> None:
    points = [ChartPoint(x, about(scale * (1 + x))) for x in (0.0, 0.5, 0.9)]
    check(line_chart("any", "Any?", [Panel("Panel", [ChartLine("a method", points, 0)])], Axis("x"), Axis("y", low=0)))


def test_names_of_lines_that_end_at_the_same_place_do_not_touch() -> None:
    lines = [ChartLine(f"method_{i} K=4", [ChartPoint(0, about(1)), ChartPoint(1, about(1))], i) for i in range(6)]
    lines += [ChartLine(name, [ChartPoint(0, about(1)), ChartPoint(1, about(1))]) for name in ("random", "downsample")]
    for low in (0.0, 1.0):
        check(line_chart("ends", "?", [Panel("All alike", lines)], Axis("x"), Axis("y", low=low)))


def test_maps_and_bars_can_be_read() -> None:
    cells = [[(f"{100 - i * j}", i * j / 100, "") for j in range(7)] for i in range(14)]
    check(heat_map("map", "?", [f"kind of {i}" for i in range(14)], [f"0.{j}" for j in range(7)], cells, "ratio"))
    errors = [(f"folder+withdraw, two images {i}", 1e-4 * i) for i in range(26)]
    check(bars("bars", "?", errors, "nats"))


def test_engines_beside_each_other_can_be_read() -> None:
    names = [("foldserve", "folder"), ("foldserve", "folder + withdraw"), ("openvino", "pruning_ratio")]
    contenders = [Contender(e, n if r else "none", r, 784) for e, n in names for r in (0.0, 0.5)]
    cells = [Cell(c, n, [LoadRun(2 + i, (0.1,), 0)]) for n in (1, 8) for i, c in enumerate(dict.fromkeys(contenders))]
    for chart in openvino_charts(results(cells)):
        check(chart)
    for chart in openvino_charts(read_results(BENCHMARKS / "openvino-cpu.json")):
        check(chart)


def test_the_panel_in_the_readme_is_the_last_of_its_page() -> None:
    whole, last = ((BENCHMARKS / f"serving-cpu{part}.svg").read_text() for part in ("", "-64"))
    cut = whole.replace('width="1056pt"', 'width="352pt"').replace('viewBox="0 0 1056 262"', 'viewBox="704 0 352 262"')
    assert last == cut != whole


def test_the_check_sees_what_is_wrong() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.add_axes((0.1, 0.2, 0.4, 0.4))
    axes.text(0.5, 0.5, "one text")
    axes.text(0.52, 0.5, "another")
    axes.text(0.9, -2, "below the edge")
    found = " ".join(unreadable(DrawnChart(figure)))
    assert "'one text' and 'another' overlap" in found
    assert "'below the edge' is cut off" in found
    assert "the plots have 0.16" in found


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 10)), min_size=1, max_size=9))
def test_labels_are_spread_without_overlap(labels: list[tuple[float, float]]) -> None:
    wanted, heights = zip(*labels, strict=True)
    centres = spread(wanted, heights, 0, 100)
    ends = sorted((centre - h / 2, centre + h / 2) for centre, h in zip(centres, heights, strict=True))
    assert ends[0][0] >= -1e-9 and ends[-1][1] <= 100 + 1e-9
    assert all(next_[0] >= end[1] - 1e-9 for end, next_ in pairwise(ends))
    in_order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert [centres[i] for i in in_order] == sorted(centres)


def test_labels_stay_where_there_is_room() -> None:
    assert spread([10, 50], [4, 4], 0, 100) == [10, 50]
    assert spread([50, 50], [4, 4], 0, 100) == [48, 52]
    with pytest.raises(ValueError, match="do not fit"):
        spread([1, 2], [60, 60], 0, 100)


def test_an_svg_follows_the_theme_and_tells_its_values() -> None:
    line = ChartLine(
        "folder <b>", [ChartPoint(0.0, Estimate(1, 0.9, 1.1), "ratio 0"), ChartPoint(0.5, Estimate(2, 1.8, 2.2))], 0
    )
    other = ChartLine("tome", [ChartPoint(0.5, Estimate(2.001, 2, 2.1))], 1)
    chart = line_chart("x", "?", [Panel("P", [line, other])], Axis("x"), Axis("y", low=0))
    (drawn,) = chart.figures()
    alone, inline = drawn.svg(), drawn.svg(alone=False)
    assert alone == chart.figures()[0].svg()  # the same every time
    for svg in (alone, inline):
        root = ElementTree.fromstring(svg)
        titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
        assert titles == [
            "folder <b>, ratio 0: 1.00 [0.90, 1.10]",
            "folder <b>: 2.00 [1.80, 2.20]\ntome: 2.00 [2.00, 2.10]",
        ]
    assert "var(--series-1)" in inline and not set(SERIES) & set(re.findall(r"#[0-9a-f]{6}", inline))
    assert "prefers-color-scheme:dark" in alone and "prefers-color-scheme" not in inline
    ids = re.findall(r' id="([^"]+)"', inline)
    assert all(f"#{name}" in inline for name in ids)


def test_differences_have_the_intervals_of_both() -> None:
    """Newcombe 1998, table II, example (a): 56/70 and 48/80, method 10."""
    first, second = Estimate(48 / 80, 0.4906, 0.7005), Estimate(56 / 70, 0.6918, 0.8769)  # Wilson's
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-4)
    turned = difference(second, first)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    twice = ratio(Estimate(1, 0.9, 1.1), Estimate(2, 1.8, 2.2))
    assert twice is not None and twice.value == pytest.approx(2) and 1.7 < twice.low < 1.8 < 2.2 < twice.high < 2.4
    assert ratio(Estimate(0, 0, 0), Estimate(1, 1, 1)) is None


def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says() -> None:
    random, hits = np.random.default_rng(0), 0
    for _ in range(400):
        sides = [random.normal(mean, 0.2 * mean, 40) for mean in (1.0, 3.0)]
        both = [
            Estimate(s.mean(), s.mean() - 1.96 * e, s.mean() + 1.96 * e) for s in sides for e in [s.std() / 40**0.5]
        ]
        found = ratio(*both)
        assert found is not None
        hits += found.low <= 3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98
