"""The quality card as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foldserve.loadtest.report.charts import Chart
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import NONE, Table
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.plots import plots
from foldserve.server.quality.evaluation.variants import CONTROLS

_NAMES = ["method", "ratio", "K"]
_HEADINGS = [
    *_NAMES, "tokens", "layer tokens", "accuracy", *CONTROLS, "OCR", *(f"OCR {c}" for c in CONTROLS), "lost", "gained",
    "KL", "agreement",
]  # fmt: skip


def write_page(card: Card, folder: Path) -> None:
    """Writes index.html, quality.md and the charts."""
    drawn = plots({"": card})
    for chart in drawn:
        chart.write(folder)
    (folder / "index.html").write_text(html(card, drawn))
    (folder / "quality.md").write_text(markdown(card))


def markdown(card: Card) -> str:
    """A heading, the results, accuracy by kind, and refused variants."""
    results, *others = _tables(card)
    parts = [_head(card), results.markdown(), results.note]
    for table in others:
        parts += [f"{table.title}:", table.markdown()]
    return "\n\n".join(parts) + "\n"


def html(card: Card, charts: Sequence[Chart]) -> str:
    """One HTML file that contains the charts."""
    lead = ". ".join(filter(None, [_asked(card), card.machine, card.date]))
    return page(f"Quality of {card.model}", lead=lead, facts=facts(card), charts=charts, tables=_tables(card))


def facts(card: Card) -> dict[str, str]:
    """Model, questions, machine, date and engine."""
    found = {"model": card.model, "weights": card.model_hash, "asked": _asked(card), "questions": card.data_hash}
    return found | {name: text for name, text in (("machine", card.machine), ("date", card.date)) if text} | card.engine


def _asked(card: Card) -> str:
    return (
        f"{card.questions} questions: {card.data}. {card.tokens} vision tokens per image, {card.layers} decoder layers"
    )


def _tables(card: Card) -> list[Table]:
    """Results first."""
    shown = [result for result in card.results if not result.is_control]
    tables = [Table("Results", _HEADINGS, [_row(card, result) for result in shown], key=3, note=_note(card))]
    if kinds := sorted({kind for result in card.results for kind in result.kinds}):
        by_kind = [[*names(r), *(_percent(r.kinds.get(kind)) for kind in kinds)] for r in shown]
        tables.append(Table("Accuracy by kind of question, %", [*_NAMES, *kinds], by_kind, key=3))
    if card.refused:
        refused = [[r.label, _number(r.ratio), _number(r.layer), r.reason] for r in card.refused]
        tables.append(Table("Not possible on this model", [*_NAMES, "why"], refused, key=3, is_prose=True))
    return tables


def _head(card: Card) -> str:
    return (
        f"Quality of {card.model} ({card.tokens} vision tokens per image, {card.layers} decoder layers) on "
        f"{card.questions} questions: {card.data}."
    )


def _note(card: Card) -> str:
    return (
        "Accuracy is exact match in %, with its 95 % interval (Wilson); OCR is kept apart. Layer tokens: vision tokens "
        "that a decoder layer sees, mean over the layers. random, downsample: accuracy of these controls at the same "
        "number of layer tokens (downsample: at most as many). KL: of the first answer token against ratio 0, in nats, "
        f"over the whole vocabulary. Agreement: its likeliest value is that of ratio 0, in %. "
        f"{' '.join(f'{key} {value}.' for key, value in card.engine.items())}"
    )


def _row(card: Card, result: VariantResult) -> list[str]:
    controls = [card.control(name, result) if result is not card.reference else None for name in CONTROLS]
    return [
        *names(result),
        str(result.kept),
        f"{result.layer_tokens:.1f}",
        _with_interval(result.accuracy),
        *(_percent(control.accuracy if control else None) for control in controls),
        _with_interval(result.ocr),
        *(_percent(control.ocr if control else None) for control in controls),
        str(result.lost),
        str(result.gained),
        f"{result.kl.value:.4f}",
        _percent(result.agreement),
    ]


def names(result: VariantResult) -> list[str]:
    """Method, ratio and K."""
    return [result.label, _number(result.ratio), _number(result.layer)]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _percent(estimate: Estimate | None) -> str:
    return NONE if estimate is None else f"{100 * estimate.value:.1f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return NONE
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}..{100 * estimate.high:.1f})"
