"""How many equal requests a fixed KV pool holds at once, compared with the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foldserve.loadtest.micro.engine import ProbedEngine, ProbeRequest
from foldserve.loadtest.micro.shape import Shape

STEPS = 2  # all prompts in one step, then all requests decode together
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Resident:
    """Result for one kind of request, alone on a pool of `pool_mib`.

    Attributes:
        requests: number that ran at once, with more waiting.
        expected: (fewest, most) requests by the formula, with less than `block_mib` of rounding each, or none.
        held_mib: KV memory of a request, in whole blocks.
        formula_mib: KV memory of a request by the formula, without rounding to blocks.
        block_mib: memory of one block in every KV cache group.
    """

    name: str
    requests: int
    expected: tuple[int, int]
    held_mib: float
    formula_mib: float
    block_mib: float
    pool_mib: float

    @property
    def as_predicted(self) -> bool:
        """Whether memory and number agree with the formula, within one block per request."""
        in_memory = self.formula_mib <= self.held_mib < self.formula_mib + self.block_mib
        return in_memory and self.expected[0] <= self.requests <= self.expected[1]


def count_resident(
    name: str, engine: ProbedEngine, shape: Shape, request: ProbeRequest, vision: int, deep_vision: int
) -> Resident:
    """Sends more equal requests than fit, and counts those that run after each has generated `STEPS` tokens.

    Raises:
        RuntimeError: a request was preempted, or they hold different numbers of blocks.
    """
    pool = engine.usable_blocks * engine.block_bytes
    block = engine.groups * engine.block_bytes
    formula = shape.kv_bytes(shape.text + STEPS - 1, vision, deep_vision)
    expected = pool // (formula + block), pool // formula
    for _ in range(expected[1] + 1):
        engine.add(replace(request, tokens=STEPS + 1))
    counts = []
    for _ in range(STEPS):
        engine.step()
        counts.append(len(engine.resident()))
    held = set(engine.resident())
    engine.clear()
    if len(set(counts)) != 1 or len(held) != 1:
        raise RuntimeError(
            f"{name}: running after each step {counts}, (tokens, blocks) held {held}: not a steady state"
        )
    _, blocks = held.pop()
    memory = (blocks * engine.block_bytes, formula, block, pool)
    return Resident(name, counts[0], expected, *(value / MIB for value in memory))
