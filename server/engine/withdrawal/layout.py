"""Splits the layers into KV cache groups so that any K wastes little memory.

vLLM gives all KV cache groups the same number of layers, w, and pads smaller groups, so a block of any group costs w
pages. By itself it derives w from the K shallow and N-K deep layers: K=20 of 32 would pad 10+10 shallow and 12 deep
layers to 12 each. A `bucket` number in the KV spec splits groups further and so controls w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

DEEP_SHARE = 1 / 8
"""Deep blocks per shallow block of a withdrawing request: 5/41 for LLaVA-1.5, 576 + 80 tokens, 16 per block."""

MAX_WASTE = 0.0125
"""Padding allowed, as a share of all layers at full length; K=15 of 32 needs 0.0117 in 7 groups."""

GROUP_COST = 0.002
"""Waste that saves one group: each group costs a block table and attention metadata in every step."""


@dataclass(frozen=True)
class Grouping:
    """Buckets per side and the resulting groups of `width` layers; `waste` as in MAX_WASTE."""

    shallow_buckets: int
    deep_buckets: int
    width: int
    groups: int
    waste: float

    @property
    def cost(self) -> tuple[float, int]:
        return self.waste + GROUP_COST * self.groups, self.shallow_buckets + self.deep_buckets


@lru_cache
def choose_grouping(layers: int, withdraw_layer: int) -> Grouping:
    """The cheapest grouping that wastes at most MAX_WASTE. One exists: one bucket per layer needs no padding."""
    sides = withdraw_layer, layers - withdraw_layer
    candidates = [_grouping(sides, (a, b)) for a in range(1, sides[0] + 1) for b in range(1, sides[1] + 1)]
    return min((c for c in candidates if c.waste <= MAX_WASTE), key=lambda c: c.cost)


def bucket_of(layer: int, layers: int, withdraw_layer: int) -> int:
    """The bucket of a layer among those of its side (shallow: layer < withdraw_layer)."""
    grouping = choose_grouping(layers, withdraw_layer)
    if layer < withdraw_layer:
        return layer % grouping.shallow_buckets
    return (layer - withdraw_layer) % grouping.deep_buckets


def _grouping(sides: tuple[int, int], buckets: tuple[int, int]) -> Grouping:
    """vLLM's rule (`_get_kv_cache_groups_uniform_page_size`): w is the smallest bucket, or the largest if < 1.5x."""
    sizes = [_balanced(side, count) for side, count in zip(sides, buckets, strict=True)]
    smallest, largest = min(map(min, sizes)), max(map(max, sizes))
    width = largest if largest < 1.5 * smallest else smallest
    groups = [sum(-(-size // width) for size in side) for side in sizes]
    padded = [count * width - side for count, side in zip(groups, sides, strict=True)]
    waste = (padded[0] + DEEP_SHARE * padded[1]) / sum(sides)
    return Grouping(*buckets, width, sum(groups), waste)


def _balanced(layers: int, buckets: int) -> list[int]:
    """Sizes of `buckets` nearly equal buckets."""
    small, larger = divmod(layers, buckets)
    return [small + 1] * larger + [small] * (buckets - larger)
