"""Where the images stand in a chat's messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits.body import is_image


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one image.

    Attributes:
        parts: the message's content.
        index: of the image's part in it.
        url: http(s) or data.
        param: JSON path of the URL.
    """

    parts: list[Any]
    index: int
    url: str
    param: str

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors from inside name this image's URL as what is wrong, unless it is the server that can't."""
        try:
            yield
        except InvalidRequest as error:
            error.param = self.param
            raise

    def put(self, part: dict[str, Any]) -> None:
        """Replaces the image's part."""
        self.parts[self.index] = part


def places_of_images(messages: Sequence[Any]) -> Iterator[Place]:
    """The images of validated messages, in order; their content becomes lists, since pydantic's is a one-shot iterator.

    Raises:
        InvalidRequest: a part that no type of content fits.
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
            if isinstance(part, dict) and is_image(part):
                source = part["image_url"]
                is_object = isinstance(source, dict)
                url = source["url"] if is_object else source
                yield Place(parts, p, url, f"messages[{m}].content[{p}].image_url{'.url' if is_object else ''}")
