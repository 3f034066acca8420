"""What all images of one request may cost together, and of all requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from foldserve.server.api.errors import LimitExceeded, Unavailable
from foldserve.server.limits import Limits


@dataclass(slots=True)
class Budget:
    """Counts down over the images of one request.

    Attributes:
        limits: the bounds.
        bytes_used: size of the files so far.
        pixels_used: width x height so far, from the files' headers.
    """

    limits: Limits
    bytes_used: int = 0
    pixels_used: int = 0

    def check_file(self, size: int) -> None:
        """Refuses a file of `size` bytes, before they are read where the size is announced.

        Raises:
            LimitExceeded: too large alone, or together with the images before.
        """
        if size > self.limits.max_image_bytes:
            raise LimitExceeded(f"the image's file is larger than {self.limits.max_image_mb:g} MB: send a smaller one")
        if self.bytes_used + size > self.limits.max_media_bytes:
            raise LimitExceeded(f"the request's image files are larger than {self.limits.max_media_mb:g} MB together")

    def spend_bytes(self, size: int) -> None:
        """Counts bytes that have come.

        Raises:
            LimitExceeded: too many.
        """
        self.bytes_used += size
        if self.bytes_used > self.limits.max_media_bytes:
            raise LimitExceeded(f"the request's image files are larger than {self.limits.max_media_mb:g} MB together")

    def spend_pixels(self, width: int, height: int) -> None:
        """Checks an image's size, as its header gives it, and counts it.

        Raises:
            LimitExceeded: too small, too large, too long, or too much for one request.
        """
        limits = self.limits
        short, long = sorted((width, height))
        if short < limits.min_image_side:
            raise LimitExceeded(
                f"the image is {width}x{height}: both sides need {limits.min_image_side} pixels or more"
            )
        if long > limits.max_image_side:
            raise LimitExceeded(
                f"the image is {width}x{height}: a side may have {limits.max_image_side} pixels at most"
            )
        if long > limits.max_image_aspect * short:
            raise LimitExceeded(
                f"the image is {width}x{height}: a side may be {limits.max_image_aspect:g} times the other at most"
            )
        if width * height > limits.max_image_pixels:
            raise LimitExceeded(
                f"the image is {width}x{height}: more than {limits.max_image_megapixels:g} megapixels; make it smaller"
            )
        self.pixels_used += width * height
        if self.pixels_used > limits.max_media_pixels:
            raise LimitExceeded(
                f"the request's images have more than {limits.max_media_megapixels:g} megapixels together"
            )


class Room:
    """Pixels of all requests that one process holds in memory at once.

    Args:
        pixels: how many; no request may ask for more.
        seconds: how long a request waits for others.
    """

    def __init__(self, pixels: int, seconds: float) -> None:
        self._free = pixels
        self._seconds = seconds
        self._changed = asyncio.Condition()
        self._waiting = 0

    @asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        """Waits until there is room, and keeps it.

        Raises:
            Unavailable: there was none in time.
        """
        if self._waiting or self._free < pixels:
            await self._wait(pixels)
        else:
            self._free -= pixels
        try:
            yield
        finally:
            self._free += pixels
            if self._waiting:
                async with self._changed:
                    self._changed.notify_all()

    async def _wait(self, pixels: int) -> None:
        self._waiting += 1
        try:
            async with asyncio.timeout(self._seconds), self._changed:
                await self._changed.wait_for(lambda: self._free >= pixels)
                self._free -= pixels
        except TimeoutError as error:
            raise Unavailable("the server has too many images to prepare: try again later") from error
        finally:
            self._waiting -= 1
