"""The quality card: the result of an evaluation as one JSON value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from foldserve.server.quality.evaluation.journal import Outcome, OutcomeJournal
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.quality.evaluation.scores import Score, mean, share
from foldserve.server.quality.evaluation.variants import Variant, VariantRefusal, control_positions

CARD_FILE = "quality.json"
OCR = "ocr"
"""Kinds with this in their name are reading. They suffer first, so they are not part of the average."""


class VariantResult(BaseModel):
    """Result of one variant.

    Attributes:
        label: method as named on the command line; "none" at ratio 0.
        ratio: None for a method without an amount, and for a control, which is measured at another method's count.
        layer: withdrawal layer K, or None.
        reduction: as in a request.
        kept: vision tokens of an image that reach the decoder, mean over the images.
        kept_deep: those that layers from K on see.
        layer_tokens: vision tokens that a decoder layer sees, mean over all layers.
        count: `layer_tokens` as an integer, at which the controls are measured.
        accuracy: over all kinds but OCR; None if no answers are known.
        lost, gained: questions that are right at ratio 0 only, and in this variant only.
        kl: mean KL(P_variant || P_ratio0) of the answer's first token, in nats.
        agreement: share of questions whose likeliest first token is that of ratio 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    ratio: float | None
    layer: int | None
    reduction: dict[str, Any]
    kept: int
    kept_deep: int
    layer_tokens: float
    count: int
    is_control: bool
    accuracy: Score | None
    ocr: Score | None
    kinds: dict[str, Score]
    lost: int
    gained: int
    kl: Score
    agreement: Score


class RefusedVariant(BaseModel):
    """A variant that this model can't run, with the error message as reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    ratio: float | None
    layer: int | None
    reason: str


class Card(BaseModel):
    """All results of an evaluation.

    Attributes:
        data: where the questions come from.
        tokens: vision tokens of an image at ratio 0, mean over the images.
        layers: number of decoder layers.
        engine: versions and engine options.
        machine, date: "" in cards of earlier versions.
        results: ratio 0 first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    model_hash: str
    data: str
    data_hash: str
    questions: int
    tokens: int
    layers: int
    engine: dict[str, str]
    machine: str = ""
    date: str = ""
    results: list[VariantResult]
    refused: list[RefusedVariant]

    @property
    def reference(self) -> VariantResult:
        """The result at ratio 0."""
        return self.results[0]

    def control(self, name: str, beside: VariantResult) -> VariantResult | None:
        """The control's result at the count of `beside`, or slightly fewer tokens; None if it was refused."""
        positions = control_positions(name, beside.reduction.get("positions", ""))
        fitting = [
            r
            for r in self.results
            if r.is_control
            and r.reduction["method"] == name
            and r.reduction.get("positions", "") == positions
            and r.kept <= beside.count
        ]
        return max(fitting, key=attrgetter("kept"), default=None)

    @classmethod
    def read(cls, file: Path) -> Card:
        """Raises ValueError if `file` is no card."""
        try:
            fields = json.loads(file.read_text())
            return cls.model_validate({name: value for name, value in fields.items() if name != "summary"})
        except (OSError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no card of `foldserve evaluate`: {error}") from error

    def write(self, file: Path) -> None:
        """Writes `file` atomically; its `summary` is what `/v1/reducers` shows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.part")
        fields = self.model_dump(mode="json")
        partial.write_text(json.dumps({"summary": self.summary()} | fields, indent=1) + "\n")
        partial.replace(file)

    def summary(self) -> dict[str, Any]:
        """The figures of each result, without intervals and kinds."""
        return {
            "model_hash": self.model_hash,
            "data": self.data,
            "questions": self.questions,
            "results": [_summary(result) for result in self.results],
            "refused": [refused.model_dump(mode="json") for refused in self.refused],
        }


def _summary(result: VariantResult) -> dict[str, Any]:
    return {
        "method": result.label,
        "reduction": result.reduction,
        "withdraw_layer": result.layer,
        "kept": result.kept,
        "layer_tokens": round(result.layer_tokens, 2),
        "accuracy": None if result.accuracy is None else round(result.accuracy.value, 4),
        "ocr": None if result.ocr is None else round(result.ocr.value, 4),
        "kl": round(result.kl.value, 6),
        "agreement": round(result.agreement.value, 4),
    }


def results(
    questions: Sequence[Question], base: Variant, variants: Sequence[Variant], journal: OutcomeJournal
) -> list[VariantResult]:
    """Results from the journal, ratio 0 first; variants that are the same to the engine share their outcomes."""
    full = journal[base.key]
    return [_result(variant, questions, journal[variant.key], full) for variant in (base, *variants)]


def refusals(refused: Sequence[VariantRefusal]) -> list[RefusedVariant]:
    return [RefusedVariant(label=r.label, ratio=r.ratio, layer=r.layer, reason=r.reason) for r in refused]


def _result(
    variant: Variant, questions: Sequence[Question], outcomes: Sequence[Outcome], full: Sequence[Outcome]
) -> VariantResult:
    judged = [(q.kind, o.right) for q, o in zip(questions, outcomes, strict=True) if o.right is not None]
    by_kind = {kind: [right for k, right in judged if k == kind] for kind, _ in judged}
    changed = [(before.right, now.right) for before, now in zip(full, outcomes, strict=True)]
    return VariantResult(
        label=variant.label,
        ratio=variant.ratio,
        layer=variant.layer,
        reduction=variant.reduction.to_json(),
        kept=round(variant.kept),
        kept_deep=round(variant.kept_deep),
        layer_tokens=variant.layer_tokens,
        count=variant.count,
        is_control=variant.is_control,
        accuracy=_share_of(judged, reading=False),
        ocr=_share_of(judged, reading=True),
        kinds={kind: share(hits) for kind, hits in sorted(by_kind.items())},
        lost=changed.count((True, False)),
        gained=changed.count((False, True)),
        kl=mean([outcome.kl for outcome in outcomes]),
        agreement=share([outcome.agrees for outcome in outcomes]),
    )


def _share_of(judged: Sequence[tuple[str, bool]], *, reading: bool) -> Score | None:
    hits = [right for kind, right in judged if (OCR in kind.casefold()) == reading]
    return share(hits) if hits else None
