"""Figures, tables and the picture of what both engines took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foldserve.loadtest.micro.openvino.engines import Contender
from foldserve.loadtest.micro.openvino.runs import Run
from foldserve.loadtest.micro.pairs import ratio
from foldserve.loadtest.report.charts import draw_estimates, style
from foldserve.loadtest.report.estimates import Estimate, estimate
from foldserve.loadtest.report.tables import NONE, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 1 << 20
_HEADINGS = ("ratio", "engine", "method", "requests/s", "to OpenVINO's own", "TTFT p50, ms", "KV in use, MiB")
_LINES = {
    ("foldserve", "folder"): "#2563eb",
    ("foldserve", "folder + withdraw"): "#059669",
    ("openvino", "pruning_ratio"): "#d97706",
}


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


def draw(cells: Sequence[Cell]) -> Figure:
    """Requests/s and TTFT against the ratio, a column per concurrency."""
    from matplotlib.figure import Figure

    levels = list(dict.fromkeys(cell.concurrency for cell in cells))
    with style():
        figure = Figure(figsize=(4.6 * len(levels) + 0.6, 6.4), layout="constrained")
        panels = figure.subplots(2, len(levels), squeeze=False)
        for column, level in enumerate(levels):
            own = [cell for cell in cells if cell.concurrency == level]
            _panel(panels[0][column], own, lambda run: run.requests_per_s, "requests/s")
            _panel(panels[1][column], own, _ttft_ms, "time to first token, ms")
            panels[0][column].set_title(f"{level} at once")
        panels[0][0].legend(frameon=False, loc="lower right")
    return figure


def _panel(axes: Axes, cells: Sequence[Cell], read: Callable[[Run], float], unit: str) -> None:
    for (engine, name), colour in _LINES.items():
        own = [cell for cell in cells if cell.contender.engine == engine and cell.contender.name in (name, "none")]
        points = [(cell.contender.ratio, cell.figure(read)) for cell in own]
        label = f"{'OpenVINO GenAI' if engine == 'openvino' else engine}: {name}"
        draw_estimates(axes, points, label=label, color=colour, marker="o", markersize=4, capsize=2.5)
    axes.set_ylabel(unit)
    axes.set_xlabel("share of the image's tokens that goes")
    axes.set_ylim(bottom=0)
    axes.grid()


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
