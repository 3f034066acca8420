"""FOLDER written down one token at a time, in Python lists and fp64: slow, and as plain as the paper's prose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Token:
    """One token of the current sequence: its value, what it is compared by, and the originals in it, itself first."""

    value: Tensor
    metric: Tensor
    attention: Tensor
    members: tuple[int, ...]


def naive_folder(x: Tensor, folds: tuple[int, ...]) -> list[Token]:
    """(n, d) fp64 -> the tokens that stay, in position order."""
    zero = torch.zeros((), dtype=x.dtype)
    tokens = [Token(row, row, zero, (i,)) for i, row in enumerate(x)]
    for k in folds:
        tokens = _fold(tokens, k, spared=None, weight=0.0)
        tokens.sort(key=lambda token: token.members[0])
    return tokens


def naive_folder_cls(x: Tensor, keys: Tensor, attention: Tensor, folds: tuple[int, ...]) -> list[Token]:
    """(n + 1, d), (n + 1, d_k), (n + 1), all fp64 -> the tokens that stay, without the class token."""
    tokens = [Token(*rows, (i,)) for i, rows in enumerate(zip(x, keys, attention, strict=True))]
    for k in folds:
        tokens = _fold(tokens, k, spared=0, weight=500.0)
    return tokens[1:]


def _fold(tokens: list[Token], k: int, *, spared: int | None, weight: float) -> list[Token]:
    """Remaining even tokens, then all the odd ones."""
    even, odd = tokens[0::2], tokens[1::2]
    best, score = [], []
    for a in even:
        cosines = [float(F.cosine_similarity(a.metric, b.metric, dim=0)) for b in odd]
        best.append(cosines.index(max(cosines)))
        score.append(max(cosines) - weight * float(a.attention))
    candidates = [i for i, token in enumerate(even) if token.members[0] != spared]
    merged = sorted(candidates, key=lambda i: -score[i])[:k]
    groups = [[b, *(even[i] for i in sorted(merged) if best[i] == j)] for j, b in enumerate(odd)]
    return [token for i, token in enumerate(even) if i not in merged] + [_mean(group) for group in groups]


def _mean(group: list[Token]) -> Token:
    sizes = torch.tensor([len(token.members) for token in group], dtype=group[0].value.dtype)

    def weighted(rows: list[Tensor]) -> Tensor:
        return (sizes.unsqueeze(-1) * torch.stack(rows)).sum(dim=0) / sizes.sum()

    return replace(
        group[0],
        value=weighted([token.value for token in group]),
        metric=weighted([token.metric for token in group]),
        attention=torch.stack([token.attention for token in group]).mean(),
        members=tuple(index for token in group for index in token.members),
    )
