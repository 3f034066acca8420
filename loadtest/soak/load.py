"""Sends requests, a bounded number at a time, and polls /health/ready meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from tqdm import tqdm

from foldserve.loadtest.soak.mix import HangUp, PlannedRequest, chat
from foldserve.loadtest.soak.wire import Address, ask, connect, encode, read_status

_READY_EVERY_S = 0.1
_PATIENCE_S = 300
_EVENTS_MIDWAY = 5


@dataclass(slots=True)
class LoadOutcome:
    """Results of some requests.

    Attributes:
        counts: answers by status, and clients that hung up by place.
        wrong: messages about what should not have happened.
        ready_s: longest time that `/health/ready` took.
        took_s: times to the last byte of requests answered with 200.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ready_s: float = 0.0
    took_s: list[float] = field(default_factory=list)

    def __add__(self, other: LoadOutcome) -> LoadOutcome:
        ready_s, took_s = max(self.ready_s, other.ready_s), self.took_s + other.took_s
        return LoadOutcome(self.counts + other.counts, self.wrong + other.wrong, ready_s, took_s)

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "wrong": self.wrong, "ready_s": round(self.ready_s, 3)}


async def send_all(address: Address, requests: Iterable[PlannedRequest], at_once: int, bar: tqdm[Any]) -> LoadOutcome:
    """Sends the requests in order, at most `at_once` at a time."""
    outcome = LoadOutcome()
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:  # shared by all clients
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    outcome.counts[await _send(address, request, outcome)] += 1
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                outcome.wrong.append(f"{type(error).__name__}: {error}")
            bar.update()

    ended = threading.Event()
    watch = asyncio.create_task(asyncio.to_thread(_watch, address, outcome, ended))
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(at_once):
                clients.create_task(client())
    finally:
        ended.set()
        await watch
    return outcome


async def stream_at_once(address: Address, count: int, tokens: int, bar: tqdm[Any]) -> LoadOutcome:
    """Opens `count` streams at the same time."""
    requests = [
        PlannedRequest(chat(f"stream {number}", [], tokens) | {"stream": True}, 200, HangUp.NEVER, 0)
        for number in range(count)
    ]
    return await send_all(address, requests, count, bar)


async def _send(address: Address, request: PlannedRequest, outcome: LoadOutcome) -> str:
    """Sends one request and returns its key in `LoadOutcome.counts`."""
    data = encode("POST", request.path, request.body, request.key)
    if request.hang_up is HangUp.NEVER:
        started = time.perf_counter()
        answer = await ask(address, data)
        if answer.status == HTTPStatus.OK:
            outcome.took_s.append(time.perf_counter() - started)
        is_cut = request.body["stream"] and (b'{"error"' in answer.body or b"[DONE]" not in answer.body)
        if answer.status != request.expected or (answer.status == 200 and is_cut):
            outcome.wrong.append(f"{request.expected} was expected: {answer.status} {answer.body[-300:]!r}")
        return f"answered {answer.status}"
    async with connect(address) as (reader, writer):
        writer.write(data[: len(data) // 2] if request.hang_up is HangUp.IN_BODY else data)
        await writer.drain()
        if request.hang_up in (HangUp.IN_BODY, HangUp.WAITING):
            await asyncio.sleep(request.wait_s)
        else:
            status = await read_status(reader)
            if status != 200:
                outcome.wrong.append(f"a stream began with {status}")
            await _read_events(reader, 1 if request.hang_up is HangUp.FIRST_TOKEN else _EVENTS_MIDWAY, outcome)
    return f"hung up {request.hang_up.value}"


async def _read_events(reader: asyncio.StreamReader, count: int, outcome: LoadOutcome) -> None:
    """Reads up to `count` events of a stream; it may have fewer, since tokens that come together make one event."""
    for _ in range(count):
        event = await reader.readuntil(b"\n\n")
        if b'{"error"' in event:
            outcome.wrong.append(f"an error in a stream: {event[-300:]!r}")
        if b"[DONE]" in event:
            return


def _watch(address: Address, outcome: LoadOutcome, ended: threading.Event) -> None:
    """Measures how long `/health/ready` takes, and records every failure.

    Runs in a thread with its own event loop: a thousand clients in this process must not make the server look slow.
    """
    while not ended.wait(_READY_EVERY_S):
        started = time.perf_counter()
        status = asyncio.run(ask(address, encode("GET", "/health/ready"))).status
        outcome.ready_s = max(outcome.ready_s, time.perf_counter() - started)
        if status != 200:
            outcome.wrong.append(f"/health/ready answered {status}")
