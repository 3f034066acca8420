"""Accuracy by exact match after normalisation, and its confidence intervals."""

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
    """Removes case, punctuation, articles and extra white space: "A red circle." becomes "red circle"."""
    return " ".join(_ARTICLE.sub(" ", _NO_WORD.sub(" ", text.casefold())).split())


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    return normalise(answer) in {normalise(text) for text in accepted}


def share(hits: Sequence[bool]) -> Score:
    """Share of hits with Wilson's score interval, which also holds near 0 and 1; ValueError without hits.

    The questions are treated as independent. The interval is too narrow if several share an image.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if not hits:
        raise ValueError("a share of no questions")
    interval = binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return Score(sum(hits) / len(hits), float(interval.low), float(interval.high), len(hits))


def mean(values: Sequence[float]) -> Score:
    """Mean with a bootstrap interval over the questions; ValueError without values."""
    if not values:
        raise ValueError("a mean of no questions")
    found = estimate(values, lambda sample: np.mean(sample, axis=-1))
    return Score(found.value, found.low, found.high, len(values))
