"""Converts pixels to the model's mode as vLLM does, but strip by strip, to save memory."""

from __future__ import annotations

import numpy as np
from PIL import Image
from vllm.multimodal.image import convert_image_mode

_STRIP_PIXELS = 1 << 20
Colour = tuple[int, int, int]


def converted(image: Image.Image, mode: str | None, background: Colour) -> Image.Image:
    """The image itself if there is nothing to convert.

    Args:
        mode: Pillow's; None keeps the image's own.
        background: RGB colour behind transparent pixels.
    """
    if mode is None:
        return _with_alpha(image)
    if image.mode == mode and not (mode == "RGB" and "transparency" in image.info):
        return image
    if mode != "RGB" or image.width * image.height <= _STRIP_PIXELS:
        return convert_image_mode(_with_alpha(image), mode, background)
    result = Image.new(mode, image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert_image_mode(_with_alpha(strip), mode, background), (0, top))
    return result


def _with_alpha(image: Image.Image) -> Image.Image:
    """Turns a colour key that Pillow's later steps would miss into an alpha channel.

    Scales 16-bit shades to 8 bits, which Pillow's own conversion clips to white.
    """
    key = image.info.get("transparency")
    if image.mode == "RGB" and key is not None:
        return image.convert("RGBA")
    if not image.mode.startswith("I;16"):
        return image
    scaled = image.point(lambda value: value * (1 / 256)).convert("L")
    scaled.info.pop("transparency", None)  # a 16-bit value, meaningless now
    if key is not None:
        scaled.putalpha(Image.fromarray(np.where(np.asarray(image) == key, np.uint8(0), np.uint8(255))))
    return scaled
