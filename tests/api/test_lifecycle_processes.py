"""Each process of a server killed, stopped or asked to end, in each phase: nothing is left, and the status tells."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil
import pytest

from tests.api.live import Answer, Live, end

GONE_WITHIN_S = 10  # the promise; a busy machine gets PATIENCE_S for the rest
HANGS_AFTER_S = 5


class Case(NamedTuple):
    """What is done to which process, in which phase, and how the server ends.

    `server` is the process below the guardian: the API process or, with several, their parent.
    """

    api_processes: int
    phase: str
    process: str
    signal: signal.Signals
    status: int


KILLED = 128 + signal.SIGKILL
CASES = [
    Case(1, "loading", "guardian", signal.SIGTERM, 128 + signal.SIGTERM),
    Case(1, "idle", "server", signal.SIGKILL, KILLED),
    Case(1, "busy", "worker", signal.SIGKILL, 1),
    Case(1, "busy", "engine", signal.SIGSTOP, 1),
    Case(1, "draining", "engine", signal.SIGKILL, 0),  # asked to end; the clients are told
    Case(2, "loading", "guardian", signal.SIGTERM, 128 + signal.SIGTERM),
    Case(2, "idle", "guardian", signal.SIGKILL, -signal.SIGKILL),
    Case(2, "busy", "api", signal.SIGKILL, 1),
    Case(2, "busy", "worker", signal.SIGSTOP, 1),
]
TOLD = {"engine", "worker"}  # whose end the clients are told of; with an API process their connection ends


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])))
def test_nothing_is_left(case: Case, tiny_llava: Path, tmp_path: Path) -> None:
    options = ["--api-server-count", str(case.api_processes), "--engine-timeout", str(HANGS_AFTER_S)]
    with (
        TemporaryDirectory(dir="/tmp") as temporary,  # short: it holds sockets
        started(tiny_llava, tmp_path, temporary, *options, case=case) as live,
    ):
        victim = find(live, case.process)
        tree = live.tree()
        answers = Answers(live) if case.phase in ("busy", "draining") else None
        if case.phase == "draining":
            live.terminate()
            live.wait(lambda: not live.is_ready())
        victim.send_signal(case.signal)
        assert live.process.wait(GONE_WITHIN_S * 12) == case.status
        gone = psutil.wait_procs(tree, GONE_WITHIN_S)[1]
        assert gone == []
        assert not is_open(live.port)
        if answers is not None:
            answers.check(told=case.process in TOLD)
        if case.process != "guardian" or case.signal is not signal.SIGKILL:
            left = [file for file in Path(temporary).rglob("*") if "foldserve" in file.name or file.is_socket()]
            assert left == []


class Answers:
    """Streams of one server, some of each API process, that last until it ends."""

    def __init__(self, live: Live) -> None:
        self._answers: list[Answer | None] = []
        self._threads = [threading.Thread(target=self._ask, args=(live,)) for _ in range(6)]
        for thread in self._threads:
            thread.start()
        live.wait(lambda: live.metrics("vllm:generation_tokens_total") > 0)

    def _ask(self, live: Live) -> None:
        answer = None
        with suppress(OSError, HTTPException):
            answer = live.chat(stream=True, max_tokens=900)
        self._answers.append(answer)

    def check(self, *, told: bool) -> None:
        for thread in self._threads:
            thread.join(GONE_WITHIN_S)
            assert not thread.is_alive(), "a client still waits"
        if told:
            assert all(answer is not None and b'"engine_stopped"' in answer.body for answer in self._answers)


@contextmanager
def started(model: Path, folder: Path, temporary: str, *options: str, case: Case) -> Iterator[Live]:
    loads = case.phase == "loading"
    live = Live(model, folder, *options, wait=not loads, env={"TMPDIR": temporary}, worker=case.process == "worker")
    try:
        if loads:
            live.wait(lambda: any("EngineCore" in title(process) for process in live.tree()))
            time.sleep(0.3)  # into the load, which is over 1.4 s later on a fast machine
        yield live
    finally:
        end(live.process, patience_s=0)


def find(live: Live, name: str) -> psutil.Process:
    guardian, *others = live.tree()
    if name == "guardian":
        return guardian
    if name == "server":
        return guardian.children()[0]
    part = {"engine": "EngineCore", "worker": "Worker", "api": "APIServer_1"}[name]
    return next(process for process in others if part in title(process))


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_open(port: int) -> bool:
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return port in [one.laddr.port for one in listening if one.laddr]
