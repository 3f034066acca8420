"""The server under test, observed from outside."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from foldserve.loadtest.metrics import KV_USE, RUNNING, WAITING, read
from foldserve.loadtest.servers import HOST, LocalServer
from foldserve.loadtest.soak.mix import chat
from foldserve.loadtest.soak.wire import Address, ask, encode

_ENGINE = "EngineCore"
_SETTLES_WITHIN_S = 30


@dataclass(frozen=True, slots=True)
class HeldResources:
    """What the idle server holds.

    Attributes:
        requests: running or waiting in the engine.
        kv_share: share of the KV cache's blocks in use, in [0, 1].
        files: open file descriptors of all its processes.
        memory: bytes that are unique to each process (USS), by the process's title.
    """

    requests: float
    kv_share: float
    files: int
    memory: Mapping[str, int]

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


class SoakServer(LocalServer):
    """`foldserve serve` on a free port; without a model in `options` it serves the demo model."""

    def __init__(self, options: Sequence[str], log: Path, key: str | None = None) -> None:
        super().__init__("foldserve", options, log)
        self.address, self._key = Address(HOST, self.port), key

    async def is_ready(self) -> bool:
        try:
            return (await ask(self.address, encode("GET", "/health/ready"))).status == 200
        except OSError:
            return False

    async def requests(self) -> float:
        """Number of requests running or waiting in the engine, as of its last step."""
        return _requests(await self._gauges())

    async def held(self) -> HeldResources:
        """What the server holds now; the engine's gauges are those of its last step."""
        gauges = await self._gauges()
        processes = self.processes()
        memory: Counter[str] = Counter()
        for process in processes:
            memory[_title(process)] += process.memory_full_info().uss
        return HeldResources(
            requests=_requests(gauges),
            kv_share=gauges.get(KV_USE, 0.0),
            files=sum(process.num_fds() for process in processes),
            memory=dict(memory),
        )

    async def held_when_idle(self) -> HeldResources:
        """What the server holds once it is idle; a short request makes the engine update its gauges."""
        end = time.monotonic() + _SETTLES_WITHIN_S
        while True:
            await asyncio.sleep(1)
            await ask(self.address, encode("POST", "/v1/chat/completions", chat("settle", [], 2), self._key))
            held = await self.held()
            if (not held.requests and not held.kv_share) or time.monotonic() > end:
                return held

    def kill_engine(self) -> None:
        """Kills the process that runs the model."""
        next(process for process in self.processes() if _ENGINE in _title(process)).kill()

    async def _gauges(self) -> Mapping[str, float]:
        _, gauges = read((await ask(self.address, encode("GET", "/metrics", key=self._key))).body.decode())
        return gauges


def _title(process: psutil.Process) -> str:
    """The title that vLLM gives the process, else the program's name."""
    return (process.cmdline() or [process.name()])[0].rsplit("/")[-1]


def _requests(gauges: Mapping[str, float]) -> float:
    return gauges.get(RUNNING, 0.0) + gauges.get(WAITING, 0.0)
