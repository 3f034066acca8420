"""What clients are told when a library fails: its error's kind and field, in words of ours and nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import (
    GenerationError,
    RetryableRequestError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.v1.engine.exceptions import EngineDeadError

from foldserve.server.api import errors
from foldserve.server.api.errors import FoldserveError, render, render_event, render_vllm, translate
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.api.serving import FoldServingChat, _explained

SECRET = "a zygote in /usr/lib/python3/site-packages/PIL/Image.py line 7, at 0x7f00deadbeef"

PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]
# error -> status, code, param
THEIRS: list[tuple[Exception, int, str, str | None]] = [
    (ValueError(SECRET), 400, "invalid_value", None),
    (TypeError(SECRET), 400, "invalid_value", None),
    (OverflowError(SECRET), 400, "invalid_value", None),
    (TemplateError(SECRET), 400, "invalid_value", None),
    (VLLMValidationError(SECRET), 400, "invalid_value", None),
    (VLLMValidationError(SECRET, parameter="top_logprobs", value=SECRET), 400, "invalid_value", "top_logprobs"),
    (VLLMValidationError(SECRET, parameter="tool_choice.function"), 400, "invalid_value", "tool_choice.function"),
    (VLLMValidationError(SECRET, parameter="cache_salt"), 400, "invalid_value", "cache_salt"),
    (VLLMValidationError(SECRET, parameter="input_tokens", value=5), 400, "invalid_value", "messages"),
    (VLLMValidationError(SECRET, parameter="of_a_later_version"), 400, "invalid_value", "of_a_later_version"),
    (VLLMUnprocessableEntityError(SECRET, parameter="stop"), 422, "unprocessable_entity", "stop"),
    (VLLMNotFoundError(SECRET), 404, "not_found", "model"),
    (NotImplementedError(SECRET), 501, "not_implemented", None),
    (GenerationError(SECRET), 500, "internal_error", None),
    (RetryableRequestError(SECRET), 503, "overloaded", None),
    (EngineDeadError(), 503, "engine_stopped", None),
    (RuntimeError(SECRET), 500, "internal_error", None),
    (KeyError(SECRET), 500, "internal_error", None),
    (HTTPException(400, SECRET), 400, "invalid_value", None),
    (HTTPException(404, SECRET), 404, "not_found", None),
]


def check(body: Any, code: str, param: str | None) -> None:
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert len(error["message"]) > 10
    for word in ("zygote", "/usr", "site-packages", "0x7f", "Error", "SECRET", "parameter="):
        assert word not in error["message"]


def told(explain: Callable[[Exception], Exception]) -> Any:
    """A life cycle that hears of every output."""
    return SimpleNamespace(explain=explain, heard=lambda: None)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS, ids=lambda v: type(v).__name__)
def test_no_text_of_a_library(error: Exception, status: int, code: str, param: str | None) -> None:
    answer = render(error)
    assert answer.status_code == status
    check(json.loads(bytes(answer.body)), code, param)
    assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS, ids=lambda v: type(v).__name__)
def test_nor_in_a_stream(error: Exception, status: int, code: str, param: str | None) -> None:
    check(json.loads(render_event(error)), code, param)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS[:-5], ids=lambda v: type(v).__name__)
def test_nor_in_a_response_that_vllm_made(error: Exception, status: int, code: str, param: str | None) -> None:
    check(json.loads(bytes(render_vllm(create_error_response(error)).body)), code, param)


def test_events_that_vllm_makes() -> None:
    """Its own two ways to end a stream with an error, as its chat handler takes them."""
    chat = object.__new__(FoldServingChat)  # neither way looks at the handler
    check(
        json.loads(chat._convert_generation_error_to_streaming_response(GenerationError(SECRET))),
        "internal_error",
        None,
    )
    check(json.loads(chat.create_streaming_error_response(ValueError(SECRET))), "invalid_value", None)
    check(json.loads(chat.create_streaming_error_response(SECRET, param="stop")), "invalid_value", "stop")


@pytest.mark.parametrize(
    ("fields", "before", "expected"),
    [
        ({}, [], None),  # left to vLLM, which makes it a 500
        ({"structured_outputs": {"regex": "x"}}, [], errors.InvalidRequest),
        ({"structured_outputs": {"regex": "x"}}, [None], errors.InvalidRequest),
        ({"messages": PICTURE}, [], None),
    ],
    ids=["plain", "form", "form, midway", "image"],
)
def test_what_the_engine_does_not_explain(
    fields: dict[str, Any], before: list[None], expected: type[FoldserveError] | None
) -> None:
    """It ends a request with the reason `error` and no more."""
    request = FoldChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)

    async def outputs() -> AsyncIterator[Any]:
        for reason in (*before, "error"):
            yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)], finished=reason is not None)

    async def read() -> int:
        return len([output async for output in _explained(request, outputs(), told(lambda error: error))])

    if expected is None:
        assert asyncio.run(read()) == len(before) + 1
    else:
        with pytest.raises(expected):
            asyncio.run(read())


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), RuntimeError("x"), errors.InvalidRequest("x")])
def test_what_fails_once_the_engine_is_gone(error: Exception) -> None:
    """Whatever a library raises then is nobody's fault but the engine's."""

    async def outputs() -> AsyncIterator[Any]:
        raise error
        yield

    async def read() -> None:
        stopped = errors.EngineStopped("the model has stopped", 10)
        explain = {True: error, False: stopped}[isinstance(error, FoldserveError)]
        request = FoldChatRequest.model_validate({"messages": [], "structured_outputs": {"regex": "x"}})
        async for _ in _explained(request, outputs(), told(lambda error: explain)):
            pass

    with pytest.raises(type(error) if isinstance(error, FoldserveError) else errors.EngineStopped):
        asyncio.run(read())


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"n": "many"}, "n", "n must be an integer"),
    ({"n": 1.5}, "n", "n must be an integer"),
    ({"temperature": "warm"}, "temperature", "temperature must be a number"),
    ({"stream": 7}, "stream", "stream must be true or false"),
    ({"stop": 5}, "stop", "stop must be a text"),
    ({"bad_words": "x"}, "bad_words", "bad_words must be a list"),
    ({"logit_bias": []}, "logit_bias", "logit_bias must be an object"),
    ({"stream_options": "x", "stream": True}, "stream_options", "stream_options must be an object"),
    ({"truncation_side": "up"}, "truncation_side", "truncation_side must be one of 'left' or 'right'"),
    ({"seed": 2**70}, "seed", "seed must be at most 9223372036854775807"),
    ({"stream_interval": 0}, "stream_interval", "stream_interval must be at least 1"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "tools[0].function is missing"),
]


@pytest.mark.parametrize(("fields", "param", "message"), FIELDS, ids=lambda v: str(v)[:50])
def test_fields_of_a_wrong_type(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FoldChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)
    found = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = translate(RequestValidationError(found))
    assert (str(error), error.param) == (message, param)


def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Where the request is at fault, not its values; where the server is, all that helps to find out."""
    with caplog.at_level(logging.INFO, logger=errors.__name__):
        translate(VLLMValidationError("no good", parameter="stop", value="xylograph"))
        assert "VLLMValidationError" in caplog.text
        assert "xylograph" not in caplog.text
        translate(RuntimeError("broken"))
        assert "broken" in caplog.text


def test_every_kind_has_its_own_code() -> None:
    def kinds(kind: type[FoldserveError]) -> list[type[FoldserveError]]:
        return [kind, *(inner for sub in kind.__subclasses__() for inner in kinds(sub))]

    public = [kind for kind in kinds(FoldserveError) if not kind.__name__.startswith("_")]
    assert len({kind.code for kind in public}) == len(public) == 16
    assert all(HTTPStatus(kind.status) >= 400 for kind in public)
