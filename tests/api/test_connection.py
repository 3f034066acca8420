"""The server's HTTP protocol over real sockets: which requests and bodies it takes, which it refuses, and when."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from foldserve.server.api import connection
from foldserve.server.api.connection import HEAD_BYTES, HttpProtocol

HOST = b"Host: x\r\n"
INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE_S = 60


class Echo:
    """An app that answers with what it got; what it saw of clients that left lies in `left`."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        self.seen.append(path)
        if path == "/slow-reader":
            await asyncio.sleep(1.5)
        body = b"" if path == "/unread" else await self._body(path, receive)
        if body is None:
            return
        if path.startswith("/long"):
            assert (await receive())["type"] == "http.disconnect"
            self.left.append(path)
            return
        names = [name.decode() for name, _ in scope["headers"]]
        answer = {"method": scope["method"], "path": path, "body": _digest(body), "headers": names}
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        status = 405 if scope["method"] == "CONNECT" else 200  # 200 would open a tunnel
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _body(self, path: str, receive: Any) -> bytes | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(path)
                return None
            body += message["body"]
            if not message["more_body"]:
                return body


class Served:
    """A server of `Echo` that speaks by `HttpProtocol`."""

    def __init__(self) -> None:
        self.app = Echo()
        config = uvicorn.Config(self.app, port=0, log_level="critical", timeout_keep_alive=75)
        config.load()
        config.http_protocol_class = HttpProtocol
        config.h11_max_incomplete_event_size = HEAD_BYTES
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        _wait(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def end(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    @contextmanager
    def connect(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            yield client

    def ask(self, *segments: bytes, answers: int | None = None) -> list[tuple[int, Any]]:
        """Sends segments, one by one; the answers, all that come before the connection ends or `answers` of them."""
        with self.connect() as client:
            with suppress(BrokenPipeError, ConnectionResetError):  # the answer says why
                for segment in segments:
                    client.sendall(segment)
                    time.sleep(0.001)
            return _read_answers(client, answers)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.end()


def _wait(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _digest(body: bytes) -> str:
    return f"{len(body)} {hashlib.sha256(body).hexdigest()}"


def _read_answers(client: socket.socket, most: int | None) -> list[tuple[int, Any]]:
    answers: list[tuple[int, Any]] = []
    with client.makefile("rb") as reader, suppress(ConnectionResetError):
        while (most is None or len(answers) < most) and (line := reader.readline()):
            status, length = int(line.split()[1]), 0
            while (header := reader.readline()) not in (b"\r\n", b""):
                name, _, value = header.decode().partition(": ")
                length = int(value) if name.lower() == "content-length" else length
            answers.append((status, json.loads(reader.read(length))))
    return answers


# ---- every byte of a body is one

OFFERS = [b"", b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"]
OFFERS += [b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"]
OFFERS += [b"Connection: upgrade\r\nUpgrade: %b\r\n" % kind for kind in (b"TLS/1.2", b"h2c, websocket", b"IRC/6.9, x")]
METHODS = (b"POST", b"PUT", b"PATCH", b"DELETE", b"GET", b"OPTIONS", b"CONNECT", b"BREW")
BODIES = st.one_of(
    st.sampled_from([INNER, INNER * 3, b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n" + INNER, b"0\r\n\r\n" + INNER]),
    st.binary(max_size=300),
    st.integers(60_000, 200_000).map(lambda size: (INNER * (size // len(INNER) + 1))[:size]),
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes, str]:
    """A request's bytes, its method, and the digest of its body."""
    method = draw(st.sampled_from(METHODS))
    body = draw(BODIES)
    head = method + (b" x:1 " if method == b"CONNECT" else b" /asked ") + b"HTTP/1.1\r\n" + HOST
    head += draw(st.sampled_from(OFFERS))
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, method, _digest(body)
    size = draw(st.integers(1, max(1, len(body)))) if len(body) < 1000 else draw(st.integers(5_000, 70_000))
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    coded = b"".join(b"%x%b\r\n%b\r\n" % (len(c), draw(st.sampled_from([b"", b";a=b"])), c) for c in chunks)
    trailer = draw(st.sampled_from([b"", b"X-Trailer: GET /inner HTTP/1.1\r\n"]))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n" + trailer + b"\r\n", method, _digest(body)


@given(st.lists(requests(), min_size=1, max_size=3), st.data())
@settings(deadline=None, max_examples=150)
def test_every_request_is_answered_once_and_has_its_whole_body(
    served: Served, sent: list[tuple[bytes, bytes, str]], data: st.DataObject
) -> None:
    stream = b"".join(request for request, _, _ in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    segments = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) if start < end]
    answers = served.ask(*segments, b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert [status for status, _ in answers] == [*(405 if m == b"CONNECT" else 200 for _, m, _ in sent), 200]
    assert [(a["method"], a["body"]) for _, a in answers] == [
        *((method.decode(), digest) for _, method, digest in sent),
        ("GET", _digest(b"")),
    ]
    assert not any("x-trailer" in answer["headers"] for _, answer in answers)


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("coded", [False, True], ids=["length", "chunked"])
def test_a_body_that_comes_long_after_its_head_is_no_request(served: Served, offer: bytes, coded: bool) -> None:
    framing = b"Transfer-Encoding: chunked\r\n" if coded else b"Content-Length: %d\r\n" % len(INNER)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER) if coded else INNER
    with served.connect() as client:
        client.sendall(b"POST /asked HTTP/1.1\r\n" + HOST + offer + framing + b"\r\n")
        time.sleep(0.1)
        client.sendall(body)
        client.sendall(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = _read_answers(client, None)
    assert [(status, answer["path"]) for status, answer in answers] == [(200, "/asked"), (200, "/last")]
    assert answers[0][1]["body"] == _digest(INNER)


@pytest.mark.parametrize("count", [500, 20_000])  # the latter are more than is read ahead
def test_every_pipelined_request_gets_its_answer(served: Served, count: int) -> None:
    assert [a["path"] for _, a in served.ask(INNER * count, answers=count)] == ["/inner"] * count


# ---- what is no request


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_request_is_told_so_in_the_form_of_all_errors(served: Served, head: bytes) -> None:
    ((status, answer),) = served.ask(head)
    assert status == 400
    assert answer["error"]["code"] == "invalid_http"
    assert answer["error"]["type"] == "invalid_request_error"
    assert "HTTP/1.1" in answer["error"]["message"]


def test_a_refusal_does_not_repeat_what_came(served: Served) -> None:
    ((_, answer),) = served.ask(b"GET / HTTP/1.1\r\nHost: x\r\nsecret-without-colon\r\n\r\n")
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize(
    "segments",
    [
        [b"POST /asked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n" + INNER],
        [b"POST /asked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc", b"X" + INNER],
    ],
)
def test_a_body_that_breaks_off_its_coding_ends_the_connection(served: Served, segments: list[bytes]) -> None:
    before = len(served.app.left)
    ((status, answer),) = served.ask(*segments)
    assert (status, answer["error"]["code"]) == (400, "invalid_http")
    _wait(lambda: len(served.app.left) == before + 1)


# ---- what is too much


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 40_000,
        b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 200_000,
        b"GET /" + b"b" * 200_000,
        b"b" * 200_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(256)) + b"\r\n",
        b"POST /left HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"e" * 200_000,
        b"POST /left HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"t: u\r\n" * 40_000,
    ],
    ids=["lines", "value", "url", "method", "count", "chunk extension", "trailers"],
)
def test_what_is_held_before_a_request_is_whole_is_bounded(served: Served, head: bytes) -> None:
    ((status, answer),) = served.ask(head)
    assert (status, answer["error"]["code"]) == (431, "headers_too_large")


def test_headers_up_to_the_bound_are_taken(served: Served) -> None:
    many = b"".join(b"a%d: b\r\n" % i for i in range(254))
    long = b"a: " + b"b" * (HEAD_BYTES - 1000) + b"\r\n"
    end = b"Connection: close\r\n\r\n"
    for headers in (many, long):
        ((status, _),) = served.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + end)
        assert status == 200


# ---- what comes too late


def test_headers_that_do_not_come_whole_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_S", 0.3)
    with served.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(4):  # bytes that come do not put it off
            time.sleep(0.1)
            client.sendall(b"a: b\r\n")
        ((status, answer),) = _read_answers(client, None)
    assert (status, answer["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("sent", [b"", b"half of "])
def test_a_body_that_stops_coming_is_refused(served: Served, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BODY_S", 0.3)
    before = len(served.app.left)
    ((status, answer),) = served.ask(b"POST /late HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + sent)
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    _wait(lambda: len(served.app.left) == before + 1)


def test_a_body_may_come_slowly(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BODY_S", 1.0)
    with served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 6\r\n\r\n")
        for _ in range(6):
            time.sleep(0.3)
            client.sendall(b"a")
        ((status, answer),) = _read_answers(client, None)
    assert (status, answer["body"]) == (200, _digest(b"aaaaaa"))


def test_a_client_is_not_blamed_while_the_server_does_not_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BODY_S", 0.3)
    body = b"x" * 8_000_000  # more than what sockets hold
    head = b"POST /slow-reader HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    ((status, answer),) = served.ask(head, body)
    assert (status, answer["body"]) == (200, _digest(body))


def test_a_body_that_nobody_reads_ends_with_the_connection(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_REST_S", 0.3)
    with served.connect() as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n")
        assert _read_answers(client, 1)[0][0] == 200
        with pytest.raises(OSError):
            for _ in range(PATIENCE_S * 10):
                client.sendall(b"x")
                time.sleep(0.1)


def test_a_short_rest_of_a_body_that_nobody_reads_costs_no_connection(served: Served) -> None:
    with served.connect() as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(INNER))
        assert _read_answers(client, 1)[0][1]["path"] == "/unread"
        client.sendall(INNER + b"GET /last HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _read_answers(client, 1)[0][1]["path"] == "/last"


# ---- who has gone


@pytest.mark.parametrize(
    ("behind", "reset"),
    [
        *itertools.product([[], [INNER], [b"", INNER], [b"", INNER, INNER], [b"", INNER * 6000]], [False, True]),
        ([b"", INNER * 15_000], True),
    ],
)
def test_a_hang_up_is_noticed_behind_whatever_was_sent(served: Served, behind: list[bytes], reset: bool) -> None:
    before, asked = len(served.app.left), len(served.app.seen)
    with served.connect() as client:
        first, *later = [b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" + b"".join(behind[:1]), *behind[1:]]
        client.sendall(first)
        _wait(lambda: len(served.app.seen) > asked)
        for segment in later:
            time.sleep(0.05)
            client.sendall(segment)
        time.sleep(0.05)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _wait(lambda: len(served.app.left) == before + 1)
    assert served.app.seen[asked:] == ["/long"]
