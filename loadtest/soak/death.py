"""Kills the engine while it works, and measures how soon every client gets an error."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

from foldserve.loadtest.soak.mix import chat
from foldserve.loadtest.soak.server import SoakServer
from foldserve.loadtest.soak.wire import Address, ask, encode

_TOKENS = 900
"""More than any request gets before the engine is killed."""
_PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Death:
    """What happened after the engine was killed.

    Attributes:
        clients: number of clients that waited for an answer or the rest of one.
        red_s: time until `/health/ready` failed.
        heard_s: time until the last client had an error.
        ended_s: time until the server's process ended.
        wrong: messages about what should not have happened.
    """

    clients: int
    red_s: float
    heard_s: float
    ended_s: float
    exit_status: int
    wrong: list[str] = field(default_factory=list)


async def kill_engine(server: SoakServer, clients: int) -> Death:
    """Kills the engine while it has `clients` requests, half of them streams; the server ends with it."""
    waiting = [asyncio.create_task(_listen(server.address, number)) for number in range(clients)]
    async with asyncio.timeout(_PATIENCE_S):
        while await server.requests() < clients:
            await asyncio.sleep(0.1)
    server.kill_engine()
    killed = time.monotonic()
    while await server.is_ready():
        await asyncio.sleep(0.01)
    red = time.monotonic()
    heard = await asyncio.gather(*waiting)
    status = await asyncio.to_thread(server.wait, _PATIENCE_S)
    return Death(
        clients,
        round(red - killed, 2),
        round(max(when for when, _ in heard) - killed, 2),
        round(time.monotonic() - killed, 2),
        status,
        [fault for _, fault in heard if fault],
    )


async def _listen(address: Address, number: int) -> tuple[float, str | None]:
    """(time at which the answer ended, what was wrong with it)."""
    body = chat(f"engine {number}", [], _TOKENS) | {"stream": number % 2 == 0}
    try:
        async with asyncio.timeout(_PATIENCE_S):
            answer = await ask(address, encode("POST", "/v1/chat/completions", body))
    except (OSError, TimeoutError) as error:
        return time.monotonic(), f"instead of an answer: {type(error).__name__}"
    is_told = answer.status in (200, 503) and re.search(rb'"code": ?"engine_stopped"', answer.body)
    fault = None if is_told else f"the engine's end was told as {answer.status} {answer.body[-300:]!r}"
    return time.monotonic(), fault
