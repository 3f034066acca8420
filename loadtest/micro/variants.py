"""The variants of the withdrawal benchmark, on two engines with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from foldserve.loadtest.micro.engine import ProbedEngine, ProbeRequest, StepCost
from foldserve.loadtest.micro.pairs import Ratio, alternate, ratio
from foldserve.loadtest.micro.resident import Resident, count_resident
from foldserve.loadtest.micro.shape import Shape
from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.plan import Reduction, VisionGeometry

FOLD = 0.66
REDUCTIONS = {
    "nothing": None,
    "withdraw": Reduction(decoder="withdraw"),
    "folder": Reduction(ratio=FOLD),
    "both": Reduction(ratio=FOLD, decoder="withdraw"),
}
GOALS = {"withdraw": 0.60, "both": 0.30}
IDLE_GOAL = 1.02
DECODING = (1, 4)  # requests at once
DECODE_PAIRS = 4  # for each pair of prefills, which take far longer
WARM_UP = 1


@dataclass(frozen=True, slots=True)
class CostRatio:
    """One comparison of `forward` or the whole `step`; `flops` and `goal` are ratios too."""

    variant: str
    base: str
    part: str
    cpu: Ratio
    wall: Ratio
    base_cpu_ms: float
    flops: float | None
    goal: float | None


class Bench:
    """An engine without withdrawal and one with, and the four kinds of request."""

    def __init__(self, shape: Shape, checkpoint: Path, **options: Any) -> None:
        self.shape = shape
        self._checkpoint, self._options = checkpoint, options
        self.plain = self._start(None)
        self.withdrawing = self._start(shape.withdraw_layer)
        image = self.plain.tokenizer.convert_tokens_to_ids("<image>")
        words = self.plain.tokenizer.encode("What is in this picture?")
        prompt = [image, *islice(cycle(words), shape.text)]
        self.requests = {name: ProbeRequest(prompt, shape.image(), each) for name, each in REDUCTIONS.items()}

    def _start(self, withdraw_layer: int | None) -> ProbedEngine:
        return ProbedEngine(self._checkpoint, withdraw_layer, **self._options)

    def vision_tokens(self, name: str) -> tuple[int, int]:
        """(vision tokens before layer K, from K on)."""
        plan = plan_item(REDUCTIONS[name] or Reduction(), Layout.single(VisionGeometry(self.shape.vision)))
        return plan.kept, plan.kept_deep

    def prefill(self, pairs: int) -> Iterator[CostRatio]:
        """Prefill cost of each reduction relative to none, in the engine with withdrawal."""
        full = self.shape.flops(*self.vision_tokens("nothing"))
        base = partial(self.withdrawing.prefill, self.requests["nothing"])
        for name in ("withdraw", "folder", "both"):
            variant = partial(self.withdrawing.prefill, self.requests[name])
            flops = self.shape.flops(*self.vision_tokens(name)) / full
            yield from _rows(name, "nothing", _timed(variant, base, pairs), flops, GOALS.get(name))

    def idle(self, pairs: int) -> Iterator[CostRatio]:
        """Cost of the engine with withdrawal when no request withdraws, relative to the one without.

        The control is a second engine without withdrawal: equal engines differ by where their weights lie in memory.
        """
        control = self._start(None)
        for name, engine, goal in (("idle", self.withdrawing, IDLE_GOAL), ("control", control, None)):
            request = self.requests["nothing"]
            costs = _timed(partial(engine.prefill, request), partial(self.plain.prefill, request), pairs)
            yield from _rows(f"{name} prefill", "plain engine", costs, None, goal)
            for count in DECODING:
                costs = self._decode(engine, count, pairs)
                yield from _rows(f"{name} decode x{count}", "plain engine", costs, None, goal)

    def _decode(self, engine: ProbedEngine, count: int, pairs: int) -> Sequence[tuple[StepCost, StepCost]]:
        """Pairs of decode steps with `count` requests in each engine, at equal context lengths."""
        request = replace(self.requests["nothing"], tokens=DECODE_PAIRS * pairs + WARM_UP + 2)
        for each in (engine, self.plain):
            for _ in range(count):
                each.add(request)
            each.step()
        costs = _timed(engine.step, self.plain.step, DECODE_PAIRS * pairs)
        engine.clear()
        self.plain.clear()
        return costs

    def resident(self) -> Iterator[Resident]:
        """Counts each kind of request alone on the pool of each engine that can serve it."""
        for label, engine, names in (
            ("plain engine", self.plain, ("nothing", "folder")),
            ("withdrawing engine", self.withdrawing, tuple(REDUCTIONS)),
        ):
            for name in names:
                kind = self.requests[name], *self.vision_tokens(name)
                yield count_resident(f"{label}, {name}", engine, self.shape, *kind)


def _timed(
    variant: Callable[[], StepCost], base: Callable[[], StepCost], pairs: int
) -> Sequence[tuple[StepCost, StepCost]]:
    """The first pair is not counted."""
    return alternate(variant, base, WARM_UP + pairs)[WARM_UP:]


def _rows(
    variant: str, base: str, costs: Sequence[tuple[StepCost, StepCost]], flops: float | None, goal: float | None
) -> Iterator[CostRatio]:
    for part in ("forward", "step"):
        clocks = [(getattr(one, part), getattr(other, part)) for one, other in costs]
        cpu = ratio([(one.cpu_ms, other.cpu_ms) for one, other in clocks])
        wall = ratio([(one.wall_ms, other.wall_ms) for one, other in clocks])
        yield CostRatio(variant, base, part, cpu, wall, median(other.cpu_ms for _, other in clocks), flops, goal)
