"""Images and videos for requests, each new to every cache unless repeats are asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_VIDEO_FRAMES, _VIDEO_FPS = 32, 8
_MARK_PX = 16  # one block of chroma samples, so that JPEG keeps the mark


class Images:
    """A source of data URLs.

    Args:
        size_px: width and height of generated images.
        folder: take images from here instead, in the order of their names, over and over.
        repeat: number of different images; 0: all differ.

    Raises:
        ValueError: a folder without images.
    """

    def __init__(self, size_px: int, folder: Path | None = None, repeat: int = 0) -> None:
        self._size_px, self._repeat = size_px, repeat
        self._files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES) if folder else []
        if folder and not self._files:
            raise ValueError(f"no images in {folder}: names that end in {', '.join(sorted(_SUFFIXES))} are looked for")

    def url(self, number: int) -> str:
        """JPEG image `number`; equal numbers give equal images."""
        number = number % self._repeat if self._repeat else number
        if self._files:
            with Image.open(self._files[number % len(self._files)]) as file:
                image = file.convert("RGB")
        else:
            coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((self._size_px, self._size_px), Image.Resampling.BICUBIC)
        if not self._repeat:
            _mark(image, number)
        return data_url(image, "JPEG", quality=90)

    def video_url(self, number: int) -> str:
        """Video `number`: a generated image that moves sideways, 32 frames in four seconds."""
        number = number % self._repeat if self._repeat else number
        coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        whole = Image.fromarray(coarse).resize((2 * self._size_px, self._size_px), Image.Resampling.BICUBIC)
        steps = np.linspace(0, self._size_px, _VIDEO_FRAMES, dtype=int)
        views = (whole.crop((x, 0, x + self._size_px, self._size_px)) for x in steps)
        return f"data:video/mp4;base64,{base64.b64encode(encoded(views, self._size_px)).decode()}"


def encoded(frames: Iterable[Image.Image], side: int) -> bytes:
    """An MP4 of square frames, whose side is even."""
    import av  # by loads with videos only

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=_VIDEO_FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """The image in Pillow's format `kind`, as a URL; `options` are those of `Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mark(image: Image.Image, number: int) -> None:
    """Makes repeated images differ, by random dots in the corner."""
    dots = np.random.default_rng([1, number]).integers(0, 2, (_MARK_PX, _MARK_PX), dtype=np.uint8) * 255
    image.paste(Image.fromarray(dots).convert("RGB"), (0, 0))
