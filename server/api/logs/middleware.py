"""Gives every request an id, and logs one line when it ends; never its content."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foldserve.server.api.logs.context import choose_request_id, request_id

_HEADER = "x-request-id"
_AT_ONCE = ("/health", "/metrics")
_log = logging.getLogger("foldserve.requests")


class RequestLog:
    """ASGI middleware; vLLM below reads the chosen id from the request's header.

    Successful health checks and scrapes are logged as DEBUG. Other requests start one per round of the event loop, so
    that a health check does not wait for a thousand that come at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chosen = choose_request_id(Headers(scope=scope).get(_HEADER))
        others = [header for header in scope["headers"] if header[0] != _HEADER.encode()]
        scope["headers"] = [*others, (_HEADER.encode(), chosen.encode())]
        request_id.set(chosen)
        if not scope["path"].startswith(_AT_ONCE):
            async with self._turn:
                await asyncio.sleep(0)  # the next request's turn is in another round of the event loop
        status: int | None = None
        gone = False
        started = time.perf_counter()

        async def receive_and_see() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = None if gone else message["status"]  # vLLM's handlers also answer a client that has gone
                MutableHeaders(raw=message["headers"])[_HEADER] = chosen
            await send(message)

        try:
            await self._app(scope, receive_and_see, send_with_id)
        finally:
            _report(scope, status, time.perf_counter() - started)


def _report(scope: Scope, status: int | None, seconds: float) -> None:
    """Logs the route as declared, not the path as sent, which may hold anything.

    `status` is None if the client went away before there was one.
    """
    route = getattr(scope.get("route"), "path", None)
    key = scope.get("state", {}).get("foldserve_key")
    fields = {
        "method": scope["method"],
        "route": route,
        "status": status,
        "seconds": round(seconds, 4),
        "key": getattr(key, "name", None),
    }
    quiet = scope.get("state", {}).get("foldserve_quiet", False) and status is not None and status < 400
    _log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %s in %.3f s, key %s",
        *fields.values(),
        extra=fields,
    )
