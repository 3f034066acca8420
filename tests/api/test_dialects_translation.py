"""Bodies of the Responses and Messages APIs as chats, and chats' answers in their form, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from foldserve.server.api.dialects import messages, responses, written_messages, written_responses
from foldserve.server.api.dialects.blocks import StreamWriter
from foldserve.server.api.dialects.translation import Translation
from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.limits.body import check_body
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.limits import Limits

PICTURE = "data:image/png;base64,AAAA"


def as_chat(translation: Translation) -> dict[str, Any]:
    """A chat's body that the chat's own checks and model take."""
    check_body(translation.chat, Limits())
    FoldChatRequest.model_validate(json.loads(json.dumps(translation.chat)))
    return translation.chat


CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "ü"}'}}


def test_tools_of_the_responses_api() -> None:
    body = {
        "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}],
        "tool_choice": {"type": "function", "name": "look"},
        "input": [
            {"role": "user", "content": "x"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"at": "ü"}'},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image", "image_url": PICTURE}]},
        ],
    }
    translation = responses.to_chat(body, Limits())
    chat = as_chat(translation)
    function = {"name": "look", "parameters": {"type": "object"}, "strict": True}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    image = {"type": "image_url", "image_url": {"url": PICTURE}}
    assert chat["messages"] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": [image]},
    ]
    for own, sent in (
        ("messages[1].tool_calls[0].function.arguments", "input[2].arguments"),
        ("messages[2].content[0].image_url.url", "input[3].output[0].image_url"),
        ("messages[2].content[0].image_url.detail", "input[3].output[0].detail"),
        ("tools[0].function.name", "tools[0].name"),
        ("tools", "tools"),
        ("messages", "input"),
    ):
        assert translation.as_sent(own) == sent


def test_tools_of_the_messages_api() -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    use = {"type": "tool_use", "id": "a", "name": "look", "input": {"at": "ü"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [picture]}
    body = {
        "max_tokens": 5,
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [thought, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "y"}]},
        ],
    }
    translation = messages.to_chat(body, Limits())
    chat = as_chat(translation)
    assert chat["tools"] == [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert chat["messages"] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": [image]},
        {"role": "user", "content": [{"type": "text", "text": "y"}]},
    ]
    for own, sent in (
        ("messages[1].tool_calls[0].function.arguments", "messages[1].content[1].input"),
        ("messages[2].content[0].image_url.url", "messages[2].content[0].content[0].source.url"),
        ("messages[3].content[0].text", "messages[2].content[1].text"),
        ("messages[3].role", "messages[2].role"),
        ("max_completion_tokens", "max_tokens"),
        ("tools[0].function.parameters", "tools[0].input_schema"),
    ):
        assert translation.as_sent(own) == sent


def chunk(delta: dict[str, Any] | None = None, **more: Any) -> str:
    """One event of a chat's stream."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": more.pop("finish_reason", None)}
    head = {"id": "chatcmpl-1", "created": 1, "model": "tiny", "usage": USAGE, "choices": [choice]}
    return f"data: {json.dumps(head | more)}\n\n"


def called(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": arguments} | ({"name": name} if name else {})
    return {"tool_calls": [{"index": index, "function": function} | ({"id": f"call_{index}"} if name else {})]}


USAGE = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 2}}
STREAM = [
    chunk({"role": "assistant", "content": ""}) + chunk({"reasoning": "h"}),
    chunk({"reasoning": "m"}) + chunk({"content": "I look."}) + chunk(called(0, "", "look")),
    chunk(called(0, '{"at"')) + chunk(called(0, ": 1}")) + chunk(called(1, "{}", "wait")),
    chunk(finish_reason="tool_calls") + chunk(choices=[]) + "data: [DONE]\n\n",
]
FAILED = {"message": "response_format can't be met", "type": "invalid_request_error", "code": "x"}


def written(writer: StreamWriter, pieces: list[str]) -> list[list[dict[str, Any]]]:
    """The data of the events that are written for each piece."""

    async def stream() -> AsyncGenerator[str, None]:
        for one in pieces:
            yield one

    async def collect() -> list[str]:
        return [text async for text in writer.written(stream())]

    events = [text.removesuffix("\n\n").split("\n\n") for text in asyncio.run(collect())]
    return [[json.loads(event.partition("\ndata: ")[2]) for event in each] for each in events]


def test_reasoning_and_tool_calls_in_events_of_the_responses_api() -> None:
    pieces = written(written_responses.ResponsesWriter(Translation(Limits())), STREAM)
    assert len(pieces) == len(STREAM)
    events = [event for each in pieces for event in each]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter[Any](ResponseStreamEvent).validate_python(event)
    response = Response.model_validate(events[-1]["response"])
    assert [item["item"] for item in events if item["type"] == "response.output_item.done"] == events[-1]["response"][
        "output"
    ]
    assert response.status == "completed"
    thought, message, *calls = (item.model_dump() for item in response.output)
    assert (thought["content"][0]["text"], message["content"][0]["text"]) == ("hm", "I look.")
    said = [(call["call_id"], call["name"], call["arguments"]) for call in calls]
    assert said == [("call_0", "look", '{"at": 1}'), ("call_1", "wait", "{}")]
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert [(event["output_index"], event["delta"]) for event in deltas] == [(2, '{"at"'), (2, ": 1}"), (3, "{}")]
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 2


def test_reasoning_and_tool_calls_in_events_of_the_messages_api() -> None:
    pieces = written(written_messages.MessagesWriter(Translation(Limits())), STREAM)
    assert len(pieces) == len(STREAM)
    events = [event for each in pieces for event in each]
    for event in events:
        TypeAdapter[Any](RawMessageStreamEvent).validate_python(event)
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert blocks[2] == {"type": "tool_use", "id": "call_0", "name": "look", "input": {}}
    deltas = [(event["index"], event["delta"]) for event in events if event["type"] == "content_block_delta"]
    assert [index for index, _ in deltas] == [0, 0, 1, 2, 2, 3]
    assert "".join(delta["partial_json"] for index, delta in deltas if index == 2) == '{"at": 1}'
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    usage = {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 9}
    assert events[-2]["usage"] == events[0]["message"]["usage"] == usage


@pytest.mark.parametrize("begun", [False, True], ids=["first", "later"])
def test_an_error_ends_a_stream(begun: bool) -> None:
    """It names the field that the client sent, as the first event too."""
    failed = f"data: {json.dumps({'error': FAILED | {'param': 'response_format'}})}\n\ndata: [DONE]\n\n"
    pieces = [*(STREAM[:1] if begun else []), failed]
    sent = Translation(Limits(), paths={"response_format": "text.format"})
    told = {"message": "text.format can't be met", "param": "text.format", "code": "x"}
    *_, (event,) = written(written_responses.ResponsesWriter(sent), pieces)
    assert event == {"type": "error", "sequence_number": event["sequence_number"], "error": event["error"]} | told
    assert event["error"] == FAILED | told
    *_, (event,) = written(written_messages.MessagesWriter(sent), pieces)
    assert event == {"type": "error", "error": told | {"type": "invalid_request_error"}}


def answer(message: dict[str, Any], **choice: Any) -> ChatCompletionResponse:
    body = {"index": 0, "message": {"role": "assistant"} | message} | choice
    return ChatCompletionResponse(id="chatcmpl-1", model="tiny", choices=[body], usage=USAGE)


@pytest.mark.parametrize("arguments", ['{"at": 1}', '{"at"', "", "[1]"])
def test_tool_calls_in_whole_answers(arguments: str) -> None:
    """A call that the request chose ends with "stop". Arguments may have been cut."""
    call = {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": arguments}}
    chat = answer({"reasoning": "hm", "tool_calls": [call]}, finish_reason="stop")
    response = Response.model_validate(written_responses.ResponsesWriter.whole(chat, Translation(Limits())))
    assert [item.type for item in response.output] == ["reasoning", "function_call"]
    assert response.output[1].arguments == arguments  # type: ignore[union-attr]
    message = Message.model_validate(written_messages.MessagesWriter.whole(chat, Translation(Limits())))
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert message.content[1].input == ({"at": 1} if arguments == '{"at": 1}' else {})  # type: ignore[union-attr]
    assert message.stop_reason == "tool_use"


def test_an_answer_that_says_nothing() -> None:
    for chat in (answer({"content": None}), answer({"content": ""}, stop_reason=2)):
        assert (
            Response.model_validate(written_responses.ResponsesWriter.whole(chat, Translation(Limits()))).output_text
            == ""
        )
        message = written_messages.MessagesWriter.whole(chat, Translation(Limits()))
        assert message["content"] == [{"type": "text", "text": ""}]
        assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


KEYS = [
    "type",
    "role",
    "content",
    "text",
    "input",
    "messages",
    "image_url",
    "source",
    "data",
    "url",
    "media_type",
    "tools",
    "tool_choice",
    "name",
    "system",
    "input_schema",
    "reasoning",
    "thinking",
    "output_config",
    "format",
    "schema",
    "effort",
    "include",
    "instructions",
    "max_tokens",
    "output",
    "call_id",
    "arguments",
    "detail",
    "summary",
    "stop_sequences",
    "budget_tokens",
    "tool_use_id",
    "id",
]
WORDS = [
    "message",
    "user",
    "assistant",
    "system",
    "text",
    "input_text",
    "input_image",
    "image",
    "base64",
    "url",
    "function",
    "function_call",
    "function_call_output",
    "reasoning",
    "tool_result",
    "tool_use",
    "thinking",
    "json_schema",
    "enabled",
    "auto",
    "any",
    "tool",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(WORDS) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)


BLOCKS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5) | JSON, max_size=3)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": BLOCKS | st.text(max_size=3)},
        optional={"type": st.sampled_from(WORDS)},
    )
    | JSON,
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(TURNS, st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_body_is_translated_or_refused(turns: list[Any], fields: dict[str, Any]) -> None:
    for to_chat, own in (
        (responses.to_chat, {"input": turns}),
        (messages.to_chat, {"messages": turns, "max_tokens": 5}),
    ):
        with suppress(InvalidRequest):
            check_body(to_chat(own | fields, Limits()).chat, Limits())


FLOODS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}] * 50_000,
    "parts": [{"role": "user", "content": [{"type": "text", "text": ""}] * 500}] * 100,
    "results": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}] * 50_000}]}],
    "results-between": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}] * 50_000}],
}


@pytest.mark.parametrize("name", FLOODS)
def test_no_more_is_translated_than_a_chat_may_have(name: str) -> None:
    """Else a MB of them would hold the event loop for longer than the chat's checks."""
    with pytest.raises(LimitExceeded):
        messages.to_chat({"messages": FLOODS[name], "max_tokens": 5}, Limits())
    if not name.startswith("results"):
        with pytest.raises(LimitExceeded):
            responses.to_chat({"input": FLOODS[name]}, Limits())
