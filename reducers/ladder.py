"""The sixteen ratios that `ratio: "auto"` chooses among: so few that different images still share batches.

Binary floats hold these ratios exactly, so the plan of a grid of n tokens keeps ceil(n * step / 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

from foldserve.reducers.reduction import MIN_KEPT

STEPS = 16  # the last step removes nothing


def ratio_of(step: int) -> float:
    """Share of the tokens that a step of 1 to `STEPS` removes."""
    return (STEPS - step) / STEPS


def steps_within(least: float, most: float) -> range:
    """Steps that remove a share between `least` and `most`; may be empty."""
    return range(max(1, ceil(STEPS * (1 - Fraction(most)))), floor(STEPS * (1 - Fraction(least))) + 1)


def step_for(count: int, tokens: int, steps: Sequence[int]) -> int:
    """The smallest of `steps` (ascending, ending in `STEPS`) that keeps at least `count`, and at least `MIN_KEPT`."""
    count = max(count, MIN_KEPT)
    return next(step for step in steps if ceil(Fraction(tokens * step, STEPS)) >= count or step == STEPS)


class SettledStep(NamedTuple):
    """The step that an image gets."""

    step: int
    is_enough: bool  # the image keeps as many tokens as it needs
    unpredicted: int | None = None  # cells that its pixels do not predict; None without a pixel cap


@dataclass(frozen=True, slots=True)
class StepBounds:
    """The steps that an image may get."""

    steps: tuple[int, ...]  # all possible ones, ascending, ending in `STEPS`
    allowed: tuple[int, ...]  # those within the request's bounds, ascending; at least one
    more: int = 0  # steps added to what the image needs
    pressure: int = 0  # allowed steps subtracted because of the server's load

    def settle(self, needed: int) -> SettledStep:
        """The step of an image that needs step `needed`."""
        wanted = self.steps[min(self.steps.index(needed) + self.more, len(self.steps) - 1)]
        place = next((place for place, step in enumerate(self.allowed) if step >= wanted), len(self.allowed) - 1)
        step = self.allowed[max(0, place - self.pressure)]
        return SettledStep(step, step >= wanted)


@dataclass(frozen=True, slots=True)
class PixelCap:
    """An image needs at most as many tokens as it has cells that its pixels do not predict."""

    levels: int  # difference of pixels up to which cells are alike, see `pixelprune.unpredicted`
    needed: int  # step without the cap
    bounds: StepBounds

    @property
    def least(self) -> int:
        """The lowest step that an image can get."""
        return self.bounds.allowed[0]

    def settle(self, unpredicted: int, tokens: int) -> SettledStep:
        """The step of an image with `tokens` tokens and `unpredicted` unpredicted cells."""
        needed = min(self.needed, step_for(unpredicted, tokens, self.bounds.steps))
        return self.bounds.settle(needed)._replace(unpredicted=unpredicted)
