"""Figures with percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_RESAMPLES = 2000

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""(..., values) -> (...)"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval at `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def show(self, digits: int = 2, scale: float = 1) -> str:
        return f"{scale * self.value:.{digits}f} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


def estimate(values: Sequence[float], statistic: Statistic) -> Estimate:
    """The statistic of independent values, with its interval; deterministic."""
    sample = np.asarray(values, np.float64)
    drawn = resample(sample, statistic, _RESAMPLES, np.random.default_rng(0))
    return Estimate(float(statistic(sample)), *interval(drawn))


def resample(sample: Floats, statistic: Statistic, times: int, random: np.random.Generator) -> Floats:
    """(times,) statistics of resamples, whose rows are drawn from `sample` with replacement."""
    picks = random.integers(0, len(sample), (times, len(sample)))
    return statistic(sample[picks].reshape(times, -1))


def interval(drawn: Floats) -> tuple[float, float]:
    """Both ends of the interval, from the statistics of resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
