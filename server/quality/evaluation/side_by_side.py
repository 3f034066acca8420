"""Two quality cards on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.side_by_side import NOTE, Measure, Pair, differences, settings
from foldserve.loadtest.report.tables import Table
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.plots import plots
from foldserve.server.quality.evaluation.tables import facts, names

_MEASURES = (
    Measure("accuracy, %", digits=1, scale=100),
    Measure("OCR, %", digits=1, scale=100),
    Measure("KL", digits=4),
)
_PAIRED = "Where both had the same questions, the intervals are wider than they need to be."


def write(cards: Mapping[str, Card], folder: Path) -> None:
    """Writes index.html and the charts as SVG for two cards, by the names that the page gives them."""
    drawn = plots(cards)
    for chart in drawn:
        chart.write(folder)
    first, second = cards.values()
    tables = [table(cards), settings(facts(first), facts(second), [*cards])]
    title = f"Quality cards: {' beside '.join(cards)}"
    lead = f"{first.model} and {second.model}"
    (folder / "index.html").write_text(page(title, lead=lead, facts={}, charts=drawn, tables=tables))


def table(cards: Mapping[str, Card]) -> Table:
    """The results that both cards have, without controls."""
    return differences(["method", "ratio", "K"], _MEASURES, _rows(*cards.values()), [*cards], f"{NOTE} {_PAIRED}")


def _rows(first: Card, second: Card) -> Iterator[tuple[Sequence[str], Sequence[Pair]]]:
    others = {tuple(names(result)): result for result in second.results if not result.is_control}
    for result in first.results:
        if not result.is_control and (other := others.get(tuple(names(result)))):
            yield names(result), _pairs(result, other)


def _pairs(first: VariantResult, second: VariantResult) -> list[Pair]:
    return [(first.accuracy, second.accuracy), (first.ocr, second.ocr), (first.kl, second.kl)]
