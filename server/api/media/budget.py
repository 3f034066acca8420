"""Limits over all images and videos of one request."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field

from foldserve.server.api import metrics
from foldserve.server.api.errors import LimitExceeded
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.pixel_memory import BYTES_PER_PIXEL
from foldserve.server.engine.family import Modality
from foldserve.server.limits import MOST_PIXELS, Limits

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class MediaBudget:
    """Counts over the images and videos of one request, which several threads read.

    `pixels_used` is width x height of images and of frames that are taken, from the files' headers.
    """

    limits: Limits
    bytes_used: int = 0
    pixels_used: int = 0
    _held_pixels: int = 0
    _decoding_pixels: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def most_bytes(self, modality: Modality) -> int:
        return self.limits.max_image_bytes if modality == "image" else self.limits.max_video_bytes

    def check_file(self, size: int, modality: Modality = "image") -> None:
        """Refuses a file of `size` bytes, before it is read if the size is announced.

        Raises LimitExceeded if it is too large, alone or together with the files before.
        """
        if size > self.most_bytes(modality):
            most = f"{self.most_bytes(modality) / 1e6:g} MB"
            raise LimitExceeded(f"the image's file is larger than {most}: send a smaller one")
        if self.bytes_used + size > self.limits.max_media_bytes:
            raise self._too_large()

    def spend_bytes(self, size: int) -> None:
        """Counts received bytes; raises LimitExceeded if there are too many."""
        with self._lock:
            self.bytes_used += size
        if self.bytes_used > self.limits.max_media_bytes:
            raise self._too_large()

    def _too_large(self) -> LimitExceeded:
        return LimitExceeded(f"the request's files are larger than {self.limits.max_media_mb:g} MB together")

    def admit_frames(self, count: int, width: int, height: int) -> None:
        """Checks a video's frames, each like an image, and counts their pixels; raises LimitExceeded as `admit`."""
        self._check_shape(width, height)
        self._count(count * width * height)
        with self._lock:
            self._held_pixels += count * width * height

    def admit(self, file: ImageFile) -> ImageFile:
        """Checks an image by its header and counts its pixels; `--oversized scale` scales a too large one down.

        Raises LimitExceeded for an image that is too small, too large, too long, or too much for one request.
        """
        if self.limits.oversized == "refuse" or self._excess(*file.size) is None:
            self.spend_pixels(*file.size)
            self._hold(file)
            return file
        self._check_shape(*file.size)
        scaled = file.scaled(*self._largest_fitting_size(*file.size))
        if scaled.decoded_pixels > self.limits.max_media_pixels or math.prod(file.size) > MOST_PIXELS:
            raise LimitExceeded(
                f"{_describe_size(*file.size)}, too many pixels to be scaled down: save it as a baseline JPEG, or "
                "smaller"
            )
        self._count(scaled.decoded_pixels)
        self._hold(scaled)
        _log.info("an image of %dx%d is scaled down to %dx%d", *file.size, *(scaled.largest or ()))
        metrics.observe_scaled()
        return scaled

    def spend_pixels(self, width: int, height: int) -> None:
        """Checks an image's size from its header, and counts it; raises LimitExceeded as `admit`."""
        self._check_shape(width, height)
        if excess := self._excess(width, height):
            raise LimitExceeded(f"{_describe_size(width, height)}: {excess}")
        self._count(width * height)

    def _check_shape(self, width: int, height: int) -> None:
        """Checks what scaling down can't mend."""
        limits = self.limits
        short, long = sorted((width, height))
        if short < limits.min_image_side:
            raise LimitExceeded(
                f"{_describe_size(width, height)}: both sides need {limits.min_image_side} pixels or more"
            )
        if long > limits.max_image_aspect * short:
            raise LimitExceeded(
                f"{_describe_size(width, height)}: a side may be {limits.max_image_aspect:g} times the other at most"
            )

    def _excess(self, width: int, height: int) -> str | None:
        """What is too large about an image, with a remedy; None if nothing is."""
        limits = self.limits
        if width * height > limits.max_image_pixels:
            return f"too many pixels, more than {limits.max_image_megapixels:g} megapixels; make it smaller"
        if max(width, height) > limits.max_image_side:
            return f"a side may have {limits.max_image_side} pixels at most"
        return None

    def _largest_fitting_size(self, width: int, height: int) -> tuple[int, int]:
        """The largest size of the same aspect within the limits."""
        limits = self.limits
        scale = min(limits.max_image_side / max(width, height), math.sqrt(limits.max_image_pixels / (width * height)))
        fitting = int(width * scale), int(height * scale)
        if min(fitting) < limits.min_image_side:
            raise LimitExceeded(f"{_describe_size(width, height)}: too long to be scaled down")
        return fitting

    @property
    def memory_pixels(self) -> int:
        """Pixels of a `PixelMemory` for all of them, decoded one after the other."""
        return self._held_pixels + self._decoding_pixels

    def _hold(self, file: ImageFile) -> None:
        held = math.prod(file.image.size)
        with self._lock:
            self._held_pixels += held
            self._decoding_pixels = max(self._decoding_pixels, file.decoding_bytes // BYTES_PER_PIXEL - held)

    def _count(self, pixels: int) -> None:
        with self._lock:
            self.pixels_used += pixels
        if self.pixels_used > self.limits.max_media_pixels:
            most = f"{self.limits.max_media_megapixels:g} megapixels"
            raise LimitExceeded(f"the request's images and frames have more than {most} together")


def _describe_size(width: int, height: int) -> str:
    return f"the image is {width}x{height}"
