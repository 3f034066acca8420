"""VTW: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.method import InDecoder
from foldserve.reducers.ops import Op


def take_rows(rows: Tensor, positions: Tensor, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The m rows of a step that enter the deep layers, of positions (n,), hidden (n, d) and residual (n, e)."""
    return positions[rows], hidden[rows], residual[rows]


@Op
def kv_slots(block_table: Tensor, request_of: Tensor, positions: Tensor, block_size: int, size: int) -> Tensor:
    """KV cache slot of each row in the deep layers.

    Args:
        block_table: (r, blocks) int32, one row per request.
        request_of: (m,) int64, each row's request.
        positions: (m,) int64, each row's index among its request's kept tokens; negative if it stores nothing.

    Returns:
        (size,) int64, size >= m; -1 for rows that store nothing and for the padding after m.
    """
    blocks = block_table[request_of, positions // block_size].long()
    slots = (blocks * block_size + positions % block_size).masked_fill_(positions < 0, -1)
    unused = size - len(slots)
    return F.pad(slots, (0, unused), value=-1) if unused else slots


class Withdraw(InDecoder):
    """All vision tokens leave at layer K. The engine does the work, since it owns the KV cache."""

    name = "withdraw"
    summary = "Drops all vision tokens from the decoder's layers from K on, and their KV cache with them (VTW)."
    paper = "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference"

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens
