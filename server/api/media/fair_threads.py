"""Threads that read and decode images in turn, one job of an owner at a time, so that owners share them fairly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from foldserve.server.api.errors import ImageUnavailable, Unavailable
from foldserve.server.api.media.pixel_memory import MemoryShare

_RETRY_AFTER_S = 2


@dataclass(eq=False, slots=True)
class RequestTurn:
    """A request's turn among the others.

    Attributes:
        share: of the memory, held while a thread works for the request.
        seconds_left: of work for it.
        owner: name of the key that asks; without keys each request is its own owner.
        served_until_s: when the owner's work would be done if each owner had one thread to itself.
    """

    share: MemoryShare
    seconds_left: float
    owner: str | None = None
    served_until_s: float = 0


@dataclass(eq=False, slots=True)
class _Job:
    """Holds neither the work nor its result: an image in a reference cycle would wait for garbage collection."""

    turn: RequestTurn
    is_large: bool
    until_s: float

    @property
    def owner(self) -> object:
        return self.turn if self.turn.owner is None else self.turn.owner


@dataclass(eq=False, slots=True)
class _QueuedJob:
    job: _Job
    work: Callable[[], Any]
    started: asyncio.Future[Future[Any]]


class FairThreads:
    """A pool of threads with fair queueing: the owner with the least expected work so far comes first.

    Large images leave one thread to small ones.

    Args:
        seconds: how long a request waits for a thread, and how long they work for it.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="foldserve-decode")
        self._count = count
        self._seconds = seconds
        self._waiting: list[_QueuedJob] = []
        self._running: set[_Job] = set()
        self._served_until_s: dict[str, float] = {}  # by owner: keys, which are few

    async def run(self, turn: RequestTurn, expected_s: float, large: bool, work: Callable[[], Any]) -> Any:
        """The result of `work`.

        Raises:
            Unavailable: no thread was free in time.
            ImageUnavailable: it took too long.
        """
        loop = asyncio.get_running_loop()
        until = self._queue(turn, expected_s, loop.time())
        waiting = _QueuedJob(_Job(turn, large, until), work, loop.create_future())
        self._waiting.append(waiting)
        self._start()
        try:
            async with asyncio.timeout(self._seconds):
                future = await waiting.started
        except TimeoutError as error:
            message = "the server has too many images to decode: try again later"
            raise Unavailable(message, _RETRY_AFTER_S) from error
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        began = loop.time()
        try:
            async with asyncio.timeout(turn.seconds_left):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise ImageUnavailable(f"the images could not be decoded within {self._seconds:g} s") from error
        finally:
            turn.seconds_left -= loop.time() - began

    def _queue(self, turn: RequestTurn, expected_s: float, now: float) -> float:
        before = turn.served_until_s if turn.owner is None else self._served_until_s.get(turn.owner, 0)
        until = max(now, before) + expected_s
        if turn.owner is None:
            turn.served_until_s = until
        else:
            self._served_until_s[turn.owner] = until
        return until

    def _start(self) -> None:
        busy = {job.owner for job in self._running}
        for waiting in sorted(self._waiting, key=lambda waiting: waiting.job.until_s):
            if len(self._running) >= self._count:
                return
            job = waiting.job
            large = sum(other.is_large for other in self._running)
            if job.owner in busy or (job.is_large and large >= max(1, self._count - 1)) or waiting.started.done():
                continue
            busy.add(job.owner)
            self._waiting.remove(waiting)
            self._submit(waiting)

    def _submit(self, waiting: _QueuedJob) -> None:
        job = waiting.job
        self._running.add(job)
        future = self.pool.submit(waiting.work)
        job.turn.share.hold_for(future)
        future.add_done_callback(partial(self._report_done, asyncio.get_running_loop(), job))
        waiting.started.set_result(future)

    def _report_done(self, loop: asyncio.AbstractEventLoop, job: _Job, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._done, job)

    def _done(self, job: _Job) -> None:
        self._running.discard(job)
        self._start()
