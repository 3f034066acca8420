"""Places of images and videos in a chat's messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits.body import media_of
from foldserve.server.api.limits.misplaced import URL_FIELDS
from foldserve.server.engine.family import Modality


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """The place of one image or video.

    Attributes:
        parts: the message's content.
        index: of the item's part.
        url: http(s) or data.
        param: JSON path of the URL.
    """

    modality: Modality
    parts: list[Any]
    index: int
    url: str
    param: str

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names this URL in errors of the request, and says "video" of a video, where loaders say "image"."""
        try:
            yield
        except InvalidRequest as error:
            error.param = self.param
            if self.modality == "video":
                error.code = error.code.replace("image", "video")
                error.args = (str(error).replace("an image", "a video").replace("image", "video"),)
            raise

    def put(self, part: dict[str, Any]) -> None:
        self.parts[self.index] = part


def places_of_media(messages: Sequence[Any]) -> Iterator[MediaPlace]:
    """The media of validated messages, in order; raises InvalidRequest for a part of no known type.

    Turns content into lists, since pydantic's is a one-shot iterator.
    """
    for m, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        try:
            parts = message["content"] = list(content)
        except ValidationError as error:
            raise InvalidRequest("a part of this message has no known form", f"messages[{m}].content") from error
        for p, part in enumerate(parts):
            if isinstance(part, dict) and (modality := media_of(part)) is not None:
                field = URL_FIELDS[modality]
                source = part[field]
                is_object = isinstance(source, dict)
                url = source["url"] if is_object else source
                yield MediaPlace(
                    modality, parts, p, url, f"messages[{m}].content[{p}].{field}{'.url' if is_object else ''}"
                )
