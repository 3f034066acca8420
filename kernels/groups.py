"""Sums and means of groups of tokens, without a sort, without atomics: the same bits on every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.dtypes import at_most_fp32

BLOCK_WIDTH, CHUNK = 128, 64
"""Channels of a program, and tokens that it looks at together; not tuned on a device yet."""


def group_mean(x: Tensor, group: Tensor, groups: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foldserve.reducers.fold.group_mean` in one launch; fp32 means of fp16, bf16 or fp32.

    Floor of memory traffic: x read once, B groups d x 4 bytes written. Besides, every program reads the image's groups,
    8 n bytes, from the L2 cache. The reference is 11 to 14 operators of torch, each a launch or more, a stable sort
    among them.

    Raises:
        TypeError: x is in fp64.
    """
    total = group.new_empty(len(x), groups)
    return _launch(x, group, groups, sizes, total), total


def group_sum(values: Tensor, slot: Tensor, sizes: Tensor, weight: Tensor | None = None) -> Tensor:
    """`foldserve.reducers.fold.group_sum` in one launch; see `group_mean`."""
    return _launch(values, slot, sizes.shape[1], weight, None)


def _launch(x: Tensor, group: Tensor, groups: int, weight: Tensor | None, total: Tensor | None) -> Tensor:
    at_most_fp32(x)
    batch, n, width = x.shape
    out = x.new_empty(batch, groups, width, dtype=torch.float32)
    _sum_groups[groups, triton.cdiv(width, BLOCK_WIDTH), batch](
        x,
        group.contiguous(),
        None if weight is None else weight.contiguous(),
        out,
        total,
        n,
        width,
        *x.stride(),
        BLOCK_WIDTH=min(BLOCK_WIDTH, triton.next_power_of_2(width)),
        CHUNK=CHUNK,
    )
    return out


@triton.jit(do_not_specialize=["n"])
def _sum_groups(
    x: tl.tensor,
    group: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    n: int,
    width: int,
    image_stride: int,
    token_stride: int,
    channel_stride: int,
    BLOCK_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """A program adds up its channels of one group; of the tokens it reads only those of the group.

    With `total`, which it writes, it divides by the sum of the weights, which are integers then.
    """
    own, groups = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    columns = x + image * image_stride + c[None, :] * channel_stride
    acc = tl.zeros((BLOCK_WIDTH,), tl.float32)
    weights = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = tl.load(group + image * n + i, i < n, -1) == own
        if tl.sum(mine.to(tl.int32), axis=0) > 0:
            rows = tl.load(columns + i[:, None] * token_stride, mine[:, None] & (c < width)[None, :], 0.0)
            rows = rows.to(tl.float32)
            w = mine.to(tl.int64) if weight is None else tl.load(weight + image * n + i, mine, 0)
            if weight is not None:
                rows *= w.to(tl.float32)[:, None]
            if total is not None:
                weights += w
            acc += tl.sum(rows, axis=0)
    if total is not None:
        together = tl.sum(weights, axis=0)
        acc = tl.math.div_rn(acc, together.to(tl.float32))
        if tl.program_id(1) == 0:
            tl.store(total + image * groups + own, together)
    tl.store(out + (image * groups + own) * width + c, acc, c < width)
