"""The server's HTTP/1.1: a body is never read as a request, and what a client may hold is bounded.

uvicorn's faster parser, httptools, drops a body that comes with an offer to upgrade and reads it as the next request.
It takes trailers for headers, has no bounds, and does not notice a client that hung up behind a pipelined request.
"""

from __future__ import annotations

import re
import select
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from foldserve.server.api.errors import FoldserveError, MalformedHttp, render_error

HEAD_BYTES = 64 * 1024
"""Most bytes of request line and headers, of trailers, and of a chunk's head; default of
--h11-max-incomplete-event-size.
"""
_HEAD_S = 10.0  # from the first byte of a request to the end of its headers
_BODY_S = 10.0  # between two pieces of a body
_REST_S = 5.0  # for the rest of a body that nobody reads, once its answer is sent
_LINGER_S = 2.0  # from a refusal to the close: closing at once could make the client lose the refusal
_PIPELINED_BYTES = 256 * 1024  # requests read ahead of their turn; a FIN behind more bytes goes unnoticed
_LOOK_S = 1.0  # between two checks that a client is still there, while nothing is read from it
_QUOTE = re.compile(r":? \(?b(?:ytearray\(b)?['\"]")


class Connection(h11.Connection):
    """Modifications to h11's connection:

    - the number of headers is bounded, and the version is 1.1 or 1.0;
    - `refusal` keeps the last refusal, whose status uvicorn drops.
    """

    def __init__(self, max_head_bytes: int, max_headers: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._max_headers = max_headers
        self.refusal: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check(self, request: h11.Request) -> None:
        if len(request.headers) > self._max_headers:
            raise h11.RemoteProtocolError("too many headers", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if request.http_version not in (b"1.1", b"1.0"):
            raise h11.RemoteProtocolError("another version")


class HttpProtocol(H11Protocol):
    """Modifications to uvicorn's h11 protocol:

    - an offer to upgrade is ignored (RFC 9110, section 7.8), since no other protocol is served;
    - headers and bodies must come in time, and a body that nobody reads ends the connection;
    - a hang-up is noticed behind pipelined requests too;
    - a refusal has the form of all errors, and is not lost with the connection.
    """

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        limits = config.h11_max_incomplete_event_size or HEAD_BYTES, getattr(config, "h11_max_header_count", 256)
        self.conn: Connection = Connection(*limits)
        self._deadline = _Deadline(self.loop.call_later)
        self._discards = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline.set("first request", self.timeout_keep_alive, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discards or self.conn.their_state is h11.MUST_CLOSE:  # the client said that nothing would follow
            return
        super().data_received(data)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        behind_a_request = self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY
        if behind_a_request and len(self.conn.trailing_data[0]) <= _PIPELINED_BYTES:
            self.flow.resume_reading()  # uvicorn pauses at the first byte

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._watch()

    def send_400_response(self, msg: str) -> None:
        error = self.conn.refusal
        assert error is not None, "what uvicorn calls this for"
        self._refuse(_malformed(error))

    def _should_upgrade(self) -> bool:
        return False

    def _watch(self) -> None:
        """Sets the deadline for the connection's state."""
        if self._discards or self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.trailing_data[0]:
            self._deadline.keep("head", _HEAD_S, lambda: self._refuse_late("the headers did not come whole", _HEAD_S))
        elif state is h11.SEND_BODY and self.cycle.response_complete:
            self._deadline.keep("rest", _REST_S, self.transport.close)
        elif state is h11.SEND_BODY:
            self._deadline.set("body", _BODY_S, self._body_late)
        elif self.flow.read_paused:
            self._deadline.keep("hang-up", _LOOK_S, self._check_hang_up)
        else:
            self._deadline.clear()

    def _check_hang_up(self) -> None:
        """Notices a hang-up that unread bytes hide."""
        look = select.poll()
        look.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        if look.poll(0):
            self.transport.abort()
        elif self.flow.read_paused:
            self._deadline.set("hang-up", _LOOK_S, self._check_hang_up)

    def _body_late(self) -> None:
        if self.flow.read_paused:  # the server is slow, not the client
            self._deadline.set("body", _BODY_S, self._body_late)
        else:
            self._refuse_late("nothing more of the body came", _BODY_S)

    def _refuse_late(self, what: str, seconds: float) -> None:
        self._refuse(MalformedHttp(f"{what} within {seconds:g} s", 408))

    def _refuse(self, error: FoldserveError) -> None:
        """Answers with the error, unless an answer has begun, and ends the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = render_error(error)
            headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
            events = (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._discards = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline.set("linger", _LINGER_S, self.transport.close)


class _Deadline:
    """One timer and the name of what it waits for."""

    def __init__(self, call_later: Callable[..., Any]) -> None:
        self._call_later = call_later
        self._timer: Any = None
        self._name: str | None = None

    def set(self, name: str, seconds: float, callback: Callable[[], object]) -> None:
        self.clear()
        self._name, self._timer = name, self._call_later(seconds, callback)

    def keep(self, name: str, seconds: float, callback: Callable[[], object]) -> None:
        """As `set`, unless it waits for `name` already."""
        if self._name != name:
            self.set(name, seconds, callback)

    def clear(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._name = self._timer = None


def _malformed(error: h11.RemoteProtocolError) -> MalformedHttp:
    status = error.error_status_hint
    if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        return MalformedHttp("the request's headers are too large, or too many: send less", status)
    reason = _QUOTE.split(str(error))[0]  # the rest quotes the request
    return MalformedHttp(f"this is no valid HTTP/1.1 request: {reason}", HTTPStatus.BAD_REQUEST)


def use_safe_protocol(server: uvicorn.Server) -> None:
    """Makes a server that is about to listen use `HttpProtocol`, for which vLLM has no option."""
    server.config.http_protocol_class = HttpProtocol
