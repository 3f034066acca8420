"""The line that says what to try: its example must be a command that works."""

from __future__ import annotations

import base64
import io
import json
import shlex
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from foldserve.server.api import announce


class Health(BaseHTTPRequestHandler):
    """Unhealthy at first, as a server that is loading."""

    answers: list[int]

    def do_GET(self) -> None:
        self.send_response(self.answers.pop(0) if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(announce, "_POLL_S", 0.01)
    Health.answers = [503, 503, 200]
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server.server_port
        server.shutdown()


def test_the_line_comes_once_the_server_is_healthy(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    args = Namespace(headless=False, grpc=False, uds=None, ssl_certfile=None, host="127.0.0.1", port=port)
    announce.announce_when_ready(args)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
    assert Health.answers == []
    command = shlex.split(capsys.readouterr().err.partition("Try: ")[2])
    assert command[:3] == ["curl", "-s", f"http://127.0.0.1:{port}/v1/chat/completions"]
    body = json.loads(command[-1])
    assert body["reduction_ratio"] == 0.66
    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).convert("RGB")
    assert [image.getpixel((48, 48)), image.getpixel((0, 0))] == [(220, 40, 40), (150, 160, 170)]


@pytest.mark.parametrize("other", [{"headless": True}, {"grpc": True}, {"uds": "/s"}, {"ssl_certfile": "c"}], ids=str)
def test_no_line_where_plain_http_is_not_served(other: dict[str, object]) -> None:
    before = set(threading.enumerate())
    plain = {"headless": False, "grpc": False, "uds": None, "ssl_certfile": None, "host": None, "port": 1}
    announce.announce_when_ready(Namespace(**plain | other))
    assert set(threading.enumerate()) == before
