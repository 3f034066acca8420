"""Figures with their intervals, and ratios of figures, by a bootstrap in two stages.

Rounds are drawn with replacement, and within each round its requests, or for throughput its runs of answers. The two
sides of a ratio are drawn with the same rounds, since they were measured side by side. A figure is the mean over the
rounds of what one round gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""(..., values) -> (...); NaN stands for no value."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval at `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def show(self, digits: int = 2, scale: float = 1) -> str:
        return f"{scale * self.value:.{digits}f} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Draws:
    """A figure, and what it is in each of `RESAMPLES` resamples."""

    value: float
    drawn: Floats

    def __truediv__(self, base: Draws) -> Draws:
        return Draws(self.value / base.value, self.drawn / base.drawn)

    def estimate(self) -> Estimate:
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self.drawn, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))


def mean(values: Floats) -> Floats:
    return np.asarray(np.nanmean(values, axis=-1))


def rate(gaps: Floats) -> Floats:
    """Events per second from the times between them."""
    return np.asarray(1 / np.nanmean(gaps, axis=-1))


def quantile(q: float) -> Statistic:
    """The statistic of that name."""

    def of(values: Floats) -> Floats:
        flat = values.reshape(-1, values.shape[-1])
        whole = not np.isnan(flat).any()
        found = np.quantile(flat, q, axis=-1) if whole else [np.quantile(row[~np.isnan(row)], q) for row in flat]
        return np.asarray(found).reshape(values.shape[:-1])

    return of


def draw(rounds: Sequence[Sequence[Sequence[float]]], statistic: Statistic) -> Draws:
    """Of values by round, by request.

    Raises:
        ValueError: a round without values.
    """
    by_round = [_padded(requests) for requests in rounds]
    if not by_round or any(values.size == 0 for values in by_round):
        raise ValueError("a figure of no values")
    values = float(np.mean([statistic(each.reshape(-1)) for each in by_round]))
    random = np.random.default_rng(0)
    resampled = []
    for each in by_round:
        picks = random.integers(0, len(each), (RESAMPLES, len(each)))
        resampled.append(statistic(each[picks].reshape(RESAMPLES, -1)))
    chosen = np.random.default_rng(1).integers(0, len(by_round), (len(by_round), RESAMPLES))
    return Draws(values, np.stack(resampled)[chosen, np.arange(RESAMPLES)].mean(axis=0))


def gaps(start_s: Sequence[float], e2e_s: Sequence[float]) -> list[float]:
    """Times between one answer's end and the next's, the first from the first request on; in seconds."""
    ends = np.sort(np.add(start_s, e2e_s))
    return np.diff(ends, prepend=min(start_s)).tolist()  # type: ignore[no-any-return]


def runs(gaps: Sequence[float]) -> list[list[float]]:
    """Gaps that follow each other, sqrt(n) or a few more of them, to be drawn as one (block bootstrap, Kuensch 1989).

    Answers that leave in one step of the engine end together: a wave of eight is seven gaps of nothing and one of a
    whole step. Drawn one by one, how many steps there were would be a matter of chance, so no run ends inside a wave.
    """
    length, nothing = isqrt(len(gaps)), sum(gaps) / len(gaps) / 10
    found: list[list[float]] = [[]]
    for gap in gaps:
        if len(found[-1]) >= length and gap > nothing:
            found.append([])
        found[-1].append(gap)
    return found


def _padded(requests: Sequence[Sequence[float]]) -> Floats:
    """(requests, most values), NaN where a request has fewer."""
    width = max((len(values) for values in requests), default=0)
    padded = np.full((len(requests), width), np.nan)
    for row, values in zip(padded, requests, strict=True):
        row[: len(values)] = values
    return padded
