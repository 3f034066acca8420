"""FastV: An Image is Worth 1/2 Tokens After Layer 2."""

from __future__ import annotations

from torch import Tensor

from foldserve.reducers.fold import Reduced, keep
from foldserve.reducers.illava import remaining_indices
from foldserve.reducers.method import ScoredInDecoder


def fastv(x: Tensor, score: Tensor, r: int) -> Reduced:
    """Drop the r tokens of lowest score; ties drop the earlier one.

    Args:
        x: (B, n, d), any float dtype.
        score: (B, n), see `illava.image_score`.
        r: 0 <= r <= n.
    """
    return keep(x, remaining_indices(score.argsort(dim=-1, stable=True)[:, :r], score.shape[1]))


class FastV(ScoredInDecoder):
    """Rounds the number of kept tokens half to even, as the authors do."""

    name = "fastv"
    summary = "Drops the vision tokens that the last prompt token attends to least, before decoder layer K."
    paper = "An Image is Worth 1/2 Tokens After Layer 2"
    default_ratio = 0.5

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens - round(tokens * (1 - (ratio or 0.0)))

    def reduce(self, x: Tensor, score: Tensor, removed: int) -> Reduced:
        return fastv(x, score, removed)
