"""PNG files: their parts that make pixels."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

from foldserve.server.api.media.orientation import orientation
from foldserve.server.api.media.stripped import Cutter, StrippedFile, check_parts

_FIRST_CHUNK = 8
_ANCILLARY = 0x20  # a bit of the first letter: a decoder that doesn't know the chunk may ignore it
_DEPTH, _COLOUR = 24, 25  # offsets in the file
_GREY, _RGB, _PALETTE = 0, 2, 3  # types of colour
_KEY_BYTES = {_GREY: range(2, 3), _RGB: range(6, 7), _PALETTE: range(1, 257)}  # decoders ignore tRNS of other lengths
_DEPTHS = (1, 2, 4, 8, 16)
_MOST_METADATA_BYTES = 1 << 20

# Texts that may tell the orientation.
_XMP = b"XML:com.adobe.xmp"
_EXIF_AS_HEX = b"Raw profile type exif"


def strip_metadata(content: bytes) -> StrippedFile:
    """The image, or an animation's first frame, without the chunks that a decoder may ignore."""
    cutter, metadata = Cutter(content), dict[bytes, bytes]()
    depth, colour = content[_DEPTH : _COLOUR + 1].ljust(2, b"\xff")
    colour_key, chunks, at, kind = None, 0, _FIRST_CHUNK, b""
    while at + 8 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">L4s", content, at)
        end = at + 12 + length
        check_parts(chunks := chunks + 1)
        if kind == b"tRNS" and length in _KEY_BYTES.get(colour, ()) and _is_sound(content, at, end):
            colour_key = _colour_key(depth, colour, content[at + 8 : end - 4])
        elif kind[0] & _ANCILLARY or (kind == b"PLTE" and colour != _PALETTE):
            cutter.drop(at, end)
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and _is_sound(content, at, end):
                _keep_metadata(metadata, kind, content[at + 8 : end - 4])
        at = end
    return StrippedFile(cutter.result(), _orientation(metadata), colour_key)


def _is_sound(content: bytes, start: int, end: int) -> bool:
    """Whether a chunk is complete and its checksum is right."""
    return end <= len(content) and zlib.crc32(content[start + 4 : end - 4]) == int.from_bytes(content[end - 4 : end])


def _colour_key(depth: int, colour: int, data: bytes) -> int | tuple[int, ...] | None:
    """The transparent colour in Pillow's scale of samples: 8 bits, but 16 for 16-bit grey."""
    if colour == _PALETTE or depth not in _DEPTHS:
        return None  # Pillow's own reading is right, or raises
    samples = [value & ((1 << depth) - 1) for value in struct.unpack(f">{len(data) // 2}H", data)]
    if colour == _GREY:
        return samples[0] if depth == 16 else samples[0] * 255 // ((1 << depth) - 1)
    return tuple(sample >> 8 if depth == 16 else sample for sample in samples)


def _keep_metadata(metadata: dict[bytes, bytes], kind: bytes, data: bytes) -> None:
    """Keeps a chunk that may tell the orientation; the last of each kind counts, as in Pillow."""
    if kind == b"eXIf":
        metadata[b"exif"] = data
        return
    key, _, value = data.partition(b"\0")
    if kind == b"tEXt" and key == b"exif":
        metadata[b"exif"] = value
    elif key in (_XMP, _EXIF_AS_HEX):
        metadata[key] = kind + value


def _orientation(metadata: dict[bytes, bytes]) -> int:
    exif = metadata.get(b"exif", b"")
    if not exif and _EXIF_AS_HEX in metadata:
        with suppress(ValueError):  # not hexadecimal
            lines = _text(metadata[_EXIF_AS_HEX]).decode("ascii").split("\n")
            exif = bytes.fromhex("".join(lines[3:]))  # after an empty line, a name and a length
    return orientation(exif, _text(metadata.get(_XMP, b"")))


def _text(chunk: bytes) -> bytes:
    """A text chunk's text, uncompressed; empty if it is damaged or too large."""
    kind, data = chunk[:4], chunk[4:]
    if kind == b"iTXt":
        compressed, data = data[:1] == b"\1", data[2:].split(b"\0", 2)[-1]
    else:
        compressed, data = kind == b"zTXt", data[kind == b"zTXt" :]
    if not compressed:
        return data[:_MOST_METADATA_BYTES]
    try:
        return zlib.decompressobj().decompress(data, _MOST_METADATA_BYTES)
    except zlib.error:
        return b""
