"""Gives vLLM the videos that the guard has loaded, through a media connector that fetches nothing.

vLLM takes a decoded image as part of a message, but a video only as a URL for its media connector. The connector
registered here knows the URLs that the guard makes up.
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from foldserve.server.api.errors import FoldserveError

_SCHEME = "foldserve-loaded:"
_loaded: dict[str, Any] = {}
"""Of requests that are being rendered. A global, since vLLM makes a connector for each and gives it nothing of ours."""


def lend(video: Any) -> str:
    """A URL under which vLLM gets this video, until `take_back`."""
    url = _SCHEME + secrets.token_hex(16)
    _loaded[url] = video
    return url


def take_back(url: str) -> None:
    """Ends a loan; ignores URLs that `lend` did not give."""
    _loaded.pop(url, None)


class LoadedMedia(MediaConnector):
    """Serves lent videos and refuses everything else, since media of clients are loaded under the server's limits."""

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        if video_url not in _loaded:
            raise FoldserveError("a video was not loaded before its prompt was rendered")
        return _loaded[video_url]

    async def load_from_url_async(self, url: str, *_: Any, **__: Any) -> Any:
        raise FoldserveError("vLLM was to fetch something that the server has not loaded")

    def load_from_url(self, url: str, *_: Any, **__: Any) -> Any:
        raise FoldserveError("vLLM was to fetch something that the server has not loaded")


def register() -> None:
    """Replaces vLLM's connector in this process. Idempotent."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(LoadedMedia)
