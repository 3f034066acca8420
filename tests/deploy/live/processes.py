"""Real servers, a router and a Prometheus on this machine, as deploy/ starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.files import DEPLOY, RULES, router_commands

START_LIMIT_S = 900
"""Generous: two servers start at once on two cores that other work may hold."""

QUEUE = 4
"""Requests that a server runs at once, and as many that wait."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, done: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Process:
    """A program with its children in a session of their own, and its output in a file."""

    command: Sequence[str | Path]
    ready: str
    log: Path
    running: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        with self.log.open("ab") as out:
            self.running = subprocess.Popen(self.command, stdout=out, stderr=out, env=env, start_new_session=True)

    def wait_until_ready(self) -> None:
        def done() -> bool:
            assert self.running.poll() is None, self.log.read_text()[-4000:]
            return answers(self.ready)

        wait_for(f"{self.ready}, see {self.log}", done)

    def terminate(self) -> int:
        """SIGTERM to the program itself, as a container's runtime sends it; its exit status."""
        self.running.terminate()
        return self.running.wait(120)

    def kill(self) -> None:
        """Kills all processes at once, as when a machine fails."""
        os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()

    def stop(self) -> None:
        if self.running.poll() is None:
            self.running.terminate()
            try:
                self.running.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


def server(model: Path, folder: Path, *options: str) -> tuple[Process, str]:
    """`foldserve serve` on a small model, and its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).parent / "foldserve"
    command: list[object] = [program, "serve", model, "--port", port, "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", 1024, "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--kv-cache-memory-bytes", 64 << 20, "--mm-processor-cache-gb", 0.1, "--withdraw-layer", 2]
    command += ["--max-num-seqs", QUEUE, "--max-queue", QUEUE, *options]
    return Process([str(word) for word in command], f"{url}/health/ready", folder / f"server-{port}.log"), url


def router(urls: Sequence[str], folder: Path) -> tuple[Process, str, str]:
    """`vllm-router` with the options of deploy/compose, its URL and its metrics' address."""
    port, metrics_port = free_port(), free_port()
    places = {f"http://worker-{i}:8000": url for i, url in enumerate(urls)} | {"29000": str(metrics_port)}
    options = [places.get(word, word) for word in router_commands()["compose"]]
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).parent / "vllm-router"
    command: list[str | Path] = [program, "--host", "127.0.0.1", "--port", str(port), *options]
    return Process(command, f"{url}/readiness", folder / "router.log"), url, f"127.0.0.1:{metrics_port}"


def prometheus(targets: dict[str, Sequence[str]], folder: Path, key: str | None = None) -> tuple[Process, str]:
    """Prometheus with our rules and the labels that Kubernetes gives; scrapes every second, with the key."""
    address = f"127.0.0.1:{free_port()}"
    (folder / "metrics-key").write_text(key or "none")  # as compose does
    jobs = [
        {"job_name": job, "static_configs": [_static(hosts)]} | _authorization(job) for job, hosts in targets.items()
    ]
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs}))
    program = Path(sys.executable).parent / "prometheus"
    command: list[str | Path] = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address={address}"]
    return Process(command, f"http://{address}/-/ready", folder / "prometheus.log"), f"http://{address}"


def _authorization(job: str) -> dict[str, Any]:
    """As deploy/prometheus has it."""
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (ours,) = [each for each in jobs if each["job_name"] == job]
    return {name: value for name, value in ours.items() if name == "authorization"}


def _static(hosts: Sequence[str]) -> dict[str, Any]:
    return {"targets": list(hosts), "labels": {"namespace": "foldserve", "pod": "foldserve-0"}}
