"""What is done to one image as a whole: a plan for each of its grids, and what no grid decides by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from foldserve.reducers import METHODS
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import Decoder
from foldserve.reducers.plan import CODES, Plan, make_plan
from foldserve.reducers.reduction import MIN_KEPT, InvalidReduction, Reduction

__all__ = ["ItemPlan", "Layout", "Part", "plan_item"]


@dataclass(frozen=True, slots=True)
class Part:
    """`count` grids of one geometry, each reduced by itself, and `separators` embeddings beside them, which stay."""

    geometry: VisionGeometry
    count: int = 1
    separators: int = 0

    @property
    def tokens(self) -> int:
        return self.geometry.tokens * self.count + self.separators


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of an unreduced image, in the order of the prompt.

    Attributes:
        parts: at least one.
        shape: what of the image's size decides the parts, as its model family sees fit.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...] = ()

    @classmethod
    def single(cls, geometry: VisionGeometry) -> Layout:
        """Of an image that is one grid."""
        return cls((Part(geometry),))

    @property
    def tokens(self) -> int:
        """Embeddings that the decoder gets at ratio 0."""
        return sum(part.tokens for part in self.parts)

    @property
    def removable(self) -> int:
        """Tokens that can go at most: some of every grid have to stay."""
        return sum(part.count * (part.geometry.tokens - MIN_KEPT) for part in self.parts)


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """The counts of one image.

    Attributes:
        layout: of the image without reduction.
        grids: for each part, the plan of each of its grids.
        decoder: the method that works in the decoder, or "none".
        decoder_removed: tokens that it removes from layer K on, separators among them.
        keeps_positions: tokens that stay keep their positions in the decoder, and text goes on from the full length.
    """

    layout: Layout
    grids: tuple[Plan, ...]
    decoder: str = "none"
    decoder_removed: int = 0
    keeps_positions: bool = False

    @property
    def encoded(self) -> int:
        """Embeddings that the decoder would get without reduction."""
        return self.layout.tokens

    @property
    def removed(self) -> int:
        """How many of them go before the decoder."""
        return sum(plan.removed * part.count for plan, part in zip(self.grids, self.layout.parts, strict=True))

    @property
    def kept(self) -> int:
        """Embeddings that the decoder gets."""
        return self.encoded - self.removed

    @property
    def kept_deep(self) -> int:
        """Embeddings that the decoder's layers from K on get."""
        return self.kept - self.decoder_removed

    @property
    def ratio(self) -> float:
        """Share of the embeddings that is really removed before the decoder."""
        return self.removed / self.encoded

    @property
    def is_identity(self) -> bool:
        """Nothing is removed before the decoder."""
        return all(plan.is_identity for plan in self.grids)

    @property
    def method(self) -> str:
        """The method that works before the decoder, or "none"."""
        return next((plan.method for plan in self.grids if not plan.is_identity), "none")

    @property
    def is_seeded(self) -> bool:
        """The method draws at random, seeded by the image."""
        return any(plan.is_seeded for plan in self.grids)

    def with_seed(self, seed: int) -> ItemPlan:
        """The same plan for an image of this seed."""
        return replace(self, grids=tuple(plan.with_seed(seed) if plan.is_seeded else plan for plan in self.grids))

    def to_ints(self) -> tuple[int, ...]:
        """As many integers for every plan of a model; `from_ints` of the same release reads those behind the shape."""
        own = (CODES.index(self.decoder), self.decoder_removed, int(self.keeps_positions))
        return (*self.layout.shape, *own, *(code for plan in self.grids for code in plan.to_ints()))

    @classmethod
    def from_ints(cls, ints: Sequence[int], layout: Layout) -> ItemPlan:
        """The plan that gave these integers, without the shape, which is the layout's."""
        decoder, decoder_removed, keeps_positions, *codes = ints
        width = len(codes) // len(layout.parts)
        grids = tuple(
            Plan.from_ints(codes[i * width : (i + 1) * width], part.geometry) for i, part in enumerate(layout.parts)
        )
        return cls(layout, grids, CODES[decoder], decoder_removed, bool(keeps_positions))


@lru_cache(maxsize=4096)
def plan_item(reduction: Reduction, layout: Layout) -> ItemPlan:
    """Turn what was asked into counts for an image; a random method's seed is added where the pixels are.

    `ratio` holds for each grid. `keep_tokens` is shared out over the grids; where they are several, equal grids keep
    equally many, so that a few tokens fewer may stay.

    Raises:
        InvalidReduction: the image has too few tokens for it, or the model is not one that the method works with.
    """
    grids = tuple(_plan_part(one, layout, i) for i, one in enumerate(_shared_out(reduction, layout)))
    if reduction.decoder:
        METHODS[reduction.decoder].check(layout.parts[0].geometry)
    plan = ItemPlan(layout, grids)
    decoder, decoder_removed = _in_decoder(reduction, plan.kept)
    keeps_positions = reduction.positions == "keep" and not plan.is_identity
    return replace(plan, decoder=decoder, decoder_removed=decoder_removed, keeps_positions=keeps_positions)


def _plan_part(reduction: Reduction, layout: Layout, index: int) -> Plan:
    """Of each grid of a part; a refusal says which part, if there are more grids than one."""
    part = layout.parts[index]
    try:
        return make_plan(reduction, part.geometry)
    except InvalidReduction as refusal:
        if len(layout.parts) == part.count == 1:
            raise
        which = f"part {index + 1} of {len(layout.parts)}, " if len(layout.parts) > 1 else ""
        grids = "a grid" if part.count == 1 else f"{part.count} grids"
        text = f"{which}{grids} of {part.geometry.tokens} tokens, each reduced by itself: {refusal}"
        raise InvalidReduction(text, refusal.param) from None


def _shared_out(reduction: Reduction, layout: Layout) -> list[Reduction]:
    """What each part's grids are asked: `keep_tokens` by largest remainder, in proportion to their tokens."""
    parts, asked = layout.parts, reduction.keep_tokens
    if asked is None or layout.tokens == parts[0].geometry.tokens:  # one grid: nothing to share
        return [reduction] * len(parts)
    least = layout.tokens - layout.removable
    if not least <= asked <= layout.tokens:
        raise InvalidReduction(
            f"keep_tokens {asked} is not what this image can keep: give {least} to {layout.tokens}", "keep_tokens"
        )
    share = Fraction(asked - least, max(layout.removable, 1))
    more = [share * (part.geometry.tokens - MIN_KEPT) for part in parts]  # of each grid, beyond what has to stay
    kept = [MIN_KEPT + int(number) for number in more]
    left = asked - least - sum(part.count * int(number) for part, number in zip(parts, more, strict=True))
    for i in sorted(range(len(parts)), key=lambda i: -(more[i] % 1)):
        if more[i] % 1 and parts[i].count <= left:
            kept[i] += 1
            left -= parts[i].count
    return [replace(reduction, keep_tokens=number) for number in kept]


def _in_decoder(reduction: Reduction, kept: int) -> tuple[str, int]:
    """The decoder's method, and how many of the `kept` tokens it removes."""
    if reduction.decoder is None:
        return "none", 0
    method = METHODS[reduction.decoder]
    assert isinstance(method, Decoder)  # as Reduction checked
    removed = method.removed(kept, reduction.decoder_ratio)
    if removed == kept and not reduction.withdraw:
        raise InvalidReduction(
            f"{method.name!r} at {reduction.decoder_ratio} would remove all {kept} vision tokens: give a lower share, "
            "or withdraw them",
            "decoder_ratio",
        )
    return (method.name, removed) if removed else ("none", 0)
