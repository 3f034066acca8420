"""What is measured: variants x loads, in rounds of alternating order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

ServerName = Literal["foldserve", "vllm"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A server and how its images are reduced; `vllm` is the control without reduction.

    Attributes:
        method: None at ratio 0.
        ratio: in [0, 1).
        withdraw: whether vision tokens leave the decoder at the server's layer K.
    """

    server: ServerName = "foldserve"
    method: str | None = None
    ratio: float = 0.0
    withdraw: bool = False

    @property
    def family(self) -> str:
        """Name of the variant without its ratio: one line of a plot."""
        if self.server == "vllm":
            return "plain vLLM"
        return " + ".join(filter(None, [self.method, "withdraw" if self.withdraw else None])) or "ratio 0"

    @property
    def label(self) -> str:
        return f"{self.family} {self.ratio:g}" if self.method else self.family

    def body(self) -> dict[str, Any]:
        """The request fields of this variant."""
        reduction: dict[str, Any] = {"method": self.method, "ratio": self.ratio} if self.method else {}
        if self.withdraw:
            reduction["withdraw"] = True
        return {"reduction": reduction} if reduction else {}


CONTROL = Variant("vllm")
RATIO_0 = Variant()


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. Exactly one of the first three is set.

    Attributes:
        concurrency: number of requests always in flight.
        rate: requests/s, at random times.
        speed: factor on the times of a trace.
        requests: per block.
        blocks: per variant and round.
    """

    concurrency: int | None = None
    rate: float | None = None
    speed: float | None = None
    requests: int = 1
    blocks: int = 1

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return f"{self.rate:g} requests/s" if self.rate is not None else f"trace at speed {self.speed:g}"


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One cell of the grid."""

    variant: Variant
    load: Load

    def __str__(self) -> str:
        return f"{self.variant.label}, {self.load}"


@dataclass(frozen=True, slots=True)
class Block:
    """One measurement of a point; `number` counts the point's blocks in this round."""

    point: GridPoint
    round: int
    number: int = 0

    @property
    def key(self) -> str:
        """Key of the result in the journal."""
        number = f", block {self.number}" if self.number else ""
        return f"{self.point}, {self.point.load.requests} requests, round {self.round}{number}"


def variants(methods: Sequence[str], ratios: Sequence[float], withdraw: Sequence[bool], control: bool) -> list[Variant]:
    """The control, ratio 0, then the others in the order given."""
    rest = []
    for leaves, method, ratio in product(withdraw, methods, ratios):
        rest.append(Variant("foldserve", method if ratio else None, ratio, leaves))
    return list(dict.fromkeys([*([CONTROL] if control else []), RATIO_0, *rest]))


def schedule(variants: Sequence[Variant], loads: Sequence[Load], rounds: int, *, beside: bool) -> list[Block]:
    """All blocks in the order in which they run.

    Every second pass through the variants, and every second round, runs backwards (ABBA), so that a machine that slows
    down favours no variant.

    Args:
        beside: whether both servers run at the same time and their variants alternate. Otherwise each server runs all
            its blocks of a round before the other starts.
    """
    cells = [
        (GridPoint(variant, load), turn)
        for load in loads
        for turn in range(load.blocks)
        for variant in (variants[::-1] if turn % 2 else variants)
    ]
    if not beside:
        cells.sort(key=lambda cell: cell[0].variant.server != "vllm")
    return [
        Block(point, number, turn) for number in range(rounds) for point, turn in (cells[::-1] if number % 2 else cells)
    ]
