"""Two GPU checks on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.side_by_side import Measure, Pair, differences, settings
from foldserve.loadtest.report.tables import NONE, Table
from foldserve.server.quality.gpu_check.page import charts, details
from foldserve.server.quality.gpu_check.result import CheckResults

_FIGURES = {
    "requests_per_s": Measure("requests/s", as_ratio=True),
    "ttft_ms": Measure("TTFT, ms", digits=1, as_ratio=True),
    "itl_ms": Measure("ITL, ms", as_ratio=True),
    "sequences": Measure("sequences in KV", digits=0, as_ratio=True),
}
_NOTE = "Medians of one run each: they have no intervals."


def write(checks: Mapping[str, CheckResults], folder: Path) -> None:
    """Writes index.html and the charts as SVG for two checks, by the names that the page gives them."""
    drawn = charts(checks)
    for chart in drawn:
        chart.write(folder)
    first, second = checks.values()
    tables = filter(None, [_load(checks), settings(first.facts, second.facts, [*checks])])
    lead = ", ".join(f"{name}: {results.verdict()}" for name, results in checks.items())
    title = f"GPU checks: {' beside '.join(checks)}"
    html = page(title, lead=lead, facts={}, first=[_stages(checks)], charts=drawn, tables=tables)
    (folder / "index.html").write_text(html)


def _stages(checks: Mapping[str, CheckResults]) -> Table:
    stages = dict.fromkeys(stage.stage for results in checks.values() for stage in results.stages)
    cells = [[stage, *(_result(results, stage) for results in checks.values())] for stage in stages]
    return Table("Stages", ["stage", *checks], cells, labels=3, is_prose=True)


def _result(results: CheckResults, stage: str) -> str:
    return next((f"{each.status}: {each.line}" for each in results.stages if each.stage == stage), NONE)


def _load(checks: Mapping[str, CheckResults]) -> Table | None:
    first, second = (details(results, "load").get("rows") or [] for results in checks.values())
    if not first or not second:
        return None
    return differences(["engine", "ratio"], [*_FIGURES.values()], _rows(first, second), [*checks], _NOTE)


def _rows(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Sequence[str], Sequence[Pair]]]:
    for row in first:
        other = next((o for o in second if (o["engine"], o["ratio"]) == (row["engine"], row["ratio"])), None)
        if other is not None:
            pairs = [(_exact(row[name]), _exact(other[name])) for name in _FIGURES]
            yield (row["engine"], f"{row['ratio']:g}"), pairs


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value)
