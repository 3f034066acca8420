"""The process that a supervisor sees as `foldserve serve`: it starts the server, forwards signals, and outlives it.

By itself, vLLM loses a SIGTERM that arrives while it loads, exits with status 0 after a worker was killed, and leaves
its engine running when its main process is killed. The guardian guarantees:

- Status 0 means that the server was asked to end, and that every client got its answer or an error.
- Every process ends as soon as its parent ends (`die_with_parent`); the guardian ends the others.
- Before the server listens, SIGTERM ends it within seconds, with status 143.

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
"""The directory of one run; set in every process that has a guardian."""
_LISTENS = "listens"
_FAILURE = "failure"
_GUARDED = ("serve", "batch")
_ERROR = "foldserve {}: error: {}"  # as argparse begins it
_LOADING_S = 3.0  # for a server that is not listening yet to end by itself
_ENDS_WITHIN_S = 30.0  # after a drain: to cut off answers and to end vLLM's engines
_LEFT_S = 2.0  # for processes that the server leaves behind to end by themselves
_LONGEST_FOR_SOCKETS = 107 - len("/00000000-0000-0000-0000-000000000000")
"""Longest path of a directory in which vLLM can bind its Unix sockets."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ASKS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def is_guarded() -> bool:
    return _RUN_DIR in os.environ


def run_dir() -> str | None:
    """A directory for this run's files, removed by the guardian; None without one."""
    return os.environ.get(_RUN_DIR)


def die_with_parent() -> None:
    """Ends this process with its parent, if it has a guardian and multiprocessing started it."""
    parent = multiprocessing.parent_process()
    if is_guarded() and parent is not None and parent.pid is not None:
        _die_with(parent.pid)


def bind_children() -> None:
    """Makes processes that vLLM starts from this one end with it, where no guardian does."""
    os.environ.setdefault(_RUN_DIR, mkdtemp(prefix="foldserve-"))


def is_wanted(arguments: Sequence[str]) -> bool:
    """Whether a process with these arguments should guard a server or a batch instead of being one."""
    asks_for_help = any(argument == "-h" or argument.startswith("--help") for argument in arguments)
    return bool(arguments) and arguments[0] in _GUARDED and not asks_for_help and not is_guarded()


def report_listening(drain_s: float) -> None:
    """Tells the guardian that SIGTERM now means a drain. It kills the server `drain_s` + `_ENDS_WITHIN_S` later."""
    if is_guarded():
        Path(os.environ[_RUN_DIR], _LISTENS).write_text(str(drain_s))


def is_listening() -> bool:
    """Whether a server of this run has begun to listen."""
    return is_guarded() and Path(os.environ[_RUN_DIR], _LISTENS).exists()


def report_failure(reason: str) -> bool:
    """Gives the guardian the reason to print when the server ends; False if another process was first."""
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
    """Runs a server or a batch (`name`) to its end; a batch may end by itself.

    Returns:
        The exit status: 0 if it was asked to end, 128 + the signal's number if a signal ended it.
    """
    output.install()
    _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans become our children
    with TemporaryDirectory(prefix="foldserve-") as folder:
        return _GuardedProcess(command, Path(folder), name).run()


class _GuardedProcess:
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
        # A process group of its own: Ctrl-C in a terminal reaches only this process. Not a session of its own: Linux
        # gives each session its share of the cores (sched_autogroup), and on two cores answers came up to four seconds
        # late.
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
            self._deadline = time.monotonic()  # a second signal: end at once
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
    """Ends all processes that are left of the server's tree."""
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
    """Reaps adopted children; `subprocess` reaps the server."""
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
