"""Which prepared images the engine holds: known from requests that reached it, not from their having been prepared.

What: replaces the renderer's notes of the engine's image cache, in a server with one API process.
Why: vLLM notes an image as held by the engine when it has been prepared; a request that ends before it reaches the
    engine (its client hangs up, its answer has no room) leaves a note that is wrong, and the next request with that
    image fails. Measured: 3 of 10,000 requests in a soak where three in ten hang up.
Upstream: vLLM 0.32 drops the wrong note after that failure, and leaves it to the client to ask again.
Remove when: vLLM notes an image as sent when it has been sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.multimodal.cache.base import (
    BaseMultiModalProcessorCache,
    MultiModalCache,
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheOutItem,
)
from vllm.multimodal.processing.processor import ResolvedPromptUpdate
from vllm.renderers import BaseRenderer
from vllm.utils.cache import CacheInfo
from vllm.utils.mem_constants import GiB_bytes


@dataclass(slots=True)
class _Note:
    prompt_updates: Sequence[ResolvedPromptUpdate]
    size: int
    prepared: int  # the clock, when a request last asked for it
    reached: int | None = None  # the clock when the last request that is known to have reached the engine was prepared


class SentImages(BaseMultiModalProcessorCache):
    """Notes of the images that the engine holds.

    The engine drops the image that it has not used for longest, once all take more than its room. The clock here counts
    the bytes of images that requests asked for, so an image used since less than that room ago is still there. Half of
    it is left for requests that overtake each other between here and the engine.

    Images are prepared by one thread. Another tells what reached the engine: it only writes `reached`.
    """

    def __init__(self, room: int) -> None:
        """`room`: of the engine's cache, bytes."""
        super().__init__()
        self.clock = 0
        self._reach = room // 2
        self._notes: dict[str, _Note] = {}  # by `prepared`, oldest first
        self._stats = CacheInfo(0, 0)
        self._told = CacheInfo(0, 0)

    def reached_engine(self, mm_hashes: Sequence[str], clock: int) -> None:
        """A request with these images has reached the engine; `clock` was read before it was prepared."""
        for mm_hash in mm_hashes:
            if (note := self._notes.get(mm_hash)) is not None and (note.reached is None or note.reached < clock):
                note.reached = clock

    def is_cached_item(self, mm_hash: str) -> bool:
        note = self._notes.get(mm_hash)
        return note is not None and note.reached is not None and self.clock - note.reached <= self._reach

    def is_cached(self, mm_hashes: list[str]) -> list[bool]:
        # Here and not below: what was found for a request has to stay until the request has it.
        while self._notes and self.clock - self._notes[oldest := next(iter(self._notes))].prepared > self._reach:
            del self._notes[oldest]
        return super().is_cached(mm_hashes)

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        note = self._notes.pop(mm_hash, None)
        if mm_item is None:
            assert note is not None, f"{mm_hash} was found a moment ago"
            note.prepared = self.clock
            out: MultiModalProcessorCacheOutItem = (None, note.prompt_updates)
        else:
            out = mm_item
            reached = None if note is None else note.reached
            note = _Note(mm_item[1], MultiModalCache.get_item_size(mm_item[0]), self.clock, reached)
        self._notes[mm_hash] = note
        self.clock += note.size
        self._stats = CacheInfo(self._stats.hits + (mm_item is None), self._stats.total + 1)
        return out

    def invalidate(self, mm_hash: str) -> None:
        if (note := self._notes.get(mm_hash)) is not None:
            note.reached = None

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Nothing: an image counts as used when the request with it has reached the engine."""

    def clear_cache(self) -> None:
        self._notes.clear()
        self.clock += self._reach + 1  # for requests that are on their way: what they bring may be gone again

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        stats = self._stats
        if not delta:
            return stats
        self._told, told = stats, self._told
        return stats - told


@dataclass(frozen=True, slots=True)
class OnItsWay:
    """A prepared request, until it is known whether it reached the engine."""

    notes: SentImages
    mm_hashes: Sequence[str]
    clock: int

    def arrived(self) -> None:
        self.notes.reached_engine(self.mm_hashes, self.clock)

    def failed(self) -> None:
        """The engine gave it up: perhaps because it did not hold the images."""
        for mm_hash in self.mm_hashes:
            self.notes.invalidate(mm_hash)


def note_sent_images(renderer: BaseRenderer) -> SentImages | None:
    """Lets the renderer use `SentImages`, to be called before the first request.

    None where the kind of cache can't err in the way described above, or there is none.
    """
    if not isinstance(renderer._mm_processor_cache, LruKeyReplicatedSenderCache):
        return None
    notes = SentImages(int(GiB_bytes * renderer.model_config.multimodal_config.mm_processor_cache_gb))
    renderer._mm_processor_cache = notes
    return notes
