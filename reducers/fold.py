"""The fold that FOLDER, ToMe and Turbo are made of: pair even tokens with odd ones, merge the most alike.

A fold only decides where each token goes. Values follow in `group_sum`: one sum over the original tokens gives the
result of any number of folds, and nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.ops import Op

Order = Literal["position", "unmerged_first", "best_unmerged_first"]


class Reduced(NamedTuple):
    """Result of a reduction from n to n_out tokens.

    Attributes:
        tokens: (B, n_out, d), dtype of the input.
        sizes: (B, n_out) int64, original tokens in each output token; sums to n unless some are dropped.
        source: (B, n_out) int64, index of the original token that each output token stands for: itself, or the one
            that the others of its group were merged into.
        group: (B, n) int64, index of the output token that each original token went into; -1 if it was dropped.
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
        metric: (B, n, d_m), any float dtype; compared by cosine in at least fp32.
        k: tokens to merge, 1 <= k <= n // 2; with a class token, (n - 1) // 2.
        order: of the folded sequence: by position, or the remaining even tokens before all the odd ones; "best" sorts
            the former by descending score.
        class_token: token 0 is the class token: it neither goes nor receives.
        penalty: (B, n), subtracted from an even token's score: changes which tokens go, never where they go.

    Raises:
        ValueError: k is out of range.
    """
    n = metric.shape[1]
    most = (n - class_token) // 2
    if not 1 <= k <= most:
        raise ValueError(f"one fold of {n} tokens can merge 1 to {most} of them, not {k}")
    score, partner = match(metric, class_token=class_token, penalty=penalty)
    return place(score, partner, n, k, order)


@Op
def match(metric: Tensor, *, class_token: bool = False, penalty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The odd token that each even one is most like; see `fold`.

    Returns:
        score: (B, even), at least fp32: cosine to the partner, less the penalty; -inf for the class token.
        partner: (B, even) int64, index among the odd tokens, of equals the first.
    """
    metric = _aligned(F.normalize(at_least_fp32(metric), dim=-1))
    with true_fp32():
        cosine = metric[:, 0::2] @ metric[:, 1::2].mT  # (B, even, odd)
    score, partner = cosine.max(dim=-1)
    if penalty is not None:
        score = score - penalty[:, 0::2]
    if class_token:
        score[:, 0] = -torch.inf
    return score, partner


def _aligned(x: Tensor) -> Tensor:
    """(..., d) with zeros up to a multiple of 16 columns, which models have: every row begins at a cache line then.

    BLAS may round otherwise where a matrix does not, and equal tokens would go other ways in another place of the
    batch: seen on a CPU of AMD's with odd widths.
    """
    missing = -x.shape[-1] % 16
    return F.pad(x, (0, missing)) if missing else x


@Op
def place(score: Tensor, partner: Tensor, n: int, k: int, order: Order) -> Fold:
    """Number the tokens that stay; each of the k even ones of highest score gets the number of its partner.

    Args:
        score: (B, even); of equals, the earlier merge.
        partner: (B, even), index among the odd tokens.
        n: even and odd tokens.
    """
    best_first = score.argsort(dim=-1, descending=True, stable=True)  # topk may break ties in any order
    batch, even = best_first.shape
    odd, n_out = n - even, n - k
    index = torch.arange(n, device=best_first.device).expand(batch, n)
    place = torch.empty_like(best_first).scatter_(1, best_first, index[:, :even])  # of each even token in best_first
    stays = place >= k
    rank = stays.cumsum(dim=-1)  # remaining even tokens, up to and with this one
    if order == "position":
        even_slot, odd_slot = rank - 1 + index[:, :even], rank[:, :odd] + index[:, :odd]
    else:
        even_slot = rank - 1 if order == "unmerged_first" else place - k
        odd_slot = index[:, :odd] + (even - k)
    slot, target = rank.new_empty(2, batch, n)
    slot[:, 0::2] = torch.where(stays, even_slot, odd_slot.gather(1, partner))
    target[:, 0::2] = torch.where(stays, even_slot, n_out)  # one column more, cut off below
    slot[:, 1::2] = target[:, 1::2] = odd_slot
    survivor = rank.new_empty(batch, n_out + 1).scatter_(1, target, index)[:, :n_out]
    return Fold(slot, group_sizes(slot, n_out), survivor)


def merge(x: Tensor, steps: Sequence[Fold], sizes: Tensor | None = None) -> Reduced:
    """Apply folds, the first one first: each group becomes the mean of its original tokens.

    That is the size-weighted mean of every fold, without its rounding. Tokens come back in at least fp32.

    Args:
        x: (B, n, d).
        steps: folds of n, n - k_1, n - k_1 - k_2, ... tokens.
        sizes: (B, n) int64, original tokens that each token of x is the mean of already; None: one.
    """
    group, _, source = steps[0] if steps else _identity(x)
    for step in steps[1:]:
        group = step.slot.gather(1, group)
        source = source.gather(1, step.survivor)
    tokens, total = group_mean(x, group, source.shape[1], sizes)
    return Reduced(tokens, total, source, group)


def _identity(x: Tensor) -> Fold:
    index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return Fold(index, torch.ones_like(index), index)


def group_sizes(slot: Tensor, groups: int, sizes: Tensor | None = None) -> Tensor:
    """(B, n) group of each token, and (B, n) its own size (None: 1) -> (B, groups) int64 size of each group."""
    own = torch.ones_like(slot) if sizes is None else sizes
    return slot.new_zeros(slot.shape[0], groups).scatter_add_(1, slot, own)


@Op
def group_mean(x: Tensor, group: Tensor, groups: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of each group.

    Args:
        x: (B, n, d), any float dtype.
        group: (B, n), group of each token.
        groups: how many there are.
        sizes: (B, n) int64, how often each token counts; None: once.

    Returns:
        mean: (B, groups, d), at least fp32.
        total: (B, groups) int64, how often its tokens counted together.
    """
    members = group_sizes(group, groups)
    values, total = at_least_fp32(x), members
    if sizes is not None:
        values, total = values * sizes.unsqueeze(-1), group_sizes(group, groups, sizes)
    return group_sum(values, group, members) / total.unsqueeze(-1), total


@Op
def group_sum(values: Tensor, slot: Tensor, sizes: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the values of each group in position order: the same bits on every run, whatever else is in the batch.

    `scatter_add` adds floats in any order on a GPU; a one-hot matrix product costs 7 times as much (2.5 against
    0.35 ms, 576 tokens of width 1024, one CPU core).

    Args:
        values: (B, n, d), any float dtype.
        slot: (B, n), group of each token.
        sizes: (B, groups), tokens in each group.
        weight: (B, n), what each token is multiplied by; None: 1.

    Returns:
        (B, groups, d), at least fp32.
    """
    values = at_least_fp32(values)
    if weight is not None:
        values = values * weight.unsqueeze(-1)
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
    allowed = _allowed()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if isinstance(allowed, str):
            torch.set_float32_matmul_precision(allowed)
        else:
            for backend, precision in zip(_BACKENDS, allowed, strict=True):
                backend.fp32_precision = precision


_BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def _allowed() -> str | list[str]:
    """Precision of matrix products; per backend where torch's newer settings chose it: its older one raises then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return [backend.fp32_precision for backend in _BACKENDS]
