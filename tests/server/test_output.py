"""Output to a reader that stalls or goes away, or to a full disk: nothing blocks, and lost lines are counted."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from foldserve.server.output import _QUEUE_BYTES, QueuedStream

PATIENCE_S = 60
LINE = b"%06d " + b"x" * 200 + b"\n"


class Pipe:
    """A pipe that is written through a queue and read when the test says so."""

    def __init__(self) -> None:
        self._reads, self._writes = os.pipe()
        self.queued = QueuedStream(self._writes, "standard output")
        self.sent = 0

    def send(self, lines: int = 1) -> None:
        for _ in range(lines):
            self.queued.write(LINE % self.sent)
            self.sent += 1

    def fill(self) -> None:
        """Sends until lines are dropped, and some more."""
        while not self.queued.dropped_lines:
            self.send()
        self.send(100)

    def read(self, lines: int, size: int = len(LINE % 0)) -> list[int]:
        """The numbers of the next lines, which have `size` bytes."""
        data = bytearray()
        while (missing := lines - data.count(b"\n")) > 0:
            assert select.select([self._reads], [], [], PATIENCE_S)[0], f"{missing} lines never came"
            data += os.read(self._reads, missing * size)
        return [int(line.split()[0]) for line in data.splitlines()]


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_lines_come_in_order(pipe: Pipe) -> None:
    pipe.send(1000)
    assert pipe.read(1000) == list(range(1000))
    assert pipe.queued.dropped_lines == 0


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_what_can_not_wait_is_written_without_a_thread(kind: str, tmp_path: Path) -> None:
    reads, target = os.pipe() if kind == "pipe" else (0, os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    queued = QueuedStream(target, "standard output")
    started = threading.active_count()
    queued.write(b"line\n")
    assert (os.read(reads, 100) if kind == "pipe" else (tmp_path / "log").read_bytes()) == b"line\n"
    assert threading.active_count() == started


def test_a_terminal_is_written_by_the_thread() -> None:
    """Ctrl-S stops it, and no write to it refuses to wait."""
    leader, terminal = os.openpty()
    QueuedStream(terminal, "standard output").write(b"line\n")
    assert select.select([leader], [], [], PATIENCE_S)[0]
    assert os.read(leader, 100) == b"line\r\n"


def test_a_stalled_reader_costs_lines_and_hears_how_many(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    pipe.fill()
    dropped = pipe.queued.dropped_lines
    kept = pipe.sent - dropped
    assert kept * len(LINE % 0) >= _QUEUE_BYTES
    assert caplog.messages == []
    assert pipe.read(kept) == list(range(kept))
    wait(lambda: len(caplog.messages) == 1)
    assert caplog.messages == [f"standard output was not read in time: {dropped} lines dropped"]
    assert caplog.records[0].levelno == logging.WARNING
    first = pipe.sent
    pipe.send(10)
    assert pipe.read(10) == list(range(first, first + 10))
    assert pipe.queued.dropped_lines == dropped


def test_each_gap_is_told(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    for gaps in (1, 2):
        before, dropped = pipe.sent, pipe.queued.dropped_lines
        while pipe.queued.dropped_lines == dropped:
            pipe.send()
        pipe.read(pipe.sent - before - 1)
        wait(lambda: len(caplog.messages) == gaps)  # noqa: B023
    assert [message.split(": ")[1] for message in caplog.messages] == ["1 lines dropped"] * 2


def test_a_line_larger_than_the_queue_is_written(pipe: Pipe) -> None:
    large = b"0 " + b"x" * 2 * _QUEUE_BYTES + b"\n"
    pipe.queued.write(large)
    assert pipe.read(1, len(large)) == [0]
    wait(pipe.queued.is_read)  # a line is in the queue, and fills it, until all of it is known to be written
    pipe.send()
    assert pipe.read(1) == [0]


def test_a_pipe_that_somebody_made_non_blocking(pipe: Pipe) -> None:
    os.set_blocking(pipe.queued.fileno(), False)
    pipe.send(2000)
    time.sleep(0.2)  # meets the full pipe
    assert pipe.read(2000) == list(range(2000))


@pytest.mark.parametrize("gone", [False, True], ids=["full disk", "no reader"])
def test_what_can_not_be_written_is_told_once(gone: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if gone:
        reads, target = os.pipe()
        os.close(reads)
    else:
        target = os.open("/dev/full", os.O_WRONLY)
    queued = QueuedStream(target, "standard output")
    for number in range(50):
        queued.write(LINE % number)
    wait(lambda: queued.dropped_lines == 50)
    why = "Broken pipe" if gone else "No space left on device"
    assert capsys.readouterr().err == f"foldserve: standard output can't be written, lines are dropped: {why}\n"


def test_a_disk_that_has_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    full = os.open("/dev/full", os.O_WRONLY)
    working = os.dup(target)
    os.dup2(full, target)
    queued = QueuedStream(target, "standard output")
    queued.write(b"lost\n")
    wait(lambda: queued.dropped_lines == 1)
    os.dup2(working, target)
    queued.write(b"kept\n")
    wait(lambda: len(caplog.messages) == 1)
    assert (tmp_path / "log").read_text() == "kept\n"


# ---- whole processes

INSTALL = "import os, signal, sys; from foldserve.server import output; output.install(); output.install()\n"


@pytest.fixture
def stalled() -> Iterator[int]:
    """A pipe that is full, and that nobody reads."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    while True:
        try:
            os.write(writes, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writes, True)
    yield writes
    os.close(reads)
    os.close(writes)


def run(script: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", INSTALL + script]
    return subprocess.run(command, stdout=stdout, stderr=stderr, text=True, timeout=PATIENCE_S, check=False)


def test_a_process_writes_what_is_queued_before_it_ends() -> None:
    done = run("for n in range(20_000): print(n)\nprint('e', file=sys.stderr)\n1 / 0")
    assert done.stdout.split() == [str(n) for n in range(20_000)]
    assert done.stderr.startswith("e\nTraceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.returncode == 1


def test_a_stalled_reader_does_not_hold_up_the_end(stalled: int) -> None:
    script = "for n in range(100_000): print('x' * 50); print('x' * 50, file=sys.stderr)\nsys.exit(7)"
    assert run(script, stalled, stalled).returncode == 7


def test_nor_does_what_c_writes_at_the_end(stalled: int) -> None:
    script = "import ctypes; ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).malloc_stats); print('x')"
    assert run(script, stalled, stalled).returncode == 0


def test_a_warning_is_not_held_up_either(stalled: int, tmp_path: Path) -> None:
    """The queue keeps a pipe full: what is printed past logging must not wait for it."""
    script = "import warnings, pathlib; print('x' * 100_000); warnings.warn('w')\n"
    assert run(script + f"pathlib.Path({str(tmp_path / 'on')!r}).touch()", stalled, stalled).returncode == 0
    assert (tmp_path / "on").exists()


def test_a_fork_has_a_queue_of_its_own() -> None:
    done = run("print('parent')\nif os.fork() == 0:\n    print('child')\n    sys.exit()\nos.wait()\nprint('end')")
    assert done.stdout == "parent\nchild\nend\n"


def test_a_signals_handler_may_print() -> None:
    script = (
        "signal.signal(signal.SIGALRM, lambda *_: sys.stdout.buffer.write(b'signal\\n'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "for n in range(50_000): sys.stdout.buffer.write(b'line\\n')\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    lines = run(script).stdout.splitlines()
    assert set(lines) == {"line", "signal"}
    assert lines.count("line") == 50_000


def test_closed_output_stays_closed() -> None:
    """Its descriptor may belong to a socket by now."""
    script = f"import os; os.close(1); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {INSTALL!r} + '''\n"
    script += "print(1); print(sys.stdout, file=sys.stderr)'''])"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == "None\n"


def test_streams_look_as_before() -> None:
    script = (
        "print(sys.stdout.fileno(), sys.stderr.fileno(), sys.stdout.isatty(), sys.stdout.encoding, sys.stderr.errors)"
    )
    assert run(script).stdout == "1 2 False utf-8 backslashreplace\n"
