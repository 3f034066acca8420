"""Cuts archives into parts of limited size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MIB = 2**20
_SMALL = 64 * 1024
"""Least bytes of a piece: a smaller rest of a part stays empty."""


class Piece(NamedTuple):
    """Bytes [start, end) of an archive."""

    archive: str
    start: int
    end: int


def cut(sizes: Mapping[str, int], limit: int, beside: int) -> list[list[Piece]]:
    """The pieces of each part, archives in order, in as few parts as possible.

    Args:
        sizes: bytes of each archive.
        limit: most bytes of a part.
        beside: bytes of other files in every part.

    Raises:
        ValueError: no room for pieces.
    """
    room = limit - beside
    if room < _SMALL:
        raise ValueError(
            f"parts of {limit} bytes have no room: {beside} are taken in each, at least {_SMALL} are needed"
        )
    parts: list[list[Piece]] = []
    left = 0
    for archive, size in sizes.items():
        start = 0
        while start < size:
            if left < min(_SMALL, size - start):
                parts.append([])
                left = room
            end = min(start + left, size)
            parts[-1].append(Piece(archive, start, end))
            left -= end - start
            start = end
    return parts


def require_size(sizes: Mapping[str, int], limit: int) -> None:
    """Raises ValueError if a part, name -> bytes, is larger than `limit`."""
    for name, size in sizes.items():
        if size > limit:
            raise ValueError(f"{name} has {size / MIB:.2f} MiB, more than the limit of {limit / MIB:.2f} MiB")
