"""Checks that a chart's texts can be read, by their extents in Matplotlib's figure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import ceil

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from foldserve.loadtest.report.charts import Chart, DrawnChart

LEAST_PLOT = 0.5
"""Share of a figure that the plots have."""
_TOUCH_PT = 0.5


def check(chart: Chart) -> None:
    """All panels in one figure, where they are as they are alone."""
    columns = min(chart.columns, len(chart.panels))
    used = len(chart.panels) / columns / ceil(len(chart.panels) / columns)  # the last row may have room for more
    problems = [*unreadable(chart.whole(), used)]
    assert not problems, f"{chart.stem}: {problems}"


def unreadable(drawn: DrawnChart, used: float = 1) -> Iterator[str]:
    """What is cut off, what covers what, and plots that are squeezed.

    Args:
        used: share of the figure that panels have.
    """
    figure = drawn.figure
    figure.draw_without_rendering()
    whole = figure.bbox
    boxes = [(axes, text, extent(text)) for axes in figure.axes for text in texts(axes)]
    for _, text, box in boxes:
        if box.x0 < whole.x0 or box.y0 < whole.y0 or box.x1 > whole.x1 or box.y1 > whole.y1:
            yield f"{text.get_text()!r} is cut off: {box.extents} of {whole.extents}"
    for (_, one, box), (_, other, its) in combinations(boxes, 2):
        across = min(box.x1, its.x1) - max(box.x0, its.x0)
        along = min(box.y1, its.y1) - max(box.y0, its.y0)
        if across > _TOUCH_PT and along > _TOUCH_PT:
            yield f"{one.get_text()!r} and {other.get_text()!r} overlap by {across:.1f} x {along:.1f}"
    plots = sum(axes.get_position().width * axes.get_position().height for axes in figure.axes)
    if plots < LEAST_PLOT * used:
        yield f"the plots have {plots:.2f} of the figure"


def texts(axes: Axes) -> Iterator[Text]:
    """All that are drawn; ticks outside of the axes are not."""
    yield from (text for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label] if text.get_text())
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted(limits)
        for label, place in zip(axis.get_majorticklabels(), axis.get_majorticklocs(), strict=True):
            if label.get_text() and low <= place <= high:
                yield label


def extent(text: Text) -> Bbox:
    """Of the text alone: that of an annotation holds the line to its point too."""
    return Text.get_window_extent(text)
