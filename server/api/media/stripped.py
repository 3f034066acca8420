"""An image file without its metadata, so that damaged or huge metadata costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from foldserve.server.api.errors import InvalidImage

MOST_PARTS = 100_000
"""Most chunks or segments of a file. One of 20 MB has 300 to 3,000; each costs a step of an interpreted loop."""


@dataclass(frozen=True, slots=True)
class StrippedFile:
    """The parts of a file that make its pixels.

    Attributes:
        content: a file of the same format.
        orientation: EXIF's, 1 to 8; 1 is upright.
        colour_key: the transparent shade or RGB colour, in the values of Pillow's decoded pixels.
        has_scans: a decoder holds the whole image before it can give a smaller one.
    """

    content: bytes
    orientation: int = 1
    colour_key: int | tuple[int, ...] | None = None
    has_scans: bool = False


def check_parts(count: int) -> None:
    """Raises InvalidImage for a file of too many parts."""
    if count > MOST_PARTS:
        raise InvalidImage(f"the image file consists of more than {MOST_PARTS} parts: save it anew")


class Cutter:
    """Copies a file except some ranges, which come in order."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._kept: list[bytes] = []
        self._start = 0

    def drop(self, start: int, end: int) -> None:
        self._kept.append(self._content[self._start : start])
        self._start = end

    def result(self) -> bytes:
        if not self._start:
            return self._content
        return b"".join([*self._kept, self._content[self._start :]])
