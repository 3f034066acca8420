"""What is done to one image, in integers: the one place where token counts are computed.

The prompt's placeholders depend on the counts, so they are decided before the encoder runs, and nobody computes them
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from foldserve.reducers import METHODS
from foldserve.reducers.reduction import MIN_KEPT, InvalidReduction, Reduction
from foldserve.reducers.schedule import fold_schedule

__all__ = ["InvalidReduction", "Plan", "Reduction", "fold_schedule", "make_plan", "tokens_to_remove"]

_METHOD_CODES = ("none", *METHODS)
_SCALE_CODES: tuple[Literal["none", "official"], ...] = ("none", "official")


@dataclass(frozen=True, slots=True)
class Plan:
    """The counts of one image; plans with equal integers are equal.

    Attributes:
        method: a name in `METHODS`, or "none" if nothing is removed.
        encoded: tokens that the encoder gives the decoder without reduction.
        removed: how many of them go.
        folds: tokens that each step of the method removes; sums to `removed`.
        scale: see `Reduction`.
        withdraw: see `Reduction`.
    """

    method: str
    encoded: int
    removed: int
    folds: tuple[int, ...]
    scale: Literal["none", "official"]
    withdraw: bool

    @property
    def kept(self) -> int:
        """Tokens that the decoder gets."""
        return self.encoded - self.removed

    @property
    def ratio(self) -> float:
        """Share of tokens that is really removed."""
        return self.removed / self.encoded

    @property
    def is_identity(self) -> bool:
        """Nothing is removed."""
        return self.removed == 0

    def to_ints(self) -> tuple[int, ...]:
        """Five integers, for a tensor; `from_ints` of the same release reads them."""
        return (
            _METHOD_CODES.index(self.method),
            self.encoded,
            self.removed,
            _SCALE_CODES.index(self.scale),
            int(self.withdraw),
        )

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Plan:
        """The plan that gave these integers."""
        method, encoded, removed, scale, withdraw = ints
        return _plan(_METHOD_CODES[method], encoded, removed, _SCALE_CODES[scale], bool(withdraw))


@lru_cache(maxsize=4096)
def make_plan(reduction: Reduction, encoded: int) -> Plan:
    """Turn what was asked into counts for an image of `encoded` vision tokens.

    Raises:
        InvalidReduction: the image has too few tokens for it.
    """
    removed = tokens_to_remove(reduction, encoded)
    return _plan(reduction.method, encoded, removed, reduction.scale, reduction.withdraw)


def tokens_to_remove(reduction: Reduction, encoded: int) -> int:
    """int(encoded * ratio), truncated as in the authors' code, or encoded - keep_tokens.

    Raises:
        InvalidReduction: fewer than two tokens would stay, or more than there are.
    """
    if reduction.keep_tokens is not None:
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
            f"ratio {reduction.ratio} would remove {removed} of this image's {encoded} vision tokens, but {MIN_KEPT} "
            f"have to stay: give a ratio below {limit}, or keep_tokens from {MIN_KEPT} to {encoded}",
            "ratio",
        )
    return removed


@lru_cache(maxsize=4096)
def _plan(method: str, encoded: int, removed: int, scale: Literal["none", "official"], withdraw: bool) -> Plan:
    if removed == 0:
        return Plan("none", encoded, 0, (), "none", withdraw)
    return Plan(method, encoded, removed, METHODS[method].schedule(encoded, removed), scale, withdraw)
