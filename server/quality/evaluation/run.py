"""Runs every question under every variant that the journal lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm  # comes with vLLM

from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.plan import Reduction
from foldserve.server.quality.calibration_search import kl_divergence
from foldserve.server.quality.evaluation.journal import Outcome, OutcomeJournal
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.quality.evaluation.scores import is_right
from foldserve.server.quality.evaluation.variants import Variant, plan_all


class ModelAnswer(Protocol):
    """One reply; implemented by `Reply` in `quality/engine/offline.py`."""

    @property
    def text(self) -> str:
        """The whole answer."""

    @property
    def first(self) -> NDArray[np.float32]:
        """(vocab,) log-probabilities of the answer's first token."""


class Engine(Protocol):
    def ask(
        self,
        dialogues: Sequence[list[dict[str, Any]]],
        reduction: Reduction,
        plans: Sequence[ItemPlan],
        max_tokens: int,
    ) -> Sequence[ModelAnswer]:
        """One reply per dialogue, whose image is reduced by its plan."""


class Model(Protocol):
    def engine(self, withdraw_layer: int | None) -> AbstractContextManager[Engine]:
        """A running engine with K = `withdraw_layer`, or without withdrawal."""


def reference_variant(layouts: Sequence[Layout], layers: int) -> Variant:
    """The variant at ratio 0, which all others are compared with."""
    return Variant("none", 0.0, None, layers, Reduction(), plan_all(Reduction(), layouts))


def measure(
    model: Model,
    questions: Sequence[Question],
    base: Variant,
    variants: Sequence[Variant],
    journal: OutcomeJournal,
    *,
    max_tokens: int,
    batch: int,
) -> None:
    """Fills the journal, with one engine for each K and one without, and a progress bar over all questions.

    Args:
        base: the variant at ratio 0, which is measured first.
        batch: questions per call of the engine.

    Raises:
        ValueError: an unreadable image, or log-probabilities that are not finite.
    """
    first = journal.load_reference() if base.key in journal else None
    wanted = {v.key: v for v in [*([base] if first is None else []), *variants] if v is base or v.key not in journal}
    bar = tqdm(total=len(wanted) * len(questions), desc="foldserve evaluate", unit="question")
    for layer, group in _by_layer(list(wanted.values())):
        with model.engine(layer) as engine:
            for variant in group:
                bar.set_postfix_str(f"{variant.label} {variant.kept:.4g} tokens" + (f" K={layer}" if layer else ""))
                replies: list[ModelAnswer] = []
                for start in range(0, len(questions), batch):
                    these = slice(start, start + batch)
                    asked = [question.messages() for question in questions[these]]
                    replies += engine.ask(asked, variant.reduction, variant.plans[these], max_tokens)
                    bar.update(len(asked))
                if variant is base:
                    first = np.stack([reply.first for reply in replies])
                    journal.save_reference(first)
                assert first is not None  # the reference comes first
                journal.add(variant.key, _outcomes(questions, replies, first))
    bar.close()


def _by_layer(variants: Sequence[Variant]) -> Iterator[tuple[int | None, list[Variant]]]:
    """Groups of equal K, without K first."""
    layers = sorted({variant.layer for variant in variants}, key=lambda layer: layer or 0)
    for layer in layers:
        yield layer, [variant for variant in variants if variant.layer == layer]


def _outcomes(
    questions: Sequence[Question], replies: Sequence[ModelAnswer], first: NDArray[np.float32]
) -> list[Outcome]:
    own = torch.from_numpy(np.stack([reply.first for reply in replies]))
    full = torch.from_numpy(first)
    kl = kl_divergence(own, full)
    if not kl.isfinite().all():
        raise ValueError("the model's log-probabilities are not finite: try --dtype float32 or bfloat16")
    agrees = own.argmax(-1) == full.argmax(-1)
    return [
        Outcome(
            answer=reply.text,
            right=is_right(reply.text, question.answers) if question.answers else None,
            kl=max(0.0, divergence),  # rounding makes it -1e-8 for equal distributions
            agrees=agreement,
        )
        for question, reply, divergence, agreement in zip(questions, replies, kl.tolist(), agrees.tolist(), strict=True)
    ]
