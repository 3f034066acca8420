"""Naive implementations of the methods, token by token in Python lists and fp64, as close to the papers as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def naive_tome(
    x: Tensor, keys: Tensor, sizes: Tensor, r: int, *, class_token: bool, attention: Tensor | None = None
) -> list[Token]:
    """(n, d), (n, d_k), (n,) and Turbo's (n,): one step of ToMe, of Turbo if there is an attention."""
    n = len(x)
    attention = torch.zeros(n, dtype=x.dtype) if attention is None else attention
    tokens = [  # as many members as its size, of which only the first is in the sequence
        Token(x[i], keys[i], attention[i], (i, *range(n, n + size - 1))) for i, size in enumerate(sizes.tolist())
    ]
    return _fold(tokens, r, spared=0 if class_token else None, weight=300.0, best_first=not class_token)


def naive_illava(x: Tensor, score: Tensor, r: int) -> tuple[list[int], list[Tensor]]:
    """(n, d), (n,) -> indices of the tokens that stay, and their values."""
    lowest = sorted(range(len(x)), key=lambda i: float(score[i]))[: r + 1]
    total = sum(range(1, r + 2))
    merged = sum(((r + 1 - place) / total * x[i] for place, i in enumerate(lowest)), torch.zeros_like(x[0]))
    kept = [i for i in range(len(x)) if i not in lowest[:-1]]
    return kept, [merged if i == lowest[-1] else x[i] for i in kept]


def naive_prumerge(x: Tensor, attention: Tensor, keys: Tensor, count: int) -> tuple[list[int], list[Tensor]]:
    """(n, d), (n,), (n, d_k) -> selected tokens, and what they and all others become."""
    by_attention = sorted(range(len(x)), key=lambda i: -float(attention[i]))
    selected, others = by_attention[:count], by_attention[count:]
    out = []
    for i in selected:
        cosine = [float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(len(x))]
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine[j])[:32]
        out.append(x[i] + sum((attention[j] * x[j] for j in near), torch.zeros_like(x[i])))
    return selected, [*out, sum((attention[j] * x[j] for j in others), torch.zeros_like(x[0]))]


def naive_visionzip(
    x: Tensor, score: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[list[list[int]], list[Tensor]]:
    """(n, d), (n,), (n, d_k) -> members of each token that stays, itself first, and their values."""
    chosen = sorted(sorted(range(len(x)), key=lambda i: -float(score[i]))[:dominant])
    others = [i for i in range(len(x)) if i not in chosen]
    if not contextual:
        return [[i] for i in chosen], [x[i] for i in chosen]
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    members: list[list[int]] = [[i] for i in targets]
    for i in others:
        if i not in targets:
            cosines = [float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in targets]
            members[cosines.index(max(cosines))].append(i)
    merged = [x[i] + torch.stack([x[j] for j in rest]).mean(0) if rest else x[i] for i, *rest in members]
    return [[i] for i in chosen] + members, [x[i] for i in chosen] + merged


def naive_divprune(x: Tensor, kept: int, geometry: str) -> list[int]:
    """(n, d) -> tokens in the order of picking."""
    n = len(x)
    y = x if geometry != "standardized" else x / (x.var(dim=0, correction=0) + 1e-6).sqrt()
    weight = [1.0] * n
    if geometry != "plain":
        unlike = [-sum(_cosine(y[i], y[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
        mean = sum(unlike) / n
        deviation = (sum((g - mean) ** 2 for g in unlike) / n) ** 0.5
        weight = [(g - min(unlike)) / (max(unlike) - min(unlike) + 1e-6) for g in unlike]
        if geometry == "standardized":
            weight = [1 / (1 + math.exp(-(g - mean) / (deviation + 1e-6))) for g in unlike]
        y = y - y.mean(dim=0)
    far = [[1 - _cosine(a, b) for b in y] for a in y]
    picks = [max(range(n), key=lambda j: min(far[i][j] for i in range(n) if i != j))]
    while len(picks) < kept:
        left = [j for j in range(n) if j not in picks]
        picks.append(max(left, key=lambda j: weight[j] * min(far[i][j] for i in picks)))
    return picks


def naive_cdpruner(x: Tensor, kept: int, relevance: Tensor) -> list[int]:
    """(n, d), (n,) -> tokens in the order of picking: determinants, from scratch for each."""
    cosines = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in x]) for a in x])
    kernel = relevance[:, None] * cosines * relevance
    picks: list[int] = []
    while len(picks) < kept:
        left = [j for j in range(len(x)) if j not in picks]
        volume = {j: float(torch.linalg.det(kernel[[*picks, j]][:, [*picks, j]])) for j in left}
        picks.append(max(left, key=lambda j: volume[j]))
    return picks


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def naive_mmtok(projected: Tensor, tower: Tensor, text: Tensor, kept: int, temperature: float) -> list[int]:
    """(n, D), (n, C), (m, D), in fp64 -> the tokens that stay, in position order."""
    projected, tower, text = projected.double(), tower.double(), text.double()
    n, targets = len(projected), []
    for word in text:
        targets.append((F.cosine_similarity(word[None], projected) / temperature).softmax(0) / len(text))
    for token in tower:
        targets.append((F.cosine_similarity(token[None], tower) / 0.2).softmax(0) * 0.5 / n)
    covered = torch.zeros(len(targets), dtype=torch.float64)
    rows, picked = torch.stack(targets), list[int]()
    for _ in range(kept):
        gains = (rows - covered[:, None]).clamp_min(0).sum(0).tolist()
        best = max((i for i in range(n) if i not in picked), key=lambda i: (gains[i], -i))
        picked.append(best)
        covered = torch.maximum(covered, rows[:, best])
    return sorted(picked)


def _fold(tokens: list[Token], k: int, *, spared: int | None, weight: float, best_first: bool = False) -> list[Token]:
    """Remaining even tokens, in their order or by score, then all the odd ones."""
    even, odd = tokens[0::2], tokens[1::2]
    best, score = [], []
    for a in even:
        cosines = [float(F.cosine_similarity(a.metric, b.metric, dim=0)) for b in odd]
        best.append(cosines.index(max(cosines)))
        score.append(max(cosines) - weight * float(a.attention))
    candidates = [i for i, token in enumerate(even) if token.members[0] != spared]
    merged = sorted(candidates, key=lambda i: -score[i])[:k]
    groups = [[b, *(even[i] for i in sorted(merged) if best[i] == j)] for j, b in enumerate(odd)]
    left = [i for i in range(len(even)) if i not in merged]
    if best_first:
        left.sort(key=lambda i: -score[i])
    return [even[i] for i in left] + [_mean(group) for group in groups]


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


def naive_evs(x: Tensor, frames: int, kept: int) -> list[int]:
    """(frames * n, d) -> the tokens that stay, ascending."""
    n, x = len(x) // frames, x.double()
    scores = [255.0] * n
    scores += [1 - float(F.cosine_similarity(x[i], x[i - n], dim=0)) for i in range(n, len(x))]
    return sorted(sorted(range(len(x)), key=lambda i: (-scores[i], i))[:kept])


def naive_vidcom2(x: Tensor, frames: int, kept: int) -> list[int]:
    """(frames * n, d) -> the tokens that stay, ascending."""
    n, d, x = len(x) // frames, x.shape[1], x.double()
    variances = [float(column.var(correction=0)) for column in x.T]
    steady = sorted(range(d), key=lambda c: (variances[c], c))[: max(1, d // 2)]
    unit = [F.normalize(row[steady], dim=0) for row in x]
    whole = torch.stack(unit).mean(0)
    likeness: list[float] = []
    scores: list[float] = []
    for f in range(frames):
        frame = unit[f * n : (f + 1) * n]
        own = torch.stack(frame).mean(0)
        for row in frame:
            likeness.append(_near(row, whole))
            scores.append(likeness[-1] + _near(row, own))
    means = [sum(likeness[f * n : (f + 1) * n]) / n for f in range(frames)]
    unlike = torch.softmax(torch.tensor([-mean / 0.01 for mean in means], dtype=torch.float64), 0).tolist()
    inside: list[int] = []
    for f, own_share in enumerate(unlike):
        share = min(1.0, kept / len(x) * (1 + own_share - sum(unlike) / frames))
        budget = min(n, max(1, round(share * n)))
        inside += sorted(range(f * n, (f + 1) * n), key=lambda i: (scores[i], i))[:budget]
    order = sorted(range(len(x)), key=lambda i: (i not in inside, scores[i], i))
    return sorted(order[:kept])


def _near(a: Tensor, b: Tensor) -> float:
    distance = float((a - b).square().sum())
    return sum(math.exp(-distance / (2 * 2.0**k)) for k in range(-3, 2))


ACROSS_FRAMES = {"evs": naive_evs, "vidcom2": naive_vidcom2}


def naive_pixelprune(cells: Sequence[Sequence[Sequence[int]]], tau: int, *, anchored: bool = True) -> list[int]:
    """Rows of cells of pixel values -> those that stay, in raster order; `shown` is what a decoder would show."""
    shown = [[list(cell) for cell in row] for row in cells]
    stay = []
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            prediction = _predicted(shown, i, j, tau)
            if prediction is None or not _alike(cell, prediction, tau):
                stay.append(i * len(row) + j)
            elif anchored:
                shown[i][j] = prediction
    return stay


def _predicted(shown: list[list[list[int]]], i: int, j: int, tau: int) -> list[int] | None:
    if i == 0:
        return shown[0][j - 1] if j else None
    if j == 0:
        return shown[i - 1][0]
    left, upper, corner = shown[i][j - 1], shown[i - 1][j], shown[i - 1][j - 1]
    return upper if _alike(corner, left, tau) and not _alike(corner, upper, tau) else left


def _alike(a: Sequence[int], b: Sequence[int], tau: int) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tau
