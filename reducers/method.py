"""What the server knows about a reduction method without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Where on an image's way a method removes tokens."""

    BEFORE_TOWER = "before_tower"
    IN_TOWER = "in_tower"
    AFTER_TOWER = "after_tower"
    PROJECTOR = "projector"
    DECODER = "decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One entry of the registry.

    Attributes:
        name: what a request writes in `reduction.method`.
        summary: one sentence for users.
        paper: title of the paper that defines it.
        stage: where it removes tokens.
        schedule: (patch tokens, tokens to remove) -> tokens that each of its steps removes; the steps sum to the total.
        parameters: fields of `Reduction` that a request may set with it, besides `method`.
    """

    name: str
    summary: str
    paper: str
    stage: Stage
    schedule: Callable[[int, int], tuple[int, ...]]
    parameters: tuple[str, ...] = ("ratio", "keep_tokens", "withdraw")
