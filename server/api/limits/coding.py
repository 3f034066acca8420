"""Compressed bodies: not taken, since what they hold can't be counted while it comes, and told so."""

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
    """Refuses the values of the header `Content-Encoding` that name a compression.

    Raises:
        InvalidRequest: 400, which OpenAI's clients know, and `Accept-Encoding` as RFC 9110, 12.5.3 has it.
    """
    if (coding := compression(values)) is not None:
        raise _compressed(coding)


def check_bytes(body: bytes) -> None:
    """Refuses a body that begins as a compressed one does, whatever its header says.

    Raises:
        InvalidRequest: as above.
    """
    for first, coding in _FIRST_BYTES.items():
        if body.startswith(first):
            raise _compressed(coding)


def _compressed(coding: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body is compressed ({coding}): send it as plain JSON, without `Content-Encoding`",
        headers={"Accept-Encoding": "identity"},
    )
