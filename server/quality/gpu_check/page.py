"""The results as a page, in HTML and in Markdown, with charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foldserve.loadtest.report.charts import Axis, Chart, ChartLine, ChartPoint, Level, Panel, bars, line_chart
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import NONE, Table
from foldserve.server.quality.gpu_check.result import CheckResults, StageResult

PAGE_FILE = "gpu-check.md"
_GIB = 2**30
_PLAIN = "plain vLLM"
_ON_CPU = "On a CPU: this tried the check itself, and says nothing about a GPU."
_LOAD_NOTE = "Medians; the weights are dummies."
_QUESTIONS = (
    ("load", "How many requests a second?", "requests_per_s", "requests/s"),
    ("ttft", "How long until the first token?", "ttft_ms", "TTFT of one request alone, ms"),
    ("sequences", "How many requests does the KV cache hold?", "sequences", "requests"),
)
"""(file stem, title, field of a row, unit)"""
_STAGES = (
    ("reference", "How far are margins in fp32 from plain PyTorch's?"),
    ("smoke", "How far are margins in bf16 from plain PyTorch's in fp32?"),
)
_LOAD_HEADINGS = ["engine", "ratio", "prompt tokens", "requests/s", "TTFT ms", "ITL ms", "sequences in KV", "peak GiB"]


def write_page(results: CheckResults, folder: Path) -> None:
    """Writes the page in both forms, and its charts if matplotlib is installed."""
    drawn = charts({"": results}) if find_spec("matplotlib") else []
    for chart in drawn:
        chart.write(folder)
    (folder / "index.html").write_text(html(results, drawn))
    (folder / PAGE_FILE).write_text(markdown(results, drawn))


def html(results: CheckResults, drawn: Sequence[Chart]) -> str:
    failed = [f"{result.stage} failed" for result in results.stages if result.status == "FAIL"]
    lead = ". ".join([results.verdict(), *failed, *([_ON_CPU] if results.device == "cpu" else [])])
    tables = filter(None, [_load(results), _tower(results), _steps(results)])
    return page("GPU check", lead=lead, facts=results.facts, first=[_stages(results)], charts=drawn, tables=tables)


def markdown(results: CheckResults, drawn: Sequence[Chart]) -> str:
    parts = [f"# GPU check: {results.verdict()}"]
    if results.device == "cpu":
        parts.append(_ON_CPU)
    parts += [_stages(results).markdown(), f"## {_facts(results).title}", _facts(results).markdown()]
    for chart in drawn:
        parts += [f"## {chart.title}", f"![{chart.title}]({chart.stem}.svg)", *filter(None, [chart.note])]
    for table in filter(None, (_load(results), _tower(results), _steps(results))):
        parts += [f"## {table.title}", table.markdown(), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def _facts(results: CheckResults) -> Table:
    return Table("Machine", ["what", "value"], list(results.facts.items()), labels=2)


def _stages(results: CheckResults) -> Table:
    rows = [[r.stage, r.status, f"{r.seconds:.0f}", r.shows, r.line] for r in results.stages]
    return Table("Stages", ["stage", "result", "seconds", "shows that", "found"], rows, labels=5, is_prose=True)


def _load(results: CheckResults) -> Table | None:
    found = details(results, "load")
    rows = found.get("rows")
    if not rows:
        return None
    cells = [
        [
            f"{row['engine']}, {row['runner']}",
            f"{row['ratio']:g}",
            str(row["prompt_tokens"]),
            f"{row['requests_per_s']:.2f}",
            f"{row['ttft_ms']:.1f}",
            f"{row['itl_ms']:.2f}",
            str(row["sequences"]),
            NONE if row["peak_bytes"] is None else f"{row['peak_bytes'] / _GIB:.1f}",
        ]
        for row in rows
    ]
    note = (
        f"{found['requests']} requests of {found['tokens']} tokens at once, then single ones; medians. All in one "
        "process: no HTTP. Weights are dummies, so answers mean nothing; every image is another one."
    )
    return Table("Load", _LOAD_HEADINGS, cells, note=note)


def _tower(results: CheckResults) -> Table | None:
    cells = [
        [name, str(row["images"]), f"{row['eager_ms']:.2f}", f"{row['graph_ms']:.2f}", f"{row['difference']:.1g}"]
        for name, found in details(results, "tower").items()
        for row in found["rows"]
    ]
    headings = ["model", "images", "ms without", "ms with graphs", "difference"]
    note = "Medians, from pixels on the device to embeddings; the difference is relative to the largest embedding."
    return Table("Vision tower with and without CUDA graphs", headings, cells, note=note) if cells else None


def _steps(results: CheckResults) -> Table | None:
    graphs = details(results, "graphs")
    cells = [[name, mode, str(count)] for name, found in graphs.items() for mode, count in found["steps"].items()]
    return Table("Steps by mode of CUDA graphs", ["engine", "mode", "steps"], cells, labels=2) if cells else None


def charts(checks: Mapping[str, CheckResults]) -> list[Chart]:
    """Charts of the results; `checks` are keyed by the name for their panels, "" if only one."""
    found = []
    for stem, title, field, unit in _QUESTIONS:
        panels = [
            Panel(name, _lines(rows, field), _levels(rows, field))
            for name, results in checks.items()
            if (rows := details(results, "load").get("rows"))
        ]
        if panels:
            y = Axis(unit, low=0)
            found.append(line_chart(stem, title, panels, Axis("reduction ratio"), y, note=_LOAD_NOTE, columns=2))
    for name, results in checks.items():
        for stage, title in _STAGES:
            if errors := details(results, stage).get("errors"):
                stem = "-".join(filter(None, ["errors", stage, name]))
                found.append(bars(stem, f"{title}{f', {name}' if name else ''}", [*errors.items()], "largest, nats"))
    return found


def _lines(rows: Sequence[Mapping[str, Any]], field: str) -> list[ChartLine]:
    """One line per engine, except plain vLLM."""
    engines = dict.fromkeys(row["engine"] for row in rows if row["engine"] != _PLAIN)
    return [
        ChartLine(
            engine,
            [ChartPoint.exact(r["ratio"], r[field], f"ratio {r['ratio']:g}") for r in rows if r["engine"] == engine],
            i,
        )
        for i, engine in enumerate(engines)
    ]


def _levels(rows: Sequence[Mapping[str, Any]], field: str) -> list[Level]:
    return [Level(_PLAIN, Estimate(*[row[field]] * 3)) for row in rows if row["engine"] == _PLAIN]


def details(results: CheckResults, stage: str) -> Mapping[str, Any]:
    """A stage's details; empty if it was not run."""
    found: StageResult | None = next((result for result in results.stages if result.stage == stage), None)
    return {} if found is None else found.details
