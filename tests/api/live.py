"""A server that one test has for itself and may fill, drain and kill."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

START_LIMIT_S = 1800  # a server that fails to start ends; this is for one that hangs
PATIENCE_S = 300  # for what a busy machine takes long for
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """A whole HTTP response; names of headers are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of a stream's events."""
        return [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line]


def chat(text: str = "hello", *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A chat of exactly `max_tokens` tokens."""
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "ignore_eos": True} | fields


def bearer(key: str | None) -> dict[str, str]:
    """The header that brings a key."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


class Live:
    """A running server; what it prints lies in `out` and `err`.

    Args:
        model: the checkpoint; None for the demo model.
        folder: for its output.
        options: more options of `foldserve serve`.
        wait: until it is ready.
        env: more environment variables.
        watcher: key for its metrics, where it asks for one.
        output: a descriptor that gets all that it prints, instead of `out` and `err`.
        worker: the engine computes in a process below its own, as on CPUs and with several GPUs; without, it computes
            itself, as with one GPU, and the server starts in half the time.
    """

    def __init__(
        self,
        model: Path | None,
        folder: Path,
        *options: str,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
        watcher: str | None = None,
        output: int | None = None,
        worker: bool = False,
    ) -> None:
        self._watcher = watcher
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.out, self.err = folder / "out", folder / "err"
        command = [sys.executable, "-m", "foldserve.server.cli", "serve", "--port", str(self.port)]
        command += [] if model is None else [str(model), "--served-model-name", "tiny"]
        command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(64 << 20), *options]
        computes = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(worker))}  # vLLM asks for no more than that
        variables = {**os.environ, **computes, "VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=output or out, stderr=output or err, env=variables)
        if not wait:
            return
        self.wait(lambda: self.process.poll() is not None or self.is_ready(), START_LIMIT_S)
        assert self.process.poll() is None, self.out.read_text()[-4000:] + self.err.read_text()[-4000:]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One request over a connection of its own; `headers` in the spelling of Python."""
        connection = self.connect()
        try:
            self.send(connection, method, path, body, **headers)
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        finally:
            connection.close()

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str
    ) -> None:
        """Sends a request without waiting for the answer."""
        names = {"Content-Type": "application/json"} if body is not None else {}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), names)

    def chat(self, text: str = "hello", *parts: dict[str, Any], key: str | None = None, **fields: Any) -> Answer:
        return self.ask("POST", CHAT, chat(text, *parts, **fields), **bearer(key))

    @contextmanager
    def stream(self, text: str = "hello", key: str | None = None, **fields: Any) -> Iterator[http.client.HTTPResponse]:
        """A stream that has begun; leaving hangs up."""
        connection = self.connect()
        try:
            self.send(connection, "POST", CHAT, chat(text, stream=True, **fields), **bearer(key))
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.readline()
            yield response
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return self.ask("GET", "/health/ready").status == 200
        except OSError:
            return False

    def metrics(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        page = self.ask("GET", "/metrics", **bearer(self._watcher))
        assert page.status == 200, page.body
        families = text_string_to_metric_families(page.body.decode())
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def wait(self, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        """Waits until the condition holds."""
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"waited {limit_s} s in vain"
            time.sleep(0.2)

    def tree(self) -> list[psutil.Process]:
        """The server's processes, the first one first."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def engine(self) -> psutil.Process:
        return next(process for process in self.tree() if "EngineCore" in " ".join(process.cmdline()))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        end(self.process, patience_s=0)


def end(server: subprocess.Popen[bytes], patience_s: float = PATIENCE_S) -> None:
    """Ends a server as a supervisor does; leaves no process behind, whatever the test did."""
    if server.poll() is None and patience_s:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
    if server.poll() is None:
        first = psutil.Process(server.pid)
        for process in (*reversed(first.children(recursive=True)), first):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    server.wait()
