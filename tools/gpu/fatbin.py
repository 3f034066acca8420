"""Keeps of a CUDA shared library only the code that one GPU can run; the rest becomes zeros, which pack to nothing.

A library holds fatbin containers: a header of 16 bytes (magic, version, header size, size of what follows) and entries,
each with a header of its own (kind, version, header size, size, compute capability) before its code. Kind 1 is PTX,
which the driver compiles for any newer GPU, kind 2 machine code for one.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")
_PTX, _MACHINE_CODE = 1, 2
_ENTRY_HEADER = range(48, 257)


class Entry(NamedTuple):
    """`code`: header and code. `capability`: 90 for 9.0."""

    kind: int
    capability: int
    code: bytes


def prune(library: bytes, capability: int) -> tuple[bytes, Counter[str]]:
    """The library, as long as it was, and how many containers kept what."""
    data, counts = bytearray(library), Counter[str]()
    place = 0
    while (place := data.find(_MAGIC, place)) >= 0:
        _, version, header, size = _CONTAINER.unpack_from(data, place)
        start, end = place + header, place + header + size
        place += len(_MAGIC)
        if version != 1 or header != _CONTAINER.size or end > len(data):
            continue  # the same four bytes by chance
        entries = list(_entries(data, start, end))
        if start + sum(len(entry.code) for entry in entries) != end:
            counts["not understood, kept"] += 1
            continue
        kept, kind = _useful(entries, capability)
        counts[kind] += 1
        code = b"".join(entry.code for entry in kept)
        struct.pack_into("<Q", data, start - 8, len(code))
        data[start:end] = code + bytes(size - len(code))
        place = end
    return bytes(data), counts


def _entries(data: bytearray, place: int, end: int) -> Iterator[Entry]:
    """Up to the first that makes no sense."""
    while place + _ENTRY_HEADER.start <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, place)
        (capability,) = struct.unpack_from("<I", data, place + 28)
        after = place + header + size
        if kind not in (_PTX, _MACHINE_CODE) or header not in _ENTRY_HEADER or after > end:
            return
        yield Entry(kind, capability, bytes(data[place:after]))
        place = after


def _useful(entries: list[Entry], capability: int) -> tuple[list[Entry], str]:
    """Machine code for this GPU, else the newest PTX that it can compile, else the smallest: there has to be one."""
    if code := [entry for entry in entries if entry.kind == _MACHINE_CODE and entry.capability == capability]:
        return code, "machine code"
    ptx = [entry for entry in entries if entry.kind == _PTX and entry.capability <= capability]
    if ptx:
        return [max(ptx, key=lambda entry: entry.capability)], "PTX"
    return sorted(entries, key=lambda entry: len(entry.code))[:1], "for other GPUs"
