"""The server under test: started as a user does, looked at from outside."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from foldserve.loadtest.soak.wire import Address, ask, encode

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Held:
    """What the server holds while nobody asks anything.

    Attributes:
        requests: running or waiting in the engine.
        kv_share: of the KV cache's blocks that are not free, in [0, 1].
        files: open file descriptors of all its processes.
        memory_bytes: that only its processes use, each one's own (USS).
    """

    requests: float
    kv_share: float
    files: int
    memory_bytes: int


class Server:
    """`foldserve serve` on a free port.

    Args:
        options: of the command; a model first, or the demo model is served.
        log: for its output.
    """

    def __init__(self, options: Sequence[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self.address = Address(_HOST, int(probe.getsockname()[1]))
        command = [sys.executable, "-m", "foldserve.server.cli", "serve", *options]
        command += ["--host", _HOST, "--port", str(self.address.port)]
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self._log = log

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

    async def held(self) -> Held:
        """What is held now; the engine's numbers are those of its last step."""
        metrics = (await ask(self.address, encode("GET", "/metrics"))).body.decode()
        processes = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        return Held(
            requests=_value(metrics, "vllm:num_requests_running") + _value(metrics, "vllm:num_requests_waiting"),
            kv_share=_value(metrics, "vllm:kv_cache_usage_perc"),
            files=sum(process.num_fds() for process in processes),
            memory_bytes=sum(process.memory_full_info().uss for process in processes),
        )

    def stop(self, patience_s: float = 60) -> int:
        """Ends the server as a supervisor does; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(patience_s)

    def kill(self) -> None:
        """Leaves no process behind."""
        if self._process.poll() is None:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
            self._process.kill()
            self._process.wait()


def _value(metrics: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE))
