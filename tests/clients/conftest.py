"""The demo model, served as `make serve` does, once for all clients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.live.processes import Process, free_port


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = f"http://127.0.0.1:{free_port()}"
    program = Path(sys.executable).parent / "foldserve"
    command: list[str | Path] = [program, "serve", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    server = Process(command, f"{url}/health/ready", tmp_path_factory.mktemp("server") / "log")
    server.start()
    try:
        server.wait_until_ready()
        yield url
    finally:
        server.stop()
