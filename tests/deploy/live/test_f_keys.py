"""A server with keys: who gets its metrics, and what smoke.sh says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy.files import DEPLOY
from tests.deploy.live.processes import prometheus, server, wait_for


def new_key(file: Path, name: str, scope: str) -> str:
    """As an operator makes it."""
    program = Path(sys.executable).parent / "foldserve"
    made = subprocess.run([program, "hash-key", name, "--scope", scope], capture_output=True, text=True, check=True)
    with file.open("a") as entries:
        entries.write(made.stdout)
    return made.stderr.split()[-1]


@pytest.fixture(scope="module")
def guarded(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A server's URL, a key for chats and one for metrics."""
    folder = tmp_path_factory.mktemp("guarded")
    file = folder / "api-keys.toml"
    alice, watcher = new_key(file, "alice", "api"), new_key(file, "prometheus", "metrics")
    process, url = server(tiny_llava, folder, "--api-keys", str(file))
    process.start()
    try:
        process.wait_until_ready()
        yield url, alice, watcher
    finally:
        process.stop()


@pytest.mark.parametrize("right", [True, False], ids=["its key", "another key"])
def test_prometheus_needs_the_key_for_metrics(right: bool, guarded: tuple[str, str, str], tmp_path: Path) -> None:
    url, alice, watcher = guarded
    hosts = [url.removeprefix("http://")]
    process, watching = prometheus({"foldserve": hosts}, tmp_path, watcher if right else alice)
    process.start()
    try:
        process.wait_until_ready()

        def seen() -> list[str]:
            answer = httpx.get(f"{watching}/api/v1/query", params={"query": 'up{job="foldserve"}'}, timeout=30).json()
            return [sample["value"][1] for sample in answer["data"]["result"]]

        wait_for("a scrape", lambda: bool(seen()))
        assert seen() == ["1" if right else "0"]
    finally:
        process.stop()


def test_smoke_takes_a_key_for_each(guarded: tuple[str, str, str]) -> None:
    url, alice, watcher = guarded

    def smoke(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(DEPLOY / "smoke.sh"), url]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)

    done = smoke(FOLDSERVE_API_KEY=alice, METRICS_KEY=watcher)
    assert done.returncode == 0, done.stdout
    refused = smoke(FOLDSERVE_API_KEY=alice)
    assert "FAIL  metrics: status 403" in refused.stdout
    assert (refused.returncode, alice in done.stdout + refused.stdout) == (1, False)
