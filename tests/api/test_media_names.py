"""Names whose DNS server is silent delay no other request, and are dropped with their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from foldserve.server.api.errors import ImageUnavailable
from foldserve.server.api.media.guard import MediaGuard
from foldserve.server.api.media.names import NameLimiter, SystemResolver
from foldserve.server.limits import Limits
from tests.api.hostile import HOST, PHOTO, dns_server, hostile_server

GOOD = "good.example"
LIMITS = Limits(allow_media_private_host=(GOOD,), max_media_seconds=30)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with hostile_server() as url:
        yield int(url.rpartition(":")[2])


@pytest.fixture
def dns() -> Iterator[tuple[str, list[str]]]:
    with dns_server({GOOD: HOST, "private.example": "10.0.0.1"}) as found:
        yield found


async def load(guard: MediaGuard, *urls: str, owner: str | None = None) -> list[bytes]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": parts}]
    async with guard.loaded(messages, owner):
        return [part["image_pil"].original_bytes for part in messages[0]["content"]]


@asynccontextmanager
async def guard_of(dns: tuple[str, list[str]]) -> AsyncIterator[MediaGuard]:
    guard = MediaGuard(LIMITS)
    async with aclosing(SystemResolver([dns[0]])) as resolver:
        guard._names = NameLimiter(resolver)
        yield guard


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def silent(count: int) -> list[str]:
    return [f"http://silent{number}.example/x" for number in range(count)]


@pytest.mark.parametrize("owner", [None, "bob", "alice"])
@pytest.mark.parametrize("count", [1, 16])
def test_silent_names_delay_nobody(owner: str | None, count: int, port: int, dns: tuple[str, list[str]]) -> None:
    """They wait for all their seconds; who asks for another name gets it meanwhile, with the same key too."""

    async def run() -> None:
        async with guard_of(dns) as guard:
            others = [asyncio.create_task(load(guard, *silent(count), owner="alice")) for _ in range(3)]
            await until(lambda: dns[1])
            assert await load(guard, f"http://{GOOD}:{port}/photo", owner=owner) == [PHOTO]
            assert not any(other.done() for other in others)
            await end(others)

    asyncio.run(run())


def test_a_thousand_silent_names_delay_nobody(port: int, dns: tuple[str, list[str]]) -> None:
    """Without keys, and without a thread for any of them."""

    async def run() -> None:
        async with guard_of(dns) as guard:
            before = threading.active_count()
            others = [asyncio.create_task(load(guard, *silent(16))) for _ in range(500)]
            await until(lambda: len(dns[1]) > 1000)
            assert threading.active_count() < before + 5
            assert await load(guard, f"http://{GOOD}:{port}/photo") == [PHOTO]
            await end(others)

    asyncio.run(run())


def test_a_silent_name_ends_by_itself(dns: tuple[str, list[str]]) -> None:
    async def run() -> None:
        async with guard_of(dns) as guard:
            with pytest.raises(ImageUnavailable, match="was not found"):
                await load(guard, *silent(1))

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < LIMITS.max_media_seconds


class Slow(AbstractResolver):
    """Answers when it is told to; counts who waits."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def resolve(self, host: str, port: int = 0, family: Any = None) -> list[ResolveResult]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        return []

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(("owners", "most"), [([None], 2), (["a"], 2), (["a"] * 9, 8), (["a"] * 9 + ["b"], 10)])
def test_names_at_once(owners: list[str | None], most: int) -> None:
    async def run() -> None:
        slow = Slow()
        names = NameLimiter(slow)
        views = [names.of_request(owner) for owner in owners]
        asks = [asyncio.create_task(view.resolve(f"{number}.example")) for view in views for number in range(16)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert slow.now == most
        slow.go.set()
        await asyncio.gather(*asks)
        assert slow.most == most

    asyncio.run(run())


def test_who_hangs_up_waits_for_no_name() -> None:
    async def run() -> None:
        slow = Slow()
        guard = MediaGuard(LIMITS)
        guard._names = NameLimiter(slow)
        gone = asyncio.create_task(load(guard, *silent(5), owner="a"))
        await until(lambda: slow.now == 2)
        await end([gone])
        await until(lambda: slow.cancelled == 2)
        assert slow.now == 0

    asyncio.run(run())
