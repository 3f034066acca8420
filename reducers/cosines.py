"""Cosines between the tokens of an image, for methods that pick tokens one by one: of each pick, those to all others.

The matrix of all cosines is held where an image has no more than `fold.AT_ONCE` of them, up to 4,096 tokens. On a CPU,
of 2,880 tokens of 4,096 columns it takes 0.63 s to make, and 15 us to read for a pick; without it each pick takes 1.9
ms, a quarter of the tokens 1.4 s. Of more tokens the row of each pick is made by itself, whatever that costs: the
matrix of 8,748 tokens is 306 MB, of 16,384 a GiB, and start-up has not measured that there is room for it.

A matrix and a row are rounded differently. Which of them an image gets follows from how many tokens it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from foldserve.reducers import fold
from foldserve.reducers.fold import true_fp32

Rows: TypeAlias = Callable[[Tensor], Tensor]
"""(B, 1) a token of each image -> (B, n) cosines to all tokens of it."""


def holds_matrix(tokens: int) -> bool:
    """Of an image of so many tokens."""
    return tokens**2 <= fold.AT_ONCE


def together(tokens: int) -> int:
    """Images of so many tokens whose matrices are held at once, at least one."""
    return max(1, fold.AT_ONCE // tokens**2)


def matrix(unit: Tensor) -> Tensor:
    """(B, n, d) of norm 1 or 0 -> (B, n, n), image by image: a product of several may be rounded differently."""
    batch, n, _ = unit.shape
    out = unit.new_empty(batch, n, n)
    with true_fp32():
        for own, product in zip(unit, out, strict=True):
            torch.mm(own, own.mT, out=product)
    return out


def rows_of(matrix: Tensor) -> Rows:
    def rows(token: Tensor) -> Tensor:
        return matrix.gather(1, token.unsqueeze(2).expand(-1, 1, matrix.shape[2])).squeeze(1)

    return rows


def rows_made(unit: Tensor) -> Rows:
    """Of one image (1, n, d)."""

    def rows(token: Tensor) -> Tensor:
        with true_fp32():
            return torch.mv(unit[0], unit[0].index_select(0, token[0])[0]).unsqueeze(0)

    return rows


def by_parts(unit: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Cosines of tokens (B, n, d) to others (B, m, d): of nearly equal parts of the tokens, one after the other."""
    parts = -(-unit.shape[0] * unit.shape[1] * others.shape[1] // fold.AT_ONCE) or 1
    for part in unit.chunk(parts, dim=1):
        with true_fp32():
            yield part @ others.mT
