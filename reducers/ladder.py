"""The counts that `ratio: "auto"` chooses among: sixteen steps, so that images of different groups still share batches.

A step is a ratio that binary floats hold exactly, so that the plan of a grid of n tokens keeps ceil(n * step / 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

from foldserve.reducers.reduction import MIN_KEPT

STEPS = 16
"""The last of them removes nothing."""


def ratio_of(step: int) -> float:
    """Share of the tokens that goes at a step of 1 to `STEPS`."""
    return (STEPS - step) / STEPS


def steps_within(least: float, most: float) -> range:
    """Steps at which at least and at most so large a share goes; empty where no step lies between the two."""
    return range(max(1, ceil(STEPS * (1 - Fraction(most)))), floor(STEPS * (1 - Fraction(least))) + 1)


def step_for(count: int, tokens: int, steps: Sequence[int]) -> int:
    """The smallest step at which at least `count` of so many tokens stay, and never fewer than have to stay anyway.

    Args:
        steps: ascending, the last of them `STEPS`.
    """
    count = max(count, MIN_KEPT)
    return next(step for step in steps if ceil(Fraction(tokens * step, STEPS)) >= count or step == STEPS)


class Settled(NamedTuple):
    """What an image gets.

    Attributes:
        step: of the ladder.
        is_enough: no fewer tokens stay than it needs.
        unpredicted: cells of the image that its pixels do not predict; None where nobody asked.
    """

    step: int
    is_enough: bool
    unpredicted: int | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """Which steps an image may get.

    Attributes:
        steps: that can be taken, ascending, the last of them `STEPS`.
        allowed: those within a request's bounds, ascending; at least one.
        more: steps that are put on what it needs.
        pressure: allowed steps that the server's load takes off again.
    """

    steps: tuple[int, ...]
    allowed: tuple[int, ...]
    more: int = 0
    pressure: int = 0

    def settle(self, needed: int) -> Settled:
        """The step of an image that needs this one."""
        wanted = self.steps[min(self.steps.index(needed) + self.more, len(self.steps) - 1)]
        place = next((place for place, step in enumerate(self.allowed) if step >= wanted), len(self.allowed) - 1)
        step = self.allowed[max(0, place - self.pressure)]
        return Settled(step, step >= wanted)


@dataclass(frozen=True, slots=True)
class PixelCap:
    """An image needs no more tokens than it has cells that its pixels do not predict.

    Attributes:
        levels: by which pixels of like cells may differ, see `pixelprune.unpredicted`.
        needed: step that an image needs of which nothing is predicted.
        allowance: steps that it may get.
    """

    levels: int
    needed: int
    allowance: Allowance

    @property
    def least(self) -> int:
        """The lowest step that an image can get."""
        return self.allowance.allowed[0]

    def settle(self, unpredicted: int, tokens: int) -> Settled:
        """The step of an image of so many tokens, of which so many cells are not predicted."""
        needed = min(self.needed, step_for(unpredicted, tokens, self.allowance.steps))
        return self.allowance.settle(needed)._replace(unpredicted=unpredicted)
