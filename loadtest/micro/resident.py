"""How many equal requests a fixed KV pool holds at once, against the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foldserve.loadtest.micro.engine import ProbedEngine, Request
from foldserve.loadtest.micro.shape import Shape

STEPS = 2  # all prompts in one step, then all requests decode together
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Resident:
    """What one kind of request found on a pool of `pool_mib` that it had for itself.

    Attributes:
        requests: how many ran at once, with more waiting.
        expected: the fewest and the most that there may be: each holds what the formula says, and less than `block_mib`
            more, or nothing more.
        held_mib: KV memory of each, counted in blocks.
        formula_mib: KV memory of each by the formula, which knows no blocks.
        block_mib: one block in every KV cache group.
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
        """Within one block per request of the formula, in memory and in number."""
        in_memory = self.formula_mib <= self.held_mib < self.formula_mib + self.block_mib
        return in_memory and self.expected[0] <= self.requests <= self.expected[1]


def count_resident(
    name: str, engine: ProbedEngine, shape: Shape, request: Request, vision: int, deep_vision: int
) -> Resident:
    """Offers more equal requests than fit, and counts those that run after each has generated `STEPS` tokens.

    Raises:
        RuntimeError: a request that ran was put back to wait, or they do not hold equally many blocks.
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
