"""Charts: panels of lines labelled at their ends, heat maps and bars. Matplotlib is optional."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.labels import spread
from foldserve.loadtest.report.svg import Mark, as_svg
from foldserve.loadtest.report.theme import INK, MUTED, SERIES, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = len(SERIES)
"""Most lines in a panel, without grey reference lines."""

_PANEL_PT = (352.0, 262.0)
_TOP, _BOTTOM, _GAP, _SIDE = 21.0, 31.0, 12.0, 8.0
"""Margins in points: title and unit; tick labels and axis name; before line labels; at the edges."""
_BAR_PT = 22.0
"""Height of a bar and the name above it."""
_BARS_UP_TO = 3
"""Most lines of a panel whose intervals are drawn; those of more lines show in tooltips only."""
_MOST_BEYOND = 1.4
"""Where the axis cuts off long intervals, relative to the largest value."""
_MARKERS = "osD^vP"
_NAME_WIDTH = 12
"""Most letters in a line of a label."""
_FIXED = "\N{NO-BREAK SPACE}"
LineStyle = str | tuple[int, tuple[float, ...]]
_GREY_STYLES: tuple[LineStyle, ...] = ("-", (0, (1.2, 1.6)))


@dataclass(frozen=True, slots=True)
class ChartPoint:
    """A point; `about` is for its tooltip."""

    x: float
    estimate: Estimate
    about: str = ""

    @classmethod
    def exact(cls, x: float, value: float, about: str = "") -> ChartPoint:
        """A point without an interval."""
        return cls(x, Estimate(value, value, value), about)


@dataclass(frozen=True, slots=True)
class ChartLine:
    """One line.

    Attributes:
        name: label at its end, or "".
        colour: index into the palette; None: a reference, in grey.
        is_dashed: predicted instead of measured; without marks.
    """

    name: str
    points: Sequence[ChartPoint]
    colour: int | None = None
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal reference line with its interval."""

    name: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes, with a vertical line at x = `at`."""

    title: str
    lines: Sequence[ChartLine]
    levels: Sequence[Level] = ()
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a panel.

    Attributes:
        scale: factor on the values shown.
        digits: decimal places in tooltips.
        low, high: ends of the axis; None: from the values.
        falls: values decrease from left to right.
    """

    name: str
    scale: float = 1
    digits: int = 2
    low: float | None = None
    high: float | None = None
    falls: bool = False
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class DrawnChart:
    """A figure and its tooltips."""

    figure: Figure
    marks: tuple[Mark, ...] = ()

    def svg(self, *, alone: bool = True) -> str:
        return as_svg(self.figure, self.marks, alone=alone)


class PanelPainter(ABC):
    """Draws one panel into a figure."""

    @property
    def height(self) -> float:
        """Height of the panel in points."""
        return _PANEL_PT[1]

    @abstractmethod
    def margins(self, width: Callable[[str], float]) -> tuple[float, float]:
        """(left, right) margin of the plot in points; `width` measures a text."""

    @abstractmethod
    def paint(self, axes: Axes, right: float) -> list[Mark]:
        """Draws the panel with `right` points free at the right of the axes; returns its tooltips."""


@dataclass(frozen=True, slots=True)
class Chart:
    """The answer to one question, in one or more panels.

    Attributes:
        stem: file name without suffix.
        title: the question.
        note: how to read the chart.
        columns: panels per row in the file.
    """

    stem: str
    title: str
    panels: Sequence[PanelPainter]
    note: str = ""
    columns: int = 3

    def figures(self) -> list[DrawnChart]:
        """One figure per panel, for a page to lay out."""
        return [_compose([panel], 1) for panel in self.panels]

    def whole(self) -> DrawnChart:
        """All panels in one figure."""
        return _compose(self.panels, self.columns)

    def write(self, folder: Path) -> None:
        (folder / f"{self.stem}.svg").write_text(self.whole().svg())


def join_charts(charts: Sequence[Chart], columns: int) -> DrawnChart:
    """All panels of several charts in one figure."""
    return _compose([panel for chart in charts for panel in chart.panels], columns)


def line_chart(
    stem: str,
    title: str,
    panels: Sequence[Panel],
    x: Axis,
    y: Axis,
    *,
    note: str = "",
    columns: int = 3,
    same_scale: bool = True,
) -> Chart:
    """Lines in one or several panels; with `same_scale`, these have equal vertical axes."""
    if same_scale:
        y = _common(panels, y)
    return Chart(stem, title, [_LinePanel(panel, x, y) for panel in panels], note, columns)


def heat_map(
    stem: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[tuple[str, float, str] | None]],
    x_name: str,
    *,
    unit: str = "",
    note: str = "",
    panel: str = "",
) -> Chart:
    """A table of shaded cells.

    Args:
        cells: for each row and column (text, shade from 0 to 1, tooltip).
        panel: title of the panel.
    """
    return Chart(stem, title, [_HeatPanel(panel, rows, columns, cells, x_name, unit)], note)


def bars(stem: str, title: str, values: Sequence[tuple[str, float]], x_name: str, *, note: str = "") -> Chart:
    """Horizontal bars, the first at the top."""
    return Chart(stem, title, [_BarPanel(values, x_name)], note)


def write(drawn: DrawnChart, file: Path, dpi: int = 150) -> None:
    """The suffix of `file` chooses the format; `dpi` is for bitmaps."""
    if file.suffix == ".svg":
        file.write_text(drawn.svg())
    else:
        with style():
            drawn.figure.savefig(file, dpi=dpi)


@dataclass(frozen=True, slots=True)
class _LinePanel(PanelPainter):
    panel: Panel
    x: Axis
    y: Axis

    def margins(self, width: Callable[[str], float]) -> tuple[float, float]:
        names = [line.name for line in self.panel.lines] + [level.name for level in self.panel.levels]
        names = [_broken(name) for name in names if name]
        longest = max((width(part) for name in names for part in name.split("\n")), default=0.0)
        return 30.0, (longest + _GAP if names else 0) + _SIDE

    def paint(self, axes: Axes, right: float) -> list[Mark]:
        _set_scales(axes, self.panel, self.x, self.y)
        axes.grid(axis="y")
        axes.set_xlabel(self.x.name, loc="left")
        _head(axes, self.panel.title, self.y.name, right - _SIDE)
        marks: list[Mark] = []
        for level in self.panel.levels:
            marks += self._level(axes, level)
        if self.panel.at is not None:
            axes.axvline(self.panel.at, color=INK, linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
        with_bars = _has_bars(self.panel)
        greys = iter(_GREY_STYLES * len(self.panel.lines))
        for line in self.panel.lines:
            self._line(axes, line, with_bars, "-" if line.colour is not None else next(greys))
            marks += [self._mark(axes, line.name, point) for point in line.points if not line.is_dashed]
        self._names(axes)
        return marks

    def _line(self, axes: Axes, line: ChartLine, with_bars: bool, linestyle: LineStyle) -> None:
        colour = MUTED if line.colour is None else SERIES[line.colour]
        x, y = [point.x for point in line.points], [self._scaled_y(point.estimate.value) for point in line.points]
        if line.is_dashed:
            axes.plot(x, y, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
            return
        is_reference = line.colour is None
        if with_bars and not is_reference:
            low, high = ([self._scaled_y(end(point)) for point in line.points] for end in (_low, _high))
            axes.vlines(x, low, high, color=colour, linewidth=1, alpha=0.55, zorder=3)
        axes.plot(
            x,
            y,
            color=colour,
            linewidth=1.1 if is_reference else 1.6,
            linestyle=linestyle,
            marker="" if is_reference else _MARKERS[(line.colour or 0) % len(_MARKERS)],
            markersize=3.6,
            zorder=2 if is_reference else 4,
        )

    def _level(self, axes: Axes, level: Level) -> list[Mark]:
        estimate = level.estimate
        axes.axhspan(
            self._scaled_y(estimate.low), self._scaled_y(estimate.high), color=MUTED, alpha=0.15, linewidth=0, zorder=1
        )
        axes.axhline(self._scaled_y(estimate.value), color=MUTED, linewidth=1, zorder=2)
        return [self._mark(axes, level.name, ChartPoint(x, estimate)) for x in axes.get_xlim()]

    def _last_seen(self, axes: Axes, points: Sequence[ChartPoint]) -> ChartPoint:
        """The rightmost point within the axes, or the rightmost of all if none is."""
        low, high = axes.get_ylim()
        inside = [point for point in points if low <= self._scaled_y(point.estimate.value) <= high]
        return min(inside or points, key=lambda point: abs(point.x - axes.get_xlim()[1]))

    def _mark(self, axes: Axes, name: str, point: ChartPoint) -> Mark:
        estimate = point.estimate
        shown = estimate.show(self.y.digits, self.y.scale)
        if estimate.low == estimate.high:  # it has no interval
            shown = shown.partition(" [")[0]
        about = ", ".join(filter(None, [name, point.about]))
        return Mark(axes, point.x, self._scaled_y(point.estimate.value), f"{about}: {shown}")

    def _scaled_y(self, value: float) -> float:
        """The value as drawn: a logarithmic axis can't show 0."""
        scaled = value * self.y.scale
        return max(scaled, axis_low) if self.y.is_log and (axis_low := self.y.low or 0) else scaled

    def _names(self, axes: Axes) -> None:
        """Writes labels at the right of the plot, each with a thin line to the end of its own line."""
        ends: list[tuple[str, str, float, float]] = []
        right = axes.get_xlim()[1]
        for line in self.panel.lines:
            if line.name and line.points:
                last = self._last_seen(axes, line.points)
                colour = MUTED if line.colour is None else SERIES[line.colour]
                ends.append((line.name, colour, last.x, self._scaled_y(last.estimate.value)))
        ends += [(level.name, MUTED, right, self._scaled_y(level.estimate.value)) for level in self.panel.levels]
        if not ends:
            return
        box = axes.get_window_extent()
        tips = [axes.transData.transform((x, y)) for *_, x, y in ends]
        heights = [10.0 * len(_broken(name).split("\n")) + 1 for name, *_ in ends]
        centres = spread([float(tip[1]) for tip in tips], heights, box.y0 - 6, box.y1 + 6)
        for (name, colour, x, y), centre in zip(ends, centres, strict=True):
            axes.annotate(
                _broken(name),
                (x, y),
                (box.x1 + _GAP, centre),
                textcoords="figure points",
                color=colour,
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "relpos": (0, 0.5)}
                | {"shrinkA": 1, "shrinkB": 2},
                linespacing=1.0,
            )


@dataclass(frozen=True, slots=True)
class _HeatPanel(PanelPainter):
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[tuple[str, float, str] | None]]
    x_name: str
    unit: str

    def margins(self, width: Callable[[str], float]) -> tuple[float, float]:
        return max(map(width, self.rows)) + 12, _SIDE

    def paint(self, axes: Axes, right: float) -> list[Mark]:
        from matplotlib.patches import Rectangle

        axes.set_xlim(0, len(self.columns))
        axes.set_ylim(len(self.rows), 0)
        marks = []
        for row, cells in enumerate(self.cells):
            for column, cell in enumerate(cells):
                if cell is None:
                    continue
                text, shade, about = cell
                if shade:
                    alpha = 0.12 + 0.63 * shade
                    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=SERIES[1], alpha=alpha, linewidth=0))
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", zorder=3)
                marks.append(Mark(axes, column + 0.5, row + 0.5, about))
        axes.set_xticks([i + 0.5 for i in range(len(self.columns))], self.columns)
        axes.set_yticks([i + 0.5 for i in range(len(self.rows))], self.rows)
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel(self.x_name, loc="left")
        _head(axes, self.title, self.unit, 0)
        return marks


@dataclass(frozen=True, slots=True)
class _BarPanel(PanelPainter):
    values: Sequence[tuple[str, float]]
    x_name: str

    @property
    def height(self) -> float:
        return max(_PANEL_PT[1] / 2, _BAR_PT * len(self.values) + _TOP + _BOTTOM)

    def margins(self, width: Callable[[str], float]) -> tuple[float, float]:
        return 20.0, 20.0  # half a number at either end

    def paint(self, axes: Axes, right: float) -> list[Mark]:
        lengths = [length for _, length in self.values]
        axes.barh(range(len(lengths)), lengths, height=0.32, color=SERIES[0])
        for i, (name, _) in enumerate(self.values):
            axes.annotate(name, (0, i - 0.24), (2, 0), textcoords="offset points", va="baseline")
        axes.set_yticks([])
        axes.set_ylim(len(lengths) - 0.5, -0.9)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x")
        axes.set_xlabel(self.x_name, loc="left")
        return [Mark(axes, length, i, f"{name}: {length:.3g}") for i, (name, length) in enumerate(self.values)]


def _compose(paints: Sequence[PanelPainter], columns: int) -> DrawnChart:
    from matplotlib.figure import Figure

    columns = min(columns, len(paints))
    rows = [paints[start : start + columns] for start in range(0, len(paints), columns)]
    heights = [max(paint.height for paint in row) for row in rows]
    wide, high = _PANEL_PT[0] * columns, sum(heights)
    marks: list[Mark] = []
    with style():
        figure = Figure(figsize=(wide / 72, high / 72))
        width = _measure(figure)
        top = high
        for row, height in zip(rows, heights, strict=True):
            for column, paint in enumerate(row):
                left, right = paint.margins(width)
                x0, y0 = column * _PANEL_PT[0] + left, top - height + _BOTTOM
                size = (_PANEL_PT[0] - left - right) / wide, (height - _TOP - _BOTTOM) / high
                axes = figure.add_axes((x0 / wide, y0 / high, *size))
                marks += paint.paint(axes, right)
                _make_room(axes, column * _PANEL_PT[0])
            top -= height
    return DrawnChart(figure, tuple(marks))


def _make_room(axes: Axes, start: float) -> None:
    """Moves the left end of the plot to the right if its tick labels are wide; `start` is the panel's left edge."""
    low, high = sorted(axes.get_ylim())
    shown = [
        label
        for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
        if low <= place <= high and label.get_text()
    ]
    figure = axes.figure
    missing = start + 2 - min((label.get_window_extent().x0 for label in shown), default=start + 2)
    if missing > 0:
        box, by = axes.get_position(), missing / figure.bbox.width
        axes.set_position((box.x0 + by, box.y0, box.width - by, box.height))


def _measure(figure: Figure) -> Callable[[str], float]:
    def width(text: str) -> float:
        shown = figure.text(0, 0, text)
        found: float = shown.get_window_extent().width
        shown.remove()
        return found

    return width


def _head(axes: Axes, title: str, unit: str, end: float) -> None:
    """Writes the title above the plot's left end, and the unit `end` points from its right end."""
    above = 10.0
    shown = axes.annotate(unit, (1, 1), (end, above), "axes fraction", "offset points", color=MUTED, ha="right")
    head = axes.annotate(title, (0, 1), (-20, above), "axes fraction", "offset points", weight="bold", fontsize=9.5)
    room = shown.get_window_extent().x0 - _GAP
    while title and head.get_window_extent().x1 > room:
        title = title[:-1]
        head.set_text(f"{title}…")


def _common(panels: Sequence[Panel], y: Axis) -> Axis:
    """An axis that fits all panels."""
    values = [value * y.scale for panel in panels for value in _values(panel)]
    low = min(values) if y.low is None else y.low
    return replace(y, low=low, high=max(values) if y.high is None else y.high)


def _has_bars(panel: Panel) -> bool:
    return sum(line.colour is not None and not line.is_dashed for line in panel.lines) <= _BARS_UP_TO


def _values(panel: Panel) -> list[float]:
    """All values to fit on the axis; long intervals are cut off so that the values stay readable."""
    points = [(line, point.estimate) for line in panel.lines for point in line.points]
    found = [estimate.value for _, estimate in points] + [level.estimate.value for level in panel.levels]
    shown = [estimate for line, estimate in points if line.colour is not None and _has_bars(panel)]
    shown += [level.estimate for level in panel.levels]
    low, high = min(found, default=0), _MOST_BEYOND * max(found, default=0)
    return found + [end for each in shown for end in (each.low, min(each.high, high)) if end >= low / _MOST_BEYOND]


def _set_scales(axes: Axes, panel: Panel, x: Axis, y: Axis) -> None:
    xs = [point.x for line in panel.lines for point in line.points]
    low, high = min(xs) if x.low is None else x.low, max(xs) if x.high is None else x.high
    if low == high:  # a single x, as when only ratio 0 was measured
        axes.set_xticks([low])
    room = 0.03 * (high - low) or 0.5
    axes.set_xlim((high + room, low - room) if x.falls else (low - room, high + room))
    values = [value * y.scale for value in _values(panel)]
    bottom, top = min(values) if y.low is None else y.low, max(values) if y.high is None else y.high
    if y.is_log:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom * 0.8, top * 1.4)
    else:
        room = 0.04 * (top - bottom) or 0.5
        axes.set_ylim(bottom - (room if bottom else 0), top + room)


def _broken(name: str) -> str:
    """Wraps a label for a narrow column."""
    lines: list[str] = []
    for word in name.replace("+ ", f"+{_FIXED}").split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= _NAME_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines).replace(_FIXED, " ")


def _low(point: ChartPoint) -> float:
    return point.estimate.low


def _high(point: ChartPoint) -> float:
    return point.estimate.high
