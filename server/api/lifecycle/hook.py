"""Starts and stops the life cycle from vLLM's ASGI lifespan, which it only observes."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foldserve.server.api.connection import use_safe_protocol
from foldserve.server.api.routes import drop_foreign_routes


class LifespanHook:
    """ASGI middleware that, once vLLM has set up its signal handlers and server, gives that server our connections and
    starts `app.state.foldserve_lifecycle`.

    uvicorn runs the lifespan after that setup, and listens only once the lifespan has started.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        state = scope["app"].state

        async def send_and_start(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                drop_foreign_routes(scope["app"])
                use_safe_protocol(state.server)
                state.foldserve_lifecycle.start(state.server)
            elif message["type"] == "lifespan.shutdown.complete":
                lifecycle.stop()
            await send(message)

        lifecycle = state.foldserve_lifecycle  # vLLM deletes the state before the end
        await self._app(scope, receive, send_and_start)
