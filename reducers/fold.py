"""The bipartite fold of FOLDER, ToMe and Turbo: pair even tokens with odd ones, merge the most similar pairs.

A fold only decides where each token goes. `group_sum` then sums the original tokens once, for any number of folds,
without rounding in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.ops import Op

Order = Literal["position", "unmerged_first", "best_unmerged_first"]

AT_ONCE = 2**24
"""Most fp32 elements (64 MiB) that a step computes at a time; it splits larger work without changing any bit. The
scores of an image of up to 8,192 tokens fit."""

_COLUMNS = 256  # parts of `by_columns` are multiples of it


class Reduced(NamedTuple):
    """Result of a reduction from n to n_out tokens."""

    tokens: Tensor  # (B, n_out, d), dtype of the input
    sizes: Tensor  # (B, n_out) int64, original tokens in each output token; sums to n unless some are dropped
    source: Tensor  # (B, n_out) int64, the original token whose place each output token takes
    group: Tensor  # (B, n) int64, the output token that each original token went into; -1 if it was dropped


class Fold(NamedTuple):
    """Where one fold sends the n tokens of a sequence."""

    slot: Tensor  # (B, n) int64, index in the folded sequence; a merged token has its partner's
    sizes: Tensor  # (B, n - k) int64, tokens in each slot
    kept_token: Tensor  # (B, n - k) int64, the token in each slot that was not merged into another


def fold(metric: Tensor, k: int, *, order: Order, class_token: bool = False, penalty: Tensor | None = None) -> Fold:
    """Merge the k even tokens of highest score, each into its most similar odd token; ties go to the earlier one.

    Args:
        metric: (B, n, d_m), any float dtype; compared by cosine in at least fp32.
        k: 1 <= k <= n // 2; with a class token, at most (n - 1) // 2.
        order: of the folded sequence: by position, or unmerged even tokens before all odd ones; "best" sorts those
            even tokens by descending score.
        class_token: token 0 is the class token, which takes no part.
        penalty: (B, n), subtracted from the scores of even tokens; it never changes their partners.

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
    """The most similar odd token of each even one; see `fold`.

    Returns:
        score: (B, even), at least fp32: cosine to the partner minus the penalty; -inf for the class token.
        partner: (B, even) int64, index among the odd tokens; ties go to the first.
    """
    odd = metric.shape[1] // 2
    images = max(1, AT_ONCE // max(1, odd * (metric.shape[1] - odd)))
    score, partner = _joined([_most_alike(some) for some in torch.split(metric, images)], dim=0)
    if penalty is not None:
        score = score - penalty[:, 0::2]
    if class_token:
        score[:, 0] = -torch.inf
    return score, partner


def _most_alike(metric: Tensor) -> tuple[Tensor, Tensor]:
    unit = unit_rows(metric)
    even, odd = unit[:, 0::2], unit[:, 1::2].mT
    parts = -(-even.shape[1] * odd.shape[-1] // AT_ONCE) or 1  # nearly equal parts: a part of few rows rounds otherwise
    with true_fp32():
        return _joined([(some @ odd).max(dim=-1) for some in even.chunk(parts, dim=1)], dim=1)


def _joined(parts: Sequence[Sequence[Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        score, partner = parts[0]
        return score, partner
    score, partner = (torch.cat(each, dim=dim) for each in zip(*parts, strict=True))
    return score, partner


def unit_rows(metric: Tensor) -> Tensor:
    """`F.normalize` of (..., d) in at least fp32, padded with zeros to a multiple of 16 columns.

    Padded rows start on a cache line. Without that, BLAS may round equal rows differently in another place of the
    batch (seen on an AMD CPU with odd widths), so equal images would reduce differently.
    """
    x = at_least_fp32(metric)
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / norm if x is metric else x.div_(norm)
    missing = -unit.shape[-1] % 16
    return F.pad(unit, (0, missing)) if missing else unit


@Op
def place(score: Tensor, partner: Tensor, n: int, k: int, order: Order) -> Fold:
    """Number the tokens that stay; the k even tokens of highest score get their partners' numbers.

    Args:
        score: (B, even); ties merge the earlier one.
        partner: (B, even), index among the odd tokens.
        n: even and odd tokens.
    """
    best_first = score.argsort(dim=-1, descending=True, stable=True)  # topk may break ties in any order
    batch, even = best_first.shape
    odd, n_out = n - even, n - k
    index = torch.arange(n, device=best_first.device).expand(batch, n)
    place = torch.empty_like(best_first).scatter_(1, best_first, index[:, :even])  # each even token's in best_first
    stays = place >= k
    rank = stays.cumsum(dim=-1)  # unmerged even tokens up to and including this one
    if order == "position":
        even_slot, odd_slot = rank - 1 + index[:, :even], rank[:, :odd] + index[:, :odd]
    else:
        even_slot = rank - 1 if order == "unmerged_first" else place - k
        odd_slot = index[:, :odd] + (even - k)
    slot, target = rank.new_empty(2, batch, n)
    slot[:, 0::2] = torch.where(stays, even_slot, odd_slot.gather(1, partner))
    target[:, 0::2] = torch.where(stays, even_slot, n_out)  # merged tokens go to an extra column, cut off below
    slot[:, 1::2] = target[:, 1::2] = odd_slot
    kept_token = rank.new_empty(batch, n_out + 1).scatter_(1, target, index)[:, :n_out]
    return Fold(slot, group_sizes(slot, n_out), kept_token)


def merge(
    x: Tensor,
    steps: Sequence[Fold],
    sizes: Tensor | None = None,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Reduced:
    """Apply folds in order: each group becomes the mean of its original tokens.

    This equals taking the size-weighted mean in every fold, without its rounding.

    Args:
        x: (B, n, d), any float dtype.
        steps: folds of n, n - k_1, n - k_1 - k_2, ... tokens.
        sizes: (B, n) int64, original tokens in each token of x; None: one.
        scale: maps (B, n_out) sizes to factors of the means; None: 1.
    """
    group, _, source = steps[0] if steps else _identity(x)
    for step in steps[1:]:
        group = step.slot.gather(1, group)
        source = source.gather(1, step.kept_token)
    total = source

    def mean(some: Tensor) -> Tensor:
        nonlocal total
        tokens, total = group_mean(some, group, source.shape[1], sizes)
        return tokens if scale is None else tokens * scale(total).unsqueeze(-1)

    return Reduced(by_columns(x, source.shape[1], mean), total, source, group)


def merge_groups(x: Tensor, group: Tensor, source: Tensor) -> Reduced:
    """Merge the tokens of each group into their mean.

    Args:
        x: (B, n, d), any float dtype.
        group: (B, n) int64, the output token that each token goes into.
        source: (B, n_out) int64, the token of each group whose place the output token takes.
    """
    return merge(x, [Fold(group, group_sizes(group, source.shape[1]), source)])


def keep(x: Tensor, kept: Tensor) -> Reduced:
    """Keep the tokens at the distinct ascending indices `kept`, (m,) or (B, m), and drop the others."""
    source = _to_device(kept, x.device).expand(x.shape[0], -1)
    slots = torch.arange(kept.shape[-1], device=x.device).expand_as(source)
    group = source.new_full(x.shape[:2], -1).scatter_(1, source, slots)
    tokens = x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return Reduced(tokens, torch.ones_like(source), source, group)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which needs pinned memory on a GPU."""
    if x.device == device:
        return x
    return (x.pin_memory() if torch.cuda.is_available() else x).to(device, non_blocking=True)


def by_columns(x: Tensor, n_out: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, n, d) -> (B, n_out, d) in the dtype of x: `reduce`, which treats columns alike, on some columns at a time.

    This bounds the fp32 copy of an image: 1.3 GB for 16,384 tokens of 20,480 columns.
    """
    batch, _, width = x.shape
    columns = columns_at_once(x)
    if columns >= width:
        return reduce(x).to(x.dtype)
    out = x.new_empty(batch, n_out, width)
    for some, place in zip(torch.split(x, columns, dim=-1), torch.split(out, columns, dim=-1), strict=True):
        place.copy_(reduce(some))
    return out


def columns_at_once(x: Tensor) -> int:
    """How many columns of (B, n, d) have about `AT_ONCE` elements."""
    return max(_COLUMNS, AT_ONCE // max(1, x.shape[0] * x.shape[1]) // _COLUMNS * _COLUMNS)


def _identity(x: Tensor) -> Fold:
    index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return Fold(index, torch.ones_like(index), index)


def group_sizes(slot: Tensor, groups: int, sizes: Tensor | None = None) -> Tensor:
    """(B, n) group of each token, (B, n) sizes (None: 1) -> (B, groups) int64 total size of each group."""
    own = torch.ones_like(slot) if sizes is None else sizes
    return slot.new_zeros(slot.shape[0], groups).scatter_add_(1, slot, own)


@Op
def group_mean(x: Tensor, group: Tensor, groups: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means of the tokens x (B, n, d) in each group, weighted by `sizes` (B, n) int64; None: 1.

    Returns:
        mean: (B, groups, d), at least fp32.
        total: (B, groups) int64, sum of the weights.
    """
    members = group_sizes(group, groups)
    values, total = at_least_fp32(x), members
    if sizes is not None:
        values, total = values * sizes.unsqueeze(-1), group_sizes(group, groups, sizes)
    return group_sum(values, group, members).div_(total.unsqueeze(-1)), total


@Op
def group_sum(values: Tensor, slot: Tensor, sizes: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the values of each group in position order: the same bits on every run, in any batch.

    `scatter_add` adds floats in an unspecified order on a GPU; a one-hot matrix product is 7 times as slow (2.5 ms
    instead of 0.35 ms, 576 tokens of width 1024, one CPU core).

    Args:
        values: (B, n, d), any float dtype.
        slot: (B, n), group of each token.
        sizes: (B, groups), tokens in each group.
        weight: (B, n) factors; None: 1.

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
    """Half precision to fp32: bf16 cosines cannot tell the best partner from the second best."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def true_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 even where the process allows TF32, which changes cosines by 1e-3.

    The host reads the flag when it launches a kernel, so this needs no synchronisation.
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
    """Precision of matrix products; one per backend if torch's newer API set it, since the older getter then raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return [backend.fp32_precision for backend in _BACKENDS]
