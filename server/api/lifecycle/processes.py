"""Watches the engine's processes from any API process: with several of those, vLLM watches only from their parent."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil
from vllm import envs


def engine_processes() -> list[int]:
    """Ids of the engines on this machine: children of this process or, with several API processes, of its parent."""
    me = psutil.Process()
    return _engines(me) or _engines(me.parent())


class EngineWatch:
    """Calls `on_end` once, in the event loop, when one of the watched processes ends; they need not be children."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._handles: list[int] = []

    def start(self, processes: Iterable[int]) -> None:
        loop = asyncio.get_running_loop()
        for process in processes:
            handle = os.pidfd_open(process)
            self._handles.append(handle)
            loop.add_reader(handle, self._ended)  # readable once the process has ended

    def stop(self) -> None:
        """Ends the watch without calling `on_end`."""
        loop = asyncio.get_running_loop()
        for handle in self._handles:
            loop.remove_reader(handle)
            os.close(handle)
        self._handles.clear()

    def kill(self) -> None:
        for handle in self._handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _ended(self) -> None:
        self.stop()
        self._on_end()


def _engines(parent: psutil.Process | None) -> list[int]:
    title = f"{envs.VLLM_PROCESS_NAME_PREFIX}::EngineCore"  # the title that vLLM sets
    return [child.pid for child in (parent.children() if parent else []) if _title(child).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""
