"""deploy/smoke.sh against a server, a router, and something that is neither."""

from __future__ import annotations

import os
import subprocess

from tests.deploy.files import DEPLOY
from tests.deploy.live.conftest import Fleet
from tests.deploy.live.processes import free_port


def smoke(url: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [DEPLOY / "smoke.sh", url], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    return done.returncode, [line.split(":")[0] for line in done.stdout.splitlines()]


CHECKS = ["health", "chat at ratio 0", "chat at ratio 0.66", "stream", "a bad ratio is refused", "metrics"]


def test_a_server(fleet: Fleet) -> None:
    server = next(iter(fleet.servers))
    assert smoke(server) == (0, [*(f"ok    {check}" for check in CHECKS), "PASS  http"])


def test_behind_the_router(fleet: Fleet) -> None:
    server = next(iter(fleet.servers))
    assert smoke(fleet.router, METRICS_URL=server)[0] == 0
    assert smoke(fleet.router, METRICS_URL="") == (0, [*(f"ok    {check}" for check in CHECKS[:-1]), "PASS  http"])


def test_nobody() -> None:
    assert smoke(f"http://127.0.0.1:{free_port()}") == (1, ["FAIL  health", "FAIL  http"])


def test_something_else(fleet: Fleet) -> None:
    status, lines = smoke(fleet.prometheus)
    assert status == 1 and lines[-1] == "FAIL  http"
    assert "FAIL  chat at ratio 0" in lines
