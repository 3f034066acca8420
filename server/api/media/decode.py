"""Decodes image files of the web's formats to RGB pixels, as vLLM would."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import ExifTags, Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile as PillowFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from vllm.multimodal.image import normalize_image
from vllm.multimodal.media import MediaWithBytes

from foldserve.server.api.errors import InvalidImage, LimitExceeded
from foldserve.server.api.media import jpeg, png, webp
from foldserve.server.api.media.convert import Colour, converted
from foldserve.server.api.media.stripped import StrippedFile

_BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # bytes a pixel in Pillow's memory; 4 in all others
_WEBP_CANVAS_BYTES = 16  # two canvases, the frame, and what lossless decoding needs
_JPEG_SCALES = (2, 4, 8)  # libjpeg decodes at these fractions of the size, for less memory and time


@dataclass(frozen=True, slots=True)
class _Format:
    """A format of the web: its first bytes, its part that makes pixels, and its decoder."""

    magic: bytes
    strip_metadata: Callable[[bytes], StrippedFile]
    reader: Callable[[io.BytesIO], PillowFile]


_FORMATS = (
    _Format(b"\xff\xd8\xff", jpeg.strip_metadata, JpegImageFile),
    _Format(b"\x89PNG\r\n\x1a\n", png.strip_metadata, PngImageFile),
    _Format(b"RIFF", webp.strip_metadata, WebPImageFile),
    _Format(b"GIF87a", StrippedFile, GifImageFile),
    _Format(b"GIF89a", StrippedFile, GifImageFile),
)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file whose header has been read.

    Attributes:
        stripped: the part of `content` that makes pixels.
        image: not decoded yet.
        size: width and height in the header.
        largest: size to which the decoded image is scaled down; None: not scaled.
    """

    content: bytes
    stripped: StrippedFile
    image: PillowFile
    size: tuple[int, int]
    largest: tuple[int, int] | None = None

    @classmethod
    def open(cls, content: bytes) -> ImageFile:
        """Reads the header.

        Raises:
            InvalidImage: another format, or damaged.
            LimitExceeded: more pixels than Pillow finds safe.
        """
        format = next((format for format in _FORMATS if content.startswith(format.magic)), None)
        if format is None:
            raise InvalidImage("the file is no JPEG, PNG, WebP or GIF image")
        stripped = format.strip_metadata(content)
        try:
            image = format.reader(io.BytesIO(stripped.content))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise LimitExceeded("the image has too many pixels to be decoded safely; make it smaller") from error
        except Exception as error:  # Pillow's readers raise whatever the damage leads to
            raise _damaged() from error
        if stripped.colour_key is not None:
            image.info["transparency"] = stripped.colour_key
        return cls(content, stripped, image, image.size)

    @property
    def decoded_pixels(self) -> int:
        """Pixels that a decoder holds at once."""
        width, height = self.size if self.stripped.has_scans else self.image.size
        return width * height

    @property
    def decoding_bytes(self) -> int:
        """Peak memory, while both the result and its source exist."""
        width, height = self.image.size
        source = _BYTES_OF_MODE.get(self.image.mode, 4)
        beside = _WEBP_CANVAS_BYTES if isinstance(self.image, WebPImageFile) else 0
        is_converted = self.image.mode != "RGB" or "transparency" in self.image.info
        copies = is_converted + (self.stripped.orientation != 1)
        decoding = width * height * (source + max(beside, 4 * (copies + (self.largest is not None))))
        if isinstance(self.image, JpegImageFile) and self.stripped.has_scans:  # two bytes a coefficient
            decoding = max(decoding, width * height * source + 2 * self.image.layers * self.decoded_pixels)
        return decoding

    def scaled(self, width: int, height: int) -> ImageFile:
        """The same file, decoded to at most this size; a JPEG, if possible, without ever holding a larger one."""
        if isinstance(self.image, JpegImageFile):
            full = self.size
            fitting = (s for s in _JPEG_SCALES if -(-full[0] // s) <= width and -(-full[1] // s) <= height)
            scale = next(fitting, _JPEG_SCALES[-1])
            self.image.draft(None, (max(1, full[0] // scale), max(1, full[1] // scale)))
        return replace(self, largest=(width, height))

    def decode(self, mode: str | None = "RGB", background: Colour = (255, 255, 255)) -> Any:
        """The upright pixels of the first frame, in vLLM's wrapper, which identifies them by the file.

        Args:
            mode: Pillow's; None keeps the file's own.
            background: RGB colour behind transparent pixels.

        Raises:
            InvalidImage: damaged.
        """
        try:
            self.image.load()
            own = (
                self.image.copy() if isinstance(self.image, WebPImageFile) else self.image
            )  # whose file holds canvases
            image = converted(own, mode, background)
            settings: dict[str, Any] = {}
            if image is not own:
                settings = {"image_mode": mode, "rgba_background_color": background}
            if self.largest is not None:
                settings["largest"] = self.largest
                image = _shrink(image, *self.largest)
            return MediaWithBytes(self._upright(image), self.content, settings or None)
        except Exception as error:  # as above, MemoryError included
            raise _damaged() from error

    def _upright(self, image: Image.Image) -> Image.Image:
        if self.stripped.orientation == 1:
            return image
        image.getexif()[ExifTags.Base.Orientation] = self.stripped.orientation
        return normalize_image(image)


def _shrink(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.width <= width and image.height <= height:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _damaged() -> InvalidImage:
    return InvalidImage("the image file is damaged or cut short")
