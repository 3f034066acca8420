"""Right or wrong, and how sure that is: exact match after normalisation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foldserve.loadtest.report.estimates import CONFIDENCE, Estimate, estimate

_NO_WORD = re.compile(r"[^\w\s]|_")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Score(Estimate):
    """A mean over `count` questions."""

    count: int


def normalise(text: str) -> str:
    """Case, punctuation, articles and white space taken out: "A red circle." is "red circle"."""
    return " ".join(_ARTICLE.sub(" ", _NO_WORD.sub(" ", text.casefold())).split())


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """The answer is one of those accepted, both normalised."""
    return normalise(answer) in {normalise(text) for text in accepted}


def share(hits: Sequence[bool]) -> Score:
    """Share of hits with Wilson's score interval, which holds for shares near 0 and 1 too.

    The questions count as independent. Those that share an image are not quite: then the interval is too narrow.

    Raises:
        ValueError: there are none.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if not hits:
        raise ValueError("a share of no questions")
    interval = binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return Score(sum(hits) / len(hits), float(interval.low), float(interval.high), len(hits))


def mean(values: Sequence[float]) -> Score:
    """Mean with the interval of a bootstrap over the questions.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("a mean of no questions")
    found = estimate(values, lambda sample: np.mean(sample, axis=-1))
    return Score(found.value, found.low, found.high, len(values))
