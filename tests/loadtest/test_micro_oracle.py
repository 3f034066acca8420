"""Statistics of the image oracle, from tries with known outcomes."""

from __future__ import annotations

from itertools import count

import pytest

from foldserve.loadtest.micro.image_oracle import Guess, GuesserResult, measure, render, right_share


class Caches:
    """A server in which a picture that was sent before takes a tenth of the time: for everybody, or for its sender."""

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._known: set[tuple[str, str]] = set()
        self._hits = 0

    def ask(self, name: str, url: str) -> float:
        owner = "everybody" if self._shared else name
        hit = (owner, url) in self._known
        self._known.add((owner, url))
        self._hits += hit
        return 0.1 if hit else 1.0

    def hits(self) -> float:
        return self._hits


@pytest.mark.parametrize(
    ("guesser", "shared", "finds"), [("bob", True, True), ("bob", False, False), ("alice", False, True)]
)
def test_who_finds_what(guesser: str, shared: bool, finds: bool) -> None:
    caches = Caches(shared=shared)
    tries = measure(
        lambda url: caches.ask("alice", url),
        lambda url: caches.ask(guesser, url),
        caches.hits,
        map(str, count()),
        tries=40,
        times=2,
    )
    found = GuesserResult.of(tries)
    assert sum(each.seen for each in tries) == 20
    assert (found.hits_seen, found.hits_fresh) == (20 if finds else 0, 0)
    assert (found.seen_ms, found.fresh_ms) == (100 if finds else 1000, 1000)
    assert (found.right_share == 1) == finds
    assert found.chance_within == 0.155


def test_what_is_learnt_from_a_try_is_not_used_on_it() -> None:
    """Else noise alone would be guessed well."""
    tries = [Guess(seen=number % 4 < 2, seconds=1 + number % 2, hits=0) for number in range(100)]
    assert right_share(tries) == 0.5


def test_a_row_for_each_guesser() -> None:
    tries = [Guess(seen=number % 4 < 2, seconds=0.1, hits=0) for number in range(100)]
    assert render({"Bob": GuesserResult.of(tries)}).splitlines()[2] == (
        "| Bob | 100 | 100.0 ms | 100.0 ms | 50% | 40% to 60% | 0, 0 |"
    )
