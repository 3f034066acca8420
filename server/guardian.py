"""The process that a supervisor sees as `foldserve serve`: it starts the server, passes signals on, and outlives it.

vLLM by itself loses a SIGTERM that comes while it loads, ends with status 0 when a worker was killed, and leaves its
engine running when its main process is killed. Here

- status 0 means: ended because it was asked to, with every answer finished or told;
- a process ends with its parent, at once, whatever killed that (`die_with_parent`); what is left, the guardian ends;
- until the server listens, SIGTERM ends it within seconds, with status 143.

This process imports neither torch nor vLLM.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import psutil

from foldserve.server import output

_RUN_DIR = "FOLDSERVE_RUN_DIR"
"""Names the directory of one run: whoever finds it set has a guardian."""
_LISTENS = "listens"
_FAILURE = "failure"
_GUARDED = ("serve", "batch")
_ERROR = "foldserve {}: error: {}"  # as argparse begins it
_LOADING_S = 3.0
"""For a server that is not listening yet to end by itself."""
_ENDS_WITHIN_S = 30.0
"""After a drain: for answers to be cut off, and for vLLM to end its engines."""
_LEFT_S = 2.0
"""For processes that the server leaves behind to end by themselves."""
_LONGEST_FOR_SOCKETS = 107 - len("/00000000-0000-0000-0000-000000000000")
"""Of a directory, so that vLLM can bind Unix sockets in it."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ASKS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def is_guarded() -> bool:
    """Whether this process has a guardian."""
    return _RUN_DIR in os.environ


def run_dir() -> str | None:
    """A directory for this run's files, which the guardian removes; None without one."""
    return os.environ.get(_RUN_DIR)


def die_with_parent() -> None:
    """Ends this process when its parent ends, where it has a guardian and was started by Python's multiprocessing."""
    parent = multiprocessing.parent_process()
    if is_guarded() and parent is not None and parent.pid is not None:
        _die_with(parent.pid)


def bind_children() -> None:
    """Lets processes that vLLM starts from this one end with it, where it has no guardian."""
    os.environ.setdefault(_RUN_DIR, mkdtemp(prefix="foldserve-"))


def is_wanted(arguments: Sequence[str]) -> bool:
    """Whether a process with these arguments is to guard a server, or a batch, instead of being one."""
    asks_for_help = any(argument == "-h" or argument.startswith("--help") for argument in arguments)
    return bool(arguments) and arguments[0] in _GUARDED and not asks_for_help and not is_guarded()


def report_listening(drain_s: float) -> None:
    """Lets the guardian know that SIGTERM means a drain from now on.

    Args:
        drain_s: that a drain takes at most; `_ENDS_WITHIN_S` after that the server is killed.
    """
    if is_guarded():
        Path(os.environ[_RUN_DIR], _LISTENS).write_text(str(drain_s))


def is_listening() -> bool:
    """Whether a server of this run has come so far."""
    return is_guarded() and Path(os.environ[_RUN_DIR], _LISTENS).exists()


def report_failure(reason: str) -> bool:
    """Lets the guardian say at last why the server ended.

    Returns:
        False where another process was first, whose reason it says.
    """
    if not is_guarded():
        print(_ERROR.format("serve", reason), file=sys.stderr)
        return True
    try:
        with Path(os.environ[_RUN_DIR], _FAILURE).open("x") as file:
            file.write(reason)
    except FileExistsError:
        return False
    return True


def guard(command: Sequence[str], name: str = "serve") -> int:
    """Runs a server, or a batch, to its end.

    Args:
        name: of the command; a batch may end by itself.

    Returns:
        The exit status: 0 after an end that was asked for, 128 + the signal's number where a signal ended it.
    """
    output.install()
    _prctl(_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes our child
    with TemporaryDirectory(prefix="foldserve-") as folder:
        return _Guarded(command, Path(folder), name).run()


class _Guarded:
    def __init__(self, command: Sequence[str], folder: Path, name: str) -> None:
        self._name = name
        self._listens, self._failure = folder / _LISTENS, folder / _FAILURE
        self._signals = {*_ASKS, signal.SIGCHLD}
        self._asked_as: signal.Signals | None = None
        self._drains = False
        self._deadline: float | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        me = os.getpid()

        def in_child() -> None:
            _die_with(me)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        env = {**os.environ, _RUN_DIR: str(folder)}
        if len(str(folder)) <= _LONGEST_FOR_SOCKETS:
            env.setdefault("VLLM_RPC_BASE_PATH", str(folder))  # sockets of its processes, gone with the directory
        # A group of its own: Ctrl-C in a terminal asks this process, not all of them at once. No session of its own, to
        # which Linux gives its own share of the cores (sched_autogroup): on two, answers came up to four seconds late.
        self._server = subprocess.Popen(command, env=env, preexec_fn=in_child, process_group=0)

    def run(self) -> int:
        try:
            while self._server.poll() is None and not self._is_late():
                self._heed(signal.sigtimedwait(self._signals, self._remaining_s()))
        finally:
            _end_children(self._server)
        return self._status(self._server.wait())

    def _heed(self, got: signal.struct_siginfo | None) -> None:
        if got is None or got.si_signo not in _ASKS:
            _reap(self._server)
            return
        if self._asked_as is not None:
            self._deadline = time.monotonic()  # asked twice: somebody is in a hurry
            return
        self._asked_as, self._drains = signal.Signals(got.si_signo), self._listens.exists()
        takes_s = float(self._listens.read_text() or 0) + _ENDS_WITHIN_S if self._drains else _LOADING_S
        self._deadline = time.monotonic() + takes_s
        self._server.send_signal(signal.SIGTERM)

    def _remaining_s(self) -> float:
        return 3600.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _status(self, code: int) -> int:
        if self._asked_as is not None and not self._drains:
            return 128 + self._asked_as
        if self._asked_as is None and self._failure.exists():
            print(_ERROR.format(self._name, self._failure.read_text()), file=sys.stderr)
        if code < 0:
            if self._asked_as is None:
                why = ": by the system, if memory ran out" if code == -signal.SIGKILL else ""
                what = "server" if self._name == "serve" else self._name
                print(f"foldserve: the {what} was ended by {signal.Signals(-code).name}{why}", file=sys.stderr)
            return 128 - code
        if code == 0 and self._asked_as is None and self._name == "serve":
            print("foldserve: the server ended although nobody asked it to: its log says why", file=sys.stderr)
            return 1
        return code


def _end_children(server: subprocess.Popen[bytes]) -> None:
    """Ends whatever is left of the server's tree."""
    children = psutil.Process().children(recursive=True)
    if server.poll() is not None:
        children = psutil.wait_procs([child for child in children if child.pid != server.pid], _LEFT_S)[1]
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    server.wait()
    psutil.wait_procs(children, _LEFT_S)


def _reap(server: subprocess.Popen[bytes]) -> None:
    """Takes note of adopted children that have ended, but leaves the server's end to `subprocess`."""
    for child in psutil.Process().children():
        if child.pid != server.pid:
            try:
                os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def _die_with(parent: int) -> None:
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
