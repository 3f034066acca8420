"""Values that a model runner derives from each of its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerRequest(Generic[T]):
    """One lazily made value per request state; values of finished requests are dropped from time to time."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._known: dict[str, tuple[object, T]] = {}

    def of(self, states: Mapping[str, object], request_id: str) -> T:
        """The value of `states[request_id]`."""
        state = states[request_id]
        entry = self._known.get(request_id)
        if entry is None or entry[0] is not state:  # new, or another request under an old id
            if len(self._known) > 2 * len(states):
                self._known = {i: known for i, known in self._known.items() if states.get(i) is known[0]}
            entry = self._known[request_id] = state, self._make(state)
        return entry[1]
