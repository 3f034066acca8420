"""VTW: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.method import Decoder
from foldserve.reducers.ops import Op


def take_rows(rows: Tensor, positions: Tensor, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a step that enter the deep layers.

    Args:
        rows: (m,) int64, of the n rows.
        positions: (n,) integers.
        hidden, residual: (n, d) and (n, e).

    Returns:
        positions (m,), hidden (m, d), residual (m, e).
    """
    return positions[rows], hidden[rows], residual[rows]


@Op
def kv_slots(block_table: Tensor, request_of: Tensor, positions: Tensor, block_size: int, size: int) -> Tensor:
    """Slot in the deep layers' KV cache of each row.

    Args:
        block_table: (r, blocks) int32, of the requests that have a row.
        request_of: (m,) int64, index of each row's request among those.
        positions: (m,) int64, place of the row among its request's kept tokens; negative: it stores nothing.
        block_size: tokens per block.
        size: length of the result, at least m.

    Returns:
        (size,) int64; -1 for what stores nothing, which all beyond m rows is.
    """
    blocks = block_table[request_of, positions // block_size].long()
    slots = (blocks * block_size + positions % block_size).masked_fill_(positions < 0, -1)
    unused = size - len(slots)
    return F.pad(slots, (0, unused), value=-1) if unused else slots


class Withdraw(Decoder):
    """All vision tokens leave at layer K. The work is done where the KV cache is, in the engine."""

    name = "withdraw"
    summary = "Drops all vision tokens from the decoder's layers from K on, and their KV cache with them (VTW)."
    paper = "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference"

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens
