"""Which API keys take part in a step, so that keys with few requests are not slowed down by keys with many."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ALLOWED = 2
"""How many times longer requests of light keys may take than in steps of their own, beside a step in progress."""
_LOOK_EVERY = 256
_KEPT = 0.8


@dataclass(slots=True)
class _Step:
    output: object
    own: bool
    decodes: bool
    planned: float
    expected: float


class FairSteps:
    """Gives light keys steps of their own, as few as possible.

    A key is light if it runs no more requests than the mean of all keys. In a full step, with all requests, light keys
    fall behind by its duration minus `ALLOWED` times that of a step of their own; they catch up in steps of their own.
    These take at most half of the time, and none if full steps are hardly longer, as in decoding on a GPU.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_flight = deque[_Step]()
        self._ended = 0.0
        self._behind = 0.0
        self._own_s = self._full_s = 0.0  # duration of a step; 0: unknown
        self._next_look = 0  # full steps until the next step of light keys, which measures its duration
        self._light_running = self._looked_at = 0
        self._is_idle = False

    def light_keys(self, running: Counter[str | None], waiting: Iterable[str | None]) -> frozenset[str | None] | None:
        """Keys of the next step; None for all. Takes running requests per key, and keys with waiting requests."""
        keys = {*running, *waiting}
        light = frozenset(key for key in keys if running[key] * len(keys) <= running.total())
        if len(light) in (0, len(keys)):
            self._behind = 0
            return None
        self._light_running = sum(running[key] for key in light)
        look = self._next_look <= 0 or 2 * self._light_running <= self._looked_at
        return light if (self._behind > 0 or look) and not self._is_idle else None

    def note_planned(self, output: object, *, own: bool, computes: bool, decodes: bool) -> None:
        """Record that a step was planned.

        Args:
            output: identifies the step.
            own: it is for light keys only.
            computes: it has tokens.
            decodes: it has no prompt tokens.
        """
        self._is_idle = own and not computes  # light keys wait for something other than a step
        if not computes:
            return
        self._next_look = _LOOK_EVERY if own else self._next_look - 1
        if own:
            self._looked_at = self._light_running
        expected = self._own_s if own else self._full_s
        self._behind += self._lost(own, expected)
        self._in_flight.append(_Step(output, own, decodes, self._clock(), expected))

    def note_results(self, output: object) -> None:
        """Record that the results of a step have arrived."""
        if not self._in_flight or self._in_flight[0].output is not output:
            return
        step, now = self._in_flight.popleft(), self._clock()
        took = now - max(step.planned, self._ended)  # a step planned ahead waits for the one before it
        self._ended = now
        self._behind += self._lost(step.own, took) - self._lost(step.own, step.expected)
        if not step.own:
            self._full_s = _KEPT * self._full_s + (1 - _KEPT) * took if self._full_s else took
        elif step.decodes:  # a prompt is computed only once, so its step tells nothing about the next
            self._own_s = took

    def _lost(self, own: bool, took: float) -> float:
        """Seconds that light keys fall behind in a step; negative if they catch up."""
        return (1 - ALLOWED) * took if own else took - ALLOWED * self._own_s
