"""A server with keys, two API processes and JSON logs, until its engine is killed.

The tests share it and run in order; the last ones end it and read its logs.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from foldserve.server.api.auth.keys import entry, new_key
from tests.api.apis import APIS, MESSAGES, RESPONSES
from tests.api.live import CHAT, PATIENCE_S, Live, bearer, chat
from tests.api.test_bad_inputs import LEAKS
from tests.images import data_uri, photo

ALICE, BOB, SLOW, FEW, WATCHER, LATE = (new_key() for _ in range(6))
SEATS, QUEUE = 4, 4
SECRET = "the word that no log may hold: xylograph"
IMAGE = data_uri(photo(77))
ANSWERED_WITHIN_S = 5


def key_entries() -> str:
    def made(name: str, key: str, rate: str | None = None, concurrent: int | None = None, scope: Any = "api") -> str:
        return entry(name, key, rate=rate, concurrent=concurrent, scopes=[scope])

    return (
        made("alice", ALICE)
        + made("bob", BOB)
        + made("slow", SLOW, rate="2/hour")
        + made("few", FEW, concurrent=1)
        + made("watcher", WATCHER, scope="metrics")
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(key_entries())
    return file


@pytest.fixture(scope="module")
def live(tiny_llava: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    options = ["--api-keys", str(keys), "--log-format", "json", "--api-server-count", "2"]
    options += ["--max-num-seqs", str(SEATS), "--max-queue", str(QUEUE)]
    server = Live(tiny_llava, tmp_path_factory.mktemp("live"), *options, watcher=WATCHER)
    yield server
    server.end()


def error(status: int, code: str, answer: Any) -> None:
    assert answer.status == status, answer.body
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["code"] == code


ROUTES = [
    ("POST", CHAT),
    ("POST", RESPONSES),
    ("POST", "/v1/reductions/map"),
    ("GET", "/v1/reducers"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/load"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/invocations"),
    ("GET", "/ping"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/scale_elastic_ep"),
    ("GET", "/kv_event_sources"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda value: str(value))
def test_every_route_asks_for_a_key(live: Live, method: str, path: str) -> None:
    refused = live.ask(method, path)
    error(401, "invalid_api_key", refused)
    assert refused.headers["www-authenticate"] == 'Bearer realm="foldserve"'
    assert live.ask(method, path, authorization=f"Bearer {ALICE}").status in {200, 400, 404}


def test_the_messages_api_takes_a_key_in_either_header(live: Live) -> None:
    """Its errors have another shape. Two keys in one request are refused, whatever the headers are."""
    for headers in ({}, {"x_api_key": ALICE[:-1]}, {"x_api_key": ""}, bearer(ALICE) | {"x_api_key": ALICE}):
        refused = live.ask("POST", MESSAGES, **headers)
        assert refused.status == 401
        assert (refused.json["type"], refused.json["error"]["type"]) == ("error", "authentication_error")
    for headers in (bearer(ALICE), {"x_api_key": ALICE}):
        assert live.ask("POST", MESSAGES, **headers).status == 400
        assert live.ask("POST", MESSAGES, APIS["messages"].body(chat()), **headers).status == 200
    assert live.ask("POST", MESSAGES, x_api_key=WATCHER).json["error"]["type"] == "permission_error"


def test_all_declared_paths_were_tried(live: Live) -> None:
    declared = live.ask("GET", "/openapi.json", authorization=f"Bearer {ALICE}").json["paths"]
    others = {"/health", "/health/live", "/health/ready", "/metrics", MESSAGES}  # elsewhere
    assert set(declared) - others <= {path for _, path in ROUTES}


def test_health_is_open(live: Live) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert live.ask("GET", path).json == {"status": "ready"}


def test_metrics_are_for_keys_with_their_scope(live: Live) -> None:
    """Their counters of cache hits would tell a stranger what others send."""
    error(401, "invalid_api_key", live.ask("GET", "/metrics"))
    error(403, "insufficient_permissions", live.ask("GET", "/metrics", **bearer(ALICE)))
    assert b"vllm:num_requests_running" in live.ask("GET", "/metrics", **bearer(WATCHER)).body


def test_a_key_of_another_scope(live: Live) -> None:
    refused = live.ask("GET", "/v1/models", authorization=f"Bearer {WATCHER}")
    error(403, "insufficient_permissions", refused)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {ALICE[:-1]}"},
        {"authorization": "Bearer " + "k" * 60_000},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": ALICE},
        {"api_key": ALICE},
        {"x_api_key": ALICE},
        {"cookie": f"authorization=Bearer {ALICE}"},
        {"x_forwarded_authorization": f"Bearer {ALICE}"},
        {"x_original_url": "/health", "x_rewrite_url": "/health", "x_forwarded_prefix": "/health"},
        {"x_http_method_override": "OPTIONS"},
        {"host": "x/health?"},
        {"host": "localhost/health#"},
        {"host": "/metrics"},
        {"host": "a@b:8000/health/"},
        {"forwarded": "host=health;proto=http", "x_forwarded_host": "x/health?"},
    ],
    # keys differ from process to process, and names of tests must not
    ids=lambda headers: f"{next(iter(headers))} {next(iter(headers.values()))}".replace(ALICE, "KEY").replace(
        ALICE[:-1], "SHORT"
    )[:40],
)
def test_no_header_opens_a_route(live: Live, headers: dict[str, str]) -> None:
    error(401, "invalid_api_key", live.ask("GET", "/v1/models", **headers))


@pytest.mark.parametrize("target", ["//v1/models", "/health/../v1/models", "/v1/models/", "/V1/MODELS", "/v1%2fmodels"])
def test_no_spelling_of_a_path_opens_a_route(live: Live, target: str) -> None:
    assert live.ask("GET", target).status in {401, 404}


def test_two_keys_in_one_request(live: Live) -> None:
    connection = live.connect()
    connection.putrequest("GET", "/v1/models")
    for key in (ALICE, BOB):
        connection.putheader("Authorization", f"Bearer {key}")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_rate(live: Live) -> None:
    """Counted over both processes: each request takes a connection of its own."""
    statuses = [live.chat(key=SLOW).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    refused = live.chat(key=SLOW)
    error(429, "rate_limit_exceeded", refused)
    assert 3000 < int(refused.headers["retry-after"]) <= 3600
    assert live.ask("GET", "/v1/models", authorization=f"Bearer {SLOW}").status == 200


def test_places_of_a_key(live: Live) -> None:
    with live.stream(key=FEW, max_tokens=900):
        for _ in range(3):
            refused = live.chat(key=FEW)
            error(429, "concurrency_limit_exceeded", refused)
            assert int(refused.headers["retry-after"]) >= 1
        assert live.chat(key=ALICE).status == 200
    live.wait(lambda: live.chat(key=FEW).status == 200)


def test_each_answer_takes_a_place(live: Live) -> None:
    """A key whose entry says nothing may have half of what the server holds."""
    most = (SEATS + QUEUE) // 2
    for key, n, beams in ((ALICE, most + 1, False), (FEW, 2, False), (FEW, 2, True)):
        refused = live.chat(key=key, n=n, temperature=1, use_beam_search=beams)
        error(400, "invalid_value", refused)
        assert refused.json["error"]["param"] == "n"
    with live.stream(key=ALICE, max_tokens=900, n=most, temperature=1):
        error(429, "concurrency_limit_exceeded", live.chat(key=ALICE))
        assert live.chat(key=BOB, n=most, temperature=1).status == 200
    live.wait(lambda: live.chat(key=ALICE, n=most, temperature=1).status == 200)


def test_a_full_server(live: Live) -> None:
    with ExitStack() as held:
        for _ in range(SEATS):
            held.enter_context(live.stream(key=ALICE, max_tokens=900))
        for _ in range(QUEUE):  # these wait, and have no first token to wait for
            connection = live.connect()
            held.callback(connection.close)
            live.send(connection, "POST", CHAT, chat_of(900), authorization=f"Bearer {BOB}")
        live.wait(lambda: live.metrics("vllm:num_requests_waiting") == QUEUE)
        refused = live.ask("GET", "/v1/models", authorization=f"Bearer {BOB}")
        assert refused.status == 200, "only work is refused"
        refused = live.chat(key=BOB)
        error(503, "overloaded", refused)
        assert int(refused.headers["retry-after"]) >= 1
        assert live.ask("GET", "/health/ready").status == 200
    live.wait(lambda: live.chat(key=BOB).status == 200)


def chat_of(tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "wait"}], "max_tokens": tokens, "ignore_eos": True}


def test_a_prompt_is_cached_for_its_own_key(live: Live) -> None:
    prompt = "A text that is long enough to fill some blocks of the cache. " * 12

    def hits(key: str, **fields: Any) -> float:
        asked, hit = (live.metrics(f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
        tokens = live.chat(prompt, key=key, **fields).json["usage"]["prompt_tokens"]
        live.wait(lambda: live.metrics("vllm:prefix_cache_queries_total") == asked + tokens)  # told by one process
        return live.metrics("vllm:prefix_cache_hits_total") - hit

    assert hits(ALICE) == 0
    assert hits(ALICE) > 0
    assert hits(BOB) == 0
    assert hits(ALICE, cache_salt="apart") == 0
    assert hits(ALICE, cache_salt="apart") > 0
    assert hits(BOB, cache_salt="apart") == 0
    error(400, "invalid_value", live.chat(key=ALICE, cache_salt="a b"))


def test_an_image_is_cached_for_its_own_key(live: Live) -> None:
    image = {"type": "image_url", "image_url": {"url": data_uri(photo(78))}}
    answers: set[str] = set()

    def is_hit(key: str, **fields: Any) -> bool:
        asked, hit = (live.metrics(f"vllm:mm_cache_{what}_total") for what in ("queries", "hits"))
        answer = live.chat("What is this?", image, key=key, temperature=0, max_tokens=8, **fields)
        answers.add(answer.json["choices"][0]["message"]["content"])
        live.wait(lambda: live.metrics("vllm:mm_cache_queries_total") == asked + 1)
        return live.metrics("vllm:mm_cache_hits_total") > hit

    sent = misses = 0
    while misses < 2 and sent < 30:  # each process has a cache of its own; one may take all of the requests
        sent, misses = sent + 1, misses + (not is_hit(ALICE))
    assert is_hit(ALICE)
    assert not is_hit(BOB)
    assert not is_hit(ALICE, cache_salt="apart")
    assert any(is_hit(BOB) for _ in range(3))
    assert len(answers) == 1


def test_a_key_that_is_added_later(live: Live, keys: Path) -> None:
    assert live.chat(key=LATE).status == 401
    keys.write_text(key_entries() + entry("late", LATE, rate=None, concurrent=None, scopes=["api"]))
    live.wait(lambda: all(live.chat(key=LATE).status == 200 for _ in range(4)))
    assert live.chat(key=ALICE).status == 200


def test_request_ids(live: Live) -> None:
    mine = live.ask("POST", CHAT, chat_of(1), authorization=f"Bearer {ALICE}", x_request_id="my-own.id:1")
    assert mine.headers["x-request-id"] == "my-own.id:1"
    assert mine.json["id"] == "chatcmpl-my-own.id:1"
    for sent in ("with space", "x" * 129, "a/b", '"', ""):
        answer = live.ask("GET", "/v1/models", authorization=f"Bearer {ALICE}", x_request_id=sent)
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    for method, path in (("GET", "/nowhere"), ("GET", CHAT), ("GET", "/health"), ("GET", "/metrics")):
        assert live.ask(method, path).headers["x-request-id"]
    error(404, "not_found", live.ask("GET", "/nowhere"))


def test_wrong_method(live: Live) -> None:
    refused = live.ask("GET", CHAT, authorization=f"Bearer {ALICE}")
    error(405, "method_not_allowed", refused)
    assert refused.headers["allow"] == "POST"


def test_what_is_asked(live: Live) -> None:
    """Prompts, images and bad requests that the logs are searched for at the end."""
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    assert live.chat(SECRET, image, key=ALICE).status == 200
    assert live.chat(SECRET, key=ALICE, reduction={"method": SECRET}).status == 400
    assert live.chat(SECRET, key=ALICE, max_tokens=10**7).status == 400
    assert live.chat(SECRET, {"type": "image_url", "image_url": {"url": IMAGE[:-900]}}, key=ALICE).status == 400
    assert live.chat(SECRET, key=ALICE, model=SECRET).status == 404
    for stream, form in product((False, True), ({"regex": f"(({SECRET}"}, {"json": {"type": SECRET}}, {"choice": []})):
        answer = live.chat(SECRET, key=ALICE, stream=stream, structured_outputs=form)
        assert answer.status == 400 or (stream and "structured_outputs" in answer.events[-2])
    assert live.chat(SECRET, key=SECRET).status == 401


def test_the_engine_is_killed_under_load(live: Live) -> None:
    """Streams, whole answers, requests that wait, and images on their way: everyone hears of it; the server ends."""
    answers: list[tuple[float, int, str]] = []

    def listen(number: int) -> None:
        body = chat_of(900) | {"stream": number % 2 == 0}
        if number % 4 > 1:
            parts = [{"type": "image_url", "image_url": {"url": data_uri(photo(number))}}] * 4
            body["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": SECRET}]}]
        connection = live.connect()
        live.send(connection, "POST", CHAT, body, authorization=f"Bearer {(ALICE, BOB)[number // 4]}")
        response = connection.getresponse()
        text = response.read().decode()
        answers.append((time.monotonic(), response.status, text))
        connection.close()

    clients = [threading.Thread(target=listen, args=(number,)) for number in range(SEATS + QUEUE)]
    for client in clients:
        client.start()
    live.wait(lambda: live.metrics("vllm:num_requests_running") >= SEATS)
    killed = time.monotonic()
    live.engine().kill()
    live.wait(lambda: not live.is_ready(), ANSWERED_WITHIN_S)
    for client in clients:
        client.join()
    assert len(answers) == len(clients)
    in_flight = [answer for answer in answers if answer[0] > killed]
    assert len(in_flight) >= SEATS
    for heard, status, text in in_flight:
        assert heard - killed < ANSWERED_WITHIN_S
        assert status in {200, 503}
        last = text if status == 503 else text.split("data: ")[-2]
        assert json.loads(last).keys() == {"error"}
        assert json.loads(last)["error"].keys() == {"message", "type", "param", "code"}
        assert json.loads(last)["error"]["code"] == "engine_stopped"
        assert not LEAKS.search(last), last
        assert status == 503 or text.endswith("data: [DONE]\n\n")
    assert live.process.wait(PATIENCE_S) != 0  # the soak sees to it that this takes no more than 10 s


def test_logs_are_json_and_hold_no_prompt(live: Live) -> None:
    live.process.wait(30)
    text = live.out.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    everything = text + live.err.read_text()
    assert "xylograph" not in everything
    assert IMAGE[100:160] not in everything
    for key in (ALICE, BOB, SLOW, FEW, WATCHER, LATE):
        assert key not in everything
    mine = [line for line in lines if line.get("request_id") == "my-own.id:1"]
    assert [(line["route"], line["method"], line["status"], line["key"]) for line in mine] == [
        (CHAT, "POST", 200, "alice")
    ]
    asked = [line for line in lines if line["logger"] == "foldserve.requests"]
    assert all(line["request_id"] and line["timestamp"] and line["level"] for line in asked)
    assert {line["status"] for line in asked} >= {200, 400, 401, 403, 404, 405, 429, 503}
