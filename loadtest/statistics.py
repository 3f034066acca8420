"""Figures and ratios of figures, with intervals from a two-stage bootstrap.

A figure is the mean over rounds. Rounds are drawn with replacement, and within each round its requests, or for
throughput its runs of answers. Both sides of a ratio use the same draws of rounds, since they were measured together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from foldserve.loadtest.report.estimates import Estimate, Floats, Statistic, interval, resample

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class ResampledFigure:
    """A figure, and its value in each of `RESAMPLES` resamples."""

    value: float
    drawn: Floats

    def __truediv__(self, base: ResampledFigure) -> ResampledFigure:
        return ResampledFigure(self.value / base.value, self.drawn / base.drawn)

    def estimate(self) -> Estimate:
        return Estimate(self.value, *interval(self.drawn))


def mean(values: Floats) -> Floats:
    """Mean without NaN, which in all statistics here stands for a missing value."""
    return np.asarray(np.nanmean(values, axis=-1))


def quotient(pairs: Floats) -> Floats:
    """Mean of the pairs' first values over the mean of their second values."""
    return np.asarray(np.nanmean(pairs[..., ::2], axis=-1) / np.nanmean(pairs[..., 1::2], axis=-1))


def rate(gaps: Floats) -> Floats:
    """Events per second, from the times between them."""
    return np.asarray(1 / np.nanmean(gaps, axis=-1))


def quantile(q: float) -> Statistic:
    def of(values: Floats) -> Floats:
        flat = values.reshape(-1, values.shape[-1])
        whole = not np.isnan(flat).any()
        found = np.quantile(flat, q, axis=-1) if whole else [np.quantile(row[~np.isnan(row)], q) for row in flat]
        return np.asarray(found).reshape(values.shape[:-1])

    return of


def resample_rounds(rounds: Sequence[Sequence[Sequence[float]]], statistic: Statistic) -> ResampledFigure:
    """Resamples values[round][request]; ValueError if a round has none."""
    by_round = [_padded(requests) for requests in rounds]
    if not by_round or any(values.size == 0 for values in by_round):
        raise ValueError("a figure of no values")
    values = float(np.mean([statistic(each.reshape(-1)) for each in by_round]))
    random = np.random.default_rng(0)
    resampled = [resample(each, statistic, RESAMPLES, random) for each in by_round]
    chosen = np.random.default_rng(1).integers(0, len(by_round), (len(by_round), RESAMPLES))
    return ResampledFigure(values, np.stack(resampled)[chosen, np.arange(RESAMPLES)].mean(axis=0))


def gaps(start_s: Sequence[float], e2e_s: Sequence[float]) -> list[float]:
    """Seconds between the ends of consecutive answers; the first counts from the first request."""
    ends = np.sort(np.add(start_s, e2e_s))
    return np.diff(ends, prepend=min(start_s)).tolist()  # type: ignore[no-any-return]


def runs(gaps: Sequence[float]) -> list[list[float]]:
    """Splits gaps into runs of sqrt(n) or slightly more, to be drawn as a whole (block bootstrap, Kuensch 1989).

    Answers of the same engine step end together: eight of them give seven gaps near 0 and one of a whole step. Drawing
    gaps one by one would make the number of steps random, so no run ends between such answers.
    """
    length, nothing = isqrt(len(gaps)), sum(gaps) / len(gaps) / 10
    found: list[list[float]] = [[]]
    for gap in gaps:
        if len(found[-1]) >= length and gap > nothing:
            found.append([])
        found[-1].append(gap)
    return found


def _padded(requests: Sequence[Sequence[float]]) -> Floats:
    """(requests, most values of a request), padded with NaN."""
    width = max((len(values) for values in requests), default=0)
    padded = np.full((len(requests), width), np.nan)
    for row, values in zip(padded, requests, strict=True):
        row[: len(values)] = values
    return padded
