"""The phases of an API process, from ready through drain to its end.

    SERVING --SIGTERM--> DRAINING --all answered, or out of time--> the process ends, status 0
       └-- the engine's process ends, its     --> STOPPED --------> the process ends, status 1
           outputs can't be read, or none come

vLLM's own handler of SIGTERM keeps taking requests, and with several API processes cuts off those in flight.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import uvicorn
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from foldserve.server import guardian
from foldserve.server.access import Access
from foldserve.server.api.errors import EngineStopped, FoldserveError, ShuttingDown
from foldserve.server.api.lifecycle.arguments import SharedState
from foldserve.server.api.lifecycle.processes import EngineWatch, engine_processes
from foldserve.server.engine.stats import last_stats

_LAST_WORDS_S = 2.0  # for clients to read the error that ends their answer
_RETRY_AFTER_S = 10
_LOOK_S = 1.0  # between two checks for outputs of the engine
_log = logging.getLogger(__name__)


class Phase(Enum):
    SERVING = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The life of one API process. `access` has its timeouts; `shared` connects it with the other API processes."""

    def __init__(self, engine: AsyncLLM, access: Access, shared: SharedState) -> None:
        self._engine = engine
        self._timeout_s = access.shutdown_timeout_s
        self._engine_timeout_s = access.engine_timeout_s
        self._engine_died = shared.engine_died
        self._last_output = shared.last_output
        self._phase = Phase.SERVING
        self._in_flight = 0
        self._calls = 0
        self._cause: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: uvicorn.Server | None = None
        self._watch = EngineWatch(partial(self._on_engine_end, "the engine's process has ended"))
        self._outputs: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def phase(self) -> Phase:
        return Phase.STOPPED if self._engine.errored else self._phase

    @property
    def cause(self) -> str | None:
        """Why the engine ended, as far as this process has seen."""
        return self._cause

    @property
    def is_idle(self) -> bool:
        return self._in_flight == 0

    def start(self, server: uvicorn.Server) -> None:
        """Takes over signals from vLLM and watches the engine; called when `server` is about to listen."""
        self._server = server
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        self.watch_engine()
        guardian.report_listening(self._timeout_s)

    def watch_engine(self) -> None:
        """Notices when the engine ends or hangs; enough for a batch, which has no server."""
        self._watch.start(engine_processes())
        self._outputs = self._engine.output_handler
        assert self._outputs is not None, "vLLM starts it where a loop runs"
        self._outputs.add_done_callback(self._on_outputs_end)
        self._run(self._watch_for_hangs())

    def stop(self) -> None:
        """Ends the watch; called when the server or the batch has ended."""
        self._watch.stop()
        if self._outputs is not None:
            self._outputs.remove_done_callback(self._on_outputs_end)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Delays the server's end during a request; raises ShuttingDown or EngineStopped if it comes too late."""
        if self.phase is Phase.DRAINING:
            raise ShuttingDown("the server is shutting down: ask another, or try again later", _RETRY_AFTER_S)
        if self.phase is Phase.STOPPED:
            raise _stopped()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def explain(self, error: Exception) -> Exception:
        """The error to show for one that ended a request: once the engine is gone, any failure is due to that."""
        return error if isinstance(error, FoldserveError) or self.phase is not Phase.STOPPED else _stopped()

    def drain(self) -> None:
        """Refuses new requests, lets those in flight finish, then ends the server."""
        if self._phase is Phase.SERVING:
            self._phase = Phase.DRAINING
            _log.info("draining: %d requests have %g s to finish", self._in_flight, self._timeout_s)
            self._run(self._drain())

    async def _drain(self) -> None:
        if not await self._all_answered(self._timeout_s):
            _log.warning("cut off after %g s: %d requests", self._timeout_s, self._in_flight)
            await self._end_answers()
        await self._end_server()

    @contextmanager
    def engine_call(self) -> Iterator[None]:
        """Entered while the engine works on a call without outputs, so that a hang is noticed."""
        self._calls += 1
        try:
            yield
            self.note_output()
        finally:
            self._calls -= 1

    def note_output(self) -> None:
        """Notes an output of the engine."""
        self._last_output.value = time.monotonic()

    async def _watch_for_hangs(self) -> None:
        """Ends the server when its engine hangs.

        Counts silent checks instead of time: a process that was itself stopped has missed no output.
        """
        silent_s = 0.0
        while self._phase is Phase.SERVING:
            before = time.monotonic()
            await asyncio.sleep(_LOOK_S)
            self._last_output.value = max(self._last_output.value, last_stats.at)
            is_silent = self._last_output.value < before - _LOOK_S  # another process may have looked that long ago
            has_work = self._calls > 0 or self._engine.output_processor.has_unfinished_requests()
            silent_s = silent_s + _LOOK_S if has_work and is_silent else 0.0
            if silent_s >= self._engine_timeout_s:
                self._engine.output_processor.propagate_error(EngineDeadError())
                self._on_engine_end(f"the engine has work and gave no output for {silent_s:g} s")
                self._watch.kill()

    def _on_outputs_end(self, outputs: asyncio.Task[None]) -> None:
        """vLLM reads all answers in one task: if that fails, no more can come.

        Kills the engine's process too, so that the other API processes notice: half a server can't serve.
        """
        self._engine.output_processor.propagate_error(EngineDeadError())  # vLLM itself leaves some errors out
        if self._phase is Phase.SERVING:
            self._on_engine_end("the engine's outputs can't be read any more")
            self._watch.kill()

    def _on_engine_end(self, cause: str) -> None:
        """Ends the server, since it needs every engine: a request in flight on this one would wait forever."""
        if self._phase is Phase.SERVING:
            self._cause = cause
            self._engine_died.set()
            _log.error("%s: %d requests fail", cause, self._in_flight)
        was, self._phase = self._phase, Phase.STOPPED
        if was is not Phase.STOPPED:
            self._run(self._abandon())

    async def _abandon(self) -> None:
        await self._end_answers()
        if self._server is not None:
            await self._end_server()

    async def _end_answers(self) -> None:
        """Makes every request in flight fail, as vLLM does when it finds its engine dead.

        Does not use `AsyncLLM.shutdown`, which also stops the task that tells the requests, so that they would wait
        forever.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, partial(self._engine.engine_core.shutdown, timeout=0))
        await self._all_answered(_LAST_WORDS_S)

    async def _all_answered(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _end_server(self) -> None:
        assert self._server is not None, "started"
        self._server.should_exit = True
        await asyncio.sleep(_LAST_WORDS_S)
        self._server.force_exit = True  # a connection that is idle in the middle of a request holds uvicorn up

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


def _stopped() -> EngineStopped:
    return EngineStopped("the model has stopped: ask another server, or try again later", _RETRY_AFTER_S)
