"""Removes code for other GPUs from a CUDA shared library: it becomes zeros, which compress to nothing.

A library holds fatbin containers. A container has a header of 16 bytes (magic, version, header size, size of the rest)
and entries, each with its own header (kind, version, header size, size, compute capability) before its code. Kind 1 is
PTX, which the driver compiles for any newer GPU; kind 2 is machine code for one GPU.
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


class FatbinEntry(NamedTuple):
    """An entry of a container; `capability` is 90 for 9.0, `code` includes the header."""

    kind: int
    capability: int
    code: bytes


def prune(library: bytes, capability: int) -> tuple[bytes, Counter[str]]:
    """The library, of unchanged length, and the number of containers by what was kept of them."""
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


def _entries(data: bytearray, place: int, end: int) -> Iterator[FatbinEntry]:
    """The entries up to the first malformed one."""
    while place + _ENTRY_HEADER.start <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, place)
        (capability,) = struct.unpack_from("<I", data, place + 28)
        after = place + header + size
        if kind not in (_PTX, _MACHINE_CODE) or header not in _ENTRY_HEADER or after > end:
            return
        yield FatbinEntry(kind, capability, bytes(data[place:after]))
        place = after


def _useful(entries: list[FatbinEntry], capability: int) -> tuple[list[FatbinEntry], str]:
    """Machine code for this GPU, else the newest PTX that it can run, else the smallest entry: one has to stay."""
    if code := [entry for entry in entries if entry.kind == _MACHINE_CODE and entry.capability == capability]:
        return code, "machine code"
    ptx = [entry for entry in entries if entry.kind == _PTX and entry.capability <= capability]
    if ptx:
        return [max(ptx, key=lambda entry: entry.capability)], "PTX"
    return sorted(entries, key=lambda entry: len(entry.code))[:1], "for other GPUs"
