"""How charts look, and the files they become. Matplotlib is optional."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldserve.loadtest.report.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND_LINE_IN = 0.165
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foldserve",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}


def style() -> AbstractContextManager[None]:
    """Charts are made under it."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def one_panel(paint: Callable[[Axes], None], size_in: tuple[float, float] = (7, 4)) -> Figure:
    """A chart whose axes `paint` fills, taller than `size_in` if their legend is."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size_in, layout="constrained")
        axes = figure.add_subplot()
        axes.grid()
        paint(axes)
        if legend := axes.get_legend():
            figure.set_figheight(max(size_in[1], _LEGEND_LINE_IN * (len(legend.get_texts()) + 2)))
    return figure


def draw_estimates(axes: Axes, points: Sequence[tuple[float, Estimate]], scale: float = 1, **options: Any) -> None:
    """A line through (x, estimate), with intervals as bars; `options` are those of `Axes.errorbar`."""
    below = [scale * (each.value - each.low) for _, each in points]
    above = [scale * (each.high - each.value) for _, each in points]
    x, y = [x for x, _ in points], [scale * each.value for _, each in points]
    axes.errorbar(x, y, yerr=[below, above], **options)


def as_svg(figure: Figure) -> str:
    """The same chart gives the same text."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def write(figure: Figure, file: Path, dpi: int = 100) -> None:
    """The suffix of `file` chooses the format; `dpi` is for those of pixels."""
    if file.suffix == ".svg":
        file.write_text(as_svg(figure))
    else:
        figure.savefig(file, dpi=dpi)
