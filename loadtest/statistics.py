"""Figures with their intervals, and ratios of figures, by a bootstrap in two stages.

Rounds are drawn with replacement, and within each round its requests, or for throughput its runs of answers. The two
sides of a ratio are drawn with the same rounds, since they were measured side by side. A figure is the mean over the
rounds of what one round gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from foldserve.loadtest.report.estimates import Estimate, Floats, Statistic, interval, resample

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Draws:
    """A figure, and what it is in each of `RESAMPLES` resamples."""

    value: float
    drawn: Floats

    def __truediv__(self, base: Draws) -> Draws:
        return Draws(self.value / base.value, self.drawn / base.drawn)

    def estimate(self) -> Estimate:
        return Estimate(self.value, *interval(self.drawn))


def mean(values: Floats) -> Floats:
    """As in all statistics here, NaN stands for no value."""
    return np.asarray(np.nanmean(values, axis=-1))


def quotient(pairs: Floats) -> Floats:
    """Mean of the first of each pair over that of the second."""
    return np.asarray(np.nanmean(pairs[..., ::2], axis=-1) / np.nanmean(pairs[..., 1::2], axis=-1))


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
    resampled = [resample(each, statistic, RESAMPLES, random) for each in by_round]
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
