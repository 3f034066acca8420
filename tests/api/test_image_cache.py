"""Our record of the images that the engine holds, compared with the engine's own cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm.multimodal.cache import LruKeyReplicatedReceiverCache, MultiModalCacheMissError, MultiModalProcessorOnlyCache
from vllm.multimodal.cache.base import MultiModalProcessorCacheInItem
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange

from foldserve.server.api.image_cache import EngineCacheMirror, PendingImages, mirror_engine_cache

ROOM = 1000
SIZES = {"a": 100, "b": 100, "c": 250, "d": 300, "e": 400, "big": 600}
ITEMS = {name: MultiModalKwargsItem.dummy(size) for name, size in SIZES.items()}

Payload = list[MultiModalKwargsItem | None]


class Pair:
    """Both sides of the way to the engine."""

    def __init__(self) -> None:
        self.mirror = EngineCacheMirror(ROOM)
        model = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=ROOM / 2**30))
        self.engine = LruKeyReplicatedReceiverCache(model)

    def prepare(self, *names: str) -> tuple[PendingImages, Payload]:
        clock = self.mirror.clock
        known = self.mirror.is_cached(list(names))
        items: list[MultiModalProcessorCacheInItem] = [
            None if there else (ITEMS[name], []) for name, there in zip(names, known, strict=True)
        ]
        payload = [self.mirror.get_and_update_item(item, name)[0] for item, name in zip(items, names, strict=True)]
        return PendingImages(self.mirror, names, clock), payload

    def deliver(self, way: PendingImages, payload: Payload) -> None:
        position = PlaceholderRange(0, 1)
        specs = [
            MultiModalFeatureSpec(item, "image", name, position, name)
            for name, item in zip(way.mm_hashes, payload, strict=True)
        ]
        for name, got in zip(way.mm_hashes, self.engine.get_and_update_features(specs), strict=True):
            assert got.data is ITEMS[name]

    def ask(self, *names: str) -> list[bool]:
        """One request from end to end; which of its images had to travel."""
        way, payload = self.prepare(*names)
        self.deliver(way, payload)
        way.mark_arrived()
        return [item is not None for item in payload]


def test_an_image_travels_once() -> None:
    pair = Pair()
    assert pair.ask("a", "b") == [True, True]
    assert pair.ask("b", "a", "c") == [False, False, True]
    assert (pair.mirror.make_stats(), pair.mirror.make_stats(delta=True)) == ((2, 5), (2, 5))
    assert pair.mirror.make_stats(delta=True) == (0, 0)


def test_an_image_that_was_only_prepared_travels_again() -> None:
    pair = Pair()
    pair.prepare("a")
    assert pair.ask("a") == [True]
    assert pair.ask("a") == [False]


def test_a_request_that_the_engine_gave_up_says_nothing() -> None:
    pair = Pair()
    pair.ask("a")
    way, _ = pair.prepare("a")
    way.mark_failed()
    assert pair.ask("a") == [True]


def test_a_note_lasts_as_long_as_the_image_is_used() -> None:
    pair = Pair()
    pair.ask("a")
    assert [pair.ask("a", name)[0] for name in ("b", "c", "b", "c")] == [False] * 4
    pair.ask("big")
    assert pair.ask("a") == [True]
    assert set(pair.mirror._images) == {"a"}  # what is too old is forgotten altogether


def test_after_a_reset_everything_travels_again() -> None:
    pair = Pair()
    way, payload = pair.prepare("a")
    pair.deliver(way, payload)
    pair.engine.clear_cache()
    pair.mirror.clear_cache()
    late = pair.prepare("a")
    way.mark_arrived()  # tells of the time before
    assert pair.prepare("a")[1] == [ITEMS["a"]]
    pair.deliver(*late)


def test_the_same_image_twice_in_a_request() -> None:
    pair = Pair()
    assert pair.ask("a", "a") == [True, True]
    assert pair.ask("a", "a") == [False, False]


REQUESTS = st.tuples(
    st.lists(st.sampled_from(sorted(ITEMS)), min_size=1, max_size=3),
    st.none() | st.integers(0, 3),  # requests that are prepared before it reaches the engine, None: it never does
    st.none() | st.integers(1, 6),  # and then until it is heard of, None: it is not
)


@given(st.lists(REQUESTS, max_size=25))
@example([(["a"], None, None), (["a"], 0, 1)])
@example([([name], None if k in (2, 4, 6) else 0, 1) for k, name in enumerate("acadaeaba")])
def test_the_engine_holds_what_is_noted(requests: list[tuple[list[str], int | None, int | None]]) -> None:
    """Whatever overtakes what, short of half of the engine's room; a miss would be an error of the client's request."""
    pair = Pair()
    events: dict[int, list[Callable[[], None]]] = defaultdict(list)

    def deliver(way: PendingImages, payload: Payload, heard: int | None) -> None:
        if pair.mirror.clock - way.clock > ROOM // 2:  # it has hung for too long
            return
        pair.deliver(way, payload)
        if heard is not None:
            events[heard].append(way.mark_arrived)

    for time, (names, delay, heard) in enumerate(requests):
        if delay is not None:
            arrival = time + delay
            way, payload = pair.prepare(*names)
            events[arrival].append(partial(deliver, way, payload, None if heard is None else arrival + heard))
        else:
            pair.prepare(*names)
        for event in events.pop(time, ()):
            event()
    while events:
        for event in events.pop(min(events)):
            event()


def test_a_wrong_note_is_a_miss() -> None:
    """What all this is against; without it the test above could not fail."""
    pair = Pair()
    way, _ = pair.prepare("a")
    way.mark_arrived()  # it had not
    with pytest.raises(MultiModalCacheMissError):
        pair.ask("a")


def test_other_caches_are_left_alone() -> None:
    for cache in (None, MultiModalProcessorOnlyCache.__new__(MultiModalProcessorOnlyCache)):
        renderer = SimpleNamespace(_mm_processor_cache=cache)
        assert mirror_engine_cache(renderer) is None
        assert renderer._mm_processor_cache is cache
