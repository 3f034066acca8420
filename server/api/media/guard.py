"""Loads a chat's images and videos under the request's budget, and puts them into its messages; vLLM fetches none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

from vllm.config import ModelConfig
from vllm.multimodal.media import ImageMediaIO

from foldserve.server.api.errors import ImageUnavailable
from foldserve.server.api.limits.misplaced import URL_FIELDS
from foldserve.server.api.media import connector, data_url
from foldserve.server.api.media.address import HostPolicy
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.fair_threads import FairThreads, RequestTurn
from foldserve.server.api.media.fetch import Fetcher, open_fetcher
from foldserve.server.api.media.memory import Trimmer
from foldserve.server.api.media.names import NameLimiter, SystemResolver
from foldserve.server.api.media.pixel_memory import BYTES_PER_PIXEL, PixelMemory, is_large
from foldserve.server.api.media.places import MediaPlace, places_of_media
from foldserve.server.api.media.video import LoadedVideo, PictureList, VideoFile, VideoSource
from foldserve.server.engine.family import Modality
from foldserve.server.limits import Limits
from foldserve.server.video.decoder import VideoDecoder


class DecodedItem(NamedTuple):
    """Size and times of a decoded image or video.

    `size` is (width, height) in pixels, upright and, of a large image, after scaling down. `times` are those of a
    video's frames, in seconds since the first of the file.
    """

    size: tuple[int, int]
    times: tuple[float, ...] = ()


DecodedMedia: TypeAlias = Mapping[Modality, Sequence[DecodedItem]]
_T = TypeVar("_T")
_DECODED_PER_S, _READ_PER_S = 20e6, 200e6  # pixels and bytes, roughly, to order a queue


class MediaGuard:
    """Loads images and videos for all requests of a process.

    Args:
        domains: the only hosts to load from, vLLM's `--allowed-media-domains`; empty for all.
        media_io_kwargs: vLLM's `--media-io-kwargs`, of which `image` counts.
        processor: vLLM's single thread that processes media next.
    """

    def __init__(
        self,
        limits: Limits,
        domains: Sequence[str] = (),
        media_io_kwargs: Mapping[str, Any] | None = None,
        processor: Executor | None = None,
    ) -> None:
        self._limits = limits
        self._policy = HostPolicy(frozenset(domains), frozenset(limits.allow_media_private_host))
        trimmer = Trimmer()
        self._memory = PixelMemory(
            limits.max_prepared_pixels, limits.max_media_seconds, lambda pixels: trimmer.freed(pixels * BYTES_PER_PIXEL)
        )
        self._threads = FairThreads(limits.media_decode_threads, limits.max_media_seconds)
        self._processor = processor
        self._videos = VideoDecoder()
        self._names = NameLimiter(SystemResolver())
        options = ImageMediaIO(**{"image_mode": "RGB", **(media_io_kwargs or {}).get("image", {})})  # validates
        self._mode: str | None = options.image_mode
        self._background: tuple[int, int, int] = options.rgba_background_color

    @asynccontextmanager
    async def loaded(
        self, messages: Sequence[Any], owner: str | None = None, salt: str | None = None
    ) -> AsyncIterator[DecodedMedia]:
        """Replaces each media URL in `messages` by the decoded image or video, as long as the context is entered.

        Afterwards an empty URL stands there, so that no pixels are kept while the answer is generated.

        Args:
            owner: name of the key that asks; its images are decoded in turn with those of other owners.
            salt: becomes part of each item's identity in all caches; None keeps vLLM's identity.

        Raises:
            InvalidRequest: an item can't be loaded or is refused; `param` names its URL.
            Unavailable: other requests leave no room.
        """
        places = list(places_of_media(messages))
        async with self._memory.share() as share:
            turn = RequestTurn(share, self._limits.max_media_seconds, owner)
            items: list[Any] = []
            try:
                items = await self._load_all(places, turn)
                for place, item in zip(places, items, strict=True):
                    _put(place, item, salt)
                yield _decoded(places, items)
            except BaseException:
                if items and self._processor is not None:  # it may still be at work, and does one thing after another
                    share.hold_for(self._processor.submit(_let_go, items))
                raise
            else:
                _let_go(items)
            finally:
                for place in places:
                    _remove(place)

    async def _load_all(self, places: Sequence[MediaPlace], turn: RequestTurn) -> list[Any]:
        """Loads all before one is put into the messages, so that a refusal leaves no pixels there."""
        if not places:
            return []
        budget = MediaBudget(self._limits)
        if len(places) == 1:
            return [await self._load_one(places[0], budget, turn)]
        files = await self._open_all(places, budget, turn)
        await turn.share.take(budget.memory_pixels)
        return [await self._decode(place, files.pop(0), turn) for place in places]  # none is kept once it is decoded

    async def _load_one(self, place: MediaPlace, budget: MediaBudget, turn: RequestTurn) -> Any:
        """Loads a single image in one visit to a thread if there is room: each visit costs 0.1 ms."""
        content = None
        if not data_url.is_data_url(place.url):
            names = self._names.of_request(turn.owner)
            async with self._in_time(), open_fetcher(self._policy, budget, names) as fetcher:
                with place.named():
                    content = await fetcher.get(place.url, place.modality)
        with place.named():
            loaded = await self._run(self._load_here, turn, _reading(place, content), place, content, budget, turn)
        if not isinstance(loaded, ImageFile | VideoFile | PictureList):
            return loaded
        await turn.share.take(budget.memory_pixels)
        return await self._decode(place, loaded, turn)

    def _open_here(self, place: MediaPlace, content: bytes | None, budget: MediaBudget) -> ImageFile | VideoSource:
        if place.modality == "video" and content is None and data_url.is_pictures(place.url):
            return PictureList.open(data_url.read_pictures(place.url, budget, self._limits.video_frames), budget)
        if content is None:
            content = data_url.read(place.url, budget, place.modality)
        if place.modality == "video":
            return VideoFile.open(content, budget, self._videos)
        return budget.admit(ImageFile.open(content))

    def _load_here(self, place: MediaPlace, content: bytes | None, budget: MediaBudget, turn: RequestTurn) -> Any:
        """The pixels; or the file if it is large, or if there is no room yet."""
        file = self._open_here(place, content, budget)
        if is_large(budget.memory_pixels) or not turn.share.take_now(budget.memory_pixels):
            return file
        return file.decode(self._mode, self._background)

    async def _open_all(
        self, places: Sequence[MediaPlace], budget: MediaBudget, turn: RequestTurn
    ) -> list[ImageFile | VideoSource]:
        async with AsyncExitStack() as held:
            fetcher = None
            if not all(data_url.is_data_url(place.url) for place in places):
                names = self._names.of_request(turn.owner)
                fetcher = await held.enter_async_context(open_fetcher(self._policy, budget, names))
            async with self._in_time():
                contents = await _all([self._fetch(place, fetcher) for place in places])
        return [await self._open(place, content, budget, turn) for place, content in zip(places, contents, strict=True)]

    async def _fetch(self, place: MediaPlace, fetcher: Fetcher | None) -> bytes | None:
        if fetcher is None or data_url.is_data_url(place.url):
            return None
        with place.named():
            return await fetcher.get(place.url, place.modality)

    async def _open(
        self, place: MediaPlace, content: bytes | None, budget: MediaBudget, turn: RequestTurn
    ) -> ImageFile | VideoSource:
        with place.named():
            expected = _reading(place, content)
            file: ImageFile | VideoSource = await self._run(self._open_here, turn, expected, place, content, budget)
            return file

    async def _decode(self, place: MediaPlace, file: ImageFile | VideoSource, turn: RequestTurn) -> Any:
        with place.named():
            return await self._run(file.decode, turn, _ExpectedWork.of(file), self._mode, self._background)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Bounds the time in which all files of a request must arrive."""
        seconds = self._limits.max_media_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise ImageUnavailable(f"the images could not be fetched within {seconds:g} s", "messages") from error

    async def _run(self, function: Any, turn: RequestTurn, expected: _ExpectedWork, *args: Any) -> Any:
        return await self._threads.run(turn, expected.seconds, expected.is_large, partial(function, *args))


@dataclass(frozen=True, slots=True)
class _ExpectedWork:
    """The expected work of a job."""

    seconds: float
    is_large: bool = False

    @classmethod
    def of(cls, file: ImageFile | VideoSource) -> _ExpectedWork:
        return cls(file.decoded_pixels / _DECODED_PER_S, is_large(file.decoded_pixels))


def _reading(place: MediaPlace, content: bytes | None) -> _ExpectedWork:
    return _ExpectedWork(len(place.url if content is None else content) / _READ_PER_S)


def _decoded(places: Sequence[MediaPlace], items: Sequence[Any]) -> DecodedMedia:
    found: dict[Modality, list[DecodedItem]] = {}
    for place, item in zip(places, items, strict=True):
        if isinstance(item, LoadedVideo):
            each = DecodedItem((item.chosen.width, item.chosen.height), item.chosen.times)
        else:
            each = DecodedItem(item.media.size)
        found.setdefault(place.modality, []).append(each)
    return found


def _put(place: MediaPlace, item: Any, salt: str | None) -> None:
    """Puts a loaded item into its message, in a form that vLLM takes."""
    if isinstance(item, LoadedVideo):
        place.put({"type": "video_url", "video_url": {"url": connector.lend(item.for_vllm(salt))}})
        return
    if salt is not None:  # vLLM hashes these settings together with the file
        item.io_config = {**(item.io_config or {}), "salt": salt}
    place.put({"type": "image_pil", "image_pil": item})


def _remove(place: MediaPlace) -> None:
    """Replaces a loaded item by an empty URL."""
    field = URL_FIELDS[place.modality]
    part = place.parts[place.index]
    if place.modality == "video" and isinstance(part[field], dict):
        connector.take_back(part[field]["url"])
    place.put({"type": field, field: {"url": ""}})


def _let_go(items: Sequence[Any]) -> None:
    """Frees the pixels now: vLLM's renderer leaves images in a cycle that waits for garbage collection."""
    for item in items:
        if isinstance(item, LoadedVideo):
            item.frames.release()
        else:
            item.media.close()
            item.original_bytes = b""


async def _all(tasks: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results in order; the first failure cancels the other tasks, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None
    return [task.result() for task in running]


def media_guard(model: ModelConfig, limits: Limits, processor: Executor | None = None) -> MediaGuard:
    """The guard for a served model, with vLLM's options for images; raises ValueError for one that it would ignore."""
    if model.allowed_local_media_path:
        raise ValueError("--allowed-local-media-path: images are never read from the server's disk, leave it out")
    config = model.multimodal_config
    if config is not None and (config.media_io_kwargs or {}).get("video"):
        raise ValueError("--media-io-kwargs: of videos use --video-frames and --video-fps instead")
    connector.register()
    return MediaGuard(limits, model.allowed_media_domains or (), config.media_io_kwargs if config else None, processor)
