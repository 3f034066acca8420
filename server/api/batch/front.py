"""The server's own application, called in this process, so that a line gets the answer that HTTP would give.

Guard, limits, planner, `usage` and error messages are the same. vLLM's `run_batch` calls the chat handler behind all of
them. It also reads the whole input, starts a task for each line, and writes only at the end.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.types import Message
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.usage.usage_lib import UsageContext

from foldserve.server.api.lifecycle.state import Lifecycle, Phase
from foldserve.server.api.limits.route import ChatRoute

_HEADERS = ((b"host", b"localhost"), (b"content-type", b"application/json"))


@dataclass(slots=True)
class Reply:
    """A whole response; header names are lower-case."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


class Front:
    """The application on a running engine, as vLLM builds it, with our routes."""

    def __init__(self, app: FastAPI, engine: EngineClient) -> None:
        self._app = app
        self._engine = engine
        self._lifecycle: Lifecycle = app.state.foldserve_lifecycle

    @property
    def urls(self) -> Collection[str]:
        """Paths of the routes that make the model work."""
        return sorted(route.path for route in self._app.routes if isinstance(route, ChatRoute))

    @property
    def has_failed(self) -> bool:
        """Whether the engine is gone, so that nothing will be answered any more."""
        return self._lifecycle.phase is Phase.STOPPED

    @property
    def failure(self) -> str:
        """Why it is gone."""
        return self._lifecycle.cause or "the engine has ended"

    @property
    def runs_at_once(self) -> int:
        """Answers that the engines work on at a time."""
        config = self._engine.vllm_config
        return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

    async def post(self, path: str, body: bytes) -> Reply:
        """The application's response; drops `body` once it is read."""
        reply = Reply()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [*_HEADERS, (b"content-length", str(len(body)).encode())]
        del body

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # nobody hangs up
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            else:
                reply.body += message.get("body", b"")

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
        }
        await self._app(scope, receive, send)
        return reply


@asynccontextmanager
async def open_front(args: Namespace) -> AsyncIterator[Front]:
    """Starts the engine, or several for data parallel, and the application, as the server would.

    `args` are vLLM's, see `launch.serve_args`.
    """
    async with build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        async with app.router.lifespan_context(app):  # vLLM's: statistics, and a frozen heap
            lifecycle: Lifecycle = app.state.foldserve_lifecycle
            lifecycle.watch_engine()
            try:
                yield Front(app, engine)
            finally:
                lifecycle.stop()
