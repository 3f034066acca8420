"""WebP files: their parts that make pixels."""

from __future__ import annotations

import struct

from foldserve.server.api.media.orientation import orientation
from foldserve.server.api.media.stripped import Cutter, StrippedFile, check_parts

_FIRST_CHUNK = 12
_FLAGS = 20  # offset in the extended header
_METADATA_FLAGS = 0x2C  # colour profile, EXIF, XMP
_OF_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")


def strip_metadata(content: bytes) -> StrippedFile:
    """The file without colour profile, EXIF, XMP and chunks of other programs."""
    if content[_FIRST_CHUNK : _FIRST_CHUNK + 4] != b"VP8X":
        return StrippedFile(content)  # the simple format: one image, no metadata
    cutter, metadata = Cutter(content), dict[bytes, bytes]()
    chunks, at = 0, _FIRST_CHUNK
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sL", content, at)
        end = at + 8 + length + length % 2
        check_parts(chunks := chunks + 1)
        if kind not in _OF_PIXELS:
            cutter.drop(at, end)
            metadata.setdefault(kind, content[at + 8 : at + 8 + length] if kind in (b"EXIF", b"XMP ") else b"")
        at = end
    found = orientation(metadata.get(b"EXIF", b""), metadata.get(b"XMP ", b""))
    return StrippedFile(_without_flags(cutter.result()) if metadata else content, found)


def _without_flags(content: bytes) -> bytes:
    """Corrects the header of a file whose metadata was cut out: its length and flags."""
    result = bytearray(content)
    struct.pack_into("<L", result, 4, len(content) - 8)
    result[_FLAGS] &= ~_METADATA_FLAGS
    return bytes(result)
