"""Threads and memory for images are shared fairly: one sender's flood does not delay the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from foldserve.server.api.errors import ImageUnavailable, Unavailable
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.fair_threads import FairThreads, RequestTurn
from foldserve.server.api.media.guard import MediaGuard
from foldserve.server.api.media.memory import Trimmer
from foldserve.server.api.media.pixel_memory import MemoryShare, PixelMemory
from foldserve.server.limits import Limits
from tests.images import data_uri, photo

PATIENCE_S = 60.0
LARGE = 5_000_000


class Work:
    """Jobs that end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, threading.Event] = {}

    def job(self, name: str) -> Callable[[], str]:
        end = self.ends[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert end.wait(PATIENCE_S)
            return name

        return work

    def end(self, *names: str) -> None:
        for name in names or tuple(self.ends):
            self.ends[name].set()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def turn_of(owner: str | None = None) -> AsyncIterator[RequestTurn]:
    async with PixelMemory(100, PATIENCE_S).share() as share:
        yield RequestTurn(share, PATIENCE_S, owner)


def test_one_at_a_time_of_a_key_and_others_beside_it() -> None:
    async def run() -> None:
        threads, work = FairThreads(4, PATIENCE_S), Work()
        async with turn_of("alice") as alice, turn_of("alice") as again, turn_of("bob") as bob:
            tasks = [
                asyncio.create_task(threads.run(alice if number % 2 else again, 1, True, work.job(f"alice{number}")))
                for number in range(6)
            ]
            await until(lambda: work.begun)
            tasks.append(asyncio.create_task(threads.run(bob, 1, True, work.job("bob"))))
            await until(lambda: "bob" in work.begun)
            assert len(work.begun) == 2
            work.end("bob")
            await tasks[-1]
            for number in range(6):
                await until(lambda: f"alice{number}" in work.begun)  # noqa: B023  # in order
                assert len(work.begun) == number + 2
                work.end(f"alice{number}")
            await asyncio.gather(*tasks)
        threads.pool.shutdown()

    asyncio.run(run())


def test_without_keys_each_request_is_its_own_owner() -> None:
    async def run() -> None:
        threads, work = FairThreads(3, PATIENCE_S), Work()
        async with turn_of() as one, turn_of() as other:
            tasks = [
                asyncio.create_task(threads.run(turn, 1, False, work.job(name)))
                for name, turn in (("a1", one), ("a2", one), ("b1", other), ("b2", other))
            ]
            await until(lambda: len(work.begun) == 2)
            assert sorted(work.begun) == ["a1", "b1"]
            work.end()
            assert await asyncio.gather(*tasks) == ["a1", "a2", "b1", "b2"]
        threads.pool.shutdown()

    asyncio.run(run())


def test_large_ones_leave_a_thread() -> None:
    async def run() -> None:
        threads, work = FairThreads(2, PATIENCE_S), Work()
        async with turn_of() as a, turn_of() as b, turn_of() as c:
            tasks = [
                asyncio.create_task(threads.run(turn, 1, large, work.job(name)))
                for name, turn, large in (("large1", a, True), ("large2", b, True), ("small", c, False))
            ]
            await until(lambda: "small" in work.begun)
            assert work.begun[0] == "large1" and len(work.begun) == 2
            work.end()
            await asyncio.gather(*tasks)
        threads.pool.shutdown()

    asyncio.run(run())


def test_who_has_had_least_comes_first() -> None:
    """Alice's flood came first; bob's one request overtakes all of it that has not begun."""

    async def run() -> None:
        threads, work = FairThreads(1, PATIENCE_S), Work()
        async with turn_of("alice") as alice, turn_of("bob") as bob:
            tasks = [
                asyncio.create_task(threads.run(alice, 2, True, work.job(f"alice{number}"))) for number in range(5)
            ]
            await until(lambda: work.begun)
            tasks.append(asyncio.create_task(threads.run(bob, 2, True, work.job("bob"))))
            await asyncio.sleep(0)
            work.end()
            await asyncio.gather(*tasks)
        assert work.begun.index("bob") == 1
        threads.pool.shutdown()

    asyncio.run(run())


def test_time_in_the_queue_is_the_servers_fault() -> None:
    async def run() -> None:
        threads, work = FairThreads(1, 0.2), Work()
        async with turn_of() as first, turn_of() as second:
            busy = asyncio.create_task(threads.run(first, 1, False, work.job("busy")))
            await until(lambda: work.begun)
            with pytest.raises(Unavailable, match="try again later") as caught:
                await threads.run(second, 1, False, work.job("late"))
            assert int(caught.value.headers["Retry-After"]) >= 1 and caught.value.param is None
            work.end()
            await busy
        threads.pool.shutdown()
        assert work.begun == ["busy"]

    asyncio.run(run())


def test_time_at_work_is_the_images() -> None:
    async def run() -> None:
        threads, work = FairThreads(1, 0.2), Work()
        async with PixelMemory(100, 1).share() as share:
            with pytest.raises(ImageUnavailable, match=r"decoded within 0\.2 s"):
                await threads.run(RequestTurn(share, 0.2), 1, False, work.job("slow"))
        work.end()
        threads.pool.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [True, False], ids=["hung-up", "timed-out"])
def test_memory_is_held_until_the_thread_is_done(cancelled: bool) -> None:
    async def run() -> None:
        threads, work, memory = FairThreads(1, 1 if cancelled else 0.2), Work(), PixelMemory(100, PATIENCE_S)

        async def request() -> None:
            async with memory.share() as share:
                await share.take(70)
                await threads.run(RequestTurn(share, 60 if cancelled else 0.2), 1, False, work.job("slow"))

        task = asyncio.create_task(request())
        await until(lambda: work.begun)
        if cancelled:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with memory.share() as other:
            assert not other.take_now(70)
            work.end()
            await other.take(70)
        threads.pool.shutdown()

    asyncio.run(run())


def test_large_requests_leave_room() -> None:
    async def run() -> None:
        memory = PixelMemory(4 * LARGE, 0.1)
        async with memory.share() as a, memory.share() as b, memory.share() as c, memory.share() as d:
            assert a.take_now(2 * LARGE) and not b.take_now(2 * LARGE)
            with pytest.raises(Unavailable, match="too many images") as caught:
                await b.take(2 * LARGE)
            assert "Retry-After" in caught.value.headers
            assert b.take_now(LARGE)
            assert c.take_now(2_000_000) and not d.take_now(4_000_000)

    asyncio.run(run())


def test_what_asks_for_more_than_there_is_gets_its_turn_alone() -> None:
    async def run() -> None:
        memory = PixelMemory(2 * LARGE, PATIENCE_S)
        async with memory.share() as a:
            assert a.take_now(5 * LARGE)
            async with memory.share() as b:
                assert not b.take_now(5 * LARGE) and b.take_now(1_000_000)
        async with memory.share() as again:
            assert again.take_now(5 * LARGE)

    asyncio.run(run())


def test_waiting_is_in_order_and_small_ones_pass_large_ones() -> None:
    async def run() -> None:
        memory, served = PixelMemory(4 * LARGE, PATIENCE_S), list[str]()

        async def wait(name: str, share: MemoryShare, pixels: int) -> None:
            await share.take(pixels)
            served.append(name)

        async with memory.share() as b, memory.share() as c, memory.share() as d:
            async with memory.share() as a:
                assert a.take_now(3 * LARGE)
                tasks = [
                    asyncio.create_task(wait(name, share, pixels))
                    for name, share, pixels in (("huge", b, 3 * LARGE), ("large", c, LARGE + 1), ("small", d, 1000))
                ]
                await until(lambda: "small" in served)
                await asyncio.sleep(0)
                assert served == ["small"]
            await until(lambda: "huge" in served)
            assert served == ["small", "huge"]
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def message() -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(photo(1))}}]}


@pytest.mark.parametrize("failing", [False, True])
def test_pixels_are_freed_at_once(failing: bool) -> None:
    """vLLM's renderer keeps the images in a cycle; what works on them when a request ends has them to its end."""

    async def run() -> None:
        end = threading.Event()
        with ThreadPoolExecutor(1) as processor:
            guard, chat = MediaGuard(Limits(), processor=processor), message()
            free = guard._memory._free

            async def request() -> Any:
                async with guard.loaded([chat]):
                    kept = chat["content"][0]["image_pil"]
                    if failing:
                        processor.submit(end.wait, PATIENCE_S)
                        raise RuntimeError(kept)
                    return kept

            image: Any
            try:
                image = await request()
            except RuntimeError as error:
                image = error.args[0]
            if failing:
                assert image.media.getpixel((0, 0)) and guard._memory._free < free
                end.set()
        assert image.original_bytes == b"" and guard._memory._free == free
        with pytest.raises(ValueError, match="closed"):
            image.media.getpixel((0, 0))

    asyncio.run(run())


def test_a_full_queue_does_not_blame_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(ImageFile, "decode", lambda *args: end.wait(PATIENCE_S))

    async def run() -> None:
        guard = MediaGuard(Limits(media_decode_threads=1, max_media_seconds=0.3))
        guard._threads._seconds = 0.3

        async def request() -> None:
            async with guard.loaded([message()]):
                pass

        found = await asyncio.gather(request(), request(), request(), return_exceptions=True)
        end.set()
        assert sum(isinstance(error, Unavailable) and error.param is None for error in found) == 2
        guard._threads.pool.shutdown()

    asyncio.run(run())


def test_memory_is_trimmed_once_after_a_flood() -> None:
    trimmed = threading.Semaphore(0)
    trimmer = Trimmer(lambda _: trimmed.release(), pause_s=0.1)
    for _ in range(10):
        trimmer.freed(1 << 20)
    assert not trimmed.acquire(timeout=0.3)
    for _ in range(10):
        trimmer.freed(100 << 20)
    assert trimmed.acquire(timeout=PATIENCE_S)
    assert not trimmed.acquire(timeout=0.3)
    trimmer.freed(300 << 20)
    assert trimmed.acquire(timeout=PATIENCE_S)


def test_memory_is_not_trimmed_between_the_images_of_steady_traffic() -> None:
    """What is given back then is taken again by the next image; once it is much, it is trimmed all the same."""
    trimmed = threading.Semaphore(0)
    trimmer = Trimmer(lambda _: trimmed.release(), pause_s=1.0)
    for _ in range(15):
        trimmer.freed(65 << 20)
        assert not trimmed.acquire(timeout=0.1)
    trimmer.freed(65 << 20)
    assert trimmed.acquire(timeout=PATIENCE_S)


def test_a_trickle_of_images_does_not_keep_what_a_flood_has_left() -> None:
    trimmed = threading.Event()
    trimmer = Trimmer(lambda _: trimmed.set(), pause_s=0.1)
    trimmer.freed(100 << 20)
    for _ in range(int(100 * PATIENCE_S)):
        if trimmed.wait(0.01):
            break
        trimmer.freed(1)
    assert trimmed.is_set()
