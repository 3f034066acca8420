"""FastV: An Image is Worth 1/2 Tokens After Layer 2. It drops and does not merge."""

from __future__ import annotations

from torch import Tensor

from foldserve.reducers.illava import image_score, without
from foldserve.reducers.method import Decoder


def fastv(last_row: Tensor, is_image: Tensor, r: int) -> Tensor:
    """Positions that stay when the r image tokens go that the last prompt token attends to least.

    Of equal ones the earlier goes.

    Args:
        last_row: (B, n), attention of the last prompt token in decoder layer K - 1, mean over heads.
        is_image: (B, n) bool.
        r: image tokens to remove, at most as many as there are.

    Returns:
        (B, n - r) int64, ascending.
    """
    score = image_score(last_row, is_image)
    return without(score.argsort(dim=-1, stable=True)[:, :r], score.shape[1])


class FastV(Decoder):
    """What the authors keep is rounded, halves to even."""

    name = "fastv"
    summary = "Drops the vision tokens that the last prompt token attends to least, before decoder layer K."
    paper = "An Image is Worth 1/2 Tokens After Layer 2"
    default_ratio = 0.5

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens - round(tokens * (1 - (ratio or 0.0)))
