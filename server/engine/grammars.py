"""Structured output with slow grammars: their work leaves the engine's loop and has a time limit.

Some grammars compile fast but get slower with every token (nested repetition, ambiguous rules). vLLM advances grammars
between steps, so one slow grammar delays all requests. Here a grammar that was slow once advances in low-priority
threads, and its request skips steps until it is done. xgrammar releases the GIL meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar
from weakref import WeakSet

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

SLOW_S = 0.0005
"""A grammar is slow once an operation takes this CPU time. Ordinary operations take a tenth of it."""

TOKEN_LIMIT_S, TOTAL_LIMIT_S, WALL_LIMIT_S = 1.0, 10.0, 30.0
"""Limits after which a request is aborted: CPU time per token, CPU time per request, wall time per token."""

_THREADS = 2
_NICE = 10
_GRACE_S = 0.001
_R = TypeVar("_R")


class GrammarPool:
    def __init__(self) -> None:
        self.slow: WeakSet[PacedGrammar] = WeakSet()
        self._threads = ThreadPoolExecutor(_THREADS, "grammar", initializer=_lower_priority)

    def submit(self, work: Callable[[], _R]) -> Future[_R]:
        return self._threads.submit(work)

    def settle(self) -> None:
        """Waits briefly for work begun since the last call, most of which ends before the next step."""
        begun = [grammar.work for grammar in self.slow if grammar.is_new and grammar.work is not None]
        for grammar in self.slow:
            grammar.is_new = False
        if begun:
            wait(begun, _GRACE_S)


class PacedGrammar(StructuredOutputGrammar):
    """Measures a grammar; after its first slow operation it advances in the pool's threads.

    Attributes:
        work: result of the last token's `accept_tokens`, if it went to the pool.
        is_new: `work` began after the last `GrammarPool.settle`.
    """

    def __init__(self, grammar: StructuredOutputGrammar, pool: GrammarPool) -> None:
        self._grammar, self._pool = grammar, pool
        self.work: Future[bool] | None = None
        self.is_new = False
        self._row: torch.Tensor | None = None  # the token mask after `work`
        self._width: int | None = None
        self._spent_s = 0.0
        self._clock: tuple[int, float, float] | None = (
            None  # of the thread at work: its CPU clock, what it showed, when
        )

    @property
    def is_slow(self) -> bool:
        return self in self._pool.slow

    @property
    def is_busy(self) -> bool:
        return self.work is not None and not self.work.done()

    @property
    def has_failed(self) -> bool:
        """Whether the request has to be aborted: the grammar rejected a token or took too long."""
        if self.work is not None and self.work.done():
            return self.work.exception() is not None or not self.work.result() or self._spent_s > TOTAL_LIMIT_S
        if (clock := self._clock) is None:
            return False
        thread, before_s, began_s = clock
        spent_s = time.clock_gettime(thread) - before_s
        overdue = spent_s > TOKEN_LIMIT_S or time.monotonic() - began_s > WALL_LIMIT_S
        return overdue or self._spent_s + spent_s > TOTAL_LIMIT_S

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Whether the grammar accepts the tokens; for a slow grammar always True, and `has_failed` tells later."""
        if not self.is_slow:
            return self._timed(lambda: self._grammar.accept_tokens(request_id, tokens))
        self.work, self.is_new = self._pool.submit(lambda: self._advance(request_id, tokens)), True
        return True

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self._finish()
        self._width = bitmask.shape[1]
        if self._row is None:
            self._timed(lambda: self._grammar.fill_bitmask(bitmask, batch_index))
        else:
            bitmask[batch_index] = self._row[0]

    def is_terminated(self) -> bool:
        self._finish()
        return self._grammar.is_terminated()

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        self._finish()
        return self._grammar.validate_tokens(tokens)

    def rollback(self, num_tokens: int) -> None:
        self._finish()
        self._row = None
        self._grammar.rollback(num_tokens)

    def reset(self) -> None:
        self._finish()
        self._row = None
        self._grammar.reset()

    def _finish(self) -> None:
        if self.work is not None:
            wait([self.work])

    def _timed(self, work: Callable[[], _R]) -> _R:
        began_s = time.thread_time()
        done = work()
        if time.thread_time() - began_s > SLOW_S:
            self._pool.slow.add(self)
        return done

    def _advance(self, request_id: str, tokens: list[int]) -> bool:
        began_s = time.thread_time()
        self._clock = time.pthread_getcpuclockid(threading.get_ident()), began_s, time.monotonic()
        self._row = None
        try:
            accepted = self._grammar.accept_tokens(request_id, tokens)
            if accepted and self._width is not None and not self._grammar.is_terminated():
                row = torch.full((1, self._width), -1, dtype=torch.int32)
                self._grammar.fill_bitmask(row, 0)
                self._row = row
            return accepted
        finally:
            self._clock = None
            self._spent_s += time.thread_time() - began_s


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
