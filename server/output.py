"""Standard output and error that never block the writer.

A pipe holds 64 kB. If its reader stops (a stuck log driver, `less`, Ctrl-S in a terminal), the next write blocks the
event loop, and with it the server. Here a thread writes what the pipe has no room for. What does not fit into the
thread's queue is dropped and counted.

Both streams are replaced, not only the handlers of `logging`: on a full pipe, a `print` or a warning blocks as well.
`logging.handlers.QueueListener` writes through `sys.stdout`, whose lock the interpreter takes at exit, and joins its
thread without a timeout. What C code writes (torch, glibc) goes to the descriptor as before.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import logging
import os
import select
import stat
import sys
import termios
import threading
import time
from array import array
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Any, TextIO

_QUEUE_BYTES = 1 << 20  # of each stream, beside the pipe's own 64 kB: some thousand lines
_AT_THE_END_S = 1.0  # for what is queued when the process ends
_log = logging.getLogger(__name__)


class QueuedStream(io.RawIOBase):
    """A file descriptor, written at once if that can't block, and by a thread otherwise.

    Waking the thread costs as much as a hundred direct writes. A terminal always needs it: it has no non-blocking
    write.

    Once the queue is full, everything is dropped until the queue is empty. That leaves one gap, with a warning in it,
    instead of many. The descriptor stays open.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self.dropped_lines = 0
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()  # its lock is reentrant: a signal handler may take it again
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._drops = False
        self._reported = self.dropped_lines
        self._failed = False
        self._unstarted = [None]

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        piece = bytes(data)
        with self._changed:
            if rest := piece[self._write_now(piece) :]:
                self._enqueue(rest)
        return len(piece)

    def _write_now(self, piece: bytes) -> int:
        """Returns how many bytes were written without blocking: to a pipe, all or none."""
        if self._queue or self._failed or self._reported < self.dropped_lines or len(piece) > select.PIPE_BUF:
            return 0
        try:
            if stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # has no reader to wait for
                return os.write(self._descriptor, piece)
            return os.pwritev(self._descriptor, [piece], -1, os.RWF_NOWAIT)
        except OSError:  # no room, a terminal, a full disk: the thread waits, or reports it
            return 0

    def _enqueue(self, piece: bytes) -> None:
        is_full = bool(self._queue) and self._queued_bytes + len(piece) > _QUEUE_BYTES
        self._drops = self._drops or is_full
        if self._drops:
            self.dropped_lines += piece.count(b"\n")
        else:
            self._queue.append(piece)
            self._queued_bytes += len(piece)
            self._start()
            self._changed.notify()

    def is_read(self) -> bool:
        """Whether everything was read, as far as that can be known."""
        if self._queue:
            return False
        if not stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            return bool(select.select([], [self._descriptor], [], 0)[1])
        unread = array("i", [0])
        fcntl.ioctl(self._descriptor, termios.FIONREAD, unread)
        return unread[0] == 0

    def _start(self) -> None:
        try:
            self._unstarted.pop()  # atomic, since a signal handler may run this too
        except IndexError:
            return
        try:
            threading.Thread(target=self._write_on, name="foldserve-output", daemon=True).start()
        except RuntimeError:  # no more threads for now: the next line tries again
            self._unstarted.append(None)

    def _write_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                pieces = self._next_pieces()
            joined = b"".join(pieces)
            written = self._write_whole(joined)
            with self._changed:
                for _ in pieces:
                    self._queue.popleft()
                self._queued_bytes = self._queued_bytes - len(joined) if self._queue else 0
                self.dropped_lines += 0 if written else joined.count(b"\n")
                self._drops = self._drops and bool(self._queue)
                missing = 0 if self._queue or not written else self.dropped_lines - self._reported
                self._reported += missing
            if missing:
                with suppress(Exception):  # somebody else's filter or handler
                    _log.warning("%s was not read in time: %d lines dropped", self._name, missing)

    def _next_pieces(self) -> list[bytes]:
        """As many pieces as one write to a pipe keeps together, so that lines of several processes do not mix."""
        pieces = [self._queue[0]]
        size = len(pieces[0])
        for piece in islice(self._queue, 1, None):
            size += len(piece)
            if size > select.PIPE_BUF:
                break
            pieces.append(piece)
        return pieces

    def _write_whole(self, piece: bytes) -> bool:
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:  # a full disk, or no reader any more
            if self._name == "standard output" and not self._failed:
                print(f"foldserve: {self._name} can't be written, lines are dropped: {error.strerror}", file=sys.stderr)
            self._failed = True
            return False
        self._failed = False
        return True

    def _write_some(self, rest: memoryview) -> int:
        try:
            return os.write(self._descriptor, rest)
        except BlockingIOError:  # another process made the shared pipe non-blocking
            select.select([], [self._descriptor], [])
            return 0


_streams: list[QueuedStream] = []


def install() -> None:
    """Replaces `sys.stdout` and `sys.stderr` of this process. Idempotent."""
    if not _streams:
        sys.stdout = _queue_stream(sys.stdout, "standard output")
        sys.stderr = _queue_stream(sys.stderr, "standard error")
        atexit.register(_finish)


def dropped_lines() -> int:
    return sum(queued.dropped_lines for queued in _streams)


def _queue_stream(stream: TextIO | None, name: str) -> Any:
    if stream is None:  # closed by the parent process: its descriptor may be another file by now
        return None
    stream.flush()
    queued = QueuedStream(stream.fileno(), name)
    _streams.append(queued)
    return io.TextIOWrapper(queued, stream.encoding, stream.errors, line_buffering=True)


def _finish() -> None:
    """Waits for the reader. If it stalls, later output of C code (nanobind lists its leaks) goes to /dev/null."""
    until = time.monotonic() + _AT_THE_END_S
    while not all(queued.is_read() for queued in _streams):
        if time.monotonic() >= until:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for queued in _streams:
                os.dup2(nowhere, queued.fileno())
            return
        time.sleep(0.01)
