"""An image's orientation from EXIF or XMP, without parsing the rest of them."""

from __future__ import annotations

import re
import struct

_TAG = 0x0112
_SHORT, _LONG = 3, 4  # types of EXIF's numbers
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8, where 1 is upright; damage counts as 1. EXIF wins over XMP, as in Pillow."""
    found = _in_exif(exif)
    if found is None and (match := _IN_XMP.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _in_exif(exif: bytes) -> int | None:
    """The tag's value in the first directory, if the number stands in the entry itself."""
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "L", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHL", tiff, at)
            if tag == _TAG and number == 1 and kind in (_SHORT, _LONG):
                return int(struct.unpack_from(order + ("H" if kind == _SHORT else "L"), tiff, at + 8)[0])
    except struct.error:  # it ends early
        pass
    return None
