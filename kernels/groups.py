"""Sums and means of groups of tokens, without a sort, without atomics: the same bits on every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.inputs import at_most_fp32, image_stride

BLOCK_TOKENS, COMPARED_WITH = 32, 128
"""Tokens of a program of `_order_by_group`, and those that they are compared with at once; not tuned on a device."""

BLOCK_WIDTH, BLOCK_MEMBERS = 256, 8
"""Channels of a program of `_sum_groups`, and tokens that it adds at once; not tuned on a device yet."""


def group_mean(x: Tensor, group: Tensor, groups: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foldserve.reducers.fold.group_mean` in two launches; fp32 means of fp16, bf16 or fp32.

    First the tokens in the order of their groups, and where each group begins; then a program for each group, which
    reads its own tokens only. Floor of memory traffic: x read once, B groups d x 4 bytes written. The reference is 11
    to 14 operators of torch, each a launch or more, a stable sort among them.

    Raises:
        TypeError: x is in fp64.
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
    """Numbers are counted, in any order of threads: a token's place, by the tokens that come before it.

    Writes (n,) `members`, the tokens group by group, in position order, and (groups + 1,) `offsets`, where each group
    begins among them.
    """
    image = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # a token, and the number of a group
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
    """A program adds up its channels of one group.

    With `total`, which it writes, it divides by the sum of the weights, which are integers then.
    """
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
