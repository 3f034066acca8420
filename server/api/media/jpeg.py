"""JPEG files: their scans, and their parts that make pixels."""

from __future__ import annotations

import re

from foldserve.server.api.errors import InvalidImage
from foldserve.server.api.media.orientation import orientation
from foldserve.server.api.media.stripped import Cutter, StrippedFile, check_parts

_MOST_SCANS = 100
"""A progressive JPEG has about ten. Each one, however short, costs a pass over all pixels."""
_MOST_EXIF_BYTES = 1 << 20

# A marker that begins a segment: no escaped byte (FF00), fill byte (FFFF), restart (FFD0-7) or TEM (FF01).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_OF_PIXELS = {_APP0: b"JFIF\0", _APP14: b"Adobe"}  # libjpeg reads from these how colours are stored


def strip_metadata(content: bytes) -> StrippedFile:
    """The file without the metadata before its first scan; raises InvalidImage for too many scans or segments.

    Only the first image is read: a video, a gain map or further images may follow it.
    """
    cutter, exif, xmp = Cutter(content), bytearray(), b""
    scans = segments = 0
    at = 2
    while (found := _MARKER.search(content, at)) and (code := content[found.start() + 1]) not in (_SOI, _EOI):
        start = found.end() + 2
        at = max(start, found.end() + int.from_bytes(content[found.end() : start]))
        check_parts(segments := segments + 1)
        if code == _SOS:
            scans += 1
            if scans > _MOST_SCANS:
                raise InvalidImage(f"the JPEG has more than {_MOST_SCANS} scans: save it as a baseline JPEG")
        elif not scans and _is_metadata(code, content, start):
            cutter.drop(found.start(), at)
            if code == _APP1 and content.startswith(_EXIF, start) and len(exif) < _MOST_EXIF_BYTES:
                exif += content[start + len(_EXIF) : at]  # may continue in the next segment
            elif code == _APP1 and content.startswith(_XMP, start):
                xmp = content[start:at]
    return StrippedFile(cutter.result(), orientation(bytes(exif), xmp), has_scans=scans > 1)


def _is_metadata(code: int, content: bytes, start: int) -> bool:
    if code in _OF_PIXELS and content.startswith(_OF_PIXELS[code], start):
        return False
    return _APP0 <= code <= _APP15 or code == _COM
