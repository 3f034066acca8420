"""The state that model runners keep per request."""

from __future__ import annotations

from weakref import WeakSet

from foldserve.server.engine.per_request import PerRequest


class State:
    """Of one request."""


def test_a_value_is_made_once_per_state() -> None:
    made: list[object] = []

    def make(state: object) -> int:
        made.append(state)
        return len(made)

    values = PerRequest(make)
    states: dict[str, object] = {"a": State(), "b": State()}
    assert [values.of(states, i) for i in "abab"] == [1, 2, 1, 2]
    states["a"] = State()
    assert [values.of(states, i) for i in "ab"] == [3, 2], "another request under an old id"
    assert made == [made[0], states["b"], states["a"]]


def test_requests_that_are_gone_are_forgotten() -> None:
    values = PerRequest(id)
    states: WeakSet[State] = WeakSet()
    for i in range(100):
        state = State()
        states.add(state)
        values.of({str(i): state}, str(i))
    assert len(states) <= 3
