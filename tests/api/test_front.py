"""Routes beside chat that clients, load balancers and monitors call, and response headers."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from foldserve.server.api.errors import Unavailable
from foldserve.server.api.limits.route import UnreadBodies
from foldserve.server.settings import http_variables


def body(image_url: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 3, "temperature": 0} | fields


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics", "/v1/models", "/version"])
def test_head_is_get_without_its_body(server_url: str, path: str) -> None:
    with httpx.Client(base_url=server_url) as client:
        got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nothing"])
def test_head_is_refused_where_get_is(server_url: str, path: str) -> None:
    assert httpx.head(f"{server_url}{path}").status_code == httpx.get(f"{server_url}{path}").status_code


def test_a_model_is_retrieved_by_its_id(client: openai.OpenAI) -> None:
    one, listed = (model.model_dump() for model in (client.models.retrieve("tiny"), client.models.list().data[0]))
    assert one["id"] == "tiny"
    assert {name for name in one if one[name] != listed[name]} <= {"created", "permission"}  # made anew for each answer


@pytest.mark.parametrize("name", ["other", "llava-hf/llava-1.5-7b-hf", "tiny/", "%2e%2e", "tiny%20"])
def test_another_model_is_not_found(server_url: str, name: str) -> None:
    answer = httpx.get(f"{server_url}/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


def test_the_api_is_documented_under_our_name(server_url: str) -> None:
    api = httpx.get(f"{server_url}/openapi.json").json()
    assert api["info"]["title"] == "foldserve"
    assert set(api["paths"]["/health/ready"]) == {"get"}  # HEAD is understood
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/{model}"} <= set(api["paths"])


@pytest.mark.parametrize("stream", [False, True])
def test_headers_tell_what_was_applied(server_url: str, image_url: str, stream: bool) -> None:
    sent = body(
        image_url, stream=stream, reduction_ratio=0.5, stream_options={"include_usage": True} if stream else None
    )
    answer = httpx.post(f"{server_url}/v1/chat/completions", json=sent, timeout=300)
    assert answer.status_code == 200, answer.text
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        usage = json.loads(events[-1])["usage"]["vision_tokens"]
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
    else:
        usage = answer.json()["usage"]["vision_tokens"]
    told = dict(fact.split("=") for fact in answer.headers["x-foldserve-vision-tokens"].split(", "))
    assert told == {name: str(value) for name, value in usage.items()}
    assert usage["kept"] < usage["encoded"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_without_images_has_nothing_to_tell(server_url: str, stream: bool) -> None:
    sent = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "stream": stream}
    answer = httpx.post(f"{server_url}/v1/chat/completions", json=sent, timeout=300)
    assert answer.status_code == 200
    assert "x-foldserve-vision-tokens" not in answer.headers


@pytest.mark.parametrize("offer", ["h2c", "TLS/1.2", "websocket"])
@pytest.mark.parametrize("coded", [False, True], ids=["length", "chunked"])
def test_a_chat_that_offers_to_upgrade_is_a_chat(server_url: str, offer: str, coded: bool) -> None:
    sent = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
    framing = b"Transfer-Encoding: chunked" if coded else b"Content-Length: %d" % len(sent)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: Upgrade\r\n"
    address = urlsplit(server_url)
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        connection.sendall(head + b"Upgrade: %b\r\n%b\r\n\r\n" % (offer.encode(), framing))
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent) if coded else sent)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert b'"chat.completion"' in received
    assert received.endswith(b"}")


def test_bodies_on_their_way_keep_nobody_out(server_url: str) -> None:
    """There are more of them than places in the queue."""
    address = urlsplit(server_url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 300\r\n\r\n"
    with ExitStack() as held:
        for _ in range(1400):
            connection = socket.create_connection((address.hostname, address.port), timeout=300)
            held.enter_context(connection)
            connection.sendall(head + b'{"messages"')
        sent = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert httpx.post(f"{server_url}/v1/chat/completions", json=sent, timeout=300).status_code == 200


def test_the_bytes_of_bodies_on_their_way_are_bounded() -> None:
    bodies = UnreadBodies(100)
    with bodies.share() as one, bodies.share() as other:
        one.take(60)
        other.take(40)
        with pytest.raises(Unavailable) as caught, bodies.share() as third:
            third.take(1)
        assert caught.value.headers["Retry-After"]
    with bodies.share() as whole:
        whole.take(100)


def test_idle_connections_outlive_those_of_balancers() -> None:
    assert int(http_variables({})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60
    assert http_variables({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5"}) == {}
