"""The charts of a quality card, or of two side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from foldserve.loadtest.report.charts import Axis, Chart, ChartLine, ChartPoint, Panel, heat_map, line_chart
from foldserve.reducers.method import Kind
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.curves import (
    GROUPS,
    Curve,
    DrawnCurves,
    Read,
    best,
    choose_curves,
    curves,
    differ,
    references,
    withdrawals,
)
from foldserve.server.quality.evaluation.scores import Score

_PERCENT = Axis("right answers, %", scale=100, digits=1, high=100)
_LEAST_KL = 1e-4
_KL = Axis("KL against ratio 0, nats", digits=4, low=_LEAST_KL, is_log=True)
_MEASURES: Mapping[str, Read] = {"All but OCR": attrgetter("accuracy"), "OCR": attrgetter("ocr")}
_ASKED = {"count": "How many answers stay right: counting", "caption": "How many answers stay right: captions"}
"""Kinds of questions that get their own chart, by a word in their name: they lose more to reduction than others."""


def plots(cards: Mapping[str, Card]) -> list[Chart]:
    """Charts in reading order, without empty ones; `cards` are keyed by the name for their panels, "" if only one."""
    return [chart for chart in _charts(cards) if chart is not None]


def _charts(cards: Mapping[str, Card]) -> Iterator[Chart | None]:
    yield _by_tokens("accuracy", "How many answers stay right? All questions but OCR", cards, attrgetter("accuracy"))
    yield _by_tokens("ocr", "How many answers stay right: reading (OCR)", cards, attrgetter("ocr"))
    kinds = dict.fromkeys(kind for card in cards.values() for kind in card.reference.kinds)
    for word, title in _ASKED.items():
        kind = next((kind for kind in kinds if word in kind.casefold()), None)
        if kind is not None:
            yield _by_tokens(word, title, cards, _of_kind(kind))
    yield _by_tokens("kl", "How far does the first answer token move?", cards, attrgetter("kl"), _KL)
    yield _by_kind(cards)
    yield _by_layer(cards)


def _of_kind(kind: str) -> Read:
    return lambda result: result.kinds.get(kind)


def _by_tokens(stem: str, title: str, cards: Mapping[str, Card], read: Read, y: Axis = _PERCENT) -> Chart | None:
    panels: list[Panel] = []
    left_out: list[str] = []
    for kind, group in GROUPS.items():
        choice = choose_curves([*cards.values()], kind)
        left_out += choice.left_out
        lines = {name: _lines(card, kind, choice, read, with_full=not y.is_log) for name, card in cards.items()}
        if all(any(line.colour is not None for line in each) for each in lines.values()):  # else nothing to compare
            panels += [Panel(", ".join(filter(None, [group, name])), each) for name, each in lines.items()]
    if not panels:
        return None
    tokens = max(card.tokens for card in cards.values())
    x = Axis("vision tokens that a decoder layer sees, mean over the layers", low=0, high=tokens, falls=True)
    note = f"Grey: tokens drawn at random, and a smaller image, at the same counts. {_precision(panels, y)}"
    if left_out:
        note += f" Not drawn, since others of their kind have more right answers: {', '.join(left_out)}."
    return line_chart(stem, title, panels, x, y, note=note, columns=2 if len(cards) > 1 else 3)


def _precision(panels: Sequence[Panel], y: Axis) -> str:
    """Note on the precision of the values."""
    shown = [point.estimate for panel in panels for line in panel.lines for point in line.points]
    if y.is_log:
        return f"What is below {_LEAST_KL:g} is drawn there."
    width = y.scale * max(max(each.value - each.low, each.high - each.value) for each in shown)
    count = max(each.count for each in shown if isinstance(each, Score))
    return f"{count} questions: the ends of 95 % intervals are up to {width:.0f} points away."


def _lines(card: Card, kind: Kind | None, choice: DrawnCurves, read: Read, *, with_full: bool) -> list[ChartLine]:
    """Lines of a panel, the controls last."""
    by_name = {curve.name: curve.results for curve in curves(card) if curve.kind == kind and curve.name in choice.names}
    colours = {name: colour for colour, name in enumerate(choice.names)}
    beside = [result for results in by_name.values() for result in results]
    full = [card.reference] if with_full else []
    return [
        ChartLine(name, points, colours.get(name))
        for name, results in (by_name | references(card, beside)).items()
        if (points := _points([*full, *results], read)) and len(points) > len(full)
    ]


def _points(results: Sequence[VariantResult], read: Read) -> list[ChartPoint]:
    return [
        ChartPoint(result.layer_tokens, estimate, _about(result))
        for result in results
        if (estimate := read(result)) is not None
    ]


def _about(result: VariantResult) -> str:
    ratio = "" if result.ratio is None else f"ratio {result.ratio:g}"
    layer = "" if result.layer is None else f"K={result.layer}"
    return ", ".join(filter(None, [ratio, layer, f"{result.layer_tokens:.4g} tokens"]))


def _by_kind(cards: Mapping[str, Card]) -> Chart | None:
    found = {name: curve for name, card in cards.items() if (curve := best(card)) and len(card.reference.kinds) > 1}
    maps = [_map(name, cards[name], curve) for name, curve in found.items()]
    if not maps:
        return None
    return replace(maps[0], panels=[panel for each in maps for panel in each.panels], columns=2)


def _map(name: str, card: Card, curve: Curve) -> Chart:
    shown = [card.reference, *curve.results]
    kinds = sorted(card.reference.kinds, key=lambda kind: -sum(r.kinds[kind].value for r in shown if kind in r.kinds))
    return heat_map(
        "kinds",
        f"Which questions does {curve.name} cost?",
        kinds,
        [f"{result.ratio:g}" for result in shown],
        [[_cell(kind, result, card.reference) for result in shown] for kind in kinds],
        "reduction ratio",
        unit="right answers, %",
        note="The stronger the shade, the more answers are lost against ratio 0. "
        f"{card.reference.kinds[kinds[0]].count} questions of a kind.",
        panel=name,
    )


def _cell(kind: str, result: VariantResult, full: VariantResult) -> tuple[str, float, str] | None:
    score = result.kinds.get(kind)
    if score is None:
        return None
    lost = max(0.0, full.kinds[kind].value - score.value)
    return f"{100 * score.value:.0f}", lost, f"{kind}, {_about(result)}: {score.show(1, 100)}"


def _by_layer(cards: Mapping[str, Card]) -> Chart | None:
    panels, alike = [], set()
    for title, read in _MEASURES.items():
        for name, card in cards.items():
            lines = []
            for colour, (method, results) in enumerate(withdrawals(card).items()):
                points = [
                    ChartPoint(float(result.layer or 0), estimate, _about(result))
                    for result in results
                    if (estimate := read(result)) is not None
                ]
                if len(points) < 2 or not differ([point.estimate for point in points]):
                    alike.add(method)
                    continue
                full = read(card.reference)
                start = [ChartPoint(float(card.layers), full, "never")] if full else []
                lines.append(ChartLine(method, [*start, *points], colour))
            if lines:
                panels.append(Panel(", ".join(filter(None, [title, name])), lines))
    if not panels:
        return None
    drawn = {line.name for panel in panels for line in panel.lines}
    layers = max(card.layers for card in cards.values())
    note = f"K = {layers}: never."
    if rest := sorted(alike - drawn):
        note += f" Not drawn, since K makes no difference that shows: {', '.join(rest)}."
    x = Axis("K, the first decoder layer without those tokens", low=1, falls=True)
    return line_chart("accuracy-by-layer", "From which decoder layer on can tokens go?", panels, x, _PERCENT, note=note)
