"""Ratios of two variants timed in pairs, so that a busy or throttled machine slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from foldserve.loadtest.report.estimates import Estimate, estimate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ratio(Estimate):
    """Median of the ratios of `pairs` pairs."""

    pairs: int

    def __str__(self) -> str:
        return self.show(3)


def alternate(variant: Callable[[], T], base: Callable[[], T], pairs: int) -> list[tuple[T, T]]:
    """(variant, base) results of `pairs` pairs, in the order ABBA: a drift of the machine favours neither."""
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
    """Median of variant / base, from pairs of costs in any unit."""
    found = estimate([variant / base for variant, base in pairs], lambda ratios: np.median(ratios, axis=-1))
    return Ratio(found.value, found.low, found.high, len(pairs))
