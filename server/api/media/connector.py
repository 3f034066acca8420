"""Hands videos that the guard has loaded to vLLM, in the place of what would fetch them.

vLLM has a form of a message's part for a decoded image, but none for a decoded video: only a URL, which its media
connector fetches. The connector that is registered here knows the URLs that the guard has made up, and fetches nothing.
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from foldserve.server.api.errors import FoldserveError

_SCHEME = "foldserve-loaded:"
_loaded: dict[str, Any] = {}
"""Of requests that are being rendered: vLLM makes a connector for each, and gives it nothing of ours."""


def lend(video: Any) -> str:
    """A URL under which vLLM gets this video, until it is taken back."""
    url = _SCHEME + secrets.token_hex(16)
    _loaded[url] = video
    return url


def take_back(url: str) -> None:
    """Ends a loan; another URL than `lend` gave may come too."""
    _loaded.pop(url, None)


class LoadedMedia(MediaConnector):
    """Knows what has been lent. Everything else is refused: what a client names is loaded under the server's limits."""

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        if video_url not in _loaded:
            raise FoldserveError("a video was not loaded before its prompt was rendered")
        return _loaded[video_url]

    async def load_from_url_async(self, url: str, *_: Any, **__: Any) -> Any:
        raise FoldserveError("vLLM was to fetch something that the server has not loaded")

    def load_from_url(self, url: str, *_: Any, **__: Any) -> Any:
        raise FoldserveError("vLLM was to fetch something that the server has not loaded")


def register() -> None:
    """Takes the place of vLLM's connector, in this process; again changes nothing."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(LoadedMedia)
