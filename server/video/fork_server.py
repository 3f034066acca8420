"""Forks one process per video file: `python -m foldserve.server.video.fork_server FD`.

A decoder is a million lines of C that reads a stranger's file. Its process is forked from one that has only loaded the
libraries, so that it starts in milliseconds. It has limits on memory, processor time and output, can open nothing, and
ends with the file, so that nothing is left behind.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import av

from foldserve.server.video import file as video_file
from foldserve.server.video.frames import BEGUN, DamagedVideo, FrameRule, VideoBounds, VideoTooLarge

MESSAGE_BYTES = 4096
_PAGE = resource.getpagesize()


def main(argv: Sequence[str]) -> None:
    """Serves requests from the socket until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps ended children
    for module in pkgutil.walk_packages(av.__path__, "av."):  # some are imported on use, when nothing can be opened
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with socket.socket(fileno=int(argv[0])) as requests:
        gc.freeze()
        while True:
            message, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
            if not message:
                return
            if os.fork() == 0:
                requests.close()
                _work(message, *files)
            for each in files:
                os.close(each)


def _work(message: bytes, content: int, room: int, answer: int) -> NoReturn:
    """Decodes one file and exits. Writes JSON: `{"frames": ...}`, or `{"damaged" or "too_large": message}`."""
    os.write(answer, BEGUN)
    asked = json.loads(message)
    bounds, rule = VideoBounds(**asked["bounds"]), FrameRule(**asked["rule"])
    size = os.fstat(content).st_size
    _confine(bounds, size)

    def put(pixels: video_file.Pixels) -> None:
        view = pixels.data.cast("B")
        while view:
            view = view[os.write(room, view) :]

    try:
        with os.fdopen(content, "rb", buffering=0) as file:
            chosen = video_file.read(file, bounds, rule, put if asked["decode"] else None)  # type: ignore[arg-type]  # raw is enough for it
        reply: dict[str, object] = {"frames": [getattr(chosen, name) for name in chosen.__slots__]}
    except DamagedVideo as error:
        reply = {"damaged": str(error)}
    except VideoTooLarge as error:
        reply = {"too_large": str(error)}
    except BaseException as error:
        reply = {"failed": type(error).__name__}
    os.write(answer, json.dumps(reply).encode())
    os._exit(0)


def _confine(bounds: VideoBounds, size: int) -> None:
    """From here on: no new file or socket, bounded memory and time, and no output larger than the frames may be."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * _PAGE
    seconds = max(1, round(bounds.work_s))
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 3 * bounds.pixels),
        (resource.RLIMIT_AS, used + size + bounds.memory_bytes),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)  # waiting for a processor counts too; ends the process


if __name__ == "__main__":
    main(sys.argv[1:])
