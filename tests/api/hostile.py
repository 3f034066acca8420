"""An image server that misbehaves on request, on an address other than 127.0.0.1.

The server under test may fetch from this host only: all other addresses of the machine stay refused.
"""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from tests.images import jpeg, photo

HOST = "127.0.0.2"
PHOTO = jpeg(photo(11))


class Handler(BaseHTTPRequestHandler):
    """What `GET /NAME` does is the method `do_NAME`."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    stopped: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name, _, rest = self.path[1:].partition("/")
        getattr(self, f"do_{name}")(rest)

    def do_photo(self, rest: str) -> None:
        self._answer(200, PHOTO)

    def do_text(self, rest: str) -> None:
        self._answer(200, b"<html>no image</html>")

    def do_status(self, rest: str) -> None:
        self._answer(int(rest), PHOTO)

    def do_redirect(self, rest: str) -> None:
        """To the URL in the path."""
        self._answer(302, b"", Location=rest)

    def do_location(self, rest: str) -> None:
        """To the header that the path spells in hexadecimal: any bytes."""
        self._answer(302, b"", Location=bytes.fromhex(rest).decode("latin-1"))

    def do_at(self, rest: str) -> None:
        """A photo at any path."""
        self._answer(200, PHOTO)

    def do_coded(self, rest: str) -> None:
        """Says that the photo is coded in the ways that the path spells in hexadecimal, a header a line."""
        self.send_response(200)
        for coding in bytes.fromhex(rest).decode().split("\n"):
            self.send_header("Content-Encoding", coding)
        self.send_header("Content-Length", str(len(PHOTO)))
        self.end_headers()
        self.wfile.write(PHOTO)

    def do_relative(self, rest: str) -> None:
        self._answer(307, b"", Location="/photo")

    def do_loop(self, rest: str) -> None:
        self._answer(301, b"", Location="/loop")

    def do_nowhere(self, rest: str) -> None:
        self._answer(302, b"")

    def do_empty(self, rest: str) -> None:
        self._answer(200, b"")

    def do_gzip(self, rest: str) -> None:
        self._answer(200, gzip.compress(bytes(10**7)), **{"Content-Encoding": "gzip"})

    def do_announced(self, rest: str) -> None:
        """Says that it is larger than it is; a client that believes it reads no byte."""
        self._head(200, 10**12)
        self._wait()

    def do_short(self, rest: str) -> None:
        """Breaks off."""
        self._head(200, len(PHOTO) + 1000)
        self.wfile.write(PHOTO)
        self.close_connection = True

    def do_endless(self, rest: str) -> None:
        """No length, no end."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.stopped.is_set():
            self.wfile.write(bytes(1 << 16))

    def do_drip(self, rest: str) -> None:
        """A byte now and then."""
        self._head(200, len(PHOTO))
        for byte in PHOTO:
            self.wfile.write(bytes([byte]))
            if self.stopped.wait(0.2):
                return

    def do_silent(self, rest: str) -> None:
        self._wait()

    def do_garbage(self, rest: str) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        self.close_connection = True

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, len(body), **headers)
        self.wfile.write(body)

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _wait(self) -> None:
        self.stopped.wait(60)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Clients that hang up are what these tests are about."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def hostile_server(host: str = HOST) -> Iterator[str]:
    """Its base URL, without a trailing slash."""
    Handler.stopped.clear()
    server = Server((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        Handler.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def dns_server(answers: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A DNS server that knows the IPv4 addresses of some names and says nothing about others; what it was asked."""
    asked: list[str] = []
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            query, client = server.recvfrom(512)
            if not query:
                return
            name, end = [], 12
            while query[end]:
                name.append(query[end + 1 : end + 1 + query[end]].decode())
                end += 1 + query[end]
            host, kind = ".".join(name), query[end + 1 : end + 3]
            asked.append(host)
            if host not in answers:
                continue
            is_v4 = kind == b"\0\1"
            record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(answers[host]) if is_v4 else b""
            head = query[:2] + b"\x81\x80\0\1\0" + bytes([is_v4]) + b"\0\0\0\0"
            server.sendto(head + query[12 : end + 5] + record, client)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    host, port = server.getsockname()
    try:
        yield f"{host}:{port}", asked
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", (host, port))
        thread.join()
        server.close()
