"""Time between a body's bytes and the engine grows no faster than the body, and no step blocks the event loop.

Times are CPU times, so that a busy machine changes nothing: of one thread if a step is measured alone, of the whole
process where it must not hold others up.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from transformers import AutoTokenizer
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import safe_apply_chat_template
from vllm.tokenizers.hf import get_cached_tokenizer

from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.auth.guard import AuthGuard
from foldserve.server.api.errors import FoldserveError, render_error
from foldserve.server.api.limits import template
from foldserve.server.api.limits.body import check_body
from foldserve.server.api.limits.checks import ChatChecks, known_tokens
from foldserve.server.api.limits.fields import check_fields
from foldserve.server.api.limits.route import ChatRoute, UnreadBodies
from foldserve.server.api.limits.special_tokens import SpecialTokens
from foldserve.server.api.limits.strict_json import parse
from foldserve.server.api.media.places import places_of_media
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.engine.family import Modality
from foldserve.server.limits import Limits

UNBOUNDED = Limits(max_json_items=10**8, max_messages=10**8, max_parts=10**8, max_schema_kb=10**6)
CONTEXT = 1024
FLOOR_S = 0.004  # below, it is noise
MOST = 6
LONGEST_BODY = int(Limits().max_body_mb * 1e6)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def chat(*parts: object, **more: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]} | more).encode()


def content(raw: bytes) -> bytes:
    """A chat whose text is written as it is."""
    return b'{"messages": [{"role": "user", "content": "' + raw + b'"}]}'


def messages(number: int, words: str, role: str = "user", more: Mapping[str, object] = {}) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": words, **more}] * number}).encode()


def calls(number: int, arguments: str) -> bytes:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return messages(1, "x", "assistant", {"tool_calls": [call] * number})


# Each makes a body of about n bytes.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "special-tokens": lambda n: chat(text("<s>" * (n // 3))),
    "special-tokens-of-all-kinds": lambda n: chat(text("</s><image>a" * (n // 12))),
    "beginnings-of-special-tokens": lambda n: chat(text("<" * n)),
    "halves-of-special-tokens": lambda n: chat(text("<imag" * (n // 5))),
    "parts-of-special-tokens": lambda n: chat(*[text("<s>")] * (n // 35)),
    "tokens-over-borders": lambda n: chat(*[text("<s"), text(">")] * (n // 67)),
    "empty-parts": lambda n: chat(*[text("")] * (n // 32)),
    "messages": lambda n: messages(n // 40, "hello"),
    "messages-of-odd-roles": lambda n: messages(n // 40, "hello", "critic"),
    "escapes": lambda n: content(b"\\u00e9" * (n // 6)),
    "pairs": lambda n: content(b"\\ud83d\\ude00" * (n // 12)),
    "half-a-pair-at-the-end": lambda n: content(b"\\u00e9" * (n // 6) + b"\\ud800"),
    "no-utf8-at-the-end": lambda n: content(b"a" * n + b"\xff"),
    "digits": lambda n: b'{"messages": ' + b"9" * n + b"}",
    "long-numbers": lambda n: b'{"a": [' + b",".join([b"9" * 4000] * (n // 4001)) + b"]}",
    "fractions": lambda n: b'{"a": [' + b",".join([b"1." + b"9" * 30] * (n // 33)) + b"]}",
    "nested": lambda n: b'{"a": ' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "objects": lambda n: b'{"a": ' + b'{"b":' * (n // 6) + b"1" + b"}" * (n // 6) + b"}",
    "keys": lambda n: json.dumps({f"key-{i}": 1 for i in range(n // 16)}).encode(),
    "one-key-twice": lambda n: b"{" + b'"a":1,' * (n // 6) + b'"a":1}',
    "objects-with-keys": lambda n: chat(text("x"), options={f"key-{i}": {"x": {}} for i in range(n // 25)}),
    "long-keys": lambda n: chat(text("x"), options={"k" * n: {"l" * n: 1}}),
    "keys-of-a-message": lambda n: messages(1, "x", more={f"key-{i}": 1 for i in range(n // 16)}),
    "a-long-role": lambda n: messages(1, "x", "r" * n),
    "documents": lambda n: chat(text("x"), documents=[{"title": "<s>", "text": "</s>"}] * (n // 40)),
    "tools": lambda n: chat(text("x"), tools=[{"type": "function", "function": {"name": "f"}}] * (n // 57)),
    "tool-calls": lambda n: calls(n // 90, "{}"),
    "odd-tool-calls": lambda n: messages(1, "x", "assistant", {"tool_calls": [1] * (n // 3)}),
    "arguments": lambda n: calls(1, '{"a": "' + "x" * n + '"}'),
    "nested-arguments": lambda n: calls(1, "[" * n),
    "a-form": lambda n: chat(text("x"), response_format={"type": "text", "x": "é" * (n // 6)}),
    "token-ids": lambda n: chat(text("x"), allowed_token_ids=[1] * (n // 3)),
    "no-token-ids": lambda n: chat(text("x"), allowed_token_ids=["x"] * (n // 5)),
    "biases": lambda n: chat(text("x"), logit_bias={str(i): 1 for i in range(n // 10)}),
    "an-address": lambda n: chat({"type": "image_url", "image_url": {"url": "http://" + "a" * n}}),
    "a-long-model": lambda n: chat(text("x"), model="<s>" * (n // 3)),
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is there already is not looked at: half a second each time, with torch and vLLM loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> ModelConfig:
    return EngineArgs(model=str(tiny_llava)).create_model_config()  # with the plugins, as a server has it


@pytest.fixture(scope="module")
def tokenizer(tiny_llava: Path) -> Any:
    return get_cached_tokenizer(AutoTokenizer.from_pretrained(tiny_llava))


@pytest.fixture(scope="module")
def special(tokenizer: Any) -> SpecialTokens:
    return SpecialTokens(tokenizer, ["<##IMAGE##>"])


class Steps:
    """Goes the way of a body, and notes the CPU time of each step.

    Every step is run that the one before has an input for, also those that a bound spares in service.
    """

    def __init__(self, model: ModelConfig, tokenizer: Any, special: SpecialTokens) -> None:
        self._model, self._tokenizer, self._special = model, tokenizer, special
        self.seconds: dict[str, float] = {}

    def run(self, body: bytes) -> None:
        try:
            self._run(body)
        except ValidationError as error:
            errors = self._measure("errors", error.errors)
            self._measure("render", render_error, RequestValidationError(errors))
        except VLLMValidationError as error:
            self._measure("blame", template.refusal, error, 1)
        except FoldserveError as error:
            self._measure("render", render_error, error)
        except (TypeError, ValueError):  # vLLM's, of an odd tool call
            return

    def _run(self, body: bytes) -> None:
        value = self._measure("parse", parse, body, UNBOUNDED)
        self._measure("look", self._special.may_be_in, body)
        self._measure("neutralise", self._special.neutralise_body, value, 10**8)
        self._measure("check", check_body, value, UNBOUNDED)
        request = self._measure("validate", FoldChatRequest.model_validate, value)
        self._measure("fields", check_fields, request, UNBOUNDED, CONTEXT, range(10**6))
        for place in self._measure("places", lambda: list(places_of_media(request.messages))):
            place.put(text(""))
        conversation, *_ = self._measure("vllm", parse_chat_messages, request.messages, self._model, "openai")
        words = self._measure("template", self._rendered, conversation)
        longest = CONTEXT * self._tokenizer.max_chars_per_token  # vLLM looks at that before
        self._measure("tokenize", self._tokenizer, words[:longest])

    def _rendered(self, conversation: Any) -> str:
        return safe_apply_chat_template(self._model, self._tokenizer, conversation, tokenize=False)

    def _measure(self, name: str, step: Callable[..., Any], *args: Any) -> Any:
        started = time.thread_time()
        try:
            return step(*args)
        finally:
            self.seconds[name] = time.thread_time() - started


def fastest(make: Callable[[], Steps], body: bytes) -> dict[str, float]:
    """The least CPU time of each step, of three."""
    found: dict[str, float] = {}
    for _ in range(3):
        steps = make()
        gc.collect()
        gc.disable()  # when it comes is chance
        try:
            steps.run(body)
        finally:
            gc.enable()
        for name, seconds in steps.seconds.items():
            found[name] = min(seconds, found.get(name, seconds))
    return found


def grown(make: Callable[[], Steps], shape: Callable[[int], bytes]) -> set[str]:
    """The steps that take too long on four times the body, and again on longer ones: a cache overflows but once."""
    found: set[str] | None = None
    for size in (60_000, 240_000):
        small, large = fastest(make, shape(size)), fastest(make, shape(4 * size))
        assert small.keys() == large.keys()
        slow = {step for step in small if large[step] > MOST * max(small[step], FLOOR_S)}
        found = slow if found is None else found & slow
        if not found:
            break
    return found or set()


@pytest.mark.parametrize("name", SHAPES)
def test_four_times_the_body_takes_six_times_as_long_at_most(
    name: str, model: ModelConfig, tokenizer: Any, special: SpecialTokens
) -> None:
    assert not grown(lambda: Steps(model, tokenizer, special), SHAPES[name])


def test_growth_would_be_found(model: ModelConfig, tokenizer: Any) -> None:
    class Quadratic(SpecialTokens):
        def neutralise_body(self, body: dict[str, Any], most: int) -> None:
            words = body["messages"][0]["content"][0]["text"]
            for start in range(0, len(words), 20):
                words = words[:start] + words[start:]

    slow = Quadratic(tokenizer, [])
    assert grown(lambda: Steps(model, tokenizer, slow), SHAPES["special-tokens"]) == {"neutralise"}


# The loop


class Heart:
    """Notes the most CPU time that the process took between two rounds of the event loop."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def beat(self) -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            self.longest, last = max(self.longest, now - last), now


@pytest.fixture(scope="module")
def app(model: ModelConfig, tokenizer: Any, special: SpecialTokens) -> FastAPI:
    """The chat route up to what it would hand to vLLM."""
    app, limits = FastAPI(), Limits()
    known = known_tokens(tokenizer, model.get_vocab_size())
    checks = ChatChecks(
        limits, special, 131_072, tokenizer.max_chars_per_token, known, {}, frozenset[Modality]({"image"})
    )
    app.state.foldserve_chat = Namespace(checks=checks)
    app.state.foldserve_guard = AuthGuard(None, SharedCounters(), 10)
    app.state.foldserve_lifecycle = Namespace(request=nullcontext, explain=lambda error: error)
    app.state.foldserve_turn = asyncio.Lock()
    app.state.foldserve_long_bodies = ThreadPoolExecutor(2)
    app.state.foldserve_unread = UnreadBodies(limits.max_body_bytes)
    app.router.route_class = ChatRoute

    @app.post("/chat")
    async def answer(request: FoldChatRequest) -> dict[str, str]:
        checks.check(request)
        list(places_of_media(request.messages))
        return {}

    return app


async def longest_hold(app: FastAPI, body: bytes) -> tuple[float, httpx.Response]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    heart = Heart()
    beating = asyncio.create_task(heart.beat())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        headers = {"Content-Type": "application/json"}
        answer = await client.post("/chat", content=chunks(), headers=headers, timeout=600)
    await asyncio.sleep(0.01)  # for the beat that follows
    beating.cancel()
    return heart.longest, answer


COUNTED = {"biases", "documents", "keys", "keys-of-a-message", "objects-with-keys", "tools"}
"""Shapes that have too many values at that length, and take long to make: see `FULL`."""


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in COUNTED])
def test_the_longest_body_does_not_hold_the_loop(name: str, app: FastAPI) -> None:
    body = SHAPES[name](LONGEST_BODY - 3000)
    while len(body) > LONGEST_BODY:
        body = SHAPES[name](int((LONGEST_BODY - 3000) * LONGEST_BODY / len(body) * 0.98))
    assert len(body) > LONGEST_BODY / 4
    held, answer = asyncio.run(longest_hold(app, body))
    assert answer.status_code in (200, 400), answer.text
    assert held < 0.8, answer.text


# Each of the most that may be of it: what is bounded in number, at its bound.
FULL: dict[str, Callable[[], bytes]] = {
    "parts": lambda: chat(*[text("<s>" * 2500)] * 4096),
    "messages": lambda: messages(1024, "<s>" * 10_000),
    "tool-calls": lambda: calls(4096, '{"a": "' + "x" * 7000 + '"}'),
    "odd-tool-calls": lambda: messages(1, "x", "assistant", {"tool_calls": [1] * 4096}),
    "values": lambda: chat(text("x"), options=[{"x": 1}] * 60_000),
    "documents": lambda: chat(text("x"), documents=[{"text": 1}] * 4096),
    "keys": lambda: chat(text("x"), **{f"key-{i}": 1 for i in range(190_000)}),
    "keys-of-a-message": lambda: messages(1, "x", more={f"key-{i}": 1 for i in range(190_000)}),
    "biases": lambda: chat(text("x"), logit_bias={str(i): 1 for i in range(190_000)}),
    "text": lambda: chat(text("<s>" * 3_000_000)),
    "special-tokens-of-a-name": lambda: messages(1, "x", more={"name": "<s>" * 10_000_000}),
    "a-prompt-to-cut": lambda: chat(text("<s>" * 10_000_000), truncate_prompt_tokens=5),
    "text-that-fits": lambda: chat(text("<s>" * 200_000)),
}


def test_a_hold_would_be_found(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatChecks, "is_long", lambda self, body: False)
    held, _ = asyncio.run(longest_hold(app, FULL["keys"]()))
    assert held > 0.05


@pytest.mark.parametrize("name", FULL)
def test_what_fills_the_bounds_does_not_hold_the_loop(name: str, app: FastAPI) -> None:
    held, answer = asyncio.run(longest_hold(app, FULL[name]()))
    assert answer.status_code in (200, 400), answer.text
    assert held < 0.8, answer.text
