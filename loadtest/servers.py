"""Servers under test: remote ones, and local ones started by the command that a user types."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import httpx
import psutil

from foldserve.loadtest.grid import ServerName

HOST = "127.0.0.1"
"""Host of local servers."""
_STARTS_WITHIN_S = 1800  # for a server that hangs: one that fails to start exits
_STOPS_WITHIN_S = 60
_MODULES: dict[ServerName, str] = {"foldserve": "foldserve.server.cli", "vllm": "vllm.entrypoints.cli.main"}


class Server(Protocol):
    @property
    def url(self) -> str:
        """Base URL, without a path."""

    def cpu_s(self) -> dict[str, float]:
        """CPU time so far by kind of process; empty for a remote server."""


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server that somebody else runs."""

    url: str

    def cpu_s(self) -> dict[str, float]:
        return {}


class LocalServer:
    """A server started here, on a free port.

    Args:
        name: `vllm` is started without foldserve's plugin.
        options: arguments after `serve`, the model first.
        log: file for its output.
        variables: environment variables beside those of this process.

    Raises:
        RuntimeError: it did not start.
    """

    def __init__(
        self,
        name: ServerName,
        options: Sequence[str],
        log: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        self.url, self._log = f"http://{HOST}:{self.port}", log
        command = [sys.executable, "-m", _MODULES[name], "serve", *options, "--host", HOST, "--port", str(self.port)]
        env = os.environ | dict(variables) | ({"VLLM_PLUGINS": ""} if name == "vllm" else {})
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("a") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started

    def cpu_s(self) -> dict[str, float]:
        """`engine`: the processes that run the model; `api`: the others."""
        times = {"api": 0.0, "engine": 0.0}
        for process in self.processes():
            name = " ".join(process.cmdline())
            spent = process.cpu_times()
            times["engine" if "EngineCore" in name or "Worker" in name else "api"] += spent.user + spent.system
        return times

    def processes(self) -> list[psutil.Process]:
        """The server's process first, then its children."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def wait(self, patience_s: float) -> int:
        """Waits until it ends by itself and returns its exit status."""
        return self._process.wait(patience_s)

    def stop(self) -> None:
        """Ends it with SIGTERM, as a supervisor does, and kills what is left."""
        if self._process.poll() is not None:
            return
        _, *children = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()

    def _wait_until_healthy(self) -> None:
        end = time.monotonic() + _STARTS_WITHIN_S
        while self._process.poll() is None and time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server did not come up:\n{self._log.read_text()[-4000:]}")


class Fleet:
    """Starts servers when they are needed.

    Args:
        urls: of servers that are already running.
        options: arguments after `serve` for the servers to start.
        logs: folder for their output.
        beside: whether they may run at the same time; otherwise each has the machine to itself.
        variables: environment variables of the servers to start.
    """

    def __init__(
        self,
        urls: Mapping[ServerName, str],
        options: Mapping[ServerName, Sequence[str]],
        logs: Path,
        *,
        beside: bool,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._options, self._logs, self._beside, self._variables = options, logs, beside, variables
        self._given = {name: RemoteServer(url) for name, url in urls.items()}
        self._started: dict[ServerName, LocalServer] = {}

    def get(self, name: ServerName) -> tuple[Server, bool]:
        """The server, and whether it has just been started."""
        if name in self._given:
            return self._given[name], False
        if name in self._started:
            return self._started[name], False
        if not self._beside:
            self.stop()
        self._started[name] = LocalServer(name, self._options[name], self._logs / f"{name}.log", self._variables)
        return self._started[name], True

    def stop(self) -> None:
        """Stops all servers started here; `get` starts them again."""
        while self._started:
            self._started.popitem()[1].stop()
