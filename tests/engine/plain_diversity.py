"""DivPrune and CDPruner in numpy, fp64 and loops: which tokens stay, and what goes into them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
METHODS = ("divprune", "cdpruner")


def groups(method: str, x: NDArray[Any], kept: int, geometry: str, rest: str) -> list[tuple[int, list[int]]]:
    """(n, d) projected -> for each token that stays, in order, its own number and all that are in it."""
    if method == "cdpruner":
        return [(i, [i]) for i in sorted(_greedy_map(_cosines(x.astype(np.float64)), kept))]
    far, weight = _distances(x.astype(np.float64), geometry)
    stay = sorted(_farthest(far, weight, kept))
    members = {i: [i] for i in stay}
    for j in range(len(x)) if rest == "merge" else ():
        if j not in members:
            members[stay[int(np.argmin(far[j, stay]))]].append(j)
    return [(i, sorted(members[i])) for i in stay]


def _cosines(x: Floats) -> Floats:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    product: Floats = unit @ unit.T
    return product


def _distances(x: Floats, geometry: str) -> tuple[Floats, Floats]:
    """Between all tokens, and the weight of each."""
    if geometry == "plain":
        return 1 - _cosines(x), np.ones(len(x))
    y = x / np.sqrt(x.var(axis=0) + 1e-6) if geometry == "standardized" else x
    like = _cosines(y)
    unlike = -(like.sum(axis=1) - like.diagonal()) / (len(x) - 1)
    if geometry == "standardized":
        weight = 1 / (1 + np.exp(-(unlike - unlike.mean()) / (unlike.std() + 1e-6)))
    else:
        weight = (unlike - unlike.min()) / (unlike.max() - unlike.min() + 1e-6)
    return 1 - _cosines(y - y.mean(axis=0)), weight


def _farthest(far: Floats, weight: Floats, kept: int) -> list[int]:
    n = len(far)
    picks = [int(np.argmax([min(far[i, j] for i in range(n) if i != j) for j in range(n)]))]
    while len(picks) < kept:
        left = [j for j in range(n) if j not in picks]
        picks.append(max(left, key=lambda j: weight[j] * far[picks, j].min()))
    return picks


def _greedy_map(kernel: Floats, kept: int) -> list[int]:
    """What the picks leave of each token's length, by a solution of equations for each pick."""
    picks: list[int] = []
    while len(picks) < kept:
        explained = (
            kernel[:, picks] @ np.linalg.inv(kernel[np.ix_(picks, picks)]) if picks else np.zeros((len(kernel), 0))
        )
        gain = 1 - (explained * kernel[:, picks]).sum(axis=1)
        left = [j for j in range(len(kernel)) if j not in picks]
        picks.append(left[0] if not picks else max(left, key=lambda j: gain[j]))
    return picks
