"""A minimal HTTP/1.1 client that can hang up anywhere; one connection per request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A complete response; a chunked `body` still holds its chunk headers."""

    status: int
    body: bytes


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is aborted at the end."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # no orderly close: the server must notice by itself


def encode(method: str, path: str, body: object = None, key: str | None = None) -> bytes:
    """The bytes of a request; a body that is bytes already is sent as it is."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


async def read_status(reader: asyncio.StreamReader) -> int:
    """Reads a response's head and returns its status; ConnectionError if there is no response."""
    line = await reader.readline()
    if not line:
        raise ConnectionError("the server closed the connection without an answer")
    while (await reader.readline()).strip():
        pass
    return int(line.split()[1])


async def ask(address: Address, request: bytes) -> HttpResponse:
    """Sends a request and reads the whole answer."""
    async with connect(address) as (reader, writer):
        writer.write(request)
        await writer.drain()
        return HttpResponse(await read_status(reader), await reader.read())
