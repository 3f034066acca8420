"""Sums and means of groups of tokens without sort or atomics: the same bits on every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.inputs import at_most_fp32, image_stride

BLOCK_TOKENS, COMPARED_WITH = 32, 128
"""Tokens per program of `_order_by_group`, and tokens that it compares them with at a time; not tuned on a device."""

BLOCK_WIDTH, BLOCK_MEMBERS = 256, 8
"""Channels per program of `_sum_groups`, and tokens that it adds at a time; not tuned on a device yet."""


def group_mean(x: Tensor, group: Tensor, groups: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foldserve.reducers.fold.group_mean` in two launches; fp32 means of fp16, bf16 or fp32, TypeError for fp64.

    The first launch orders tokens by group; the second has one program per group, which reads only its own tokens.
    Minimum memory traffic: x read once, B groups d x 4 bytes written. The reference is 11 to 14 torch operators, each
    at least a launch, with a stable sort among them.
    """
    total = group.new_empty(len(x), groups)
    return _launch(x, group, groups, sizes, total), total


def group_sum(values: Tensor, slot: Tensor, sizes: Tensor, weight: Tensor | None = None) -> Tensor:
    """`foldserve.reducers.fold.group_sum` in two launches; see `group_mean`."""
    return _launch(values, slot, sizes.shape[1], weight, None)


def _launch(x: Tensor, group: Tensor, groups: int, weight: Tensor | None, total: Tensor | None) -> Tensor:
    at_most_fp32(x)
    batch, n, width = x.shape
    members = group.new_empty(batch, n, dtype=torch.int32)
    offsets = group.new_empty(batch, groups + 1, dtype=torch.int32)
    _order_by_group[triton.cdiv(max(n, groups + 1), BLOCK_TOKENS), batch](
        group.contiguous(),
        members,
        offsets,
        n,
        groups,
        BLOCK_TOKENS=BLOCK_TOKENS,
        COMPARED_WITH=COMPARED_WITH,
    )
    out = x.new_empty(batch, groups, width, dtype=torch.float32)
    stride, unit = image_stride(x)
    block_width = min(BLOCK_WIDTH, triton.next_power_of_2(width))
    _sum_groups[groups, triton.cdiv(width, block_width), batch](
        x,
        members,
        offsets,
        None if weight is None else weight.contiguous(),
        out,
        total,
        n,
        width,
        stride,
        *x.stride()[1:],
        UNIT=unit,
        BLOCK_WIDTH=block_width,
        BLOCK_MEMBERS=BLOCK_MEMBERS,
    )
    return out


@triton.jit(do_not_specialize=["n", "groups"], do_not_specialize_on_alignment=["group"])
def _order_by_group(
    group: tl.tensor,
    members: tl.tensor,
    offsets: tl.tensor,
    n: int,
    groups: int,
    BLOCK_TOKENS: tl.constexpr,
    COMPARED_WITH: tl.constexpr,
) -> None:
    """Finds a token's place by counting the tokens before it, which no order of threads can change.

    Writes `members` (n,), the tokens group by group in position order, and `offsets` (groups + 1,), where each group
    begins in `members`.
    """
    image = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # index of a token, and of a group
    own_group = tl.load(group + image * n + own, own < n, 0)
    place = tl.zeros((BLOCK_TOKENS,), tl.int32)
    offset = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for start in range(0, n, COMPARED_WITH):
        other = start + tl.arange(0, COMPARED_WITH)
        other_group = tl.load(group + image * n + other, other < n, groups)
        equal = (other_group[None, :] == own_group[:, None]) & (other[None, :] < own[:, None])
        before = (other_group[None, :] < own_group[:, None]) | equal
        place += tl.sum(before.to(tl.int32), axis=1)
        offset += tl.sum((other_group[None, :] < own[:, None]).to(tl.int32), axis=1)
    tl.store(members + image * n + place, own, own < n)
    tl.store(offsets + image * (groups + 1) + own, offset, own <= groups)


@triton.jit(do_not_specialize=["n", "image_stride"], do_not_specialize_on_alignment=["weight"])
def _sum_groups(
    x: tl.tensor,
    members: tl.tensor,
    offsets: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    n: int,
    width: int,
    image_stride: int,
    token_stride: int,
    channel_stride: int,
    UNIT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
) -> None:
    """A program sums some channels of one group. With `total` it also divides by the sum of the integer weights."""
    own, groups = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    columns = x + image * image_stride * UNIT + c[None, :] * channel_stride
    start = tl.load(offsets + image * (groups + 1) + own)
    end = tl.load(offsets + image * (groups + 1) + own + 1)
    acc = tl.zeros((BLOCK_WIDTH,), tl.float32)
    weights = tl.zeros((BLOCK_MEMBERS,), tl.int64)
    for first in range(start, end, BLOCK_MEMBERS):
        at = first + tl.arange(0, BLOCK_MEMBERS)
        mine = at < end
        i = tl.load(members + image * n + at, mine, 0)
        rows = tl.load(columns + i[:, None] * token_stride, mine[:, None] & (c < width)[None, :], 0.0).to(tl.float32)
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
