"""Two servers behind vllm-router, watched by Prometheus: started once, for all files here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.live.processes import Process, prometheus, router, server


@dataclass
class Fleet:
    """What runs, by its URL.

    Attributes:
        servers: behind the router, by their URLs.
    """

    servers: dict[str, Process]
    router: str
    router_metrics: str
    prometheus: str


@pytest.fixture(scope="session")
def fleet(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    servers = {url: process for process, url in (server(tiny_llava, folder) for _ in range(2))}
    running = list(servers.values())
    try:
        for process in servers.values():
            process.start()
        for process in servers.values():
            process.wait_until_ready()
        in_front, router_url, router_metrics = router(list(servers), folder)
        hosts = [url.removeprefix("http://") for url in servers]
        watcher, prometheus_url = prometheus({"foldserve": hosts, "foldserve-router": [router_metrics]}, folder)
        running += [in_front, watcher]
        for process in (in_front, watcher):
            process.start()
            process.wait_until_ready()
        yield Fleet(servers, router_url, f"http://{router_metrics}/metrics", prometheus_url)
    finally:
        for process in reversed(running):
            process.stop()
