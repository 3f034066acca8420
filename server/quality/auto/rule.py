"""Conformal risk control: the smallest count whose share of changed answers stays below a target on new requests.

"Conformal Risk Control" (Angelopoulos et al., 2024), section 2, with a loss of 0 or 1: whether the greedy answer
differs from the one with all tokens. Whatever the distribution, a new request that is exchangeable with the samples has
its answer changed with a probability of at most the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from foldserve.reducers.ladder import STEPS


def chosen_step(changed: Sequence[Sequence[bool]], steps: Sequence[int], target: float) -> int:
    """The smallest step that the bound allows; `STEPS`, where nothing changes, if none.

    Args:
        changed: for each sample, whether its answer changed at each of the steps.
        steps: ascending, below `STEPS`.
        target: share of changed answers, in (0, 1).
    """
    pairs = zip(steps, risk_bounds(changed), strict=True)
    return next((step for step, bound in pairs if bound <= target), STEPS)


def risk_bounds(changed: Sequence[Sequence[bool]]) -> list[float]:
    """For each step, what the share of changed answers is at most on new requests: falls with the step.

    (sum of losses + 1) / (samples + 1), where a sample whose answer changed at a step has changed at all below it.
    """
    return [(sum(column) + 1) / (len(changed) + 1) for column in zip(*map(make_monotone, changed), strict=True)]


def capped(changed: Sequence[Sequence[bool]], steps: Sequence[int], caps: Sequence[int]) -> list[list[bool]]:
    """For each sample, whether its answer changes at each of the steps and at `STEPS` if it gets no more than its cap.

    Args:
        changed: without caps, see `chosen_step`; with all tokens no answer changes.
        caps: a step for each sample, `STEPS` or one of the steps.
    """
    rungs = (*steps, STEPS)
    each = zip(changed, map(rungs.index, caps), strict=True)
    return [[(*own, False)[min(place, cap)] for place in range(len(rungs))] for own, cap in each]


def shares_changed(changed: Sequence[Sequence[bool]]) -> list[float]:
    """For each step, the share of the samples whose answer changed, as measured."""
    return [sum(column) / len(changed) for column in zip(*changed, strict=True)]


def samples_needed(target: float) -> int:
    """How many there have to be before any step can be allowed."""
    return ceil(1 / target - 1 - 1e-9)


def make_monotone(changed: Sequence[bool]) -> list[bool]:
    """A larger count may not be worse: changed from the largest step that changed on down."""
    return [any(changed[place:]) for place in range(len(changed))]
