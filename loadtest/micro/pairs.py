"""Ratios of two variants timed in pairs, so that a busy or throttled machine slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

T = TypeVar("T")

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of the ratios of `pairs` pairs, and the interval that its bootstrap gives at `CONFIDENCE`."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def alternate(variant: Callable[[], T], base: Callable[[], T], pairs: int) -> list[tuple[T, T]]:
    """(variant, base) results of `pairs` pairs, run in the order ABBA: a drift of the machine favours neither."""
    results = []
    for i in range(pairs):
        if i % 2:
            of_base = base()
            results.append((variant(), of_base))
        else:
            of_variant = variant()
            results.append((of_variant, base()))
    return results


def ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """How much of the base's cost the variant has, from (variant, base) costs in any unit."""
    ratios = np.array([variant / base for variant, base in pairs])
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Ratio(median(ratios.tolist()), float(low), float(high), len(ratios))
