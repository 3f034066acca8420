"""Which tokens are removed, and the places of the others: one program per image, with all its scores in registers.

The rank of a score is the number of scores before it, found by n^2 comparisons. No order of threads can change it, and
it needs no stable sort, which takes several launches. One multiprocessor does all comparisons of an image, so images
of more than `MOST_TOKENS` run as references.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.inputs import at_most_fp32
from foldserve.reducers import fold, illava
from foldserve.reducers.fold import Fold, Order
from foldserve.reducers.illava import IntoOne

MOST_TOKENS = 1024
"""Largest image. 1,024 scores are a million comparisons, some 20 us on one multiprocessor by its clock rate. Twice as
many scores would take as long as the launches that the kernel saves. Today's towers give 144 to 729 tokens per grid."""

COMPARED_AT_ONCE = 1 << 13  # comparisons that sm_90 has registers for; not tuned on a device yet


def place(score: Tensor, partner: Tensor, n: int, k: int, order: Order) -> Fold:
    """`foldserve.reducers.fold.place` in one launch; TypeError for fp64.

    Minimum memory traffic: 6 n B bytes read, (3 n - 2 k) 8 B written. The reference is 19 torch operators, each at
    least a launch, with a stable sort among them.
    """
    at_most_fp32(score)
    if n > MOST_TOKENS:
        return fold.place.reference(score, partner, n, k, order)
    batch = len(score)
    slot = partner.new_empty(batch, n)
    sizes, kept_token = partner.new_empty(batch, n - k), partner.new_empty(batch, n - k)
    _place[batch,](
        score.contiguous(),
        partner.contiguous(),
        slot,
        sizes,
        kept_token,
        n,
        k,
        ORDER=order,
        **_blocks(MOST_TOKENS // 2),
    )
    return Fold(slot, sizes, kept_token)


def lowest_into_one(score: Tensor, r: int) -> IntoOne:
    """`foldserve.reducers.illava.lowest_into_one` in one launch; TypeError for fp64.

    Minimum memory traffic: 4 n B bytes read, (12 n + 16 (n - r)) B written. The reference is 17 torch operators, each
    at least a launch, with two stable sorts among them.
    """
    at_most_fp32(score)
    batch, n = score.shape
    if n > MOST_TOKENS:
        return illava.lowest_into_one.reference(score, r)
    source, sizes, group = (score.new_empty(batch, length, dtype=torch.int64) for length in (n - r, n - r, n))
    weight = score.new_empty(batch, n, dtype=torch.float32)
    _lowest_into_one[batch,](score.contiguous(), source, group, sizes, weight, n, r, **_blocks(MOST_TOKENS))
    return IntoOne(source, group, sizes, weight)


def _blocks(most: int) -> dict[str, int]:
    """The same sizes for every n: others would compile a variant of the kernel for each doubling of n."""
    return {"BLOCK": most, "CHUNK": COMPARED_AT_ONCE // most, "num_warps": 4 if most < 1024 else 8}


@triton.jit
def _keys(score: tl.tensor, index: tl.tensor, n: tl.tensor, DESCENDING: tl.constexpr) -> tl.tensor:
    """int32 keys in sorting order of the scores; NaN is the highest score, as in torch, and -0 equals 0."""
    value = tl.load(score + index, index < n, 0.0).to(tl.float32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value == value, key, 0x7FFFFFFF)
    if DESCENDING:
        key = -1 - key
    return tl.where(index < n, key, 0x7FFFFFFF)


@triton.jit
def _rank(
    score: tl.tensor, n: tl.tensor, DESCENDING: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """(BLOCK,) int32: how many of n scores come before each; ties by position."""
    own = tl.arange(0, BLOCK)
    own_key = _keys(score, own, n, DESCENDING)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        key = _keys(score, other, n, DESCENDING)
        equal = (key[None, :] == own_key[:, None]) & (other[None, :] < own[:, None])
        before = (key[None, :] < own_key[:, None]) | equal
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank


@triton.jit(do_not_specialize=["n", "k"], do_not_specialize_on_alignment=["score", "partner"])
def _place(
    score: tl.tensor,
    partner: tl.tensor,
    slot: tl.tensor,
    sizes: tl.tensor,
    kept_token: tl.tensor,
    n: int,
    k: int,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    even, odd = (n + 1) // 2, n // 2
    index = tl.arange(0, BLOCK)
    is_even, is_odd = index < even, index < odd
    rank = _rank(score + image * even, even, True, BLOCK, CHUNK)
    stays = is_even & (rank >= k)
    staying = tl.cumsum(stays.to(tl.int32), axis=0)  # unmerged even tokens up to and including this one
    if ORDER == "position":
        even_slot = staying - 1 + index
        odd_slot = staying + index
    elif ORDER == "unmerged_first":
        even_slot = staying - 1
        odd_slot = index + (even - k)
    else:
        even_slot = rank - k
        odd_slot = index + (even - k)
    goes_to = tl.load(partner + image * even + index, is_even, 0).to(tl.int32)
    received = tl.histogram(goes_to, BLOCK, mask=is_even & (rank < k))
    target = tl.where(stays, even_slot, tl.gather(odd_slot, goes_to, 0))

    slot += image * n
    tl.store(slot + 2 * index, target.to(tl.int64), is_even)
    tl.store(slot + 2 * index + 1, odd_slot.to(tl.int64), is_odd)
    sizes += image * (n - k)
    tl.store(sizes + even_slot, tl.full((BLOCK,), 1, tl.int64), stays)
    tl.store(sizes + odd_slot, (1 + received).to(tl.int64), is_odd)
    kept_token += image * (n - k)
    tl.store(kept_token + even_slot, (2 * index).to(tl.int64), stays)
    tl.store(kept_token + odd_slot, (2 * index + 1).to(tl.int64), is_odd)


@triton.jit(do_not_specialize=["n", "r"], do_not_specialize_on_alignment=["score"])
def _lowest_into_one(
    score: tl.tensor,
    source: tl.tensor,
    group: tl.tensor,
    sizes: tl.tensor,
    weight: tl.tensor,
    n: int,
    r: int,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < n
    rank = _rank(score + image * n, n, False, BLOCK, CHUNK)
    stays = inside & (rank >= r)
    slot = tl.cumsum(stays.to(tl.int32), axis=0) - 1
    merged_into = tl.sum(tl.where(inside & (rank == r), slot, 0), axis=0)
    all_weights = tl.cast((r + 1) * (r + 2) // 2, tl.float32)
    own_weight = tl.math.div_rn((r + 1 - rank).to(tl.float32), all_weights)

    tl.store(source + image * (n - r) + slot, index.to(tl.int64), stays)
    tl.store(sizes + image * (n - r) + slot, tl.where(rank == r, r + 1, 1).to(tl.int64), stays)
    tl.store(group + image * n + index, tl.where(stays, slot, merged_into).to(tl.int64), inside)
    tl.store(weight + image * n + index, tl.where(rank <= r, own_weight, 1.0), inside)
