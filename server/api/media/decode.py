"""From an image file to RGB pixels, as vLLM would make them, for the formats of the web only."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from vllm.multimodal.image import convert_image_mode, normalize_image
from vllm.multimodal.media import MediaWithBytes

from foldserve.server.api.errors import InvalidImage, LimitExceeded

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_MOST_SCANS = 100
"""A progressive JPEG has about ten scans. Each one, however short, costs a pass over all pixels."""
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file whose header has been read.

    Attributes:
        content: the bytes.
        image: not decoded yet.
    """

    content: bytes
    image: Image.Image

    @classmethod
    def open(cls, content: bytes) -> ImageFile:
        """Reads the header.

        Raises:
            InvalidImage: not one of `FORMATS`, or damaged.
            LimitExceeded: more pixels than Pillow finds safe.
        """
        if content.startswith(b"\xff\xd8") and content.count(_START_OF_SCAN) > _MOST_SCANS:
            raise InvalidImage(f"the JPEG has more than {_MOST_SCANS} scans: save it as a baseline JPEG")
        try:
            return cls(content, Image.open(io.BytesIO(content), formats=FORMATS))
        except UnidentifiedImageError as error:
            raise InvalidImage("the file is no JPEG, PNG, WebP or GIF image") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise LimitExceeded("the image has too many pixels to be decoded safely; make it smaller") from error
        except Exception as error:  # Pillow's readers raise whatever the damage leads to
            raise _damaged() from error

    def decode(self, mode: str | None = "RGB", background: tuple[int, int, int] = (255, 255, 255)) -> Any:
        """The pixels of the first frame, upright, with vLLM's wrapper that gives them the identity of the file.

        Args:
            mode: Pillow's; None keeps the file's own.
            background: RGB colour behind transparent pixels.

        Raises:
            InvalidImage: damaged.
        """
        try:
            self.image.load()
            image = normalize_image(_eight_bits(self.image))
            converted = image if mode is None else convert_image_mode(image, mode, background)
        except Exception as error:  # as above, MemoryError included
            raise _damaged() from error
        settings = None if converted is image else {"image_mode": mode, "rgba_background_color": background}
        return MediaWithBytes(converted, self.content, settings)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow's own conversion clips it to white."""
    if not image.mode.startswith("I;16"):
        return image
    scaled = image.point(lambda value: value * (1 / 256)).convert("L")
    scaled.info.pop("transparency", None)  # a 16-bit value, meaningless now
    return scaled


def _damaged() -> InvalidImage:
    return InvalidImage("the image file is damaged or cut short")
