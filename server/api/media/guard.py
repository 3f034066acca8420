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

    @asynccontextmanager
    async def loaded(self, messages: Sequence[Any]) -> AsyncIterator[None]:
        """While it is entered, every image URL in `messages` is a decoded image, in vLLM's own form of such a part.

        After that an empty URL stands there: pixels are not kept while an answer is generated.

        Raises:
            InvalidRequest: an image that can't be had or is refused; `param` names its URL.
            Unavailable: other requests' images take up all room.
        """
        places = list(_places(messages))
        if not places:
            yield
            return
        budget = Budget(self._limits)
        async with AsyncExitStack() as held:
            clock = asyncio.timeout(self._limits.max_media_seconds)
            try:
                async with clock:
                    files = await self._open_all(places, budget)
                    await self._take_room(held, budget)
                    images = await _all(self._decode(file) for file in files)
            except TimeoutError as error:
                raise ImageUnavailable(f"the images could not be had within {clock_s(self._limits)}", "messages") from error
            for place, image in zip(places, images, strict=True):
                place.put({"type": "image_pil", "image_pil": image})
            del images, files
            try:
                yield
            finally:
                for place in places:
                    place.put({"type": "image_url", "image_url": {"url": ""}})

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
