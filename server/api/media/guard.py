"""A chat's images: loaded under the request's budget and put into its messages, so that vLLM fetches nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.multimodal.media import ImageMediaIO

from foldserve.server.api.errors import FoldserveError, ImageUnavailable, InvalidRequest
from foldserve.server.api.media import data_url
from foldserve.server.api.media.address import Policy
from foldserve.server.api.media.budget import Budget
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.fetch import Fetcher, open_fetcher
from foldserve.server.limits import Limits


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image stands in the messages.

    Attributes:
        parts: the message's content.
        index: of the image's part.
        url: http(s) or data.
        param: JSON path of the URL.
    """

    parts: list[Any]
    index: int
    url: str
    param: str


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
        self._pool = ThreadPoolExecutor(limits.media_decode_threads, thread_name_prefix="foldserve-decode")
        options = ImageMediaIO(**{"image_mode": "RGB", **(media_io_kwargs or {}).get("image", {})})  # checks them
        self._mode: str | None = options.image_mode
        self._background: tuple[int, int, int] = options.rgba_background_color

    async def load(self, messages: Sequence[Any]) -> None:
        """Replaces every image URL in `messages` by its decoded image, in vLLM's own form of such a part.

        Raises:
            InvalidRequest: an image that can't be had or is refused; `param` names its URL.
        """
        places = list(_places(messages))
        if not places:
            return
        budget = Budget(self._limits)
        try:
            async with asyncio.timeout(self._limits.max_media_seconds), open_fetcher(self._policy, budget) as fetcher:
                images = await self._load_all(places, fetcher, budget)
        except TimeoutError as error:
            raise ImageUnavailable(
                f"the images could not be fetched and decoded within {self._limits.max_media_seconds:g} s", "messages"
            ) from error
        for place, image in zip(places, images, strict=True):
            place.parts[place.index] = {"type": "image_pil", "image_pil": image}

    async def _load_all(self, places: Sequence[_Place], fetcher: Fetcher, budget: Budget) -> list[Any]:
        try:
            async with asyncio.TaskGroup() as group:  # the first failure ends the others
                tasks = [group.create_task(self._load_one(place, fetcher, budget)) for place in places]
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _load_one(self, place: _Place, fetcher: Fetcher, budget: Budget) -> Any:
        run = asyncio.get_running_loop().run_in_executor
        try:
            if data_url.is_data_url(place.url):
                content = data_url.read(place.url, budget)
            else:
                content = await fetcher.get(place.url)
            file = await run(self._pool, ImageFile.open, content)
            budget.spend_pixels(*file.image.size)
            return await run(self._pool, file.decode, self._mode, self._background)
        except FoldserveError as error:
            error.param = place.param
            raise


def media_guard(model: ModelConfig, limits: Limits) -> MediaGuard:
    """The guard for a served model, with what vLLM's own options say about images.

    Raises:
        ValueError: an option that would be ignored.
    """
    if model.allowed_local_media_path:
        raise ValueError("--allowed-local-media-path: images are never read from the server's disk, leave it out")
    config = model.multimodal_config
    return MediaGuard(limits, model.allowed_media_domains or (), config.media_io_kwargs if config else None)


def _places(messages: Sequence[Any]) -> Iterator[_Place]:
    """The images of validated messages; their content becomes lists, since pydantic's is a one-shot iterator."""
    for m, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        try:
            parts = message["content"] = list(content)
        except ValidationError as error:
            raise InvalidRequest("a part of this message has no known form", f"messages[{m}].content") from error
        for p, part in enumerate(parts):
            if isinstance(part, dict) and "image_url" in part:
                source = part["image_url"]
                is_object = isinstance(source, dict)
                url = source["url"] if is_object else source
                yield _Place(parts, p, url, f"messages[{m}].content[{p}].image_url{'.url' if is_object else ''}")
