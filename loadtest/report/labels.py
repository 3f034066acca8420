"""Places labels so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres without overlap between `low` and `high`, closest to `wanted` (least squares); ValueError if no room."""
    total = sum(heights)
    if total > high - low:
        raise ValueError(f"labels of {total:.0f} points do not fit into {high - low:.0f}")
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    before = [end - heights[i] / 2 for i, end in zip(order, accumulate(heights[i] for i in order), strict=True)]
    # With the labels' heights subtracted, centres may coincide but not change their order: isotonic regression.
    blocks: list[tuple[float, int]] = []
    for i, offset in zip(order, before, strict=True):
        mean, count = wanted[i] - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        blocks.append((mean, count))
    free = [min(max(mean, low), high - total) for mean, count in blocks for _ in range(count)]
    centres = [0.0] * len(wanted)
    for i, start, offset in zip(order, free, before, strict=True):
        centres[i] = start + offset
    return centres
