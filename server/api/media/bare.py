"""An image file without what makes no pixels: metadata that are damaged, or far too large, cost nothing then."""

from __future__ import annotations

from dataclasses import dataclass

from foldserve.server.api.errors import InvalidImage

MOST_PARTS = 100_000
"""Chunks or segments of a file. One of 20 MB has 300 to 3,000; each costs a step of an interpreted loop."""


@dataclass(frozen=True, slots=True)
class BareFile:
    """What of a file makes its pixels.

    Attributes:
        content: a file of the same format.
        orientation: EXIF's, 1 to 8; 1 is upright.
        colour_key: the transparent shade or RGB colour, as Pillow's decoded pixels spell it.
        has_scans: a decoder holds the whole image before it can give a smaller one.
    """

    content: bytes
    orientation: int = 1
    colour_key: int | tuple[int, ...] | None = None
    has_scans: bool = False


def check_parts(count: int) -> None:
    """Refuses a file that consists of too many.

    Raises:
        InvalidImage: it does.
    """
    if count > MOST_PARTS:
        raise InvalidImage(f"the image file consists of more than {MOST_PARTS} parts: save it anew")


class Cutter:
    """Copies a file but for some ranges, which come in order.

    Args:
        content: the file.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._kept: list[bytes] = []
        self._start = 0

    def drop(self, start: int, end: int) -> None:
        """Leaves out [start, end)."""
        self._kept.append(self._content[self._start : start])
        self._start = end

    def result(self) -> bytes:
        """The rest; the file itself if nothing was dropped."""
        if not self._start:
            return self._content
        return b"".join([*self._kept, self._content[self._start :]])
