"""Cosines between the tokens of an image, for methods that pick tokens one by one and need each pick's row.

Up to 4,096 tokens (`fold.AT_ONCE` cosines) the whole matrix is computed first. For 2,880 tokens of 4,096 columns on a
CPU that takes 0.63 s, then 15 us per pick; row by row, each pick takes 1.9 ms, so a quarter of the tokens takes 1.4 s.
Larger images compute row by row: the matrix of 16,384 tokens is 1 GiB, which start-up did not reserve.

Matrix and row round differently. The number of tokens alone decides which of them an image gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from foldserve.reducers import fold
from foldserve.reducers.fold import true_fp32

Rows: TypeAlias = Callable[[Tensor], Tensor]
"""(B, 1), one token index per image -> (B, n) cosines to all tokens of that image."""


def holds_matrix(tokens: int) -> bool:
    return tokens**2 <= fold.AT_ONCE


def images_at_once(tokens: int) -> int:
    """Number of images whose matrices are held at a time, at least one."""
    return max(1, fold.AT_ONCE // tokens**2)


def matrix(unit: Tensor) -> Tensor:
    """(B, n, d) of norm 1 or 0 -> (B, n, n), image by image: a batched product may round differently."""
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
    """Like `rows_of`, row by row, for one image (1, n, d)."""

    def rows(token: Tensor) -> Tensor:
        with true_fp32():
            return torch.mv(unit[0], unit[0].index_select(0, token[0])[0]).unsqueeze(0)

    return rows


def by_parts(unit: Tensor, others: Tensor) -> Iterator[Tensor]:
    """(B, n, d), (B, m, d) -> (B, n, m) cosines, in parts of nearly equal size along n."""
    parts = -(-unit.shape[0] * unit.shape[1] * others.shape[1] // fold.AT_ONCE) or 1
    for part in unit.chunk(parts, dim=1):
        with true_fp32():
            yield part @ others.mT
