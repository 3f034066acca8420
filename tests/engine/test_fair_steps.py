"""Separate steps for keys with light load: as many as they need to keep up, and none if full steps are short."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.engine.fair_steps import ALLOWED, FairSteps

Running = Counter[Any]


@dataclass
class Engine:
    """Carries out steps that take as long as is said, the next one planned while one runs."""

    own_s: float
    full_s: float
    ahead: int = 1
    now: float = 0.0
    kinds: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = FairSteps(lambda: self.now)
        self._queue = deque[tuple[object, float]]()

    def step(
        self, running: Running, waiting: tuple[str, ...] = (), computes: bool = True, decodes: bool = True
    ) -> bool:
        light = self.steps.light_keys(running, waiting)
        own = light is not None
        output = object()
        self.steps.note_planned(output, own=own, computes=computes, decodes=decodes)
        self._queue.append((output, self.own_s if own else self.full_s))
        while len(self._queue) > self.ahead:
            output, took = self._queue.popleft()
            self.now += took
            self.steps.note_results(output)
        self.kinds.append(own)
        return own


def shares(engine: Engine, running: Running, steps: int = 2000) -> tuple[float, float]:
    """Time of a light key's step, in steps of its own, and the share of the time that those take."""
    for _ in range(steps):
        engine.step(running)
    own = sum(engine.kinds) * engine.own_s
    return engine.now / steps / engine.own_s, own / engine.now


@pytest.mark.parametrize("ahead", [0, 1, 3])
@given(own_ms=st.floats(1, 50), factor=st.floats(1, 100))
def test_light_keys_keep_up(ahead: int, own_ms: float, factor: float) -> None:
    times, share = shares(Engine(own_ms / 1e3, own_ms / 1e3 * factor, ahead), Running({"alice": 100, "bob": 1}))
    assert times <= max(1, min(ALLOWED, factor)) * 1.02 + 0.1
    assert share <= 0.5 * 1.02 + 0.01


@pytest.mark.parametrize("running", [Running(alice=9, bob=1), Running(alice=40, carol=2, bob=1)])
def test_nothing_is_spent_where_full_steps_are_short(running: Running) -> None:
    engine = Engine(own_s=0.010, full_s=0.010 * ALLOWED * 0.95)
    _, share = shares(engine, running)
    assert 0 < share < 0.01, "only to look how long they take"


@pytest.mark.parametrize(
    "running",
    [Running(alice=50), Running({None: 50}), Running(alice=5, bob=5), Running({"alice": 5, None: 5}), Running()],
    ids=str,
)
def test_nobody_is_light(running: Running) -> None:
    engine = Engine(0.001, 1.0)
    assert not any(engine.step(running) for _ in range(50))


@pytest.mark.parametrize(
    ("running", "waiting", "light"),
    [
        (Running(alice=9, bob=1), (), ["bob"]),
        (Running(alice=9, bob=1, carol=2), (), ["bob", "carol"]),
        (Running(alice=9, bob=8, carol=1), (), ["carol"]),
        (Running({"alice": 9, None: 1}), (), [None]),
        (Running(alice=9), ("bob",), ["bob"]),
        (Running(alice=9), ("alice",), None),
        (Running(), ("alice", "bob"), None),
    ],
    ids=str,
)
def test_who_is_light(running: Running, waiting: tuple[str, ...], light: list[str | None] | None) -> None:
    assert FairSteps().light_keys(running, waiting) == (None if light is None else set(light))


def test_a_light_key_that_comes_waits_for_a_step() -> None:
    engine = Engine(0.010, 0.200, ahead=0)
    for _ in range(300):
        engine.step(Running(alice=100))
    engine.step(Running(alice=100), ("bob",))
    assert engine.step(Running(alice=100, bob=1)) or engine.step(Running(alice=100, bob=1))


def test_a_light_key_that_has_nothing_to_compute_holds_nobody_up() -> None:
    """It waits for a grammar: a step of its own would be none, again and again."""
    engine = Engine(0.010, 0.200, ahead=0)
    running: Running = Running(alice=9)
    kinds = []
    for _ in range(40):
        own = engine.steps.light_keys(running, ["bob"]) is not None
        kinds.append(engine.step(running, ("bob",), computes=not own))
    assert any(kinds)
    assert not any(first and second for first, second in pairwise(kinds))


def test_prompts_say_nothing_about_the_steps_to_come() -> None:
    """A step of its own with a long prompt takes long; the answer's steps don't."""
    engine = Engine(0.600, 0.120, ahead=0)
    assert engine.step(Running(alice=100), ("bob",), decodes=False)
    engine.own_s = 0.010
    times, _ = shares(engine, Running(alice=100, bob=1))
    assert times <= ALLOWED * 1.1


def test_fewer_light_requests_are_looked_at_anew() -> None:
    engine = Engine(0.080, 0.120, ahead=0)
    running = Running(alice=100, bob=40)
    for _ in range(20):
        engine.step(running)
    engine.own_s = 0.010
    engine.kinds.clear()
    assert any(engine.step(Running(alice=100, bob=1)) for _ in range(3))


@given(st.lists(st.sampled_from(["alice", "bob", "none", "both"]), max_size=60), st.integers(0, 3))
def test_any_order_of_events(events: list[str], ahead: int) -> None:
    """Steps that were planned may end late, or never: an engine that pauses drops them."""
    engine = Engine(0.010, 0.050, ahead)
    running: dict[str, Callable[[], Running]] = {
        "alice": lambda: Running(alice=7),
        "bob": lambda: Running(bob=1),
        "none": Running,
        "both": lambda: Running(alice=7, bob=1),
    }
    for event in events:
        own = engine.step(running[event]())
        engine.steps.note_results(object())
        assert not own or event == "both"
