"""Right or wrong, and how sure that is: exact match after normalisation, intervals of 95 %."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

_CONFIDENCE = 0.95
_RESAMPLES = 2000
_NO_WORD = re.compile(r"[^\w\s]|_")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


class Estimate(BaseModel):
    """A mean over `count` questions with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float
    count: int


def normalise(text: str) -> str:
    """Case, punctuation, articles and white space taken out: "A red circle." is "red circle"."""
    return " ".join(_ARTICLE.sub(" ", _NO_WORD.sub(" ", text.casefold())).split())


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """The answer is one of those accepted, both normalised."""
    return normalise(answer) in {normalise(text) for text in accepted}


def share(hits: Sequence[bool]) -> Estimate:
    """Share of hits with Wilson's score interval, which holds for shares near 0 and 1 too.

    The questions count as independent. Those that share an image are not quite: then the interval is too narrow.

    Raises:
        ValueError: there are none.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if not hits:
        raise ValueError("a share of no questions")
    interval = binomtest(sum(hits), len(hits)).proportion_ci(_CONFIDENCE, method="wilson")
    return Estimate(value=sum(hits) / len(hits), low=float(interval.low), high=float(interval.high), count=len(hits))


def mean(values: Sequence[float]) -> Estimate:
    """Mean with the percentile interval of a bootstrap over the questions; equal values give equal intervals.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("a mean of no questions")
    sample = np.asarray(values, np.float64)
    drawn = np.random.default_rng(0).integers(0, len(sample), (_RESAMPLES, len(sample)))
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(sample[drawn].mean(axis=1), [tail, 100 - tail])
    return Estimate(value=float(sample.mean()), low=float(low), high=float(high), count=len(sample))
