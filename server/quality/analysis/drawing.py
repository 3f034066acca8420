"""The three studies as charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foldserve.loadtest.report.charts import MOST_LINES, Axis, Chart, ChartLine, ChartPoint, Panel, line_chart
from foldserve.loadtest.report.page import page
from foldserve.server.quality.analysis.report import Analysis

_PARTS = ("before the image", "image", "behind the image")


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes energy.svg, distance.svg, attention.svg and, with all of them, index.html."""
    found = charts(analysis)
    for chart in found:
        chart.write(folder)
    lead = f"Means over {analysis.samples} images of {analysis.tokens:.4g} vision tokens"
    (folder / "index.html").write_text(
        page(f"Analysis of {analysis.model}", lead=lead, facts={}, charts=found, tables=[])
    )
    return [*(folder / f"{chart.stem}.svg" for chart in found), folder / "index.html"]


def charts(analysis: Analysis) -> list[Chart]:
    return [_energy(analysis), _distance(analysis), _attention(analysis)]


def _energy(analysis: Analysis) -> Chart:
    lines = [
        ChartLine(f"ratio {ratio:g}", _points([row[column] for row in analysis.energy]), column % MOST_LINES)
        for column, ratio in enumerate(analysis.ratios)
    ]
    return line_chart(
        "energy",
        "How much of the tower's energy can fewer tokens hold?",
        [Panel("SVD energy", lines)],
        Axis("tower block"),
        Axis("share of the energy", digits=3, high=1),
    )


def _distance(analysis: Analysis) -> Chart:
    panel = Panel(f"Merging {analysis.merge_ratio:g} of the tokens", [ChartLine("", _points(analysis.distance), 0)])
    return line_chart(
        "distance",
        "In which tower block does merging change the output least?",
        [panel],
        Axis("tower block in which they are merged"),
        Axis("earth mover's distance, relative", digits=4, low=0),
    )


def _attention(analysis: Analysis) -> Chart:
    panels = [
        Panel(f"From {name}", [ChartLine(part, _points([r[i] for r in rows]), i) for i, part in enumerate(_PARTS)])
        for name, rows in (("the prompt's last token", analysis.attention_last), ("all text", analysis.attention_text))
    ]
    return line_chart(
        "attention",
        "How much attention does each decoder layer pay to the image?",
        panels,
        Axis("decoder layer"),
        Axis("share of the attention", low=0, high=1),
        columns=2,
    )


def _points(values: Sequence[float]) -> list[ChartPoint]:
    return [ChartPoint.exact(float(number), value, str(number)) for number, value in enumerate(values)]
