"""How the layers are split into KV cache groups, so that any K wastes next to no memory.

vLLM gives every KV cache group the same number of layers, w, and pads smaller groups: a block of any group costs w
pages. Left alone it takes w from the sizes of the two sides, K shallow and N-K deep layers: K=20 of 32 would pad 10+10
shallow and 12 deep layers to 12 each. A `bucket` number in the KV spec keeps layers apart that vLLM would put together,
which chooses w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

DEEP_SHARE = 1 / 8
"""Deep blocks per shallow block of a withdrawing request; LLaVA-1.5, 576 vision + 80 text tokens, 16 a block: 5/41."""

MAX_WASTE = 0.0125
"""Memory that padding may cost, as a share of all layers at full length; K=15 of 32 needs 0.0117 in 7 groups."""

GROUP_COST = 0.002
"""The waste that is worth one KV cache group less: each costs a block table and attention metadata in every step."""


@dataclass(frozen=True)
class Grouping:
    """Buckets per side and what vLLM makes of them: groups of `width` layers, `waste` as in MAX_WASTE."""

    shallow_buckets: int
    deep_buckets: int
    width: int
    groups: int
    waste: float

    @property
    def cost(self) -> tuple[float, int]:
        return self.waste + GROUP_COST * self.groups, self.shallow_buckets + self.deep_buckets


@lru_cache
def choose(layers: int, withdraw_layer: int) -> Grouping:
    """The cheapest grouping whose padding wastes at most MAX_WASTE; one bucket per layer never pads, so one exists."""
    sides = withdraw_layer, layers - withdraw_layer
    candidates = [_grouping(sides, (a, b)) for a in range(1, sides[0] + 1) for b in range(1, sides[1] + 1)]
    return min((c for c in candidates if c.waste <= MAX_WASTE), key=lambda c: c.cost)


def bucket_of(layer: int, layers: int, withdraw_layer: int) -> int:
    """The bucket of a layer among those of its side (shallow: layer < withdraw_layer)."""
    grouping = choose(layers, withdraw_layer)
    if layer < withdraw_layer:
        return layer % grouping.shallow_buckets
    return (layer - withdraw_layer) % grouping.deep_buckets


def _grouping(sides: tuple[int, int], buckets: tuple[int, int]) -> Grouping:
    """vLLM's rule (`_get_kv_cache_groups_uniform_page_size`): the smallest bucket, or the largest if that is < 1.5x."""
    sizes = [_balanced(side, count) for side, count in zip(sides, buckets, strict=True)]
    smallest, largest = min(map(min, sizes)), max(map(max, sizes))
    width = largest if largest < 1.5 * smallest else smallest
    groups = [sum(-(-size // width) for size in side) for side in sizes]
    padded = [count * width - side for count, side in zip(groups, sides, strict=True)]
    waste = (padded[0] + DEEP_SHARE * padded[1]) / sum(sides)
    return Grouping(*buckets, width, sum(groups), waste)


def _balanced(layers: int, buckets: int) -> list[int]:
    """Sizes of `buckets` buckets filled in turn."""
    small, larger = divmod(layers, buckets)
    return [small + 1] * larger + [small] * (buckets - larger)
