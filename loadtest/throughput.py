"""The report in all its forms: one HTML page that needs nothing else, pictures, CSV, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldserve.loadtest import tables
from foldserve.loadtest.plots import as_svg, draw
from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.summary import Row

NOTES = (
    "Every figure stands with its 95 % interval: a bootstrap that draws rounds, and requests within rounds; both "
    "sides of a ratio are drawn with the same rounds. With few rounds the intervals are rough, and where both ends "
    "are equal there was one value or no spread at all. Requests/s counts answered requests. ITL is the time "
    "between two parts of an answer; TTFT and E2E are seen by the client. Times that the server tells, CPU time and "
    "preemptions are per request; resident is running requests / share of KV blocks in use, looked at every second. "
    "'FLOPs allow' and 'KV allows' (the dashed lines) are what the arithmetic says for this model's tower, "
    "projector and decoder, against ratio 0: a limit for work that is bound by FLOPs, which decoding of few "
    "requests is not. For TTFT the line is ratio 0 divided by it."
)

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Throughput of {{ report.title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap }
th { background: #f9fafb } tr:hover td { background: #f3f4f6 }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; font-size: 13px }
dt { color: #6b7280 } dd { margin: 0 } svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 }
.notes { font-size: 13px; color: #4b5563; max-width: 60rem }
</style></head><body>
<h1>Throughput of {{ report.title }}</h1>
<dl>{% for name, value in report.settings.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for svg in pictures %}<figure>{{ svg | safe }}</figure>
{% endfor %}{% for title, headings, cells in tables %}<h2>{{ title }}</h2>
<div class="scroll"><table><tr>{% for name in headings %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in cells %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}<p class="notes">{{ notes }}</p>
</body></html>
"""


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
    """Writes index.html, report.md, report.json, report.csv, and every picture as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    svgs = []
    for stem, figure in draw(report.rows, report.accuracy).items():
        svgs.append(as_svg(figure))
        (folder / f"{stem}.svg").write_text(svgs[-1])
        figure.savefig(folder / f"{stem}.png", dpi=130)
    (folder / "index.html").write_text(page(report, svgs))
    (folder / "report.md").write_text(as_markdown(report))
    (folder / "report.csv").write_text(tables.as_csv(report.rows))
    fields: dict[str, Any] = {"title": report.title, "settings": dict(report.settings)}
    fields |= {"rows": [row.to_json() for row in report.rows], "accuracy": [asdict(each) for each in report.accuracy]}
    (folder / "report.json").write_text(json.dumps(fields, indent=1) + "\n")


def page(report: Report, svgs: Sequence[str]) -> str:
    """The page, with the pictures in it."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    bare = [svg[svg.index("<svg") :] for svg in svgs]  # without the XML head
    return template.render(report=report, pictures=bare, tables=_tables(report), notes=NOTES)


def as_markdown(report: Report) -> str:
    """The same tables for a README."""
    parts = [f"# Throughput of {report.title}\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in report.settings.items()) + "\n")
    parts += [f"## {title}\n\n{tables.markdown(headings, cells)}" for title, headings, cells in _tables(report)]
    return "\n".join([*parts, NOTES]) + "\n"


def _tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    return [
        ("Throughput and latency", tables.MAIN, tables.main_cells(report.rows)),
        ("What the client saw", tables.CLIENT, tables.client_cells(report.rows)),
        ("What the server tells, per request", tables.SERVER, tables.server_cells(report.rows)),
    ]
