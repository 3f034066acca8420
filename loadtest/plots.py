"""The charts of a load test, or of two side by side: a panel per load, a line per family of variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.report.charts import MOST_LINES, Axis, Chart, ChartLine, ChartPoint, Level, Panel, line_chart
from foldserve.loadtest.summary import PointSummary

_FULL = "ratio 0"
_DASHED = "Dashed: what the arithmetic allows, from what was measured at ratio 0."


@dataclass(frozen=True, slots=True)
class _Question:
    """A chart of one figure against the ratio.

    Attributes:
        stem: file name without suffix.
        title: the question that the chart answers.
        figure: key of `PointSummary.figures`.
        limit: predicted factor on the value at ratio 0.
        same_scale: whether the panels of all loads share an axis.
    """

    stem: str
    title: str
    figure: str
    y: Axis
    limit: Callable[[PointSummary], float | None]
    same_scale: bool = True
    note: str = ""


def _predicted(name: str) -> Callable[[PointSummary], float | None]:
    return lambda row: row.limit.get(name)


_QUESTIONS = (
    _Question(
        "throughput",
        "How many requests a second?",
        "requests_per_s",
        Axis("requests/s", low=0),
        _predicted("requests_per_s"),
    ),
    _Question(
        "ttft",
        "How long until the first token?",
        "ttft_s_p50",
        Axis("TTFT p50, s", low=0),
        lambda row: 1 / row.limit["requests_per_s"] if "requests_per_s" in row.limit else None,
        same_scale=False,
        note="Each load has a scale of its own.",
    ),
    _Question(
        "kv",
        "How much of the KV cache does a request hold?",
        "kv_share",
        Axis("% of the KV cache", scale=100, digits=3, low=0),
        _predicted("kv_share"),
        note="Blocks in use over running requests.",
    ),
    _Question(
        "resident",
        "How many requests does a full KV cache hold?",
        "resident_when_full",
        Axis("running requests", digits=1, low=0),
        _predicted("resident_when_full"),
        note="Seen while 90 % of its blocks or more were in use, and at least a fifth as many requests waited as ran.",
    ),
)


def charts(reports: Mapping[str, Sequence[PointSummary]], accuracy: Sequence[Accuracy] = ()) -> list[Chart]:
    """Charts in reading order, without panels of what was not measured.

    `reports` are keyed by the name for their panels, "" if there is only one.
    """
    chosen, left_out = _families([row for rows in reports.values() for row in rows])
    found = [_chart(question, reports, chosen, left_out) for question in _QUESTIONS]
    found.insert(1, _trade_off(reports, chosen, accuracy))
    return [chart for chart in found if chart is not None]


def _families(rows: Sequence[PointSummary]) -> tuple[list[str], list[str]]:
    """(families to draw, which are the fastest, other families)."""
    gains: dict[str, list[float]] = {}
    for row in rows:
        family = row.variant.family
        if row.variant.server == "foldserve" and family != _FULL and "requests_per_s" in row.to_ratio_0:
            gains.setdefault(family, []).append(row.to_ratio_0["requests_per_s"].value)
    if any(family.endswith("+ withdraw") for family in gains):
        gains.pop("withdraw", None)  # it is the first point of those lines
    best = sorted(gains, key=lambda family: fmean(gains[family]), reverse=True)[:MOST_LINES]
    return [family for family in gains if family in best], [family for family in gains if family not in best]


def _chart(
    question: _Question, reports: Mapping[str, Sequence[PointSummary]], families: Sequence[str], left_out: Sequence[str]
) -> Chart | None:
    panels: list[Panel] = []
    for load, under in _by_load(reports):
        found = [
            _panel(question, ", ".join(filter(None, [load, name])), rows, families) for name, rows in under.items()
        ]
        if None not in found:  # else there is nothing to compare
            panels += filter(None, found)
    if not panels:
        return None
    most = max(point.x for panel in panels for line in panel.lines for point in line.points)
    notes = [_DASHED] if any(line.is_dashed for panel in panels for line in panel.lines) else []
    notes += filter(None, [question.note])
    if left_out:
        notes.append(f"Not drawn, since others are faster: {', '.join(left_out)}.")
    return line_chart(
        question.stem,
        question.title,
        panels,
        Axis("reduction ratio", low=0, high=most),
        question.y,
        note=" ".join(notes),
        columns=3 if len(reports) == 1 else len(reports),
        same_scale=question.same_scale,
    )


def _by_load(reports: Mapping[str, Sequence[PointSummary]]) -> Iterator[tuple[str, dict[str, list[PointSummary]]]]:
    """(load, its rows by report) for the loads that all reports have."""
    for load in dict.fromkeys(str(row.load) for rows in reports.values() for row in rows):
        under = {name: [row for row in rows if str(row.load) == load] for name, rows in reports.items()}
        if all(any(row.variant.family == _FULL for row in own) for own in under.values()):
            yield load, under


def _panel(question: _Question, title: str, rows: Sequence[PointSummary], families: Sequence[str]) -> Panel | None:
    lines: list[ChartLine] = []
    for colour, family in enumerate(families):
        curve = [row for row in _curve(rows, family) if question.figure in row.figures]
        if any(row.variant.family == family for row in curve):
            points = [
                ChartPoint(r.variant.ratio, r.figures[question.figure], f"ratio {r.variant.ratio:g}") for r in curve
            ]
            lines += [ChartLine(family, points, colour), *_limit_line(question, curve, rows, colour)]
    full = next(row for row in rows if row.variant.family == _FULL)
    if not families and question.figure in full.figures:
        lines.append(ChartLine(_FULL, [ChartPoint(0.0, full.figures[question.figure])], 0))
    if not lines:
        return None
    levels = [
        Level("plain vLLM", row.figures[question.figure])
        for row in rows
        if row.variant.server == "vllm" and question.figure in row.figures
    ]
    return Panel(title, lines, levels)


def _curve(rows: Sequence[PointSummary], family: str) -> list[PointSummary]:
    """Rows of a family by ratio, after ratio 0 or, for a joined withdrawal, after withdrawal alone."""
    start = "withdraw" if family.endswith("+ withdraw") else family
    own = sorted(
        (row for row in rows if row.variant.family in (family, start) and row.variant.server == "foldserve"),
        key=lambda row: row.variant.ratio,
    )
    if own and own[0].variant.ratio == 0:
        return own
    return [*(row for row in rows if row.variant.family == _FULL), *own]


def _limit_line(
    question: _Question, curve: Sequence[PointSummary], rows: Sequence[PointSummary], colour: int
) -> list[ChartLine]:
    full = next(row for row in rows if row.variant.family == _FULL)
    base = full.figures.get(question.figure)
    limits = [(row.variant.ratio, factor) for row in curve if (factor := question.limit(row)) is not None]
    if base is None or len(limits) < 2:
        return []
    points = [ChartPoint.exact(ratio, base.value * factor) for ratio, factor in limits]
    return [ChartLine("", points, colour, is_dashed=True)]


def _trade_off(
    reports: Mapping[str, Sequence[PointSummary]], families: Sequence[str], accuracy: Sequence[Accuracy]
) -> Chart | None:
    """Right answers against speed, at the last load."""
    panels = []
    for name, rows in reports.items():
        last = [row for row in rows if row.load == rows[-1].load]
        lines = []
        for colour, family in enumerate(families):
            shares = {each.ratio: each.share for each in accuracy if each.family == family}
            points = [
                ChartPoint(
                    row.to_ratio_0["requests_per_s"].value, shares[row.variant.ratio], f"ratio {row.variant.ratio:g}"
                )
                for row in _curve(last, family)
                if row.variant.ratio in shares and "requests_per_s" in row.to_ratio_0
            ]
            if len(points) > 1:
                lines.append(ChartLine(family, points, colour))
        if lines:
            panels.append(Panel(", ".join(filter(None, [str(rows[-1].load), name])), lines))
    if not panels:
        return None
    return line_chart(
        "accuracy",
        "What does speed cost in right answers?",
        panels,
        Axis("requests/s, times those at ratio 0", low=1),
        Axis("right answers, %", scale=100, digits=1, high=100),
        note="Right answers of the quality card; a point is a ratio, from 0 on.",
        columns=max(1, len(reports)),
    )
