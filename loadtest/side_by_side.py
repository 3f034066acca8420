"""Two load tests on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from foldserve.loadtest.plots import charts
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.side_by_side import Measure, Pair, differences, settings
from foldserve.loadtest.report.tables import Table
from foldserve.loadtest.summary import PointSummary
from foldserve.loadtest.throughput import LoadTestReport

_FIGURES = {
    "requests_per_s": Measure("requests/s", digits=3, as_ratio=True),
    "ttft_s_p50": Measure("TTFT p50, s", digits=3, as_ratio=True),
    "e2e_s_p50": Measure("E2E p50, s", digits=3, as_ratio=True),
    "kv_share": Measure("KV of a request, %", digits=3, scale=100, as_ratio=True),
}


def write(reports: Mapping[str, LoadTestReport], folder: Path) -> None:
    """Writes index.html and the charts as SVG for two reports, by the names that the page gives them."""
    drawn = charts({name: report.rows for name, report in reports.items()})
    for chart in drawn:
        chart.write(folder)
    first, second = reports.values()
    tables = [table(reports), settings(first.settings, second.settings, [*reports])]
    title = f"Load tests: {' beside '.join(reports)}"
    lead = f"{first.title} and {second.title}"
    (folder / "index.html").write_text(page(title, lead=lead, facts={}, charts=drawn, tables=tables))


def table(reports: Mapping[str, LoadTestReport]) -> Table:
    """The results that both reports have."""
    return differences(["load", "variant"], [*_FIGURES.values()], _rows(*reports.values()), [*reports])


def _rows(first: LoadTestReport, second: LoadTestReport) -> Iterator[tuple[Sequence[str], Sequence[Pair]]]:
    others = {_names(row): row for row in second.rows}
    for row in first.rows:
        if other := others.get(_names(row)):
            yield _names(row), [(row.figures.get(name), other.figures.get(name)) for name in _FIGURES]


def _names(row: PointSummary) -> tuple[str, str]:
    return str(row.load), row.variant.label
