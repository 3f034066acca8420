"""The verdict of a soak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foldserve.loadtest.soak.death import Death
from foldserve.loadtest.soak.load import LoadOutcome
from foldserve.loadtest.soak.server import HeldResources

MEMORY_GROWTH = 0.05
"""Largest growth of memory since the server was warm, as a share."""
READY_WITHIN_S = 1.0
HEARD_WITHIN_S = 5.0
"""After the engine's death, for clients and for /health/ready; vLLM checks its engines about once a second."""
ENDED_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class SoakReport:
    """Results of a soak test.

    Attributes:
        looks: what the server held at equal numbers of requests; the first after warm-up and streams, with full caches.
        soak: of the mixed requests.
        streams: of the streams that were open at once.
        seconds: duration of the test.
        ready_within_s: longest time that `/health/ready` may take.
    """

    looks: Sequence[HeldResources]
    soak: LoadOutcome
    streams: LoadOutcome
    death: Death
    seconds: float
    ready_within_s: float = READY_WITHIN_S

    @property
    def memory_growth(self) -> float:
        return self.looks[-1].memory_bytes / self.looks[0].memory_bytes - 1

    def failures(self) -> Iterator[str]:
        """Messages about what should not have happened."""
        for held in self.looks:
            if held.requests or held.kv_share:
                yield f"left in the engine: {held.requests:g} requests, {held.kv_share:.2%} of the KV cache"
        warm, end = self.looks[0], self.looks[-1]
        if end.files > warm.files:
            yield f"file descriptors: {warm.files} when warm, {end.files} at the end"
        if self.memory_growth > MEMORY_GROWTH:
            yield f"memory grew by {self.memory_growth:.1%}"
        for name, outcome in (("the mixed requests", self.soak), ("the streams", self.streams)):
            yield from outcome.wrong[:10]
            if outcome.ready_s > self.ready_within_s:
                yield f"/health/ready took {outcome.ready_s:.2f} s beside {name}"
        yield from self._failures_of_the_end()

    def _failures_of_the_end(self) -> Iterator[str]:
        death = self.death
        yield from death.wrong[:10]
        if death.red_s > HEARD_WITHIN_S:
            yield f"the engine was killed, and /health/ready was green for {death.red_s:.2f} s"
        if death.heard_s > HEARD_WITHIN_S:
            yield f"the engine was killed, and a client heard of it after {death.heard_s:.2f} s"
        if death.ended_s > ENDED_WITHIN_S:
            yield f"the engine was killed, and the server ended after {death.ended_s:.2f} s"
        if death.exit_status == 0:
            yield "the engine was killed, and the server ended with status 0"

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "memory_growth": round(self.memory_growth, 4),
            "failures": list(self.failures()),
            "soak": self.soak.to_json(),
            "streams": self.streams.to_json(),
            "death": asdict(self.death),
            "looks": [asdict(held) | {"memory_bytes": held.memory_bytes} for held in self.looks],
        }
