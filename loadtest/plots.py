"""The report's pictures: one panel per load, one line per family of variants, intervals as bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldserve.loadtest.quality import Accuracy
from foldserve.loadtest.report.charts import draw_estimates, style
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d")
_CONTROL = "#111827"
_COLUMNS = 3
_PANEL_IN = (4.3, 3.5)


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn against the ratio.

    Attributes:
        title: of the figure.
        unit: of its vertical axes.
        read: the figure of a row.
        limit: the factor on ratio 0 that is predicted; None draws no line.
        control: plain vLLM's figure.
    """

    title: str
    unit: str
    read: Callable[[Row], Estimate | None]
    limit: Callable[[Row], float | None]


def _figure(name: str) -> Callable[[Row], Estimate | None]:
    return lambda row: row.figures.get(name)


def _inverse(name: str) -> Callable[[Row], float | None]:
    return lambda row: 1 / row.limit[name] if name in row.limit else None


PICTURES = {
    "throughput": Picture(
        "Throughput against reduction ratio",
        "requests/s",
        _figure("requests_per_s"),
        lambda row: row.limit.get("requests_per_s"),
    ),
    "ttft": Picture(
        "Time to first token against reduction ratio", "TTFT p50, s", _figure("ttft_s_p50"), _inverse("requests_per_s")
    ),
    "resident": Picture(
        "Requests that the KV cache holds at once, against reduction ratio",
        "resident requests",
        _figure("resident"),
        lambda row: row.limit.get("resident"),
    ),
}


def draw(rows: Sequence[Row], accuracy: Sequence[Accuracy]) -> dict[str, Figure]:
    """File stem -> picture; one without figures is left out."""
    with style():
        return {
            stem: _draw(picture, rows, accuracy if stem == "throughput" else ())
            for stem, picture in PICTURES.items()
            if any(picture.read(row) for row in rows)
        }


def _draw(picture: Picture, rows: Sequence[Row], accuracy: Sequence[Accuracy]) -> Figure:
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(row.load for row in rows))
    columns = min(len(loads), _COLUMNS)
    lines = -(-len(loads) // columns)
    size = (_PANEL_IN[0] * columns + 2.4, _PANEL_IN[1] * lines + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    families = _families(rows)
    for load, axes in zip(loads, panels, strict=False):
        _panel(axes, picture, [row for row in rows if row.load == load], families, accuracy)
        axes.set_title(str(load))
    for axes in list(figure.axes)[len(loads) : lines * columns]:
        axes.set_visible(False)
    figure.suptitle(picture.title, fontsize=12, fontweight="bold")
    found = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False)
    return figure


def _families(rows: Sequence[Row]) -> dict[str, str]:
    """Colour by family; ratio 0 is where all of them begin."""
    names = dict.fromkeys(row.variant.family for row in rows if row.variant.server == "foldserve")
    return dict(zip((name for name in names if name != "ratio 0"), _COLOURS * len(names), strict=False))


def _panel(
    axes: Axes, picture: Picture, rows: Sequence[Row], families: dict[str, str], accuracy: Sequence[Accuracy]
) -> None:
    full = next(row for row in rows if row.variant.family == "ratio 0")
    for family, colour in families.items():
        own = [row for row in rows if row.variant.family in (family, _at_zero(family))]
        own.sort(key=lambda row: row.variant.ratio)
        curve = own if own and own[0].variant.ratio == 0 else [full, *own]
        _line(axes, [(row.variant.ratio, picture.read(row)) for row in curve], family, colour)
        _limit_line(axes, picture, curve, full, colour)
    if not families:
        _line(axes, [(0.0, picture.read(full))], "ratio 0", _COLOURS[0])
    control = next((row for row in rows if row.variant.server == "vllm"), None)
    if control and (estimate := picture.read(control)):
        axes.axhspan(estimate.low, estimate.high, color=_CONTROL, alpha=0.10, linewidth=0)
        axes.axhline(estimate.value, color=_CONTROL, linewidth=1, linestyle=":", label="plain vLLM")
    axes.set_xlabel("reduction ratio")
    axes.set_ylabel(picture.unit)
    axes.set_ylim(bottom=0)
    axes.grid()
    _accuracy_axis(axes, families, accuracy)


def _at_zero(family: str) -> str:
    """The family that shows the same withdrawal without a method."""
    return "withdraw" if family.endswith("+ withdraw") else family


def _line(axes: Axes, points: Sequence[tuple[float, Estimate | None]], label: str, colour: str) -> None:
    known = [(x, estimate) for x, estimate in points if estimate is not None]
    options: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.6, "elinewidth": 1, "capsize": 2.5}
    draw_estimates(axes, known, label=label, color=colour, **options)


def _limit_line(axes: Axes, picture: Picture, curve: Sequence[Row], full: Row, colour: str) -> None:
    base = picture.read(full)
    points = [(row.variant.ratio, factor) for row in curve if (factor := picture.limit(row)) is not None]
    if base is None or not points:
        return
    x, y = [x for x, _ in points], [base.value * factor for _, factor in points]
    axes.plot(x, y, color=colour, linestyle="--", linewidth=1, alpha=0.65, label="what the arithmetic allows")


def _accuracy_axis(axes: Axes, families: dict[str, str], accuracy: Sequence[Accuracy]) -> None:
    shown = [each for each in accuracy if each.family in families]
    if not shown:
        return
    other = axes.twinx()
    for family, colour in families.items():
        own = sorted((each for each in shown if each.family == family), key=lambda each: each.ratio)
        points = [(each.ratio, each.share) for each in own]
        options: dict[str, Any] = {"marker": "x", "markersize": 4, "linewidth": 1, "linestyle": "-.", "elinewidth": 0.6}
        draw_estimates(other, points, 100, label="accuracy (right axis)", color=colour, alpha=0.6, **options)
    other.set_ylabel("accuracy, %")
    other.set_ylim(0, 105)
    other.spines["right"].set_visible(True)
