"""The server under test: started as a user does, looked at from outside."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from foldserve.loadtest.soak.mix import chat
from foldserve.loadtest.soak.wire import Address, ask, encode

_HOST = "127.0.0.1"
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


class Server:
    """`foldserve serve` on a free port.

    Args:
        options: of the command; a model first, or the demo model is served.
        log: for its output.
        key: to read its metrics with.
    """

    def __init__(self, options: Sequence[str], log: Path, key: str | None = None) -> None:
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self.address = Address(_HOST, int(probe.getsockname()[1]))
        command = [sys.executable, "-m", "foldserve.server.cli", "serve", *options]
        command += ["--host", _HOST, "--port", str(self.address.port)]
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self._log, self._key = log, key

    async def wait_until_ready(self) -> None:
        """Waits for as long as the server is starting.

        Raises:
            RuntimeError: it has ended instead.
        """
        while not await self.is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"the server did not come up:\n{self._log.read_text()[-4000:]}")
            await asyncio.sleep(0.5)

    async def is_ready(self) -> bool:
        try:
            return (await ask(self.address, encode("GET", "/health/ready"))).status == 200
        except OSError:
            return False

    async def requests(self) -> float:
        """How many the engine works on, or lets wait, as of its last step."""
        return _requests(await self._metrics())

    async def held(self) -> Held:
        """What is held now; the engine's numbers are those of its last step."""
        metrics = await self._metrics()
        processes = self._processes()
        memory: Counter[str] = Counter()
        for process in processes:
            memory[_title(process)] += process.memory_full_info().uss
        return Held(
            requests=_requests(metrics),
            kv_share=_value(metrics, "vllm:kv_cache_usage_perc"),
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
        next(process for process in self._processes() if _ENGINE in _title(process)).kill()

    def wait(self, patience_s: float) -> int:
        """Waits until the server has ended; its exit status."""
        return self._process.wait(patience_s)

    def kill(self) -> None:
        """Leaves no process behind."""
        if self._process.poll() is None:
            for process in reversed(self._processes()):
                process.kill()
            self._process.wait()

    async def _metrics(self) -> str:
        return (await ask(self.address, encode("GET", "/metrics", key=self._key))).body.decode()

    def _processes(self) -> list[psutil.Process]:
        """The server's, the first one first."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]


def _title(process: psutil.Process) -> str:
    """What vLLM calls its process, or the program."""
    return (process.cmdline() or [process.name()])[0].rsplit("/")[-1]


def _requests(metrics: str) -> float:
    return _value(metrics, "vllm:num_requests_running") + _value(metrics, "vllm:num_requests_waiting")


def _value(metrics: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE))
