"""Refuses compressed bodies, whose content can't be counted while it arrives."""

from __future__ import annotations

from collections.abc import Iterable

from foldserve.server.api.codings import compression
from foldserve.server.api.errors import InvalidRequest

_FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"x\x01": "deflate",
    b"x\x5e": "deflate",
    b"x\x9c": "deflate",
    b"x\xda": "deflate",
}


def check_header(values: Iterable[str]) -> None:
    """Raises InvalidRequest if `Content-Encoding` names a compression.

    400, which OpenAI's clients know, with `Accept-Encoding` (RFC 9110, section 12.5.3).
    """
    if (coding := compression(values)) is not None:
        raise _compressed(coding)


def check_bytes(body: bytes) -> None:
    """Refuses a body that begins like a compressed one, whatever its header says."""
    for first, coding in _FIRST_BYTES.items():
        if body.startswith(first):
            raise _compressed(coding)


def _compressed(coding: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body is compressed ({coding}): send it as plain JSON, without `Content-Encoding`",
        headers={"Accept-Encoding": "identity"},
    )
