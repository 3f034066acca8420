"""The results as a page in Markdown, with plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldserve.loadtest.report.tables import NONE, Table
from foldserve.server.quality.gpu_check.result import Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_FILE = "gpu-check.md"
_GIB = 2**30
_LOAD_HEADINGS = ["engine", "ratio", "prompt tokens", "requests/s", "TTFT ms", "ITL ms", "sequences in KV", "peak GiB"]


def write_page(results: Results, folder: Path) -> None:
    """Writes the page and its plots, which need matplotlib."""
    plots = dict(_plots(results)) if find_spec("matplotlib") else {}
    for stem, (_, svg) in plots.items():
        (folder / f"{stem}.svg").write_text(svg)
    (folder / PAGE_FILE).write_text(markdown(results, {stem: title for stem, (title, _) in plots.items()}))


def markdown(results: Results, plots: Mapping[str, str]) -> str:
    """Args:
    plots: file stem -> title.
    """
    parts = [f"# GPU check: {results.verdict()}"]
    if results.device == "cpu":
        parts.append("On a CPU: this tried the check itself, and says nothing about a GPU.")
    parts += [_stages(results).markdown(), f"## {_facts(results).title}", _facts(results).markdown()]
    if plots:
        parts.append("## Plots")
    for stem, title in plots.items():
        parts.append(f"![{title}]({stem}.svg)")
    for table in filter(None, (_load(results), _steps(results))):
        parts += [f"## {table.title}", table.markdown(), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def _facts(results: Results) -> Table:
    return Table("Machine", ["what", "value"], list(results.facts.items()), labels=2)


def _stages(results: Results) -> Table:
    rows = [[r.stage, r.status, f"{r.seconds:.0f}", r.shows, r.line] for r in results.stages]
    return Table("Stages", ["stage", "result", "seconds", "shows that", "found"], rows, labels=5)


def _load(results: Results) -> Table | None:
    found = _details(results, "load")
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


def _steps(results: Results) -> Table | None:
    details = _details(results, "graphs")
    cells = [[name, mode, str(count)] for name, found in details.items() for mode, count in found["steps"].items()]
    return Table("Steps by mode of CUDA graphs", ["engine", "mode", "steps"], cells, labels=2) if cells else None


def _plots(results: Results) -> Iterator[tuple[str, tuple[str, str]]]:
    """(file stem, (title, SVG))"""
    for stage, title in (
        ("reference", "Margins in fp32 against plain PyTorch"),
        ("smoke", "Margins in bf16 against plain PyTorch in fp32"),
    ):
        if errors := _details(results, stage).get("errors"):
            yield f"errors-{stage}", (title, _errors(errors, title))
    if rows := _details(results, "load").get("rows"):
        yield "load", ("Requests a second by reduction ratio", _rates(rows))


def _errors(errors: Mapping[str, float], title: str) -> str:
    def paint(axes: Axes) -> None:
        names = list(errors)[::-1]
        axes.barh(names, [errors[name] for name in names], height=0.6)
        axes.set_title(title)
        axes.set_xlabel("largest difference, nats")

    return _svg(paint, (8, 0.22 * len(errors) + 1))


def _rates(rows: Sequence[Mapping[str, Any]]) -> str:
    def paint(axes: Axes) -> None:
        for engine in dict.fromkeys(row["engine"] for row in rows):
            ratios, rates = zip(
                *((r["ratio"], r["requests_per_s"]) for r in rows if r["engine"] == engine), strict=True
            )
            if len(ratios) == 1:  # plain vLLM
                axes.axhline(rates[0], color="gray", linestyle="--", label=engine)
            else:
                axes.plot(ratios, rates, marker="o", label=engine)
        axes.set_title("Throughput")
        axes.set_xlabel("reduction ratio")
        axes.set_ylabel("requests/s")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _svg(paint, (7, 4))


def _svg(paint: Callable[[Axes], None], size_in: tuple[float, float]) -> str:
    from foldserve.loadtest.report.charts import as_svg, one_panel

    return as_svg(one_panel(paint, size_in))


def _details(results: Results, stage: str) -> Mapping[str, Any]:
    found: Result | None = next((result for result in results.stages if result.stage == stage), None)
    return {} if found is None else found.details
