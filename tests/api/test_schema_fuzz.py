"""Whatever our OpenAPI schema allows and forbids is answered, never with a 5xx, never with a library's text."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from foldserve.server.api.schema import FoldChatRequest
from tests.api.apis import MESSAGES, RESPONSES
from tests.api.test_bad_inputs import LEAKS

OURS = (
    "/v1/chat/completions",
    RESPONSES,
    MESSAGES,
    "/v1/reductions/map",
    "/v1/reducers",
    "/v1/models",
    "/health/live",
    "/health/ready",
)
TRANSLATED = (RESPONSES, MESSAGES)
"""What they say reaches the chat's checks: a few examples do."""
BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases each time
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(server_url: str) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{server_url}/openapi.json").json())


def test_schema_has_our_routes(schema: schemathesis.schemas.BaseSchema) -> None:
    assert {path for path in OURS if path in schema} == set(OURS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_is_a_server_error(
    mode: GenerationMode, schema: schemathesis.schemas.BaseSchema, server_url: str
) -> None:
    for path in OURS:
        for operation in schema[path].values():
            _fuzz(operation, mode, server_url, 8 if path in TRANSLATED else 25)


def _fuzz(
    operation: schemathesis.APIOperation[Any, Any, Any, Any], mode: GenerationMode, server_url: str, examples: int = 25
) -> None:
    if mode == GenerationMode.NEGATIVE and not operation.body:
        return  # nothing to spoil

    @settings(BOUNDED, max_examples=examples)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        answer = case.call(base_url=server_url, timeout=60)
        assert answer.status_code < 500, case.as_curl_command()
        if answer.status_code >= 400:
            assert not LEAKS.search(answer.text), answer.text

    check()


class Broken(BaseHTTPRequestHandler):
    """A server that fails."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(500)

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_error_would_be_found(schema: schemathesis.schemas.BaseSchema) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with pytest.raises(AssertionError, match="curl"):
            _fuzz(schema[OURS[0]]["POST"], GenerationMode.POSITIVE, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


FIELDS = st.sampled_from(sorted(FoldChatRequest.model_fields))
WORDS = st.sampled_from(["auto", "content", "function", "json", "name", "role", "text", "type", "url", "value"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "function", "name", "json", "role", "content"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(BOUNDED, max_examples=100)
@given(st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_any_value_in_any_field(server_url: str, fields: dict[str, object]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | fields
    answer = httpx.post(
        f"{server_url}/v1/chat/completions",
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code < 500, fields
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert not LEAKS.search(answer.text), (fields, answer.text)
