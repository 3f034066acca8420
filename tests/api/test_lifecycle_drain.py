"""A server with one API process, until it is told to end: clients that hang up, many streams at once, drain.

The tests share it and run in order; the last ones end it and read its logs.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.hostile import HOST, Handler, hostile_server
from tests.api.live import CHAT, PATIENCE_S, Live, chat
from tests.images import data_uri, photo

SEATS = 4
STREAMS = 200
SECRET = "the word that no log may hold: quagmire"


@pytest.fixture(scope="module")
def live(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    options = ["--max-num-seqs", str(SEATS), "--allow-media-private-host", HOST, "--shutdown-timeout", "600"]
    server = Live(tiny_llava, folder, *options)
    yield server
    server.end()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def is_empty(live: Live) -> bool:
    """A request that ends shows what the engine still holds, since its numbers come with its answers."""
    assert live.chat().status == 200
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return [live.metrics(name) for name in names] == [0, 0, 0]


def gone(live: Live) -> int:
    """Requests of the log whose client was gone before there was an answer."""
    return len(re.findall(f"POST {CHAT} None in", live.out.read_text()))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_while_queued(live: Live, stream: bool) -> None:
    with ExitStack() as held:
        for _ in range(SEATS):
            held.enter_context(live.stream(max_tokens=900))
        connection = live.connect()
        live.send(connection, "POST", CHAT, chat(max_tokens=900, stream=stream))
        live.wait(lambda: live.metrics("vllm:num_requests_waiting") == 1)
        connection.close()
        live.wait(lambda: live.metrics("vllm:num_requests_waiting") == 0)
        assert live.metrics("vllm:num_requests_running") == SEATS
    live.wait(lambda: is_empty(live))


def test_a_client_that_hangs_up_while_its_image_is_fetched(live: Live) -> None:
    with hostile_server() as url:
        before = gone(live)
        Handler.asked.clear()
        connection = live.connect()
        live.send(connection, "POST", CHAT, chat("x", image(f"{url}/drip")))
        live.wait(lambda: "/drip" in Handler.asked)
        connection.close()
        live.wait(lambda: gone(live) == before + 1)
    live.wait(lambda: is_empty(live))


def test_a_client_that_hangs_up_while_its_images_are_encoded(live: Live) -> None:
    """The count of vision tokens rises when a request goes to the engine; its first step encodes."""
    images = [image(data_uri(photo(seed))) for seed in range(6)]
    before = live.metrics("foldserve_vision_tokens_total")
    connection = live.connect()
    live.send(connection, "POST", CHAT, chat("x", *images, max_tokens=100, stream=True))
    live.wait(lambda: live.metrics("foldserve_vision_tokens_total") > before)
    connection.close()
    live.wait(lambda: is_empty(live))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_while_decoding(live: Live, stream: bool) -> None:
    before = live.metrics("vllm:generation_tokens_total")
    connection = live.connect()
    live.send(connection, "POST", CHAT, chat(SECRET, image(data_uri(photo(3))), max_tokens=700, stream=stream))
    live.wait(lambda: live.metrics("vllm:generation_tokens_total") > before + 3)
    assert live.metrics("vllm:kv_cache_usage_perc") > 0
    connection.close()
    live.wait(lambda: is_empty(live))
    assert live.metrics("vllm:generation_tokens_total") < before + 700


BODY = json.dumps(chat(max_tokens=900, stream=True)).encode()
HEAD = (
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
)
PHASES = {
    "connected": b"",
    "half a header": HEAD[:40],
    "header": HEAD,
    "half a body": HEAD + BODY[:20],
    "whole": HEAD + BODY,
    "another behind it": HEAD + BODY + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "half of another behind it": HEAD + BODY + HEAD[:40],
}


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_client_that_hangs_up_in_any_phase(live: Live, reset: bool) -> None:
    """Before and after the answer has begun; what the log may not hold is seen to at the end."""
    for sent in PHASES.values():
        for heard in (0, 1, 2000) if sent.startswith(HEAD + BODY) else (0,):
            with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as client:
                client.sendall(sent)
                if heard:
                    assert client.recv(1), "the answer has begun"
                while heard > 0:
                    heard -= len(client.recv(heard))
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    live.wait(lambda: is_empty(live))


def test_file_descriptors_used_up(live: Live) -> None:
    """Those that are there go on, new ones are refused, and as soon as there are descriptors all is well."""
    server = live.tree()[1]
    soft, hard = server.rlimit(psutil.RLIMIT_NOFILE)
    held: list[HTTPConnection] = []
    with live.stream(max_tokens=900) as stream:
        server.rlimit(psutil.RLIMIT_NOFILE, (server.num_fds() + 5, hard))
        try:
            with suppress(OSError, HTTPException):
                while len(held) < 100:
                    held.append(live.connect())
                    live.send(held[-1], "GET", "/health/ready")
                    assert held[-1].getresponse().read()
            assert 1 < len(held) < 100
            assert not live.is_ready()
            assert stream.readline()
            held.pop(0).close()
            live.wait(live.is_ready)
        finally:
            server.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
            for connection in held:
                connection.close()


def test_an_image_of_a_refused_request(live: Live) -> None:
    """It was prepared, and never came to the engine: the next request brings it all the same."""
    picture = image(data_uri(photo(77)))
    fits = 1022 - live.chat("").json["usage"]["prompt_tokens"]  # a text that fits as long as no image comes with it
    refused = live.chat(" ".join("a" * fits), picture)
    assert (refused.status, refused.json["error"]["code"]) == (400, "limit_exceeded")
    assert live.chat("x", picture).status == 200
    before = live.metrics("vllm:mm_cache_hits_total")
    assert live.chat("y", picture).status == 200
    assert live.metrics("vllm:mm_cache_hits_total") == before + 1


def test_many_streams(live: Live) -> None:
    """All are answered in full, and readiness is too."""
    start = threading.Barrier(STREAMS)

    def listen(number: int) -> list[str]:
        start.wait()
        return live.chat(f"stream {number}", stream=True, max_tokens=3).events

    with ThreadPoolExecutor(STREAMS + 1) as pool:
        answers = [pool.submit(listen, number) for number in range(STREAMS)]
        while not all(answer.done() for answer in answers):
            assert live.is_ready()
        for answer in answers:
            assert answer.result()[-1] == "[DONE]"
            assert not any(event.startswith('{"error"') for event in answer.result())
    live.wait(lambda: is_empty(live))


def test_drain(live: Live) -> None:
    """What is in flight ends as it would have; what is new is sent away; the readiness says so at once."""
    whole: list[list[str]] = []

    def listen() -> None:
        whole.append(live.chat("drain", stream=True, max_tokens=500).events)

    clients = [threading.Thread(target=listen) for _ in range(SEATS + 2)]  # two of them wait
    for client in clients:
        client.start()
    live.wait(lambda: live.metrics("vllm:num_requests_waiting") == 2)
    live.terminate()
    live.wait(lambda: not live.is_ready())
    assert live.process.poll() is None
    ready = live.ask("GET", "/health/ready")
    assert (ready.status, ready.json) == (503, {"status": "draining"})
    assert live.ask("GET", "/health").status == 503
    assert live.ask("GET", "/health/live").status == 200
    refused = live.chat()
    assert (refused.status, refused.json["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1
    assert live.ask("GET", "/metrics").status == 200
    for client in clients:
        client.join()
    for events in whole:
        assert events[-1] == "[DONE]"
        assert '"finish_reason":"length"' in events[-2]
        assert len(events) > 2
    assert live.process.wait(PATIENCE_S) == 0


def test_log_of_text(live: Live) -> None:
    everything = live.out.read_text() + live.err.read_text()
    assert "quagmire" not in everything
    assert "Traceback" not in everything
    assert re.search(r"INFO .*\[[0-9a-f]{32}\] POST /v1/chat/completions 200 in [\d.]+ s, key None", everything)
