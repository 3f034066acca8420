"""Accuracy of a checkpoint on held-out scenes, by kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from foldserve.reducers.plan import Reduction
from foldserve.server.quality.demo.examples import Example
from foldserve.server.quality.engine.answers import AnswerEngine


@dataclass(frozen=True)
class Score:
    """Exact answers among all of one kind."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total


def accuracy(
    engine: AnswerEngine, examples: Sequence[Example], reduction: Reduction | None = None, progress: bool = False
) -> dict[str, Score]:
    """Score by kind: an answer counts when it is the expected one, to the letter."""
    dialogues = [(example.messages(), example.image) for example in examples]
    given = engine.answers(dialogues, reduction, progress=progress)
    return scores(examples, given)


def scores(examples: Sequence[Example], given: Sequence[str]) -> dict[str, Score]:
    """Score by kind of `given` answers, one for each of `examples`."""
    total = Counter(example.kind for example in examples)
    right = Counter(e.kind for e, answer in zip(examples, given, strict=True) if answer == e.answer)
    return {kind: Score(right[kind], count) for kind, count in total.items()}
