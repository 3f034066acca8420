"""Curves of a quality card's methods, by kind, and the choice of which to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean as mean

from foldserve.loadtest.report.charts import MOST_LINES
from foldserve.loadtest.report.estimates import Estimate
from foldserve.reducers import METHODS
from foldserve.reducers.method import InDecoder, Kind
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.variants import CONTROLS

Read = Callable[[VariantResult], Estimate | None]

GROUPS: Mapping[Kind | None, str] = {
    Kind.MERGE: "Merging",
    Kind.DROP: "Dropping",
    Kind.INPUT: "Smaller input",
    Kind.DECODER: "In the decoder",
    None: "Joined methods",
}
"""Titles of the panels; None: two joined methods."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Results of a method, at one K if it has one, by falling number of layer tokens; joined methods have no kind."""

    name: str
    label: str
    kind: Kind | None
    results: Sequence[VariantResult]


@dataclass(frozen=True, slots=True)
class DrawnCurves:
    """Names of the curves of one kind that are drawn, and of those that are not."""

    names: Sequence[str]
    left_out: Sequence[str]


def curves(card: Card) -> list[Curve]:
    """One curve per method, with its first options only, or two if it has a K: about a third and two thirds deep."""
    found: list[Curve] = []
    known: set[str] = set()
    for label in dict.fromkeys(result.label for result in card.results[1:] if not result.is_control):
        name = label.partition(":")[0]
        if name in known or name in CONTROLS:
            continue
        known.add(name)
        own = [result for result in card.results if result.label == label]
        layers = sorted({result.layer for result in own if result.layer is not None and result.ratio is not None})
        for layer in _two_layers(layers, card.layers) if layers else [None]:
            shown = [result for result in own if layer is None or result.layer == layer]
            shown.sort(key=attrgetter("layer_tokens"), reverse=True)
            found.append(Curve(name if layer is None else f"{name} K={layer}", label, _kind(name), shown))
    return found


def references(card: Card, beside: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """Each control's results at the counts of `beside`."""
    found: dict[str, list[VariantResult]] = {}
    for name in CONTROLS:
        controls = [control for result in beside if (control := card.control(name, result)) is not None]
        by_count = {control.kept: control for control in controls}
        found[name] = [by_count[kept] for kept in sorted(by_count, reverse=True)]
    return found


def choose_curves(cards: Sequence[Card], kind: Kind | None) -> DrawnCurves:
    """The best curves of a kind, by right answers above those of `random` at the same counts, in the cards' order."""
    merits: dict[str, list[float]] = {}
    for card in cards:
        for curve in curves(card):
            if curve.kind == kind:
                merits.setdefault(curve.name, []).append(_merit(card, curve))
    best = sorted(merits, key=lambda name: mean(merits[name]), reverse=True)[:MOST_LINES]
    return DrawnCurves([name for name in merits if name in best], [name for name in merits if name not in best])


def best(card: Card) -> Curve | None:
    """The default method's curve, else the best of those measured at several ratios."""
    able = [curve for curve in curves(card) if len({result.ratio for result in curve.results}) > 1]
    default = next((curve for curve in able if curve.name == next(iter(METHODS))), None)
    return default or max(able, key=lambda curve: _merit(card, curve), default=None)


def withdrawals(card: Card) -> dict[str, list[VariantResult]]:
    """Results to draw against K: plain withdrawal, and other decoder methods at a middle and the highest ratio."""
    found: dict[str, list[VariantResult]] = {}
    for result in card.results:
        method = METHODS.get(result.label)
        if result.layer is None or not isinstance(method, InDecoder):
            continue
        ratios = sorted({r.ratio for r in card.results if r.label == result.label and r.ratio is not None})
        if result.ratio is None or result.ratio in (ratios[len(ratios) // 3], ratios[-1]):
            name = result.label if result.ratio is None else f"{result.label} {result.ratio:g}"
            found.setdefault(name, []).append(result)
    return {name: sorted(results, key=attrgetter("layer"), reverse=True) for name, results in found.items()}


def differ(estimates: Sequence[Estimate]) -> bool:
    """Whether at least two intervals are disjoint."""
    return max(each.low for each in estimates) > min(each.high for each in estimates)


def _kind(name: str) -> Kind | None:
    return METHODS[name].kind if name in METHODS else None


def _two_layers(layers: Sequence[int], total: int) -> list[int]:
    """The layers nearest to a third and two thirds of the decoder."""
    return sorted({min(layers, key=lambda layer: abs(layer - total * part / 3)) for part in (1, 2)})


def _merit(card: Card, curve: Curve) -> float:
    """Mean accuracy above the control's, or minus the KL if no answers are known."""
    scores = []
    for result in curve.results:
        control = card.control(CONTROLS[0], result)
        own, drawn = ((r.accuracy if r is not None else None) for r in (result, control))
        scores.append(-result.kl.value if own is None else own.value - (drawn.value if drawn else 0.0))
    return mean(scores)
