"""Figures, tables and the picture of what both engines took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from foldserve.loadtest.micro.openvino.engines import Contender
from foldserve.loadtest.micro.openvino.runs import Run
from foldserve.loadtest.micro.pairs import ratio
from foldserve.loadtest.report.charts import Axis, Chart, Line, Panel, Point, line_chart
from foldserve.loadtest.report.estimates import Estimate, estimate
from foldserve.loadtest.report.tables import NONE, Table

_MIB = 1 << 20
_HEADINGS = ("ratio", "engine", "method", "requests/s", "to OpenVINO's own", "TTFT p50, ms", "KV in use, MiB")
_LINES = (("foldserve", "folder"), ("foldserve", "folder + withdraw"), ("openvino", "pruning_ratio"))


@dataclass(slots=True)
class Cell:
    """A contender under a load, measured once a round."""

    contender: Contender
    concurrency: int
    runs: list[Run] = field(default_factory=list)

    def figure(self, read: Callable[[Run], float]) -> Estimate:
        """Median over the rounds."""
        return estimate([read(run) for run in self.runs], lambda values: np.median(values, axis=-1))


def tables(cells: Sequence[Cell]) -> list[Table]:
    """One per concurrency."""
    levels = dict.fromkeys(cell.concurrency for cell in cells)
    return [
        Table(f"{level} at once", _HEADINGS, [_line(cell, cells) for cell in cells if cell.concurrency == level], 3)
        for level in levels
    ]


def charts(cells: Sequence[Cell]) -> list[Chart]:
    """Requests/s and TTFT against the ratio, a panel per concurrency."""
    return [
        _chart(
            "throughput",
            "How many requests a second?",
            cells,
            lambda run: run.requests_per_s,
            Axis("requests/s", low=0),
        ),
        _chart("ttft", "How long until the first token?", cells, _ttft_ms, Axis("TTFT p50, ms", digits=0, low=0)),
    ]


def _chart(stem: str, title: str, cells: Sequence[Cell], read: Callable[[Run], float], y: Axis) -> Chart:
    levels = dict.fromkeys(cell.concurrency for cell in cells)
    panels = [
        Panel(f"{level} at once", _curves([cell for cell in cells if cell.concurrency == level], read))
        for level in levels
    ]
    return line_chart(
        stem, title, panels, Axis("share of the image's tokens that goes"), y, columns=2, same_scale=False
    )


def _curves(cells: Sequence[Cell], read: Callable[[Run], float]) -> list[Line]:
    return [
        Line(
            f"{'OpenVINO GenAI' if engine == 'openvino' else engine}: {name}",
            [
                Point(cell.contender.ratio, cell.figure(read), f"ratio {cell.contender.ratio:g}")
                for cell in cells
                if cell.contender.engine == engine and cell.contender.name in (name, "none")
            ],
            colour,
        )
        for colour, (engine, name) in enumerate(_LINES)
    ]


def _line(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    contender = cell.contender
    theirs = next(
        other
        for other in cells
        if (other.concurrency, other.contender.ratio) == (cell.concurrency, contender.ratio)
        and other.contender.name in ("none", "pruning_ratio")
        and other.contender.engine == "openvino"
    )
    pairs = [(a.requests_per_s, b.requests_per_s) for a, b in zip(cell.runs, theirs.runs, strict=True)]
    return [
        f"{contender.ratio:g}",
        "OpenVINO" if contender.engine == "openvino" else "ours",
        contender.name,
        cell.figure(lambda run: run.requests_per_s).show(),
        NONE if cell is theirs else ratio(pairs).show(),
        cell.figure(_ttft_ms).show(0),
        f"{max(run.kv_bytes for run in cell.runs) / _MIB:.0f}",
    ]


def _ttft_ms(run: Run) -> float:
    return 1e3 * float(np.median(run.ttft_s))
