"""The memory of all requests' images at once, in pixels of four bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from foldserve.server.api.errors import Unavailable

BYTES_PER_PIXEL = 4
_SMALL_PIXELS = 4_000_000
_RETRY_AFTER_S = 2


def is_large(pixels: int) -> bool:
    """Whether images of this size must leave room and a thread to smaller ones."""
    return pixels > _SMALL_PIXELS


class MemoryShare:
    """One request's part of a `PixelMemory`, given back once it is closed and no thread works on it any more.

    `large_pixels` of its `pixels` were taken as a large request. Once `is_closed`, it takes nothing any more.
    """

    def __init__(self, memory: PixelMemory) -> None:
        self.pixels = 0
        self.large_pixels = 0
        self.is_closed = False
        self._memory = memory
        self._threads = 0

    def take_now(self, pixels: int) -> bool:
        """Takes pixels if they are free; thread-safe, even after the request has ended."""
        return self._memory.lend(self, pixels, ahead=False)

    async def take(self, pixels: int) -> None:
        """Waits until there is room; raises Unavailable if there is none in time."""
        if not self.take_now(pixels):
            await self._memory.wait(self, pixels)

    def hold_for(self, work: Future[Any]) -> None:
        """Holds the share until `work` is done, even if nobody waits for it any more."""
        with self._memory.lock:
            self._threads += 1
        work.add_done_callback(lambda _: self._done())

    def close(self) -> None:
        with self._memory.lock:
            self.is_closed = True
        self._memory.reclaim(self)

    def is_over(self) -> bool:
        return self.is_closed and not self._threads

    def _done(self) -> None:
        with self._memory.lock:
            self._threads -= 1
        self._memory.reclaim(self)


@dataclass(eq=False, slots=True)
class _WaitingShare:
    share: MemoryShare
    pixels: int
    served: asyncio.Future[None]


class PixelMemory:
    """Pixels that all requests of one process hold in memory at once.

    Large requests leave an eighth of it to small ones. Each kind is served in order. A request for more than there is
    gets all that a large one may have.

    Args:
        seconds: how long a request waits for others.
        when_freed: called with the pixels that came back, in any thread.
    """

    def __init__(self, pixels: int, seconds: float, when_freed: Callable[[int], None] = lambda _: None) -> None:
        self.lock = threading.Lock()
        self._all = self._free = pixels
        self._most_large = self._free_large = pixels - pixels // 8
        self._seconds = seconds
        self._when_freed = when_freed
        self._waiting: list[_WaitingShare] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def share(self) -> AsyncIterator[MemoryShare]:
        """A share whose pixels are given back on exit."""
        self._loop = asyncio.get_running_loop()
        share = MemoryShare(self)
        try:
            yield share
        finally:
            share.close()

    def lend(self, share: MemoryShare, pixels: int, ahead: bool) -> bool:
        """Gives free pixels to a share. Unless it goes `ahead`, none if a request of its kind waits for them."""
        large = is_large(pixels)
        pixels = min(pixels, self._most_large if large else self._all)
        with self.lock:
            if share.is_closed or self._free < pixels or (large and self._free_large < pixels):
                return False
            if not ahead and any(is_large(waiting.pixels) == large for waiting in self._waiting):
                return False
            self._free -= pixels
            share.pixels += pixels
            if large:
                self._free_large -= pixels
                share.large_pixels += pixels
            return True

    def reclaim(self, share: MemoryShare) -> None:
        """Takes back a share's pixels, once it is over; thread-safe."""
        with self.lock:
            if not share.is_over() or not share.pixels:
                return
            pixels = share.pixels
            self._free += pixels
            self._free_large += share.large_pixels
            share.pixels = share.large_pixels = 0
            waited_for = bool(self._waiting)
        if waited_for and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._serve)
        self._when_freed(pixels)

    async def wait(self, share: MemoryShare, pixels: int) -> None:
        """Lends as soon as there is room; raises Unavailable if there is none in time."""
        waiting = _WaitingShare(share, pixels, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._serve()
        try:
            async with asyncio.timeout(self._seconds):
                await waiting.served
        except TimeoutError as error:
            message = "the server has too many images to prepare: try again later"
            raise Unavailable(message, _RETRY_AFTER_S) from error
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._serve()

    def _serve(self) -> None:
        """Lends to those who wait. One that does not fit holds up others of its kind, so that it gets its turn."""
        held_up = set[bool]()
        for waiting in list(self._waiting):
            kind = is_large(waiting.pixels)
            if kind in held_up:
                continue
            if not self.lend(waiting.share, waiting.pixels, ahead=True):
                held_up.add(kind)
                continue
            self._waiting.remove(waiting)
            if not waiting.served.done():
                waiting.served.set_result(None)
