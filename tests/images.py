"""Photo-like test images: smooth colour gradients, shapes and a little noise, different for every seed."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(20, width // 2)), int(rng.integers(20, height // 2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def page(seed: int, width: int = 320, height: int = 240, noise: int = 0) -> Image.Image:
    """Lines of something like text on white, and a grey box; `noise` darkens every pixel by up to so many levels."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 2, height // 2, width * 7 // 8, height * 7 // 8), fill=(200, 205, 210))
    for y in range(height // 8, height // 2, 20):
        for x in range(width // 8, width * int(rng.integers(3, 8)) // 8, 7):
            draw.line((x, y + int(rng.integers(8)), x + 4, y + int(rng.integers(8))), fill=(20, 20, 60))
    darker = rng.integers(0, noise + 1, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(image) - np.minimum(darker, np.asarray(image)))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()
