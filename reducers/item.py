"""What is done to one image as a whole: a plan for each of its grids, and what no grid decides by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Protocol

from foldserve.reducers import METHODS, Method, configured
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.method import AcrossFrames, Decoder
from foldserve.reducers.pixelprune import Cells, PixelPrune
from foldserve.reducers.plan import CODES, Plan, make_plan, tokens_to_remove
from foldserve.reducers.reduction import MIN_KEPT, InvalidReduction, Reduction

__all__ = ["ItemPlan", "Layout", "Part", "Tiling", "at_least", "check", "plan_item"]


@dataclass(frozen=True, slots=True)
class Part:
    """`count` grids of one geometry, each reduced by itself, and `separators` embeddings beside them, which stay.

    Attributes:
        name: what refusals call it where an image has several parts.
        joinable: the grids are the frames of a video, with no text between them in the prompt.
    """

    geometry: VisionGeometry
    count: int = 1
    separators: int = 0
    name: str = ""
    joinable: bool = False

    @property
    def tokens(self) -> int:
        return self.geometry.tokens * self.count + self.separators

    @property
    def joined(self) -> Part:
        """Its grids as one; of a part that is not `joinable` itself."""
        if not self.joinable:
            return self
        whole = replace(self.geometry, tokens=self.geometry.tokens * self.count, grid=None, frames=self.count)
        return Part(whole, separators=self.separators, name=self.name)


class Tiling(Protocol):
    """How a model lays images out in tiles that its tower sees one by one: a model family's.

    Attributes:
        tile: what the tower makes of a tile.
    """

    @property
    def tile(self) -> VisionGeometry: ...

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        """The layout of the base tile alone, with no more parts than the whole; None of what has none, as a video."""

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        """The layout where each tile has side x side tokens; asked for where methods work on the `tile`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of an unreduced image, in the order of the prompt.

    Attributes:
        parts: at least one.
        shape: what of the image's size decides the parts, as its model family sees fit.
        tiling: of an image that is laid out in tiles; one for every image of a model, or None.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...] = ()
    tiling: Tiling | None = field(default=None, repr=False)

    @classmethod
    def single(cls, geometry: VisionGeometry) -> Layout:
        """Of an image that is one grid."""
        return cls((Part(geometry),))

    @property
    def joined(self) -> Layout:
        """What a method that works across frames sees of a video."""
        return replace(self, parts=tuple(part.joined for part in self.parts))

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
        grids: for each part of what is `laid_out`, the plan of each of its grids.
        decoder: the method that works in the decoder, or "none".
        decoder_removed: tokens that it removes from layer K on, separators among them.
        keeps_positions: tokens that stay keep their positions in the decoder, and text goes on from the full length.
        base_only: the image is its base tile alone.
        tile: the plan of each tile before they are laid out, of images in tiles.
        cells: those that the tower sees, as the image's pixels decided; None: all.
    """

    layout: Layout
    grids: tuple[Plan, ...]
    decoder: str = "none"
    decoder_removed: int = 0
    keeps_positions: bool = False
    base_only: bool = False
    tile: Plan | None = None
    cells: Cells | None = None

    @property
    def laid_out(self) -> Layout:
        """Of what the tower gives: all, the base tile alone, smaller tiles, some cells, or frames as one grid."""
        return _laid_out(self.layout, self.base_only, self.tile, self.cells, self.grids[0].method)

    @property
    def encoded(self) -> int:
        """Embeddings that the decoder would get without reduction."""
        return self.layout.tokens

    @property
    def removed(self) -> int:
        """How many of them go before the decoder."""
        return self.encoded - self.kept

    @property
    def kept(self) -> int:
        """Embeddings that the decoder gets."""
        laid_out = self.laid_out
        gone = sum(plan.removed * part.count for plan, part in zip(self.grids, laid_out.parts, strict=True))
        return laid_out.tokens - gone

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
        return not self.base_only and self.cells is None and all(plan.is_identity for plan in self._plans)

    @property
    def method(self) -> str:
        """The method that works before the decoder, or "none"; "base_only+..." where another one follows."""
        methods = [BaseOnly.name] * self.base_only + [PixelPrune.name] * (self.cells is not None)
        methods += list(dict.fromkeys(plan.method for plan in self._plans if not plan.is_identity))
        return "+".join(methods) or "none"

    @property
    def _plans(self) -> tuple[Plan, ...]:
        return self.grids if self.tile is None else (self.tile, *self.grids)

    @property
    def is_seeded(self) -> bool:
        """The method draws at random, seeded by the image."""
        return any(plan.is_seeded for plan in self.grids)

    @property
    def query_method(self) -> Method | None:
        """The method that chooses by a query, if there is one."""
        methods = (plan.reducer for plan in self.grids)
        return next((method for method in methods if method is not None and method.takes_query), None)

    def with_seed(self, seed: int) -> ItemPlan:
        """The same plan for an image of this seed."""
        return replace(self, grids=tuple(plan.with_seed(seed) if plan.is_seeded else plan for plan in self.grids))

    def to_ints(self) -> tuple[int, ...]:
        """`from_ints` of the same release reads those behind the shape.

        As many for every plan of a model in which the tower sees all cells; a mask of cells comes behind them.
        """
        own = [CODES.index(self.decoder), self.decoder_removed, int(self.keeps_positions)]
        own += [] if self.layout.tiling is None else [int(self.base_only)]
        codes = [code for plan in self._plans for code in plan.to_ints()]
        missing = len(self.layout.parts) - len(self.grids)  # of a base tile alone
        mask = () if self.cells is None else self.cells.to_ints()
        return (*self.layout.shape, *own, *codes, *[0] * (missing * len(self.grids[0].to_ints())), *mask)

    @classmethod
    def from_ints(cls, ints: Sequence[int], layout: Layout) -> ItemPlan:
        """The plan that gave these integers, without the shape, which is the layout's."""
        decoder, decoder_removed, keeps_positions, *codes = ints
        base_only = layout.tiling is not None and bool(codes.pop(0))
        end = Plan.INTS * (len(layout.parts) + (layout.tiling is not None))
        each = [codes[i : i + Plan.INTS] for i in range(0, end, Plan.INTS)]
        tile = None if layout.tiling is None else Plan.from_ints(each.pop(0), layout.tiling.tile)
        cells = Cells.from_ints(tuple(codes[end:])) if codes[end:] else None
        parts = _laid_out(layout, base_only, tile, cells, CODES[each[0][0]]).parts
        grids = tuple(Plan.from_ints(own, part.geometry) for own, part in zip(each, parts, strict=False))
        return cls(layout, grids, CODES[decoder], decoder_removed, bool(keeps_positions), base_only, tile, cells)


def _laid_out(layout: Layout, base_only: bool, tile: Plan | None, cells: Cells | None, method: str) -> Layout:
    """See `ItemPlan.laid_out`; `method` is that of the grids, or "none"."""
    if cells is not None:
        return _of_cells(layout, cells.kept)
    if isinstance(METHODS.get(method), AcrossFrames):
        return layout.joined
    if layout.tiling is None or tile is None:
        return layout
    if not tile.is_identity:
        return layout.tiling.of_squares(layout.shape, isqrt(tile.kept))
    return (layout.tiling.base(layout.shape) if base_only else None) or layout


@lru_cache(maxsize=4096)
def _of_cells(layout: Layout, count: int) -> Layout:
    """Of so many cells of the one grid of an image: they are no grid, and no request knows their number."""
    (part,) = layout.parts
    geometry = replace(part.geometry, tokens=count, grid=None, varies=True)
    return replace(layout, parts=(replace(part, geometry=geometry),))


def at_least(reduction: Reduction, layout: Layout) -> int:
    """How many cells of an image have to stay, whatever its pixels are.

    Raises:
        InvalidReduction: more than it has.
    """
    is_bound = not reduction.first and (reduction.ratio or reduction.keep_tokens)
    return _left_of_whole(reduction, layout) if is_bound else MIN_KEPT


def _left_of_whole(reduction: Reduction, layout: Layout) -> int:
    """What an amount leaves of an image that is one grid."""
    return layout.tokens - tokens_to_remove(reduction, layout.parts[0].geometry)


def check(reduction: Reduction, layout: Layout) -> None:
    """Raises InvalidReduction if the model of this layout is not one that the reduction's methods work with."""
    if reduction.first:
        check_method(METHODS[reduction.first], layout)
    if reduction.first and reduction.pruning is not None:
        layout = _of_cells(layout, layout.tokens)
    if not reduction.base_only or reduction.ratio or reduction.keep_tokens:
        check_method(configured(reduction.method, reduction.option_values), layout)


def check_method(method: Method, layout: Layout) -> None:
    """Raises InvalidReduction if the model of this layout is not one that the method works with."""
    for geometry in _worked_on(method, layout):
        method.check(geometry)


def _worked_on(method: Method, layout: Layout) -> list[VisionGeometry]:
    """What the method sees of an image: its tiles, or the grids that they are laid out in."""
    if layout.tiling is not None and _works_on_tiles(method):
        return [layout.tiling.tile]
    return [part.geometry for part in _laid_out(layout, False, None, None, method.name).parts]


def _works_on_tiles(method: Method) -> bool:
    """Of images in tiles: before these are laid out."""
    return method.stage in (Stage.BEFORE_TOWER, Stage.IN_TOWER)


def plan_item(reduction: Reduction, layout: Layout, cells: Cells | None = None) -> ItemPlan:
    """Turn what was asked into counts for an image; a random method's seed is added where the pixels are.

    `ratio` holds for each grid, for each tile before they are laid out, or for a whole video where the method works
    across its frames. `keep_tokens` is shared out over the grids;
    where they are several, equal grids keep equally many, so that a few tokens fewer may stay.

    Args:
        cells: those that the reduction's pruning has chosen; None where it left all, or where there are no pixels yet:
            of no image more tokens stay.

    Raises:
        InvalidReduction: the image has too few tokens for it, or the model is not one that the method works with.
    """
    return _plan_item(reduction if reduction.query is None else replace(reduction, query=None), layout, cells)


@lru_cache(maxsize=4096)
def _plan_item(reduction: Reduction, layout: Layout, cells: Cells | None) -> ItemPlan:
    base_only = reduction.base_only and _base(layout).tokens < layout.tokens
    if isinstance(METHODS[reduction.method], AcrossFrames):
        check_method(METHODS[reduction.method], layout)
    if reduction.pruning is None:
        tile, of_grids = _of_tiles(reduction, layout)
        laid_out = _laid_out(layout, base_only, tile, None, of_grids.method)
    else:
        _check_pruning(reduction.pruning, layout)
        tile, of_grids = None, _after_pruning(reduction, layout)
        laid_out = _of_cells(layout, layout.tokens if cells is None else cells.kept)
    grids = _plan_parts(of_grids, laid_out)
    if all(plan.is_identity for plan in grids) and laid_out.parts[0].geometry.frames:
        laid_out, grids = layout, _plan_parts(Reduction(), layout)
    if reduction.decoder:
        METHODS[reduction.decoder].check(laid_out.parts[0].geometry)
    plan = ItemPlan(layout, grids, base_only=base_only, tile=tile, cells=cells)
    decoder, decoder_removed = _in_decoder(reduction, plan.kept)
    keeps_positions = reduction.positions == "keep" and not plan.is_identity
    return replace(plan, decoder=decoder, decoder_removed=decoder_removed, keeps_positions=keeps_positions)


def _check_pruning(pruning: PixelPrune, layout: Layout) -> None:
    """Raises InvalidReduction if cells of this layout can't be chosen."""
    check_method(pruning, layout)
    if layout.tokens != layout.parts[0].geometry.tokens:
        raise InvalidReduction(
            f"method {pruning.name!r} needs an image that is one grid of tokens: tiles, and a video's frames, would "
            "each keep a number of their own; choose another method",
            "method",
        )


def _after_pruning(reduction: Reduction, layout: Layout) -> Reduction:
    """What is left to ask of the cells that stay: no more tokens than the amount leaves of the whole image."""
    if not reduction.first or not (reduction.ratio or reduction.keep_tokens):
        return Reduction()
    own = {option.name for option in METHODS[reduction.method].options}
    options = tuple(option for option in reduction.options if option[0] in own)
    most = _left_of_whole(reduction, layout)
    return replace(reduction, first=None, options=options, ratio=None, keep_tokens=most)


def _base(layout: Layout) -> Layout:
    """Of the base tile alone."""
    check_method(METHODS[BaseOnly.name], layout)
    base = None if layout.tiling is None else layout.tiling.base(layout.shape)
    if base is None:
        raise InvalidReduction(f"method {BaseOnly.name!r} needs a base tile, and videos have no base tile", "method")
    return base


def _of_tiles(reduction: Reduction, layout: Layout) -> tuple[Plan | None, Reduction]:
    """The plan of each tile, and what is left to ask of the grids that they are laid out in."""
    if layout.tiling is None:
        return None, reduction
    tile = layout.tiling.tile
    if not _works_on_tiles(METHODS[reduction.method]):
        return Plan("none", tile.tokens), reduction
    if reduction.keep_tokens is not None:
        raise InvalidReduction(
            f"method {reduction.method!r} removes the same share of every tile: give a ratio, not keep_tokens",
            "keep_tokens",
        )
    plan = make_plan(reduction, tile)
    if reduction.positions == "keep" and not plan.is_identity:
        raise InvalidReduction(
            f"after {reduction.method!r} tiles are laid out anew, so that no token keeps its position: send positions "
            "'renumber'",
            "positions",
        )
    return plan, Reduction()


def _plan_parts(reduction: Reduction, layout: Layout) -> tuple[Plan, ...]:
    return tuple(_plan_part(one, layout, i) for i, one in enumerate(_shared_out(reduction, layout)))


def _plan_part(reduction: Reduction, layout: Layout, index: int) -> Plan:
    """Of each grid of a part; a refusal says which part, if there are more grids than one."""
    part = layout.parts[index]
    try:
        return make_plan(reduction, part.geometry)
    except InvalidReduction as refusal:
        if len(layout.parts) == part.count == 1:
            raise
        if part.name:
            raise InvalidReduction(f"{part.name}: {refusal}", refusal.param) from None
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
