"""Reads the `file:` URLs of a batch, under one folder of the operator's, and passes them on as `data:` URLs.

Limits and decoding then treat them like images that come over HTTP, where files are never read.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pybase64

from foldserve.server.api.errors import ImageUnavailable, LimitExceeded, RefusedUrl
from foldserve.server.api.limits.body import media_of
from foldserve.server.api.limits.misplaced import URL_FIELDS
from foldserve.server.engine.family import Modality
from foldserve.server.limits import Limits

_SCHEME = "file:"
_TYPES: dict[Modality, str] = {"image": "image/jpeg", "video": "video/mp4"}
"""If the name does not tell; decoding goes by the content."""


class LocalFiles:
    """Reads the image and video files of a chat; raises ValueError if there is no such folder.

    `folder` is an absolute path. Only files below it are read, after links are resolved.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        if not folder.is_absolute() or not folder.is_dir():
            raise ValueError(f"--allowed-local-media-path must be the absolute path of a directory, not {folder}")
        self._folder = folder.resolve()
        self._most: dict[Modality, int] = {"image": limits.max_image_bytes, "video": limits.max_video_bytes}

    def put_into(self, body: dict[str, Any]) -> None:
        """Replaces each `file:` URL in the messages of a chat that is not validated yet.

        Raises InvalidRequest if a file can't be read; `param` names its URL.
        """
        for holder, field, modality, param in _urls(body):
            if holder[field].startswith(_SCHEME):
                holder[field] = self._read(holder[field], modality, param)

    def _read(self, url: str, modality: Modality, param: str) -> str:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise RefusedUrl("a file's URL must have the form file:///FOLDER/NAME", param)
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
            if not path.is_relative_to(self._folder):
                raise RefusedUrl("this file does not lie in the folder of --allowed-local-media-path", param)
            if not path.is_file():
                raise ImageUnavailable(f"the {modality} is no file", param)
            if (size := path.stat().st_size) > (most := self._most[modality]):
                raise LimitExceeded(f"the {modality} file has {size} bytes: at most {most} are taken", param)
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # a null byte is a ValueError
            why = getattr(error, "strerror", None) or "no path"
            raise ImageUnavailable(f"the {modality} file can't be read: {why}", param) from error
        kind = mimetypes.guess_type(path.name)[0] or ""
        kind = kind if kind.startswith(modality) else _TYPES[modality]
        return f"data:{kind};base64,{pybase64.b64encode(content).decode()}"


def _urls(body: dict[str, Any]) -> Iterator[tuple[Any, str, Modality, str]]:
    """Holder, key, modality and path of each URL; leaves unknown shapes to validation."""
    messages = body.get("messages")
    for m, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for p, part in enumerate(content if isinstance(content, list) else []):
            if not isinstance(part, dict) or (modality := media_of(part)) is None:
                continue
            field = URL_FIELDS[modality]
            path = f"messages[{m}].content[{p}].{field}"
            if isinstance(part.get(field), str):
                yield part, field, modality, path
            elif isinstance(part.get(field), dict) and isinstance(part[field].get("url"), str):
                yield part[field], "url", modality, f"{path}.url"
