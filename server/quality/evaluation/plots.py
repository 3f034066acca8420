"""The curves of a quality card, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from foldserve.loadtest.report.charts import as_svg, draw_estimates, one_panel
from foldserve.loadtest.report.estimates import Estimate
from foldserve.server.quality.evaluation.card import Card, Result
from foldserve.server.quality.evaluation.variants import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_IN = (8, 4.2)  # with the legend beside the curves
_Read = Callable[[Result], Estimate | None]


def plots(card: Card) -> dict[str, str]:
    """File stem -> SVG, in the order in which they are to be read; what has no figures is left out."""
    accuracy, ocr, kl = attrgetter("accuracy"), attrgetter("ocr"), attrgetter("kl")
    percent = "accuracy, %"
    drawn = {
        "accuracy": _by_tokens(card, accuracy, "All questions but OCR", percent),
        "ocr": _by_tokens(card, ocr, "OCR", percent),
        "kl": _by_tokens(card, kl, "First answer token", "KL against ratio 0, nats"),
        "accuracy-by-layer": _by_layer(card, {"all but OCR": accuracy, "OCR": ocr}),
    }
    return {stem: svg for stem, svg in drawn.items() if svg is not None}


def lines(card: Card) -> dict[str, list[Result]]:
    """Method -> its results by falling number of layer tokens, ratio 0 in front; one line a K for what works at K."""
    found: dict[str, list[Result]] = {}
    for result in card.results[1:]:
        layered = result.layer is not None and result.ratio is not None  # plain withdrawal is one line over all K
        name = f"{result.label}, K={result.layer}" if layered else result.label
        found.setdefault(name, []).append(result)
    for results in found.values():
        results.sort(key=attrgetter("layer_tokens"), reverse=True)
    return {name: [card.reference, *results] for name, results in found.items()}


def _by_tokens(card: Card, read: _Read, title: str, unit: str) -> str | None:
    if all(read(result) is None for result in card.results):
        return None

    def draw(axes: Axes) -> None:
        for name, results in lines(card).items():
            known = [(r.layer_tokens, estimate) for r in results if (estimate := read(r)) is not None]
            _line(axes, name, known, 100 if "%" in unit else 1)
        axes.set_xlabel("vision tokens per decoder layer, mean over the layers")
        axes.invert_xaxis()
        _finish(axes, title, unit)

    return as_svg(one_panel(draw, _SIZE_IN))


def _by_layer(card: Card, read: Mapping[str, _Read]) -> str | None:
    withdrawn = sorted((r for r in card.results if r.layer is not None and r.ratio is None), key=lambda r: r.layer or 0)
    if not any(reader(result) for reader in read.values() for result in withdrawn):
        return None

    def draw(axes: Axes) -> None:
        for name, reader in read.items():
            curve = [(float(r.layer or 0), estimate) for r in withdrawn if (estimate := reader(r)) is not None]
            full = reader(card.reference)
            _line(axes, name, [*curve, *([(float(card.layers), full)] if full else [])], 100)
        axes.set_xlabel(f"K, first decoder layer without vision tokens ({card.layers}: never)")
        _finish(axes, "Withdrawal", "accuracy, %")

    return as_svg(one_panel(draw, _SIZE_IN))


def _line(axes: Axes, name: str, points: list[tuple[float, Estimate]], scale: float) -> None:
    control = name.partition(":")[0]
    style: dict[str, Any] = {"linestyle": "--", "color": "black" if control == CONTROLS[0] else "gray"}
    if control not in CONTROLS:
        style = {}
    style |= {"marker": "o", "markersize": 3, "linewidth": 1.2, "elinewidth": 0.5}
    draw_estimates(axes, points, scale, label=name, **style)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
