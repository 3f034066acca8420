"""Values of `Content-Encoding` that compress, for request bodies and for fetched images."""

from __future__ import annotations

from collections.abc import Iterable

_COMPRESSIONS = frozenset({"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"})


def compression(values: Iterable[str]) -> str | None:
    """The first coding in the header's values that compresses.

    Object stores send others, such as `aws-chunked` or `utf-8`, which say nothing about the bytes.
    """
    codings = (coding.strip().lower() for coding in ",".join(values).split(","))
    return next((coding for coding in codings if coding in _COMPRESSIONS), None)
