"""A chat's images: loaded under the request's budget and put into its messages, so that vLLM fetches nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from vllm.config import ModelConfig
from vllm.multimodal.media import ImageMediaIO

from foldserve.server.api.errors import ImageUnavailable
from foldserve.server.api.media import data_url
from foldserve.server.api.media.address import Policy
from foldserve.server.api.media.budget import Budget, Room, Share
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.fetch import Fetcher, open_fetcher
from foldserve.server.api.media.places import Place, places_of_images
from foldserve.server.limits import Limits

_T = TypeVar("_T")
_NO_IMAGE = {"type": "image_url", "image_url": {"url": ""}}


class MediaGuard:
    """Loads images for all requests of a process.

    Args:
        limits: bounds of one request.
        domains: the only hosts that images may come from, vLLM's `--allowed-media-domains`; empty for all.
        media_io_kwargs: vLLM's `--media-io-kwargs`, of which `image` counts.
    """

    def __init__(
        self, limits: Limits, domains: Sequence[str] = (), media_io_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._limits = limits
        self._policy = Policy(frozenset(domains), frozenset(limits.allow_media_private_host))
        self._room = Room(limits.max_prepared_pixels, limits.max_media_seconds)
        self._pool = ThreadPoolExecutor(limits.media_decode_threads, thread_name_prefix="foldserve-decode")
        options = ImageMediaIO(**{"image_mode": "RGB", **(media_io_kwargs or {}).get("image", {})})  # checks them
        self._mode: str | None = options.image_mode
        self._background: tuple[int, int, int] = options.rgba_background_color

    @asynccontextmanager
    async def loaded(self, messages: Sequence[Any]) -> AsyncIterator[None]:
        """While it is entered, every image URL in `messages` is a decoded image, in vLLM's own form of such a part.

        After that an empty URL stands there: pixels are not kept while the answer is generated.

        Raises:
            InvalidRequest: an image that can't be had or is refused; `param` names its URL.
            Unavailable: the images of other requests leave no room.
        """
        places = list(places_of_images(messages))
        async with self._room.share() as share:
            try:
                for place, image in zip(places, await self._load_all(places, share), strict=True):
                    place.put({"type": "image_pil", "image_pil": image})
                yield
            finally:
                for place in places:
                    place.put(_NO_IMAGE)

    async def _load_all(self, places: Sequence[Place], share: Share) -> list[Any]:
        """All of them, before one is put into the messages: a refusal leaves no pixels there."""
        if not places:
            return []
        budget = Budget(self._limits)
        if len(places) == 1:
            return [await self._load_one(places[0], budget, share)]
        files = await self._open_all(places, budget)
        await share.take(budget.pixels_used)
        async with self._in_time("decoded"):
            return await _all([self._decode(place, file) for place, file in zip(places, files, strict=True)])

    async def _load_one(self, place: Place, budget: Budget, share: Share) -> Any:
        """The usual one image, in one visit to a thread where there is room: each visit costs 0.1 ms."""
        content = None
        if not data_url.is_data_url(place.url):
            async with self._in_time("fetched"), open_fetcher(self._policy, budget) as fetcher:
                with place.named():
                    content = await fetcher.get(place.url)
        async with self._in_time("decoded"):
            with place.named():
                loaded = await self._run(self._load_here, place.url, content, budget, share)
        if not isinstance(loaded, ImageFile):
            return loaded
        await share.take(budget.pixels_used)
        async with self._in_time("decoded"):
            return await self._decode(place, loaded)

    def _open_here(self, url: str, content: bytes | None, budget: Budget) -> ImageFile:
        return budget.admit(ImageFile.open(data_url.read(url, budget) if content is None else content))

    def _load_here(self, url: str, content: bytes | None, budget: Budget, share: Share) -> Any:
        """The image; or its file where there is no room for the pixels yet."""
        file = self._open_here(url, content, budget)
        return file.decode(self._mode, self._background) if share.take_now(budget.pixels_used) else file

    async def _open_all(self, places: Sequence[Place], budget: Budget) -> list[ImageFile]:
        async with self._in_time("fetched"), AsyncExitStack() as held:
            fetcher = None
            if not all(data_url.is_data_url(place.url) for place in places):
                fetcher = await held.enter_async_context(open_fetcher(self._policy, budget))
            return await _all([self._open(place, fetcher, budget) for place in places])

    async def _open(self, place: Place, fetcher: Fetcher | None, budget: Budget) -> ImageFile:
        with place.named():
            content = None
            if fetcher is not None and not data_url.is_data_url(place.url):
                content = await fetcher.get(place.url)
            file: ImageFile = await self._run(self._open_here, place.url, content, budget)
            return file

    async def _decode(self, place: Place, file: ImageFile) -> Any:
        with place.named():
            return await self._run(file.decode, self._mode, self._background)

    @asynccontextmanager
    async def _in_time(self, what: str) -> AsyncIterator[None]:
        """Bounds the seconds that all images of a request may take for one thing."""
        seconds = self._limits.max_media_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise ImageUnavailable(f"the images could not be {what} within {seconds:g} s", "messages") from error

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


async def _all(tasks: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results in order; the first failure ends the other tasks, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None
    return [task.result() for task in running]


def media_guard(model: ModelConfig, limits: Limits) -> MediaGuard:
    """The guard for a served model, with what vLLM's own options say about images.

    Raises:
        ValueError: an option that would be ignored.
    """
    if model.allowed_local_media_path:
        raise ValueError("--allowed-local-media-path: images are never read from the server's disk, leave it out")
    config = model.multimodal_config
    return MediaGuard(limits, model.allowed_media_domains or (), config.media_io_kwargs if config else None)
