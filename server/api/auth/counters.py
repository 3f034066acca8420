"""Counters that all API processes of a server share, as a storage of the `limits` library."""

from __future__ import annotations

import ctypes
import hashlib
import math
import multiprocessing
import time
from collections.abc import Callable

from limits.storage import Storage

_SLOTS = 4096


class _Slot(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint64), ("count", ctypes.c_int64), ("expires", ctypes.c_double))


class SharedCounters(Storage):
    """Named counters in memory that processes inherit when they are spawned: pass the object among their arguments.

    `limits` itself offers only memory of one process, or a server such as Redis. A slot is free once it has expired.
    `clock` must be the same in all processes.
    """

    STORAGE_SCHEME = None  # made by hand, not by a URL
    base_exceptions = OverflowError

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._lock = context.Lock()
        self._slots = context.RawArray(_Slot, _SLOTS)
        self._clock = clock

    def take(self, name: str, most: int, number: int = 1) -> bool:
        """Adds to a counter that does not expire, unless that would bring it above `most`."""
        with self._lock:
            slot = self._slot(name)
            if slot.count + number > most:
                return False
            slot.count += number
            slot.expires = math.inf
            return True

    def give(self, name: str, number: int = 1) -> None:
        """Undoes a `take`."""
        with self._lock:
            slot = self._slot(name)
            slot.count -= number
            if slot.count == 0:
                slot.expires = 0

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        with self._lock:
            slot = self._slot(key)
            if slot.count == 0:
                slot.expires = self._clock() + expiry
            slot.count += amount
            return int(slot.count)

    def get(self, key: str) -> int:
        with self._lock:
            return int(self._slot(key).count)

    def get_expiry(self, key: str) -> float:
        with self._lock:
            return float(self._slot(key).expires)

    def clear(self, key: str) -> None:
        with self._lock:
            slot = self._slot(key)
            slot.count, slot.expires = 0, 0

    def reset(self) -> int | None:
        with self._lock:
            ctypes.memset(ctypes.byref(self._slots), 0, ctypes.sizeof(self._slots))
        return None

    def check(self) -> bool:
        return True

    def _slot(self, name: str) -> _Slot:
        """The slot of a name, by linear probing; the caller holds the lock. Raises OverflowError if none is free."""
        wanted = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) or 1
        now = self._clock()
        free = None
        for step in range(_SLOTS):
            slot: _Slot = self._slots[(wanted + step) % _SLOTS]
            if slot.name == wanted and slot.expires > now:
                return slot
            if free is None and slot.expires <= now:
                free = slot
            if slot.name == 0:
                break
        if free is None:
            raise OverflowError(f"more than {_SLOTS} counters are in use")
        free.name, free.count, free.expires = wanted, 0, 0
        return free
