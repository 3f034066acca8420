"""The reduction of one grid of vision tokens: the only place where token counts are computed.

The prompt's placeholders depend on the counts, so they are computed before the encoder runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import ClassVar

from foldserve.reducers import METHODS, Method, method_with_options
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import Step
from foldserve.reducers.options import Value, pack, unpack
from foldserve.reducers.reduction import MIN_KEPT, InvalidReduction, Reduction
from foldserve.reducers.schedule import fold_schedule, least_ratio

__all__ = ["InvalidReduction", "Plan", "Reduction", "VisionGeometry", "fold_schedule", "make_plan", "tokens_to_remove"]

CODES = ("none", *METHODS)  # a method's integer code is its index


@dataclass(frozen=True, slots=True)
class Plan:
    """The counts of one grid. On one model, `to_ints` determines the plan.

    Attributes:
        method: method before the decoder: a name in `METHODS`, or "none" if nothing is removed there.
        encoded: vision tokens without reduction.
        removed: tokens that the steps remove before the decoder.
        grid, whole_grid: (rows, columns) with and without reduction, for methods that keep a grid.
        frames: see `VisionGeometry.frames`.
    """

    INTS: ClassVar[int] = 5  # length of `to_ints`

    method: str
    encoded: int
    removed: int = 0
    steps: tuple[Step, ...] = ()
    options: tuple[Value, ...] = ()
    grid: tuple[int, int] | None = None
    whole_grid: tuple[int, int] | None = None
    frames: int = 0
    seed: int = 0

    @property
    def kept(self) -> int:
        return self.encoded - self.removed

    @property
    def is_identity(self) -> bool:
        return self.removed == 0

    @property
    def reducer(self) -> Method | None:
        return None if self.is_identity else method_with_options(self.method, self.options)

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(step.removed for step in self.steps)

    def removed_in(self, layer: int) -> tuple[int, ...]:
        return tuple(step.removed for step in self.steps if step.layer == layer)

    @property
    def is_seeded(self) -> bool:
        return self.reducer is not None and self.reducer.is_seeded

    def with_seed(self, seed: int) -> Plan:
        return replace(self, seed=seed)

    def to_ints(self) -> tuple[int, ...]:
        """`INTS` integers; only `from_ints` of the same release can read them."""
        options = METHODS[self.method].options if self.method != "none" else ()
        code = pack(options, self.options)
        return CODES.index(self.method), self.encoded, self.removed, self.seed, code

    @classmethod
    def from_ints(cls, ints: Sequence[int], geometry: VisionGeometry) -> Plan:
        """Inverse of `to_ints`, on the same model."""
        method, _, removed, seed, code = ints
        plan = cls("none", geometry.tokens)
        if removed:
            values = unpack(METHODS[CODES[method]].options, code)
            plan = _plan(method_with_options(CODES[method], values), geometry, removed)
        return plan.with_seed(seed) if seed else plan


@lru_cache(maxsize=4096)
def make_plan(reduction: Reduction, geometry: VisionGeometry) -> Plan:
    """Compute the plan of one grid; `item` combines the plans of an image's grids.

    Raises:
        InvalidReduction: the grid has too few tokens, or the method does not work with the model.
    """
    asked = method_with_options(reduction.method, reduction.option_values)
    options = asked.resolved_options(geometry, keeps_positions=reduction.positions == "keep")
    method = method_with_options(asked.name, options)
    removed = tokens_to_remove(reduction, geometry)
    if removed or reduction.method != Reduction().method:
        method.check(geometry)
    if removed:
        removed = _fit(reduction, method, geometry, removed)
    return _plan(method, geometry, removed)


@lru_cache(maxsize=4096)
def _plan(method: Method, geometry: VisionGeometry, removed: int) -> Plan:
    if removed == 0:
        return Plan("none", geometry.tokens)
    steps, grid = method.schedule(geometry, removed), method.grid(geometry, removed)
    whole_grid = geometry.grid if method.keeps_grid else None
    return Plan(method.name, geometry.tokens, removed, steps, method.values, grid, whole_grid, geometry.frames)


def tokens_to_remove(reduction: Reduction, geometry: VisionGeometry) -> int:
    """int(encoded * ratio), truncated as in the authors' code, or encoded - keep_tokens."""
    encoded = geometry.tokens
    if reduction.keep_tokens is not None:
        if reduction.keep_tokens > encoded and geometry.varies:
            return 0
        if reduction.keep_tokens > encoded:
            raise InvalidReduction(
                f"keep_tokens {reduction.keep_tokens} is more than this image has: give {encoded} or less",
                "keep_tokens",
            )
        return encoded - reduction.keep_tokens
    removed = int(encoded * (reduction.ratio or 0.0))
    if removed and encoded - removed < MIN_KEPT:
        limit = int(10_000 * (encoded - 1) / encoded) / 10_000
        raise InvalidReduction(
            f"ratio {reduction.ratio} would remove {removed} of {encoded} vision tokens, but {MIN_KEPT} "
            f"have to stay: give a ratio below {limit}",
            "ratio",
        )
    return removed


def _fit(reduction: Reduction, method: Method, geometry: VisionGeometry, removed: int) -> int:
    """Tokens that the method will remove; raises if it cannot keep exactly `keep_tokens`, or a square number."""
    name = method.name
    try:
        fitting = method.removable(geometry, removed)
    except InvalidReduction as refusal:
        by_count = refusal.param == "ratio" and reduction.keep_tokens is not None
        raise InvalidReduction(str(refusal), "keep_tokens" if by_count else refusal.param) from None
    kept = geometry.tokens - fitting
    if reduction.keep_tokens not in (None, kept) and not geometry.varies:
        raise InvalidReduction(
            f"method {name!r} can't keep {reduction.keep_tokens} tokens, the next lower number is {kept}", "keep_tokens"
        )
    if kept < MIN_KEPT:
        raise InvalidReduction(
            f"method {name!r} would leave {kept} of {geometry.tokens} vision tokens, but {MIN_KEPT} have "
            "to stay: give a smaller ratio",
            "ratio",
        )
    if geometry.any_resolution and isqrt(kept) ** 2 != kept:
        below = isqrt(kept) ** 2
        raise InvalidReduction(
            f"{kept} is not a perfect square, as this model's tiling requires of the tokens that stay: give ratio "
            f"{least_ratio(geometry.tokens, below)} ({below} tokens of {geometry.tokens})",
            "ratio" if reduction.keep_tokens is None else "keep_tokens",
        )
    return fitting
