"""Figures, tables and charts of both engines.

`python -m foldserve.loadtest.micro.openvino.report RESULTS PICTURE` draws saved results again.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from foldserve.loadtest.micro.openvino.engines import Contender
from foldserve.loadtest.micro.openvino.runs import LoadRun
from foldserve.loadtest.micro.pairs import Ratio, ratio
from foldserve.loadtest.report.charts import Axis, Chart, ChartLine, ChartPoint, Panel, join_charts, line_chart, write
from foldserve.loadtest.report.estimates import Estimate, estimate
from foldserve.loadtest.report.tables import NONE, Table

_MIB = 1 << 20
_HEADINGS = ("ratio", "engine", "method", "requests/s", "to OpenVINO's own", "TTFT p50, ms", "KV in use, MiB")
_LINES = (("foldserve", "folder"), ("foldserve", "folder + withdraw"), ("openvino", "pruning_ratio"))


@dataclass(slots=True)
class Cell:
    """A contender at a concurrency, with one run per round."""

    contender: Contender
    concurrency: int
    runs: list[LoadRun] = field(default_factory=list)

    def figure(self, read: Callable[[LoadRun], float]) -> Estimate:
        """Median over the rounds."""
        return estimate([read(run) for run in self.runs], lambda values: np.median(values, axis=-1))


@dataclass(frozen=True, slots=True)
class ContenderResult:
    """Figures of a contender at a concurrency.

    Attributes:
        to_openvino: requests/s relative to OpenVINO's own method at the same ratio; None for that method itself.
    """

    engine: str
    method: str
    ratio: float
    concurrency: int
    requests_per_s: Estimate
    to_openvino: Ratio | None
    ttft_ms: Estimate
    kv_mib: float


def results(cells: Sequence[Cell]) -> list[ContenderResult]:
    return [_result(cell, cells) for cell in cells]


def read_results(file: Path) -> list[ContenderResult]:
    """Reads a file that `--json` wrote."""
    return TypeAdapter(list[ContenderResult]).validate_python(json.loads(file.read_text())["results"])


def tables(results: Sequence[ContenderResult]) -> list[Table]:
    """One table per concurrency."""
    return [
        Table(f"{level} at once", _HEADINGS, [_cells(each) for each in results if each.concurrency == level], 3)
        for level in _levels(results)
    ]


def charts(results: Sequence[ContenderResult]) -> list[Chart]:
    """Requests/s and TTFT against the ratio, one panel per concurrency."""
    return [
        _chart(
            "throughput",
            "How many requests a second?",
            results,
            lambda result: result.requests_per_s,
            Axis("requests/s", low=0),
        ),
        _chart(
            "ttft",
            "How long until the first token?",
            results,
            lambda result: result.ttft_ms,
            Axis("TTFT p50, ms", digits=0, low=0),
        ),
    ]


def draw(results: Sequence[ContenderResult], picture: Path) -> None:
    write(join_charts(charts(results), 2), picture)


def _levels(results: Sequence[ContenderResult]) -> list[int]:
    return list(dict.fromkeys(result.concurrency for result in results))


def _chart(
    stem: str, title: str, results: Sequence[ContenderResult], read: Callable[[ContenderResult], Estimate], y: Axis
) -> Chart:
    panels = [
        Panel(f"{level} at once", _curves([each for each in results if each.concurrency == level], read))
        for level in _levels(results)
    ]
    return line_chart(
        stem, title, panels, Axis("share of the image's tokens that goes"), y, columns=2, same_scale=False
    )


def _curves(results: Sequence[ContenderResult], read: Callable[[ContenderResult], Estimate]) -> list[ChartLine]:
    return [
        ChartLine(
            f"{'OpenVINO GenAI' if engine == 'openvino' else engine}: {method}",
            [
                ChartPoint(result.ratio, read(result), f"ratio {result.ratio:g}")
                for result in results
                if result.engine == engine and result.method in (method, "none")
            ],
            colour,
        )
        for colour, (engine, method) in enumerate(_LINES)
    ]


def _result(cell: Cell, cells: Sequence[Cell]) -> ContenderResult:
    contender = cell.contender
    theirs = next(
        other
        for other in cells
        if (other.concurrency, other.contender.ratio) == (cell.concurrency, contender.ratio)
        and other.contender.name in ("none", "pruning_ratio")
        and other.contender.engine == "openvino"
    )
    pairs = [(a.requests_per_s, b.requests_per_s) for a, b in zip(cell.runs, theirs.runs, strict=True)]
    return ContenderResult(
        contender.engine,
        contender.name,
        contender.ratio,
        cell.concurrency,
        requests_per_s=cell.figure(lambda run: run.requests_per_s),
        to_openvino=None if cell is theirs else ratio(pairs),
        ttft_ms=cell.figure(lambda run: 1e3 * float(np.median(run.ttft_s))),
        kv_mib=max(run.kv_bytes for run in cell.runs) / _MIB,
    )


def _cells(result: ContenderResult) -> list[str]:
    return [
        f"{result.ratio:g}",
        "OpenVINO" if result.engine == "openvino" else "ours",
        result.method,
        result.requests_per_s.show(),
        NONE if result.to_openvino is None else result.to_openvino.show(),
        result.ttft_ms.show(0),
        f"{result.kv_mib:.0f}",
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="what --json wrote")
    parser.add_argument("picture", type=Path, metavar="PICTURE")
    args = parser.parse_args()
    draw(read_results(args.results), args.picture)


if __name__ == "__main__":
    main()
