"""The guardian with small test servers: exit statuses, signals, and no processes left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from foldserve.server import guardian

PATIENCE_S = 60
GUARD = (
    "import sys; from foldserve.server import guardian; guardian._ENDS_WITHIN_S = float(sys.argv[1]); "
    "sys.exit(guardian.guard([sys.executable, *sys.argv[2:]]))"
)
# A server with an engine, as vLLM has it: a child by multiprocessing, which has one of its own.
TREE = """
import multiprocessing, os, pathlib, signal, sys, time
from foldserve.server import guardian

def sleep(folder, name, *below):
    guardian.die_with_parent()
    start(folder, *below)
    pathlib.Path(folder, name).write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)

def start(folder, *names):
    if names:
        multiprocessing.get_context("spawn").Process(target=sleep, args=(folder, *names)).start()

def main(folder, mode):
    signal.signal(signal.SIGTERM, (lambda *_: os._exit(0)) if mode == "drains" else signal.SIG_IGN)
    start(folder, "engine", "worker")
    if mode in ("drains", "hangs"):
        guardian.report_listening(0)
    pathlib.Path(folder, "server").write_text(str(os.getpid()))
    while not all(pathlib.Path(folder, name).exists() for name in ("engine", "worker")):
        time.sleep(0.05)
    pathlib.Path(folder, "up").touch()
    time.sleep(300)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Guarded:
    def __init__(self, folder: Path, mode: str, drain_s: float = PATIENCE_S) -> None:
        (folder / "tree.py").write_text(TREE)
        command = [sys.executable, "-c", GUARD, str(drain_s), str(folder / "tree.py"), str(folder), mode]
        self.process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)})
        wait(lambda: (folder / "up").exists() or self.process.poll() is not None)
        self.pids = {name: int((folder / name).read_text()) for name in ("server", "engine", "worker")}
        self.pids["guardian"] = self.process.pid
        self.folder = folder

    def status(self) -> int:
        """The exit status, once nothing of the tree is left."""
        status = self.process.wait(PATIENCE_S)
        wait(lambda: not any(is_alive(pid) for pid in self.pids.values()))
        return status


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_drain_that_was_asked_for_ends_with_0(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, "drains")
    guarded.process.terminate()
    assert guarded.status() == 0
    assert not list(tmp_path.glob("foldserve-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_is_loading_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    guarded = Guarded(tmp_path, "loads")
    guarded.process.send_signal(number)
    assert guarded.status() == 128 + number


def test_a_drain_that_hangs_is_ended(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, "hangs", drain_s=1)
    guarded.process.terminate()
    assert guarded.status() == 128 + signal.SIGKILL


def test_whoever_asks_twice_is_in_a_hurry(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, "hangs")
    for _ in range(2):
        guarded.process.terminate()
        time.sleep(0.5)
    assert guarded.status() == 128 + signal.SIGKILL


def test_a_server_that_nobody_asked_to_end_did_not_end_well(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, "drains")
    os.kill(guarded.pids["server"], signal.SIGTERM)
    assert guarded.status() == 1


@pytest.mark.parametrize("killed", ["guardian", "server"])
@pytest.mark.parametrize("stopped", ["", "engine", "worker"])
def test_nobody_outlives_its_parent(tmp_path: Path, killed: str, stopped: str) -> None:
    guarded = Guarded(tmp_path, "drains")
    if stopped:
        os.kill(guarded.pids[stopped], signal.SIGSTOP)
    os.kill(guarded.pids[killed], signal.SIGKILL)
    assert guarded.status() == (-signal.SIGKILL if killed == "guardian" else 128 + signal.SIGKILL)


@pytest.mark.parametrize("status", [0, 1, 2, 77])
def test_the_status_of_a_server_that_does_not_start(status: int) -> None:
    run = subprocess.run([sys.executable, "-c", GUARD, "1", "-c", f"raise SystemExit({status})"], timeout=PATIENCE_S)
    assert run.returncode == (status or 1)


@pytest.mark.parametrize("asked", [False, True])
def test_the_reason_comes_last(asked: bool) -> None:
    """The first of those that the server's processes gave; none where it ended as it was asked to."""
    script = (
        "import os, signal, sys; from foldserve.server import guardian\n"
        "print(guardian.report_failure('first'), guardian.report_failure('second'))\n"
        "sys.stdout.flush(); print('Traceback', file=sys.stderr)\n"
    )
    script += "os.kill(os.getppid(), signal.SIGTERM); signal.pause()" if asked else "sys.exit(3)"
    run = subprocess.run(
        [sys.executable, "-c", GUARD, "1", "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.stdout == "True False\n"
    assert run.stderr == ("Traceback\n" if asked else "Traceback\nfoldserve serve: error: first\n")
    assert run.returncode == (128 + signal.SIGTERM if asked else 3)


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "SIGKILL: by the system, if memory ran out"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_a_server_that_was_killed(number: signal.Signals, why: str) -> None:
    script = f"import os; os.kill(os.getpid(), {number:d})"
    run = subprocess.run(
        [sys.executable, "-c", GUARD, "1", "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert run.returncode == 128 + number
    assert run.stderr == f"foldserve: the server was ended by {why}\n"


def test_without_a_guardian_the_reason_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FOLDSERVE_RUN_DIR", raising=False)
    assert guardian.report_failure("why")
    assert capsys.readouterr().err == "foldserve serve: error: why\n"


def test_the_guardian_is_small() -> None:
    script = (
        "import sys, foldserve.server.cli; print(*(m for m in ('torch', 'vllm', 'transformers') if m in sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "\n"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["serve"], True),
        (["serve", "model", "--port", "1"], True),
        (["serve", "--help"], False),
        (["serve", "--help=all"], False),
        (["serve", "model", "-h"], False),
        (["batch", "-i", "in"], True),
        (["batch", "--help"], False),
        (["loadtest", "serve"], False),
        ([], False),
    ],
)
def test_what_is_guarded(arguments: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLDSERVE_RUN_DIR", raising=False)
    assert guardian.is_wanted(arguments) == wanted
    monkeypatch.setenv("FOLDSERVE_RUN_DIR", "/run")
    assert not guardian.is_wanted(arguments)


@pytest.mark.parametrize(("name", "status", "expected"), [("batch", 0, 0), ("serve", 0, 1), ("batch", 3, 3)])
def test_only_a_batch_may_end_by_itself(name: str, status: int, expected: int) -> None:
    command = [sys.executable, "-c", f"exit({status})"]
    code = f"import sys; from foldserve.server import guardian; sys.exit(guardian.guard({command}, {name!r}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == expected
