"""CPU time of the HTTP protocol per request: `python -m foldserve.loadtest.micro.http_protocol`.

Compares our protocol class with uvicorn's default (httptools), in alternating blocks. The app only reads the body and
answers, so the difference is the protocol's.
"""

from __future__ import annotations

import json
import socket
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from foldserve.loadtest.micro.pairs import alternate, ratio
from foldserve.server.api.connection import HttpProtocol

_PROTOCOLS = {"ours": HttpProtocol, "httptools": HttpToolsProtocol}
_EVENT = b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","choices":[{"delta":{"content":"a"}}]}\n\n'
_HEADERS = (
    b"Host: localhost:8000\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 2.0.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Async: false\r\n"
    b"Authorization: Bearer none\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
)


def _request(path: bytes, body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (path, _HEADERS, len(body), body)


REQUESTS = {
    "a text, 48 events": _request(b"/48", b"x" * 300),
    "an image of 300 kB, one answer": _request(b"/0", b"x" * 300_000),
    "a body of 30 MB, one answer": _request(b"/0", b"x" * 30_000_000),
}


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, then sends one answer, as many events as the path says, or for /cpu the CPU seconds so far."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    answer = f"{time.process_time():.9f}".encode() if scope["path"] == "/cpu" else b"x" * 600
    events = int(scope["path"][1:]) if scope["path"] != "/cpu" else 0
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"0123456789abcdef")]
    headers += [] if events else [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(events):
        await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if events else answer})


def _serve(name: str, sock: socket.socket) -> None:
    config = uvicorn.Config(_app, log_level="critical", access_log=False, timeout_keep_alive=3600)
    config.load()
    config.http_protocol_class = _PROTOCOLS[name]
    uvloop.run(uvicorn.Server(config).serve(sockets=[sock]))  # as vLLM does


@contextmanager
def _server(name: str) -> Iterator[socket.socket]:
    """A connection to a server with the named protocol."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = get_context("spawn").Process(target=_serve, args=(name, listening), daemon=True)
        process.start()
        try:
            with socket.create_connection(listening.getsockname()) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                yield connection
        finally:
            process.terminate()
            process.join()


def _ask(connection: socket.socket, request: bytes) -> bytes:
    """Sends a request and returns the answer's body; a stream ends with an empty chunk."""
    connection.sendall(request)
    received = b""
    while True:
        head, _, body = received.partition(b"\r\n\r\n")
        if b"content-length: " in head:
            if len(body) == int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]):
                return body
        elif body.endswith(b"0\r\n\r\n"):
            return body
        piece = connection.recv(1 << 16)
        if not piece:
            raise ConnectionError("the server closed the connection")
        received += piece


def _cpu_us(connection: socket.socket, request: bytes, count: int) -> float:
    """CPU microseconds of the server per request, over `count` requests."""
    used = _request(b"/cpu", b"")
    start = float(_ask(connection, used))
    for _ in range(count):
        _ask(connection, request)
    return (float(_ask(connection, used)) - start) / count * 1e6


def measure(pairs: int, megabytes: float) -> dict[str, dict[str, object]]:
    """Microseconds per kind of request, and ours / httptools; the first pair is not counted.

    Args:
        megabytes: sent per block of 5 to 500 requests.
    """
    found: dict[str, dict[str, object]] = {}
    with ExitStack() as held:
        ours, theirs = (held.enter_context(_server(name)) for name in _PROTOCOLS)
        for name, request in REQUESTS.items():
            count = min(500, max(5, int(megabytes * 1e6 / len(request))))
            costs = alternate(
                lambda request=request, count=count: _cpu_us(ours, request, count),  # type: ignore[misc]
                lambda request=request, count=count: _cpu_us(theirs, request, count),  # type: ignore[misc]
                pairs + 1,
            )[1:]
            each = ratio(costs)
            ours_us, theirs_us = (round(median(costs_of), 1) for costs_of in zip(*costs, strict=True))
            found[name] = {"ours_us": ours_us, "httptools_us": theirs_us, "ratio": asdict(each)}
            print(f"{name}: ours {ours_us} us, httptools {theirs_us} us, {each}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--megabytes", type=float, default=150)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    found = measure(args.pairs, args.megabytes)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
