"""Which samples' answers change at which step of the ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pydantic import Field
from tqdm import tqdm  # comes with vLLM

from foldserve.loadtest.report.journal import Journal, JournalLine
from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.ladder import STEPS, ratio_of
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.quality.evaluation.variants import Spec, plan_all

_ANSWERS = "answers"


class Engine(Protocol):
    """A running engine; `quality/engine/offline.py` has the real one."""

    def answers(
        self, dialogues: Sequence[list[dict[str, Any]]], plans: Sequence[ItemPlan], max_tokens: int
    ) -> Sequence[list[int]]:
        """Token ids of the greedy answers with all vision tokens."""

    def changed(
        self,
        dialogues: Sequence[list[dict[str, Any]]],
        reduction: Reduction,
        plans: Sequence[ItemPlan],
        answers: Sequence[Sequence[int]],
    ) -> Sequence[bool]:
        """Whether the greedy answers are others once the images are reduced."""


class Model(Protocol):
    """Where engines come from."""

    def engine(self, withdraw_layer: int | None) -> AbstractContextManager[Engine]:
        """A running engine."""


class _Line(JournalLine[list[Any]]):
    key: str = Field(alias="step")
    result: list[Any] = Field(alias="samples")


class StepJournal(Journal[list[Any]]):
    """Of each step, a flag a sample; and the answers' token ids."""

    line = _Line


def possible_steps(spec: Spec, layouts: Sequence[Layout]) -> dict[int, tuple[ItemPlan, ...]]:
    """The steps below `STEPS` that the method can take with all images, ascending, and their plans.

    Raises:
        ValueError: there is none.
    """
    found, refusal = {}, ""
    for step in range(1, STEPS):
        try:
            found[step] = plan_all(spec.reduction(ratio=ratio_of(step)), layouts)
        except InvalidReduction as error:
            refusal = str(error)
    if not found:
        raise ValueError(f"{spec.label} can't reduce these images by any sixteenths: {refusal}")
    return found


def measure(
    model: Model,
    questions: Sequence[Question],
    layouts: Sequence[Layout],
    spec: Spec,
    plans: Mapping[int, Sequence[ItemPlan]],
    journal: StepJournal,
    *,
    answer_tokens: int,
    batch: int,
) -> list[list[bool]]:
    """For each question, whether its answer changes at each step; with a progress bar.

    Args:
        layouts: of the questions' images at ratio 0.
        spec: the method.
        plans: by step, see `possible_steps`.
        journal: holds what an earlier run has measured, and gets the rest.
        answer_tokens: how much of each answer is compared, at most.
        batch: questions that the engine is given at once.

    Raises:
        ValueError: an unreadable image.
    """
    steps = [step for step in sorted(plans, reverse=True) if str(step) not in journal]
    rounds = len(steps) + (_ANSWERS not in journal)
    batches = [slice(start, start + batch) for start in range(0, len(questions), batch)]
    if rounds:
        bar = tqdm(total=rounds * len(questions), desc="foldserve calibrate", unit="prompt")
        with model.engine(None) as engine, bar:
            if _ANSWERS not in journal:
                bar.set_postfix_str("all tokens")
                whole = plan_all(Reduction(), layouts)
                journal.add(_ANSWERS, _answers(engine, questions, whole, batches, answer_tokens, bar))
            for step in steps:
                bar.set_postfix_str(f"step {step} of {STEPS}")
                reduction = spec.reduction(ratio=ratio_of(step))
                flags = _changed(engine, questions, reduction, plans[step], journal[_ANSWERS], batches, bar)
                journal.add(str(step), flags)
    return [list(flags) for flags in zip(*(journal[str(step)] for step in plans), strict=True)]


def _answers(
    engine: Engine,
    questions: Sequence[Question],
    plans: Sequence[ItemPlan],
    batches: Sequence[slice],
    answer_tokens: int,
    bar: tqdm[Any],
) -> list[list[int]]:
    answers: list[list[int]] = []
    for batch in batches:
        dialogues = [question.messages() for question in questions[batch]]
        answers += engine.answers(dialogues, plans[batch], answer_tokens)
        bar.update(len(dialogues))
    return answers


def _changed(
    engine: Engine,
    questions: Sequence[Question],
    reduction: Reduction,
    plans: Sequence[ItemPlan],
    answers: Sequence[Sequence[int]],
    batches: Sequence[slice],
    bar: tqdm[Any],
) -> list[bool]:
    changed: list[bool] = []
    for batch in batches:
        dialogues = [question.messages() for question in questions[batch]]
        changed += engine.changed(dialogues, reduction, plans[batch], answers[batch])
        bar.update(len(dialogues))
    return changed
