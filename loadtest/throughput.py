"""The report as a self-contained HTML page, charts, CSV, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldserve.loadtest.plots import charts
from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.report.charts import Chart
from foldserve.loadtest.report.charts import write as write_chart
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.page import page
from foldserve.loadtest.summary import PointSummary
from foldserve.loadtest.tables import as_csv, tables

_NOTE = (
    "Every figure stands with its 95 % interval: a bootstrap that draws rounds, and requests within rounds; both "
    "sides of a ratio are drawn with the same rounds. With few rounds the intervals are rough, and where both ends "
    "are equal there was one value or no spread at all. Requests/s counts answered requests. ITL is the time "
    "between two parts of an answer; TTFT and E2E are seen by the client. Times that the server tells, CPU time and "
    "preemptions are per request. The KV cache is looked at every second: what a request has of it is blocks in use / "
    "running requests, told only where requests decode for longer than they prefill, and how many a full one holds is "
    "seen only while it is full and many wait. 'FLOPs allow' and 'KV allows' (the dashed lines) are what the "
    "arithmetic says for this model's tower, projector and decoder, against ratio 0: a limit for work that is bound by "
    "FLOPs, which decoding of few requests is not. For TTFT the line is ratio 0 divided by it."
)


@dataclass(frozen=True, slots=True)
class LoadTestReport:
    """Results and settings of a load test; `accuracy` is from `foldserve evaluate`, or empty."""

    title: str
    settings: Mapping[str, str]
    rows: Sequence[PointSummary]
    accuracy: Sequence[Accuracy]


REPORT_FILE = "report.json"


def write(report: LoadTestReport, folder: Path) -> None:
    """Writes index.html, report.md, report.json, report.csv, and every chart as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = charts({"": report.rows}, report.accuracy)
    for chart in drawn:
        chart.write(folder)
        write_chart(chart.whole(), folder / f"{chart.stem}.png")
    (folder / "index.html").write_text(_page(report, drawn))
    (folder / "report.md").write_text(_markdown(report))
    (folder / "report.csv").write_text(as_csv(report.rows))
    fields: dict[str, Any] = {"title": report.title, "settings": dict(report.settings)}
    fields |= {"rows": [row.to_json() for row in report.rows], "accuracy": [asdict(each) for each in report.accuracy]}
    (folder / REPORT_FILE).write_text(json.dumps(fields, indent=1) + "\n")


def read(folder: Path) -> LoadTestReport:
    """Reads report.json; ValueError if it is not from `write`."""
    file = folder / REPORT_FILE
    try:
        fields = json.loads(file.read_text())
        return LoadTestReport(
            title=fields["title"],
            settings=fields["settings"],
            rows=[PointSummary.from_json(row) for row in fields["rows"]],
            accuracy=[Accuracy(**each | {"share": Estimate(**each["share"])}) for each in fields["accuracy"]],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no report of `foldserve loadtest`: {error!r}") from error


def _page(report: LoadTestReport, drawn: Sequence[Chart]) -> str:
    shown = tables(report.rows, note=_NOTE)
    return page(f"Load test of {report.title}", lead=_lead(report), facts=report.settings, charts=drawn, tables=shown)


def _lead(report: LoadTestReport) -> str:
    """Gain, machine and date; reports of earlier versions have no date."""
    gain = _gain(report.rows)
    about = [report.settings[name] for name in ("machine", "date") if name in report.settings]
    return ". ".join([*([gain] if gain else []), *about])


def _gain(rows: Sequence[PointSummary]) -> str:
    """The largest gain of a reduction; "" if nothing was reduced."""
    gains = [(row.to_ratio_0["requests_per_s"], row) for row in rows if row.variant.method and row.to_ratio_0]
    if not gains:
        return ""
    most, row = max(gains, key=lambda gain: gain[0].value)
    return f"Up to {most.show()} times the requests/s of ratio 0: {row.variant.label}, {row.load}"


def _markdown(report: LoadTestReport) -> str:
    settings = "\n".join(f"- {name}: {value}" for name, value in report.settings.items())
    parts = [f"# Load test of {report.title}", settings]
    for table in tables(report.rows, note=_NOTE):
        parts += [f"## {table.title}", table.markdown()]
    return "\n\n".join([*parts, _NOTE]) + "\n"
