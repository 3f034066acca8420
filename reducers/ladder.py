"""The counts that `ratio: "auto"` chooses among: sixteen steps, so that images of different groups still share batches.

A step is a ratio that binary floats hold exactly, so that the plan of a grid of n tokens keeps ceil(n * step / 16).
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

STEPS = 16
"""The last of them removes nothing."""


def ratio_of(step: int) -> float:
    """Share of the tokens that goes at a step of 1 to `STEPS`."""
    return (STEPS - step) / STEPS


def steps_within(least: float, most: float) -> range:
    """Steps at which at least and at most so large a share goes; empty where no step lies between the two."""
    return range(max(1, ceil(STEPS * (1 - Fraction(most)))), floor(STEPS * (1 - Fraction(least))) + 1)
