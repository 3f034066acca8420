"""Measures what hostile clients cost a user: the user's requests first alone, then beside them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from foldserve.loadtest.soak.load import LoadOutcome, send_all
from foldserve.loadtest.soak.mix import chat, plan
from foldserve.loadtest.soak.server import HeldResources, SoakServer
from foldserve.loadtest.soak.wire import ask, encode

PROBED_WITHIN_S = 5.0
"""Timeout of the probes of `/health/live` and `/health/ready` in deploy/k8s."""
_SETTLES_S = 5
_AT_ONCE = 4
_NO_NAME = "http://nobody.example.invalid/a.png"  # makes the resolver open its file descriptors before the first look
_CLI = (sys.executable, "-m", "foldserve.server.cli", "hash-key")


@dataclass(frozen=True, slots=True)
class Siege:
    """Results of the siege.

    Attributes:
        alone, beside: of the user's requests, without and with hostile clients.
        attacks: outcomes of each attack, with their counts.
        before, after: what the server held.
        ready_within_s: longest time that `/health/ready` may take.
    """

    alone: LoadOutcome
    beside: LoadOutcome
    attacks: Mapping[str, Mapping[str, int]]
    before: HeldResources
    after: HeldResources
    ready_within_s: float

    def failures(self) -> Iterator[str]:
        """Messages about what should not have happened."""
        for name, outcome in (("alone", self.alone), ("beside hostile clients", self.beside)):
            yield from outcome.wrong[:10]
            if outcome.ready_s > self.ready_within_s:
                yield f"/health/ready took {outcome.ready_s:.2f} s, {name}"
        for name, counts in self.attacks.items():
            if not counts:
                yield f"this attack was never tried to its end: {name}"
            if bad := {what: number for what, number in counts.items() if what.startswith("500")}:
                yield f"{name}: {bad}"
        if self.after.requests or self.after.kv_share:
            yield f"left in the engine: {self.after.requests:g} requests, {self.after.kv_share:.2%} of the KV cache"
        if self.after.files > self.before.files:
            yield f"file descriptors: {self.before.files} before, {self.after.files} after"

    def to_json(self) -> dict[str, Any]:
        return {
            "failures": list(self.failures()),
            "alone": _user(self.alone),
            "beside": _user(self.beside),
            "attacks": self.attacks,
            "before": asdict(self.before) | {"memory_bytes": self.before.memory_bytes},
            "after": asdict(self.after) | {"memory_bytes": self.after.memory_bytes},
        }


def _user(outcome: LoadOutcome) -> dict[str, Any]:
    quantiles = np.quantile(outcome.took_s, [0.5, 0.99]).round(3).tolist() if outcome.took_s else [None, None]
    return outcome.to_json() | dict(zip(("p50_s", "p99_s"), quantiles, strict=True))


def make_keys(file: Path) -> tuple[str, str]:
    """Writes a key file and returns two keys: a user's, which may read metrics, and a stranger's."""
    keys = []
    with file.open("w") as entries:
        for arguments in (("user", "--scope", "api", "--scope", "metrics"), ("stranger",)):
            made = subprocess.run([*_CLI, *arguments], stdout=entries, stderr=subprocess.PIPE, text=True, check=True)
            keys.append(re.findall(r"\S+", made.stderr)[-1])
    user, stranger = keys
    return user, stranger


async def besiege(server: SoakServer, user: str, stranger: str, count: int, seed: int, ready_within_s: float) -> Siege:
    """Sends `count` requests of the user, first alone, then again while the stranger's clients attack."""
    with tqdm(total=2 * count, unit="req", smoothing=0.05) as bar:
        command = [sys.executable, "-m", "foldserve.loadtest.soak.hostile"]
        hostile = await asyncio.create_subprocess_exec(
            *command,
            server.address.host,
            str(server.address.port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert hostile.stdin is not None and hostile.stdout is not None
        await hostile.stdout.readline()
        await ask(server.address, encode("POST", "/v1/chat/completions", chat("x", [_NO_NAME], 1), user))
        before = await server.held_when_idle()
        alone = await send_all(server.address, plan(count, 0, seed, user), _AT_ONCE, bar)
        hostile.stdin.write(f"{stranger}\n".encode())
        await hostile.stdin.drain()
        await asyncio.sleep(_SETTLES_S)
        beside = await send_all(server.address, plan(count, 0, seed + 1, user), _AT_ONCE, bar)
        hostile.stdin.close()
        attacks, _ = await hostile.communicate()
        return Siege(alone, beside, json.loads(attacks), before, await server.held_when_idle(), ready_within_s)
