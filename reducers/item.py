"""The reduction of one image or video: a plan for each of its grids, and what concerns all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Protocol

from foldserve.reducers import METHODS, Method, method_with_options
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.method import AcrossFrames, InDecoder
from foldserve.reducers.pixelprune import Cells, PixelPrune
from foldserve.reducers.plan import CODES, Plan, make_plan, tokens_to_remove
from foldserve.reducers.reduction import MIN_KEPT, InvalidReduction, Reduction

__all__ = ["ItemPlan", "Layout", "Part", "Tiling", "check_reduction", "min_kept_cells", "plan_item"]


@dataclass(frozen=True, slots=True)
class Part:
    """`count` grids of one geometry, each reduced separately, and `separators` embeddings, which are never removed."""

    geometry: VisionGeometry
    count: int = 1
    separators: int = 0
    name: str = ""  # for error messages, if an image has several parts
    can_join: bool = False  # the grids are frames of a video without text between them

    @property
    def tokens(self) -> int:
        return self.geometry.tokens * self.count + self.separators

    @property
    def joined(self) -> Part:
        """The part with all grids joined into one; unchanged unless `can_join`."""
        if not self.can_join:
            return self
        whole = replace(self.geometry, tokens=self.geometry.tokens * self.count, grid=None, frames=self.count)
        return Part(whole, separators=self.separators, name=self.name)


class Tiling(Protocol):
    """How a model family lays out images in tiles, which its tower sees one by one; `tile` is one of them."""

    @property
    def tile(self) -> VisionGeometry: ...

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        """Layout of the base tile alone, with no more parts than the whole image's; None for videos."""

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        """Layout with side x side tokens per tile, for methods that work on the `tile`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of an unreduced image, in prompt order."""

    parts: tuple[Part, ...]  # at least one
    shape: tuple[int, ...] = ()  # what determines the parts; its meaning depends on the model family
    tiling: Tiling | None = field(default=None, repr=False)  # the same for all images of a model

    @classmethod
    def single(cls, geometry: VisionGeometry) -> Layout:
        return cls((Part(geometry),))

    @property
    def joined(self) -> Layout:
        """The layout of a video for methods that work across frames."""
        return replace(self, parts=tuple(part.joined for part in self.parts))

    @property
    def tokens(self) -> int:
        """Embeddings that the decoder gets without reduction."""
        return sum(part.tokens for part in self.parts)

    @property
    def removable(self) -> int:
        """Most tokens that can be removed; `MIN_KEPT` of every grid stay."""
        return sum(part.count * (part.geometry.tokens - MIN_KEPT) for part in self.parts)


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """The counts of one image or video."""

    layout: Layout  # without reduction
    grids: tuple[Plan, ...]  # for each part of `laid_out`, the plan of each of its grids
    decoder: str = "none"  # method in the decoder
    decoder_removed: int = 0  # tokens that it removes from layer K on, separators included
    keeps_positions: bool = False  # in the decoder; text then continues after the full length
    base_only: bool = False  # the tower sees only the base tile
    tile: Plan | None = None  # of each tile before tiles are laid out
    cells: Cells | None = None  # cells that the tower sees, chosen by pixels; None: all

    @property
    def laid_out(self) -> Layout:
        """Layout of the tower's output: whole, the base tile, smaller tiles, some cells, or frames as one grid."""
        return _laid_out(self.layout, self.base_only, self.tile, self.cells, self.grids[0].method)

    @property
    def encoded(self) -> int:
        return self.layout.tokens

    @property
    def removed(self) -> int:
        """Embeddings removed before the decoder."""
        return self.encoded - self.kept

    @property
    def kept(self) -> int:
        """Embeddings that the decoder gets."""
        laid_out = self.laid_out
        gone = sum(plan.removed * part.count for plan, part in zip(self.grids, laid_out.parts, strict=True))
        return laid_out.tokens - gone

    @property
    def kept_deep(self) -> int:
        """Embeddings in the decoder's layers from K on."""
        return self.kept - self.decoder_removed

    @property
    def ratio(self) -> float:
        """Share of the embeddings that is removed before the decoder."""
        return self.removed / self.encoded

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed before the decoder."""
        return not self.base_only and self.cells is None and all(plan.is_identity for plan in self._plans)

    @property
    def method(self) -> str:
        """The methods before the decoder, joined by "+"; "none" if there are none."""
        methods = [BaseOnly.name] * self.base_only + [PixelPrune.name] * (self.cells is not None)
        methods += list(dict.fromkeys(plan.method for plan in self._plans if not plan.is_identity))
        return "+".join(methods) or "none"

    @property
    def _plans(self) -> tuple[Plan, ...]:
        return self.grids if self.tile is None else (self.tile, *self.grids)

    @property
    def is_seeded(self) -> bool:
        return any(plan.is_seeded for plan in self.grids)

    @property
    def query_method(self) -> Method | None:
        methods = (plan.reducer for plan in self.grids)
        return next((method for method in methods if method is not None and method.takes_query), None)

    def with_seed(self, seed: int) -> ItemPlan:
        return replace(self, grids=tuple(plan.with_seed(seed) if plan.is_seeded else plan for plan in self.grids))

    def to_ints(self) -> tuple[int, ...]:
        """The layout's shape, then the integers for `from_ints` of the same release.

        On one model their number is the same for all plans, except that a mask of `cells` follows.
        """
        own = [CODES.index(self.decoder), self.decoder_removed, int(self.keeps_positions)]
        own += [] if self.layout.tiling is None else [int(self.base_only)]
        codes = [code for plan in self._plans for code in plan.to_ints()]
        missing = len(self.layout.parts) - len(self.grids)  # if only the base tile is encoded
        mask = () if self.cells is None else self.cells.to_ints()
        return (*self.layout.shape, *own, *codes, *[0] * (missing * len(self.grids[0].to_ints())), *mask)

    @classmethod
    def from_ints(cls, ints: Sequence[int], layout: Layout) -> ItemPlan:
        """Inverse of `to_ints`, given the integers after the shape."""
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
    """Layout of `count` cells of an image of one grid. Cells are not a grid, and clients do not know their number."""
    (part,) = layout.parts
    geometry = replace(part.geometry, tokens=count, grid=None, varies=True)
    return replace(layout, parts=(replace(part, geometry=geometry),))


def min_kept_cells(reduction: Reduction, layout: Layout) -> int:
    """How many cells of an image have to stay, whatever its pixels; raises InvalidReduction if it has fewer."""
    is_bound = not reduction.first and (reduction.ratio or reduction.keep_tokens)
    return _kept_of_single_grid(reduction, layout) if is_bound else MIN_KEPT


def _kept_of_single_grid(reduction: Reduction, layout: Layout) -> int:
    """Tokens that `ratio` or `keep_tokens` leaves of an image of one grid."""
    return layout.tokens - tokens_to_remove(reduction, layout.parts[0].geometry)


def check_reduction(reduction: Reduction, layout: Layout) -> None:
    """Raises InvalidReduction if the reduction's methods do not work with the model of this layout."""
    if reduction.first:
        check_method(METHODS[reduction.first], layout)
    if reduction.first and reduction.pruning is not None:
        layout = _of_cells(layout, layout.tokens)
    if not reduction.base_only or reduction.ratio or reduction.keep_tokens:
        check_method(method_with_options(reduction.method, reduction.option_values), layout)


def check_method(method: Method, layout: Layout) -> None:
    """Raises InvalidReduction if the method does not work with the model of this layout."""
    for geometry in _method_geometries(method, layout):
        method.check(geometry)


def _method_geometries(method: Method, layout: Layout) -> list[VisionGeometry]:
    """Geometries that the method sees: a tile's, or those of the grids after layout."""
    if layout.tiling is not None and _works_on_tiles(method):
        return [layout.tiling.tile]
    return [part.geometry for part in _laid_out(layout, False, None, None, method.name).parts]


def _works_on_tiles(method: Method) -> bool:
    """Whether the method reduces tiles before they are laid out."""
    return method.stage in (Stage.BEFORE_TOWER, Stage.IN_TOWER)


def plan_item(reduction: Reduction, layout: Layout, cells: Cells | None = None) -> ItemPlan:
    """Compute the plan of one image or video; the caller adds the seed of random methods.

    `ratio` applies to each grid, to each tile before layout, or to a whole video if the method works across frames.
    `keep_tokens` is divided among the grids. Equal grids keep equally many, so a few tokens fewer may stay.

    Args:
        cells: those that pruning has chosen; None if it keeps all, or if the pixels are not known yet, which gives the
            largest possible plan.

    Raises:
        InvalidReduction: the image has too few tokens, or the method does not work with the model.
    """
    return _plan_item(reduction if reduction.query is None else replace(reduction, query=None), layout, cells)


@lru_cache(maxsize=4096)
def _plan_item(reduction: Reduction, layout: Layout, cells: Cells | None) -> ItemPlan:
    base_only = reduction.base_only and _base_layout(layout).tokens < layout.tokens
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
    """Raises InvalidReduction if cells of this layout can't be pruned."""
    check_method(pruning, layout)
    if layout.tokens != layout.parts[0].geometry.tokens:
        raise InvalidReduction(
            f"method {pruning.name!r} needs an image that is one grid of tokens: tiles, and a video's frames, would "
            "each keep a number of their own; choose another method",
            "method",
        )


def _after_pruning(reduction: Reduction, layout: Layout) -> Reduction:
    """The reduction of the remaining cells: to at most the tokens that the amount leaves of the whole image."""
    if not reduction.first or not (reduction.ratio or reduction.keep_tokens):
        return Reduction()
    own = {option.name for option in METHODS[reduction.method].options}
    options = tuple(option for option in reduction.options if option[0] in own)
    most = _kept_of_single_grid(reduction, layout)
    # not `replace`: other fields took effect in `most`, and may contradict keep_tokens
    return Reduction(reduction.method, options=options, keep_tokens=most, positions=reduction.positions)


def _base_layout(layout: Layout) -> Layout:
    """Layout of the base tile alone."""
    check_method(METHODS[BaseOnly.name], layout)
    base = None if layout.tiling is None else layout.tiling.base(layout.shape)
    if base is None:
        raise InvalidReduction(f"method {BaseOnly.name!r} needs a base tile, and videos have no base tile", "method")
    return base


def _of_tiles(reduction: Reduction, layout: Layout) -> tuple[Plan | None, Reduction]:
    """The plan of each tile, and the reduction that remains for the grids after layout."""
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
    return tuple(_plan_part(one, layout, i) for i, one in enumerate(_split_keep_tokens(reduction, layout)))


def _plan_part(reduction: Reduction, layout: Layout, index: int) -> Plan:
    """The plan of each grid of a part; errors name the part if there are several grids."""
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


def _split_keep_tokens(reduction: Reduction, layout: Layout) -> list[Reduction]:
    """One reduction per part; `keep_tokens` is divided in proportion to tokens, by largest remainder."""
    parts, asked = layout.parts, reduction.keep_tokens
    if asked is None or layout.tokens == parts[0].geometry.tokens:  # one grid: nothing to share
        return [reduction] * len(parts)
    least = layout.tokens - layout.removable
    if not least <= asked <= layout.tokens:
        raise InvalidReduction(
            f"keep_tokens {asked} is not what this image can keep: give {least} to {layout.tokens}", "keep_tokens"
        )
    share = Fraction(asked - least, max(layout.removable, 1))
    more = [share * (part.geometry.tokens - MIN_KEPT) for part in parts]  # per grid, beyond `MIN_KEPT`
    kept = [MIN_KEPT + int(number) for number in more]
    left = asked - least - sum(part.count * int(number) for part, number in zip(parts, more, strict=True))
    for i in sorted(range(len(parts)), key=lambda i: -(more[i] % 1)):
        if more[i] % 1 and parts[i].count <= left:
            kept[i] += 1
            left -= parts[i].count
    return [replace(reduction, keep_tokens=number) for number in kept]


def _in_decoder(reduction: Reduction, kept: int) -> tuple[str, int]:
    """The decoder's method, and how many of `kept` tokens it removes."""
    if reduction.decoder is None:
        return "none", 0
    method = METHODS[reduction.decoder]
    assert isinstance(method, InDecoder)  # as Reduction checked
    removed = method.removed(kept, reduction.decoder_ratio)
    if removed == kept and not reduction.withdraw:
        raise InvalidReduction(
            f"{method.name!r} at {reduction.decoder_ratio} would remove all {kept} vision tokens: give a lower share, "
            "or withdraw them",
            "decoder_ratio",
        )
    return (method.name, removed) if removed else ("none", 0)
