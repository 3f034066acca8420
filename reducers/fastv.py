"""FastV: An Image is Worth 1/2 Tokens After Layer 2. It drops and does not merge."""

from __future__ import annotations

from torch import Tensor

from foldserve.reducers.fold import Reduced
from foldserve.reducers.illava import without
from foldserve.reducers.method import ScoringDecoder
from foldserve.reducers.random import keep


def fastv(x: Tensor, score: Tensor, r: int) -> Reduced:
    """Drop the r tokens of lowest score; of equal ones the earlier goes.

    Args:
        x: (B, n, d), any float dtype.
        score: (B, n), attention of the last prompt token in decoder layer K - 1, mean over heads; infinite for a token
            that has to stay (`image_score`).
        r: tokens to remove, 0 <= r <= n.

    Returns:
        n - r tokens as they were, in order; `group` is -1 for what was dropped.
    """
    return keep(x, without(score.argsort(dim=-1, stable=True)[:, :r], score.shape[1]))


class FastV(ScoringDecoder):
    """What the authors keep is rounded, halves to even."""

    name = "fastv"
    summary = "Drops the vision tokens that the last prompt token attends to least, before decoder layer K."
    paper = "An Image is Worth 1/2 Tokens After Layer 2"
    default_ratio = 0.5

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens - round(tokens * (1 - (ratio or 0.0)))

    def reduce(self, x: Tensor, score: Tensor, removed: int) -> Reduced:
        return fastv(x, score, removed)
