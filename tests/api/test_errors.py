"""Errors of libraries reach clients with their kind and field, in our own words only."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from torch import Tensor, ones
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import (
    GenerationError,
    RetryableRequestError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from foldserve.reducers.fold import by_columns
from foldserve.server.api import errors
from foldserve.server.api.errors import FoldserveError, from_vllm, render_error, render_error_event, translate
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.api.serving import FoldServingChat, _with_explained_errors

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
    return SimpleNamespace(explain=explain, note_output=lambda: None)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS, ids=lambda v: type(v).__name__)
def test_no_text_of_a_library(error: Exception, status: int, code: str, param: str | None) -> None:
    answer = render_error(error)
    assert answer.status_code == status
    check(json.loads(bytes(answer.body)), code, param)
    assert ("retry-after" in answer.headers) == (status == 503)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS, ids=lambda v: type(v).__name__)
def test_nor_in_a_stream(error: Exception, status: int, code: str, param: str | None) -> None:
    check(json.loads(render_error_event(error)), code, param)


@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS[:-5], ids=lambda v: type(v).__name__)
def test_nor_in_a_response_that_vllm_made(error: Exception, status: int, code: str, param: str | None) -> None:
    check(json.loads(bytes(render_error(from_vllm(create_error_response(error))).body)), code, param)


def output(text: str, finish_reason: str | None = None) -> RequestOutput:
    choice = CompletionOutput(0, text, [7], None, None, finish_reason=finish_reason)
    return RequestOutput("r", None, [1, 2], None, [choice], finish_reason is not None)


def streamed(outputs: list[RequestOutput | Exception], **attributes: Any) -> list[str]:
    """The events of vLLM's stream for these outputs, without an engine."""
    chat: Any = object.__new__(FoldServingChat)
    chat.enable_auto_tools = chat.enable_force_include_usage = chat.enable_log_deltas = chat.enable_log_outputs = False
    chat.parser_cls = chat.request_logger = chat.system_fingerprint = None
    chat.lifecycle, chat.response_role = told(lambda error: error), "assistant"
    for name, value in attributes.items():
        setattr(chat, name, value)
    request = FoldChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "stream": True})

    async def results() -> AsyncIterator[RequestOutput]:
        for result in outputs:
            if isinstance(result, Exception):
                raise result
            yield result

    async def read() -> list[str]:
        metadata = RequestResponseMetadata(request_id="id")
        events = chat.chat_completion_stream_generator(request, results(), "id", "model", [], None, metadata)
        sent = [text async for text in events]
        return "".join(sent).split("\n\n")

    return asyncio.run(read())


@pytest.mark.parametrize("begun", [[], [output("a"), output("b")]], ids=["at once", "midway"])
@pytest.mark.parametrize(("error", "status", "code", "param"), THEIRS[:-2], ids=lambda v: type(v).__name__)
def test_nor_in_a_stream_of_vllms(
    begun: list[RequestOutput], error: Exception, status: int, code: str, param: str | None
) -> None:
    *texts, event, done, end = streamed([*begun, error])
    check(json.loads(event.removeprefix("data: ")), code, param)
    assert (done, end) == ("data: [DONE]", "")
    assert len(texts) == (3 if begun else 0)  # the role, and two texts


@pytest.mark.parametrize(
    ("outputs", "attributes", "code"),
    [
        ([output("a"), output("", "error")], {}, "internal_error"),  # the engine gave no reason
        ([output("a"), output("", "stop")], {"parser_cls": object}, "invalid_value"),  # a parser without a tokenizer
        ([output("a"), output("", "stop")], {"response_role": object()}, "invalid_value"),
    ],
    ids=["outcome", "parser", "output"],
)
def test_nor_of_an_error_in_vllms_own_stream(
    outputs: list[RequestOutput | Exception], attributes: dict[str, Any], code: str
) -> None:
    *_, event, done, _ = streamed(outputs, **attributes)
    check(json.loads(event.removeprefix("data: ")), code, None)
    assert done == "data: [DONE]"


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
        return len([output async for output in _with_explained_errors(request, outputs(), told(lambda error: error))])

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
        async for _ in _with_explained_errors(request, outputs(), told(lambda error: explain)):
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


def test_where_a_library_refused_and_who_called_it(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(x: Tensor) -> Tensor:
        raise ValueError("no good")

    with caplog.at_level(logging.INFO, logger=errors.__name__):
        try:
            by_columns(ones(1, 2, 3), 1, refuse)
        except ValueError as refusal:
            translate(refusal)
    place = r"api/test_errors.py:\d+ \(refuse\), called from reducers/fold.py:\d+ \(by_columns\)"
    assert re.fullmatch(f"refused by a library: ValueError in {place}", caplog.messages[0])


def test_every_kind_has_its_own_code() -> None:
    def kinds(kind: type[FoldserveError]) -> list[type[FoldserveError]]:
        return [kind, *(inner for sub in kind.__subclasses__() for inner in kinds(sub))]

    public = [kind for kind in kinds(FoldserveError) if not kind.__name__.startswith("_")]
    assert len({kind.code for kind in public}) == len(public) == 17
    assert all(HTTPStatus(kind.status) >= 400 for kind in public)
