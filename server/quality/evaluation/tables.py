"""The quality card as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from foldserve.server.quality.evaluation.card import Card, Result
from foldserve.server.quality.evaluation.scores import Estimate
from foldserve.server.quality.evaluation.variants import CONTROLS

_NONE = "-"


def markdown(card: Card) -> str:
    """A heading, the table of results, accuracy by kind, and what is refused."""
    parts = [head(card), table(HEADINGS, rows(card)), notes(card)]
    if any(result.kinds for result in card.results):
        kinds = sorted({kind for result in card.results for kind in result.kinds})
        parts += ["Accuracy by kind of question, %:", table(["method", "ratio", "K", *kinds], kind_rows(card, kinds))]
    if card.refused:
        parts += ["Not possible on this model:", table(["method", "ratio", "K", "why"], refused_rows(card))]
    return "\n\n".join(parts) + "\n"


def head(card: Card) -> str:
    """What was measured on what."""
    return (
        f"Quality of {card.model} ({card.tokens} vision tokens per image, {card.layers} decoder layers) on "
        f"{card.questions} questions: {card.data}."
    )


def notes(card: Card) -> str:
    """How to read the table."""
    return (
        "Accuracy is exact match in %, with its 95 % interval (Wilson); OCR is kept apart. Layer tokens: vision tokens "
        "that a decoder layer sees, mean over the layers. random, downsample: accuracy of these controls at the same "
        "number of layer tokens (downsample: at most as many). KL: of the first answer token against ratio 0, in nats, "
        f"over the whole vocabulary. Agreement: its likeliest value is that of ratio 0, in %. "
        f"{' '.join(f'{key} {value}.' for key, value in card.engine.items())}"
    )


HEADINGS = [
    "method", "ratio", "K", "tokens", "layer tokens", "accuracy", *CONTROLS, "OCR", *(f"OCR {c}" for c in CONTROLS),
    "lost", "gained", "KL", "agreement",
]  # fmt: skip


def rows(card: Card) -> list[list[str]]:
    """Cells of the table of results, controls that stand for other methods' counts left out."""
    return [_row(card, result) for result in card.results if not result.is_control]


def _row(card: Card, result: Result) -> list[str]:
    controls = [card.control(name, result) if result is not card.reference else None for name in CONTROLS]
    return [
        *_names(result),
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


def kind_rows(card: Card, kinds: Sequence[str]) -> list[list[str]]:
    """Cells of accuracy by kind."""
    shown = [result for result in card.results if not result.is_control]
    return [[*_names(result), *(_percent(result.kinds.get(kind)) for kind in kinds)] for result in shown]


def refused_rows(card: Card) -> list[list[str]]:
    """Cells of what can't be done."""
    return [[r.label, _number(r.ratio), _number(r.layer), r.reason] for r in card.refused]


def table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _names(result: Result) -> list[str]:
    return [result.label, _number(result.ratio), _number(result.layer)]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:g}"


def _percent(estimate: Estimate | None) -> str:
    return _NONE if estimate is None else f"{100 * estimate.value:.1f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return _NONE
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}..{100 * estimate.high:.1f})"
