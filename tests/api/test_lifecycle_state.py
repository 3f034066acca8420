"""The life cycle of an API process, with an engine that is no more than a process."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from foldserve.server.access import Access
from foldserve.server.api.errors import EngineStopped, InvalidRequest, ShuttingDown
from foldserve.server.api.lifecycle import state
from foldserve.server.api.lifecycle.arguments import SharedState
from foldserve.server.api.lifecycle.processes import EngineWatch, engine_processes
from foldserve.server.api.lifecycle.state import Lifecycle, Phase


class Engine:
    """Requests wait for `failed`, which is set when the client of the engine is shut down."""

    def __init__(self) -> None:
        self.errored = False
        self.has_work = False
        self.failed = asyncio.Event()
        self.engine_core = SimpleNamespace(shutdown=self.shutdown)
        self.output_processor = SimpleNamespace(
            propagate_error=self.propagate, has_unfinished_requests=lambda: self.has_work
        )
        self.outputs_fail = asyncio.Event()
        self.output_handler = asyncio.create_task(self.read_outputs())
        self._loop = asyncio.get_running_loop()

    def shutdown(self, timeout: float) -> None:
        assert timeout == 0
        self.errored = True
        self._loop.call_soon_threadsafe(self.failed.set)

    def propagate(self, error: Exception) -> None:
        assert isinstance(error, EngineDeadError)
        self.failed.set()

    async def read_outputs(self) -> None:
        await self.outputs_fail.wait()


class Life:
    """A life cycle with its surroundings.

    Args:
        processes: what it takes for engines.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_s: float, processes: list[int]) -> None:
        monkeypatch.setattr(state, "engine_processes", lambda: processes)
        monkeypatch.setattr(state, "_LAST_WORDS_S", 0.2)
        self.engine = Engine()
        self.died = multiprocessing.get_context("spawn").Event()
        self.server = SimpleNamespace(should_exit=False, force_exit=False)
        access = Access(shutdown_timeout_s=timeout_s, engine_timeout_s=3)  # type: ignore[arg-type]
        self.cycle = Lifecycle(self.engine, access, SharedState(engine_died=self.died))
        self.cycle.start(self.server)  # type: ignore[arg-type]

    async def request(self, seconds: float) -> str:
        with self.cycle.request():
            try:
                async with asyncio.timeout(seconds):
                    await self.engine.failed.wait()
            except TimeoutError:
                return "answered"
            return "failed"

    async def ended(self) -> None:
        while not self.server.should_exit:
            await asyncio.sleep(0.01)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Something that runs until it is killed."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield sleeper
    sleeper.kill()
    sleeper.wait()


def run(scenario: Any) -> None:
    """Runs a scenario in a loop of its own, bounded in time."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def test_drain_lets_requests_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 20, [])
        before = life.cycle.phase
        request = asyncio.create_task(life.request(0.3))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert (before, life.cycle.phase) == (Phase.SERVING, Phase.DRAINING)
        assert not life.server.should_exit
        with pytest.raises(ShuttingDown) as caught, life.cycle.request():
            pass
        assert int(caught.value.headers["Retry-After"]) >= 1
        await life.ended()
        assert await request == "answered"
        assert not life.died.is_set()
        while not life.server.force_exit:
            await asyncio.sleep(0.01)

    run(scenario)


def test_drain_cuts_off_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 0.1, [])
        requests = [asyncio.create_task(life.request(20)) for _ in range(3)]
        await asyncio.sleep(0.05)
        life.cycle.drain()
        life.cycle.drain()
        await life.ended()
        assert await asyncio.gather(*requests) == ["failed"] * 3
        assert not life.died.is_set(), "the server was asked to end"

    run(scenario)


def test_an_idle_server_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 600, [])
        life.cycle.drain()
        await life.ended()

    run(scenario)


def test_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 600, [process.pid])
        request = asyncio.create_task(life.request(20))
        await asyncio.sleep(0.05)
        process.kill()
        await life.ended()
        assert await request == "failed"
        assert life.cycle.phase is Phase.STOPPED
        assert life.died.is_set()
        with pytest.raises(EngineStopped), life.cycle.request():
            pass
        assert isinstance(life.cycle.explain(RuntimeError("of a library")), EngineStopped)
        known = InvalidRequest("known")
        assert life.cycle.explain(known) is known
        life.cycle.stop()

    run(scenario)


def test_outputs_that_can_not_be_read(monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]) -> None:
    """vLLM's task has logged the error and ended; the engine, which is well, is ended so that everybody notices."""

    async def scenario() -> None:
        life = Life(monkeypatch, 600, [process.pid])
        request = asyncio.create_task(life.request(20))
        await asyncio.sleep(0.05)
        life.engine.outputs_fail.set()
        await life.ended()
        assert await request == "failed"
        assert life.cycle.phase is Phase.STOPPED and life.died.is_set()
        assert process.wait(10) == -signal.SIGKILL
        life.cycle.stop()

    run(scenario)


def test_outputs_that_can_not_be_read_while_the_server_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 600, [])
        request = asyncio.create_task(life.request(20))
        await asyncio.sleep(0.05)
        life.cycle.drain()
        life.engine.outputs_fail.set()
        await life.ended()
        assert await request == "failed"
        assert not life.died.is_set()

    run(scenario)


def test_an_end_in_order_is_no_failure_of_the_outputs(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    """vLLM cancels the task when all else has ended."""

    async def scenario() -> None:
        life = Life(monkeypatch, 600, [process.pid])
        life.cycle.stop()
        life.engine.output_handler.cancel()
        await asyncio.sleep(0.05)
        assert not life.died.is_set() and process.poll() is None

    run(scenario)


def test_the_engine_ends_while_the_server_drains(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 600, [process.pid])
        request = asyncio.create_task(life.request(20))
        await asyncio.sleep(0.05)
        life.cycle.drain()
        process.kill()
        await life.ended()
        assert await request == "failed"
        assert not life.died.is_set()

    run(scenario)


def test_an_engine_that_vllm_calls_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        life = Life(monkeypatch, 600, [])
        life.engine.errored = True
        assert life.cycle.phase is Phase.STOPPED
        life.cycle.stop()

    run(scenario)


def test_a_watch_that_has_ended_is_silent(process: subprocess.Popen[bytes]) -> None:
    async def scenario() -> None:
        calls: list[None] = []
        watch = EngineWatch(lambda: calls.append(None))
        watch.start([process.pid])
        watch.stop()
        process.kill()
        await asyncio.sleep(0.2)
        assert calls == []

    run(scenario)


def test_engines_are_found_by_their_title() -> None:
    """Among this process's children, whatever else runs."""
    script = (
        "import sys, time, setproctitle; setproctitle.setproctitle(sys.argv[1]); print(flush=True); time.sleep(600)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, title], stdout=subprocess.PIPE)
        for title in ("VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1", "VLLM::APIServer_0")
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        assert engine_processes() == [child.pid for child in children[:2]]
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.parametrize("stopped", ["silent", "steps", "outputs", "idle"])
def test_an_engine_that_has_work_and_says_nothing_is_killed(
    stopped: str, monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(state, "_LOOK_S", 0.02)
    steps = SimpleNamespace(at=0.0)
    monkeypatch.setattr(state, "last_stats", steps)

    async def scenario() -> None:
        life = Life(monkeypatch, 600, [process.pid])
        monkeypatch.setattr(life.cycle, "_engine_timeout_s", 0.2)
        life.engine.has_work = stopped != "idle"
        request = asyncio.create_task(life.request(0.8))
        while not request.done():
            await asyncio.sleep(0.02)
            if stopped == "outputs":
                life.cycle.note_output()
            elif stopped == "steps":
                steps.at = time.monotonic()
        if stopped == "silent":
            assert await request == "failed"
            assert life.died.is_set()
            assert process.wait(30) == -signal.SIGKILL
            await life.ended()
        else:
            assert await request == "answered"
            assert life.cycle.phase is Phase.SERVING
            assert process.poll() is None
        life.cycle.stop()

    run(scenario)


def test_a_process_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_LOOK_S", 0.02)

    async def scenario() -> None:
        life = Life(monkeypatch, 600, [])
        life.engine.has_work = True
        for _ in range(3):
            await asyncio.sleep(0.05)
            time.sleep(1)
            life.cycle.note_output()
        assert life.cycle.phase is Phase.SERVING
        life.cycle.stop()

    run(scenario)
