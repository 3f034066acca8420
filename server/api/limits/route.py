"""The chat route's own way to read a body: counts it while it arrives, and checks it before FastAPI builds a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, ClassVar

from fastapi import Request, Response

from foldserve.server.api.auth.route import WorkRoute, take_place
from foldserve.server.api.errors import BodyTooLarge, Unavailable
from foldserve.server.api.limits import coding
from foldserve.server.api.limits.checks import ChatChecks

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class UnreadBodies:
    """Bytes of bodies that have arrived in part. Whole bodies have places, which are counted elsewhere.

    `most`: bytes of such bodies that an API process holds at once.
    """

    def __init__(self, most: int) -> None:
        self._free = most

    @contextmanager
    def share(self) -> Iterator[_BodyShare]:
        """The bytes of one body while the context is entered."""
        share = _BodyShare(self)
        try:
            yield share
        finally:
            self._free += share.taken

    def lend(self, size: int) -> None:
        """Counts bytes; raises Unavailable if there are too many."""
        if size > self._free:
            raise Unavailable("the server receives too much at once: try again later")
        self._free -= size


class _BodyShare:
    def __init__(self, bodies: UnreadBodies) -> None:
        self._bodies = bodies
        self.taken = 0

    def take(self, size: int) -> None:
        self._bodies.lend(size)
        self.taken += size


class CheckedRequest(Request):
    """Modifications to Starlette's request:

    - `body` is never compressed; it stops at the server's limit, or at once if a longer one is announced;
    - `json` is strict, and its value has passed `ChatChecks.read`;
    - one body is parsed in a round of the event loop, a long one in a thread, so that neither a thousand at once nor a
      hostile one delays a health check.
    """

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            coding.check_header(self.headers.getlist("content-encoding"))
            most = self.checks.limits.max_body_bytes
            announced = self.headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > most:
                raise self._too_large()
            content = bytearray()
            with self._unread.share() as share:
                async for chunk in self.stream():
                    share.take(len(chunk))
                    content += chunk
                    if len(content) > most:
                        raise self._too_large()
            take_place(self.scope)
            self._body = bytes(content)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            content = await self.body()
            if self.checks.is_long(content):
                threads: Executor = self.app.state.foldserve_long_bodies
                self._json = await asyncio.get_running_loop().run_in_executor(threads, self.read, content)
            else:
                async with self.app.state.foldserve_turn:
                    await asyncio.sleep(0)  # the next body's turn is in another round of the event loop
                    self._json = self.read(content)
            self._body = b""  # not kept while the answer is generated
        return self._json

    def read(self, content: bytes) -> Any:
        return self.checks.read(content)

    @property
    def _unread(self) -> UnreadBodies:
        bodies: UnreadBodies = self.app.state.foldserve_unread
        return bodies

    @property
    def checks(self) -> ChatChecks:
        checks: ChatChecks = self.app.state.foldserve_chat.checks
        return checks

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self.checks.limits.max_body_mb:g} MB")


class ChatRoute(WorkRoute):
    """A route that reads its body by `request_class`."""

    request_class: ClassVar[type[CheckedRequest]] = CheckedRequest

    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(self.request_class(request.scope, request.receive))

        return checked

    def explain(self, error: Exception, request: Request) -> Exception:
        checks: ChatChecks = request.app.state.foldserve_chat.checks
        return super().explain(checks.explain(error), request)
