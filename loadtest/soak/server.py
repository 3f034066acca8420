"""The server under test, looked at from outside."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from foldserve.loadtest.metrics import KV_USE, RUNNING, WAITING, read
from foldserve.loadtest.servers import HOST, Local
from foldserve.loadtest.soak.mix import chat
from foldserve.loadtest.soak.wire import Address, ask, encode

_ENGINE = "EngineCore"
_SETTLES_WITHIN_S = 30


@dataclass(frozen=True, slots=True)
class Held:
    """What the server holds while nobody asks anything.

    Attributes:
        requests: running or waiting in the engine.
        kv_share: of the KV cache's blocks that are not free, in [0, 1].
        files: open file descriptors of all its processes.
        memory: bytes that only its processes use, each one's own (USS), by the process's title.
    """

    requests: float
    kv_share: float
    files: int
    memory: Mapping[str, int]

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


class Server(Local):
    """`foldserve serve` on a free port.

    Args:
        options: of the command; a model first, or the demo model is served.
        log: for its output.
        key: to read its metrics with.
    """

    def __init__(self, options: Sequence[str], log: Path, key: str | None = None) -> None:
        super().__init__("foldserve", options, log)
        self.address, self._key = Address(HOST, self.port), key

    async def is_ready(self) -> bool:
        try:
            return (await ask(self.address, encode("GET", "/health/ready"))).status == 200
        except OSError:
            return False

    async def requests(self) -> float:
        """How many the engine works on, or lets wait, as of its last step."""
        return _requests(await self._gauges())

    async def held(self) -> Held:
        """What is held now; the engine's numbers are those of its last step."""
        gauges = await self._gauges()
        processes = self.processes()
        memory: Counter[str] = Counter()
        for process in processes:
            memory[_title(process)] += process.memory_full_info().uss
        return Held(
            requests=_requests(gauges),
            kv_share=gauges.get(KV_USE, 0.0),
            files=sum(process.num_fds() for process in processes),
            memory=dict(memory),
        )

    async def settled(self) -> Held:
        """What is held once nothing is on its way; a short request makes the engine tell its numbers anew."""
        end = time.monotonic() + _SETTLES_WITHIN_S
        while True:
            await asyncio.sleep(1)
            await ask(self.address, encode("POST", "/v1/chat/completions", chat("settle", [], 2), self._key))
            held = await self.held()
            if (not held.requests and not held.kv_share) or time.monotonic() > end:
                return held

    def kill_engine(self) -> None:
        """Ends the process that runs the model, without a warning."""
        next(process for process in self.processes() if _ENGINE in _title(process)).kill()

    async def _gauges(self) -> Mapping[str, float]:
        _, gauges = read((await ask(self.address, encode("GET", "/metrics", key=self._key))).body.decode())
        return gauges


def _title(process: psutil.Process) -> str:
    """What vLLM calls its process, or the program."""
    return (process.cmdline() or [process.name()])[0].rsplit("/")[-1]


def _requests(gauges: Mapping[str, float]) -> float:
    return gauges.get(RUNNING, 0.0) + gauges.get(WAITING, 0.0)
