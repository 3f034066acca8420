"""One real server for the folder (two API processes, one engine), started as a user starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.api import hostile
from tests.api.live import START_LIMIT_S, end


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server_url(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "foldserve.server.cli", "serve", str(tiny_llava), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "tiny", "--api-server-count", "2"]
    command += ["--mm-processor-cache-gb", "0.1", "--withdraw-layer", "2"]
    command += ["--hf-overrides", '{"text_config": {"max_position_embeddings": 1200}}']
    command += ["--allow-media-private-host", hostile.HOST, "--max-media-seconds", "5", "--max-image-mb", "2"]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process, log)
        yield url
        assert process.poll() is None, f"the server ended while it was tested. {_log_end(log)}"
    finally:
        end(process)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server did not come up. {_log_end(log)}")


def _log_end(log: Path) -> str:
    return f"The end of {log}:\n{log.read_text()[-10_000:]}"


@pytest.fixture(scope="session")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def image_url() -> Iterator[str]:
    """A photo on a local web server."""
    with hostile.hostile_server() as url:
        yield f"{url}/photo"
