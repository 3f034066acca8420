"""Withdrawal's work in a step: the rows that enter the deep layers, and where their keys and values go."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_WIDTH, BLOCK_ROWS = 1024, 256
"""Channels and rows of a program; not tuned on a device yet."""


def take_rows(rows: Tensor, positions: Tensor, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`foldserve.reducers.withdraw.take_rows` in one launch instead of three.

    Memory traffic is at its floor in both: each row that enters is read and written once.
    """
    count, width = len(rows), max(hidden.shape[1], residual.shape[1])
    taken = (
        positions.new_empty(count),
        hidden.new_empty(count, hidden.shape[1]),
        residual.new_empty(count, residual.shape[1]),
    )
    if count:
        _take_rows[count, triton.cdiv(width, BLOCK_WIDTH)](
            rows.contiguous(),
            positions.contiguous(),
            hidden,
            residual,
            *taken,
            hidden.shape[1],
            residual.shape[1],
            *hidden.stride(),
            *residual.stride(),
            BLOCK_WIDTH=min(BLOCK_WIDTH, triton.next_power_of_2(width)),
        )
    return taken


def kv_slots(block_table: Tensor, request_of: Tensor, positions: Tensor, block_size: int, size: int) -> Tensor:
    """`foldserve.reducers.withdraw.kv_slots` in one launch instead of nine, in every step and KV cache group.

    Floor of memory traffic: 20 bytes read per row, 8 written per slot.
    """
    slots = positions.new_empty(size)
    if size:
        _kv_slots[triton.cdiv(size, BLOCK_ROWS),](
            block_table,
            request_of.contiguous(),
            positions.contiguous(),
            slots,
            len(positions),
            size,
            *block_table.stride(),
            block_size,
            BLOCK_ROWS=BLOCK_ROWS,
        )
    return slots


@triton.jit
def _take_rows(
    rows: tl.tensor,
    positions: tl.tensor,
    hidden: tl.tensor,
    residual: tl.tensor,
    taken_positions: tl.tensor,
    taken_hidden: tl.tensor,
    taken_residual: tl.tensor,
    hidden_width: int,
    residual_width: int,
    hidden_row_stride: int,
    hidden_channel_stride: int,
    residual_row_stride: int,
    residual_channel_stride: int,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    to = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + to)
    c = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    of_hidden = tl.load(hidden + row * hidden_row_stride + c * hidden_channel_stride, c < hidden_width)
    of_residual = tl.load(residual + row * residual_row_stride + c * residual_channel_stride, c < residual_width)
    tl.store(taken_hidden + to * hidden_width + c, of_hidden, c < hidden_width)
    tl.store(taken_residual + to * residual_width + c, of_residual, c < residual_width)
    if tl.program_id(1) == 0:
        tl.store(taken_positions + to, tl.load(positions + row))


@triton.jit(do_not_specialize=["count", "size"])
def _kv_slots(
    block_table: tl.tensor,
    request_of: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    count: int,
    size: int,
    request_stride: int,
    block_stride: int,
    block_size: int,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = tl.load(positions + row, row < count, -1)
    stored = position >= 0
    request = tl.load(request_of + row, row < count, 0)
    block = tl.load(block_table + request * request_stride + position // block_size * block_stride, stored, 0)
    slot = block.to(tl.int64) * block_size + position % block_size
    tl.store(slots + row, tl.where(stored, slot, -1), row < size)
