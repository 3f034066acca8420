"""The load of a server: a level that rises while requests wait for the KV cache, and falls slowly when they do not."""

from __future__ import annotations

MOST = 4  # the highest level
_FULL, _FREE = 0.9, 0.7  # share of the KV cache in use: full above the first, free below the second
_RISES_AFTER_S = 5.0
_FALLS_AFTER_S = 30.0
_DIP_S = 1.0
"""A full cache counts as full for so long: chats that end together free their blocks only for a step."""
_IDLE_AFTER_S = 5.0  # without a step for so long, nobody waits: all clients may have hung up


class Pressure:
    """Rises by 1 for each 5 s in which requests wait and the KV cache is full, and falls by 1 for each 30 s in which it
    is free. In between it stays, so that it does not oscillate. Times are those of `time.monotonic`.
    """

    def __init__(self) -> None:
        self._level = 0
        self._direction, self._since = -1, 0.0
        self._heard_at, self._full_at = 0.0, -_DIP_S

    def observe(self, waiting: int, kv_usage: float, now: float) -> None:
        """Takes the state after one step of the engine, which holds until the next one."""
        self._advance(now)
        self._heard_at = now
        if waiting and kv_usage > _FULL:
            self._full_at = now
        if now - self._full_at < _DIP_S:
            self._turn(1, now)
        else:
            self._turn(-1 if kv_usage < _FREE else 0, now)

    def level(self, now: float) -> int:
        """0 to `MOST`."""
        self._advance(now)
        return self._level

    def _advance(self, now: float) -> None:
        idle_from = self._heard_at + _IDLE_AFTER_S
        if now > idle_from:
            self._count(idle_from)
            self._turn(-1, idle_from)
        self._count(now)

    def _turn(self, direction: int, now: float) -> None:
        if direction != self._direction:
            self._direction, self._since = direction, now

    def _count(self, now: float) -> None:
        if self._direction == 0:
            return
        wait = _RISES_AFTER_S if self._direction > 0 else _FALLS_AFTER_S
        steps = max(0, int((now - self._since) / wait))
        self._since += steps * wait
        self._level = min(MOST, max(0, self._level + self._direction * steps))


pressure = Pressure()
"""Pressure on this server's engine; each of several API processes sees its share of the steps."""
