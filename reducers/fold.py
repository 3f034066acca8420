"""The fold that FOLDER is made of: pair even tokens with odd ones, merge the most alike.

A fold only decides where each token goes. Values follow in `group_sum`: one sum over the original tokens gives the
result of any number of folds, and nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["position", "unmerged_first"]


class Reduced(NamedTuple):
    """Result of a reduction from n to n_out tokens.

    Attributes:
        tokens: (B, n_out, d), dtype of the input.
        sizes: (B, n_out) int64, original tokens in each output token; sums to n.
        source: (B, n_out) int64, index of the original token that each output token stands for: itself, or the one
            that the others of its group were merged into.
        group: (B, n) int64, index of the output token that each original token went into.
    """

    tokens: Tensor
    sizes: Tensor
    source: Tensor
    group: Tensor


class Fold(NamedTuple):
    """Where one fold sends the n tokens of a sequence.

    Attributes:
        slot: (B, n) int64, index in the folded sequence; a merged token has that of its destination.
        sizes: (B, n - k) int64, tokens in each slot.
        survivor: (B, n - k) int64, the token of each slot that was not merged away.
    """

    slot: Tensor
    sizes: Tensor
    survivor: Tensor


def fold(metric: Tensor, k: int, *, order: Order, class_token: bool = False, penalty: Tensor | None = None) -> Fold:
    """Merge the k even tokens that are most like an odd one into it; of equals, the earlier ones.

    Args:
        metric: (B, n, d_m), at least fp32; compared by cosine.
        k: tokens to merge, 1 <= k <= (n - 1) // 2.
        order: of the folded sequence: by position, or the remaining even tokens before all the odd ones.
        class_token: token 0 is the class token: it neither goes nor receives.
        penalty: (B, n), subtracted from an even token's score: changes which tokens go, never where they go.

    Raises:
        ValueError: k is out of range.
    """
    n = metric.shape[1]
    if not 1 <= k <= (n - 1) // 2:
        raise ValueError(f"one fold of {n} tokens can merge 1 to {(n - 1) // 2} of them, not {k}")
    metric = F.normalize(metric, dim=-1)
    with true_fp32():
        cosine = metric[:, 0::2] @ metric[:, 1::2].mT  # (B, even, odd)
    score, partner = cosine.max(dim=-1)  # (B, even)
    if penalty is not None:
        score = score - penalty[:, 0::2]
    if class_token:
        score[:, 0] = -torch.inf
    merged = score.argsort(dim=-1, descending=True, stable=True)[:, :k]  # topk may break ties in any order
    stays = torch.ones_like(score, dtype=torch.bool).scatter_(1, merged, False)
    return _place(stays, partner, n, k, order)


def _place(stays: Tensor, partner: Tensor, n: int, k: int, order: Order) -> Fold:
    """Number the tokens that stay; a merged one gets the number of its partner.

    Args:
        stays: (B, even) bool, all but k of the even tokens.
        partner: (B, even), index among the odd tokens.
    """
    batch, even = stays.shape
    odd, n_out = n - even, n - k
    index = torch.arange(n, device=stays.device).expand(batch, n)
    rank = stays.cumsum(dim=-1)  # remaining even tokens, up to and with this one
    if order == "position":
        even_slot, odd_slot = rank - 1 + index[:, :even], rank[:, :odd] + index[:, :odd]
    else:
        even_slot, odd_slot = rank - 1, index[:, :odd] + (even - k)
    slot, target = rank.new_empty(2, batch, n)
    slot[:, 0::2] = torch.where(stays, even_slot, odd_slot.gather(1, partner))
    target[:, 0::2] = torch.where(stays, even_slot, n_out)  # one column more, cut off below
    slot[:, 1::2] = target[:, 1::2] = odd_slot
    survivor = rank.new_empty(batch, n_out + 1).scatter_(1, target, index)[:, :n_out]
    return Fold(slot, group_sizes(slot, n_out), survivor)


def merge(x: Tensor, steps: Sequence[Fold]) -> Reduced:
    """Apply folds, the first one first: each group becomes the mean of its original tokens.

    That is the size-weighted mean of every fold, without its rounding. Tokens come back in at least fp32.

    Args:
        x: (B, n, d).
        steps: folds of n, n - k_1, n - k_1 - k_2, ... tokens.
    """
    batch, n, _ = x.shape
    group = source = torch.arange(n, device=x.device).expand(batch, n)
    for step in steps:
        group = step.slot.gather(1, group)
        source = source.gather(1, step.survivor)
    sizes = group_sizes(group, source.shape[1])
    tokens = group_sum(at_least_fp32(x), group, sizes) / sizes.unsqueeze(-1)
    return Reduced(tokens, sizes, source, group)


def group_sizes(slot: Tensor, groups: int) -> Tensor:
    """(B, n) group of each token -> (B, groups) int64 tokens in each group."""
    return slot.new_zeros(slot.shape[0], groups).scatter_add_(1, slot, torch.ones_like(slot))


def group_sum(values: Tensor, slot: Tensor, sizes: Tensor) -> Tensor:
    """Sum the values of each group in position order: the same bits on every run, whatever else is in the batch.

    `scatter_add` adds floats in any order on a GPU; a one-hot matrix product costs 7 times as much (2.5 against
    0.35 ms, 576 tokens of width 1024, one CPU core).

    Args:
        values: (B, n, d).
        slot: (B, n), group of each token.
        sizes: (B, groups), tokens in each group.

    Returns:
        (B, groups, d).
    """
    batch, n, width = values.shape
    first_row = torch.arange(0, batch * n, n, device=slot.device).unsqueeze(1)
    members = slot.argsort(dim=-1, stable=True) + first_row  # (B, n), group by group
    flat_sizes = sizes.flatten()
    offsets = flat_sizes.cumsum(dim=0) - flat_sizes
    sums = F.embedding_bag(members.flatten(), values.reshape(-1, width), offsets, mode="sum")
    return sums.view(*sizes.shape, width)


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision to fp32: a bf16 cosine cannot tell the best partner from the next."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def true_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever the process allows elsewhere: TF32 would move cosines by 1e-3.

    The flag is read on the host when a kernel is launched, so that nothing waits for the device.
    """
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
