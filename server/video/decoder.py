"""The server's side of video decoding: asks for the frames of a file."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from foldserve.server.video.frames import BEGUN, ChosenFrames, DamagedVideo, FrameRule, VideoBounds, VideoTooLarge

_ANSWER_BYTES = 1 << 20


class DecoderUnavailable(RuntimeError):
    """The decoding process can't be started or does not stay up: the server's fault, not the file's."""


class Frames:
    """Pixels of a video, in memory that can be released while somebody still holds them.

    Args:
        shape: (count, height, width, 3).
        file: descriptor with the pixels; -1 for new, black ones.
    """

    def __init__(self, shape: tuple[int, int, int, int], file: int = -1) -> None:
        self._memory = mmap.mmap(file, int(np.prod(shape)))
        self.pixels: NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._memory)

    def release(self) -> None:
        """Returns the memory to the system; the pixels are black afterwards."""
        self._memory.madvise(mmap.MADV_REMOVE)


class VideoDecoder:
    """Decodes each file in a process of its own. The process that forks them starts with the first file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None
        self._stop: Callable[[], object] = lambda: None

    def measure(self, content: bytes, bounds: VideoBounds, rule: FrameRule) -> ChosenFrames:
        """What `decode` would give, without decoding: reads the container. Raises as `decode`."""
        with ExitStack() as open_files:
            return self._ask(content, bounds, rule, _memory_file("frames", open_files), decode=False)

    def decode(self, content: bytes, bounds: VideoBounds, rule: FrameRule) -> tuple[ChosenFrames, Frames]:
        """Blocks until the frames are there, at most about twice `bounds.work_s`.

        Raises:
            DamagedVideo, VideoTooLarge: as `file.read`, and for a file that ended its process.
            DecoderUnavailable: no process could be started.
        """
        with ExitStack() as open_files:
            file = _memory_file("frames", open_files)
            chosen = self._ask(content, bounds, rule, file, decode=True)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # reading beyond a file's end kills the reader
            return chosen, Frames((chosen.count, chosen.height, chosen.width, 3), file)

    def close(self) -> None:
        """Ends the process; files that are being decoded are finished."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._stop()
        self._requests = None

    def _ask(self, content: bytes, bounds: VideoBounds, rule: FrameRule, frames: int, *, decode: bool) -> ChosenFrames:
        asked = {"bounds": asdict(bounds), "rule": asdict(rule), "decode": decode}
        for _ in range(2):
            reply = self._reply(json.dumps(asked).encode(), content, frames)
            if reply == BEGUN:  # a limit has ended it
                raise VideoTooLarge("the video takes too much time or memory to decode: make it shorter or smaller")
            if reply:
                return _result(json.loads(reply))
            with self._lock:  # it ended before it began the file
                self._end()
        raise DecoderUnavailable("the process that decodes videos does not stay up")

    def _reply(self, message: bytes, content: bytes, frames: int) -> bytes:
        with ExitStack() as open_files:
            source = _memory_file("source", open_files)
            answer, theirs = (open_files.enter_context(os.fdopen(fd, "rb", 0)) for fd in os.pipe())
            _write_all(source, content)
            os.lseek(source, 0, os.SEEK_SET)
            self._send(message, [source, frames, theirs.fileno()])
            theirs.close()
            return _read_all(answer.fileno())

    def _send(self, message: bytes, files: list[int]) -> None:
        with self._lock:
            for _ in range(2):  # replaces one that was killed
                if self._requests is None:
                    self._start()
                assert self._requests is not None
                try:
                    socket.send_fds(self._requests, [message], files)
                    return
                except OSError:
                    self._end()
        raise DecoderUnavailable("the process that decodes videos does not stay up")

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "foldserve.server.video.fork_server", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._requests, self._stop = ours, weakref.finalize(self, _stop, process, ours)


def _stop(process: subprocess.Popen[bytes], requests: socket.socket) -> None:
    requests.close()
    process.wait()


def _memory_file(name: str, open_files: ExitStack) -> int:
    fd = os.memfd_create(f"foldserve-video-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    open_files.callback(os.close, fd)
    return fd


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _read_all(fd: int) -> bytes:
    reply = b""
    while len(reply) < _ANSWER_BYTES and (more := os.read(fd, _ANSWER_BYTES)):
        reply += more
    return reply


def _result(reply: dict[str, object]) -> ChosenFrames:
    if isinstance(message := reply.get("damaged"), str):
        raise DamagedVideo(message)
    if isinstance(message := reply.get("too_large"), str):
        raise VideoTooLarge(message)
    if not isinstance(values := reply.get("frames"), list):
        raise DamagedVideo("the video file can't be decoded")
    count, height, width, times, total, seconds = values
    return ChosenFrames(count, height, width, tuple(times), total, seconds)
