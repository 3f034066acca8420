"""The report in all its forms: one HTML page that needs nothing else, pictures, CSV, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldserve.loadtest.plots import draw
from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.report import charts
from foldserve.loadtest.report.page import page
from foldserve.loadtest.summary import Row
from foldserve.loadtest.tables import as_csv, tables

_NOTE = (
    "Every figure stands with its 95 % interval: a bootstrap that draws rounds, and requests within rounds; both "
    "sides of a ratio are drawn with the same rounds. With few rounds the intervals are rough, and where both ends "
    "are equal there was one value or no spread at all. Requests/s counts answered requests. ITL is the time "
    "between two parts of an answer; TTFT and E2E are seen by the client. Times that the server tells, CPU time and "
    "preemptions are per request; resident is running requests / share of KV blocks in use, looked at every second. "
    "'FLOPs allow' and 'KV allows' (the dashed lines) are what the arithmetic says for this model's tower, "
    "projector and decoder, against ratio 0: a limit for work that is bound by FLOPs, which decoding of few "
    "requests is not. For TTFT the line is ratio 0 divided by it."
)

_PNG_DPI = 130


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and how.

    Attributes:
        settings: name -> value, to be shown.
        rows: one per point.
        accuracy: of `foldserve evaluate`, or nothing.
    """

    title: str
    settings: Mapping[str, str]
    rows: Sequence[Row]
    accuracy: Sequence[Accuracy]


def write(report: Report, folder: Path) -> None:
    """Writes index.html, report.md, report.json, report.csv, and every chart as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    svgs = []
    for stem, chart in draw(report.rows, report.accuracy).items():
        svgs.append(charts.as_svg(chart))
        (folder / f"{stem}.svg").write_text(svgs[-1])
        charts.write(chart, folder / f"{stem}.png", dpi=_PNG_DPI)
    (folder / "index.html").write_text(_page(report, svgs))
    (folder / "report.md").write_text(_markdown(report))
    (folder / "report.csv").write_text(as_csv(report.rows))
    fields: dict[str, Any] = {"title": report.title, "settings": dict(report.settings)}
    fields |= {"rows": [row.to_json() for row in report.rows], "accuracy": [asdict(each) for each in report.accuracy]}
    (folder / "report.json").write_text(json.dumps(fields, indent=1) + "\n")


def _page(report: Report, svgs: Sequence[str]) -> str:
    shown = tables(report.rows, note=_NOTE)
    return page(f"Throughput of {report.title}", facts=report.settings, charts=svgs, tables=shown)


def _markdown(report: Report) -> str:
    """The same tables for a README."""
    settings = "\n".join(f"- {name}: {value}" for name, value in report.settings.items())
    parts = [f"# Throughput of {report.title}", settings]
    for table in tables(report.rows, note=_NOTE):
        parts += [f"## {table.title}", table.markdown()]
    return "\n\n".join([*parts, _NOTE]) + "\n"
