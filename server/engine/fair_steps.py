"""Which API keys take part in a step: those with few requests don't pay for the long steps of those with many."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ALLOWED = 2
"""Times as long as in steps of their own that requests of light keys may take, beside a step that has begun."""
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
    """Gives light keys steps of their own, no more than they need.

    A key is light while it runs no more requests than the mean of all keys. In a full step, with everybody's requests,
    those of light keys fall behind by what it takes beyond `ALLOWED` times a step of their own. They catch up in steps
    of their own. That takes half of the time at most, and nothing where full steps are not so much longer, as when
    a GPU decodes.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_flight = deque[_Step]()
        self._ended = 0.0
        self._behind = 0.0
        self._own_s = self._full_s = 0.0  # that a step takes; 0: not known
        self._next_look = 0  # after so many full steps a step of their own tells how long one takes now
        self._light_running = self._looked_at = 0
        self._is_idle = False

    def light_keys(self, running: Counter[str | None], waiting: Iterable[str | None]) -> frozenset[str | None] | None:
        """The keys that the next step is for; None for all.

        Args:
            running: requests of each key.
            waiting: keys with requests that wait.
        """
        keys = {*running, *waiting}
        light = frozenset(key for key in keys if running[key] * len(keys) <= running.total())
        if len(light) in (0, len(keys)):
            self._behind = 0
            return None
        self._light_running = sum(running[key] for key in light)
        look = self._next_look <= 0 or 2 * self._light_running <= self._looked_at
        return light if (self._behind > 0 or look) and not self._is_idle else None

    def begun(self, output: object, *, own: bool, computes: bool, decodes: bool) -> None:
        """A step was planned.

        Args:
            output: what tells it from others.
            own: it is for light keys only.
            computes: it has tokens; one without any is none.
            decodes: it has no part of a prompt.
        """
        self._is_idle = own and not computes  # light keys wait for something else than a step
        if not computes:
            return
        self._next_look = _LOOK_EVERY if own else self._next_look - 1
        if own:
            self._looked_at = self._light_running
        expected = self._own_s if own else self._full_s
        self._behind += self._lost(own, expected)
        self._in_flight.append(_Step(output, own, decodes, self._clock(), expected))

    def ended(self, output: object) -> None:
        """The results of a step are there."""
        if not self._in_flight or self._in_flight[0].output is not output:
            return
        step, now = self._in_flight.popleft(), self._clock()
        took = now - max(step.planned, self._ended)  # planned ahead, it waited for the one before
        self._ended = now
        self._behind += self._lost(step.own, took) - self._lost(step.own, step.expected)
        if not step.own:
            self._full_s = _KEPT * self._full_s + (1 - _KEPT) * took if self._full_s else took
        elif step.decodes:  # prompts come but once
            self._own_s = took

    def _lost(self, own: bool, took: float) -> float:
        """Seconds that light keys fall behind in a step."""
        return (1 - ALLOWED) * took if own else took - ALLOWED * self._own_s
