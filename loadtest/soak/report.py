"""The verdict of a soak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from foldserve.loadtest.soak.load import Outcome
from foldserve.loadtest.soak.server import Held

MEMORY_GROWTH = 0.05
"""Largest share by which memory may have grown since the server was warm."""
READY_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was seen.

    Attributes:
        warm: what the server held after the first requests and the streams, when its caches were full.
        end: what it held after the last.
        soak: of the mixed requests.
        streams: of those that were open at once.
        exit_status: of the server, after SIGTERM.
        seconds: that it all took.
    """

    warm: Held
    end: Held
    soak: Outcome
    streams: Outcome
    exit_status: int
    seconds: float

    @property
    def memory_growth(self) -> float:
        return self.end.memory_bytes / self.warm.memory_bytes - 1

    def failures(self) -> Iterator[str]:
        """What should not be, in words; nothing for a good server."""
        for held in (self.warm, self.end):
            if held.requests or held.kv_share:
                yield f"left in the engine: {held.requests:g} requests, {held.kv_share:.2%} of the KV cache"
        if self.end.files > self.warm.files:
            yield f"file descriptors: {self.warm.files} when warm, {self.end.files} at the end"
        if self.memory_growth > MEMORY_GROWTH:
            yield f"memory grew by {self.memory_growth:.1%}"
        for outcome in (self.soak, self.streams):
            yield from outcome.wrong[:10]
        if self.streams.ready_s > READY_WITHIN_S:
            yield f"/health/ready took {self.streams.ready_s:.2f} s beside the streams"
        if self.exit_status != 0:
            yield f"the server ended with {self.exit_status}"

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = _named(asdict(self))
        return fields | {"memory_growth": round(self.memory_growth, 4), "failures": list(self.failures())}


def _named(value: Any) -> Any:
    """The same with keys that JSON can have in place of pairs, in mappings at any depth."""
    if not isinstance(value, dict):
        return value
    return {" ".join(map(str, key)) if isinstance(key, tuple) else key: _named(each) for key, each in value.items()}
