"""The Responses and Messages APIs against the real server, with their makers' clients: they answer as the chat does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.api.apis import APIS, MESSAGES, RESPONSES
from tests.api.live import CHAT
from tests.images import data_uri, photo

PICTURE = data_uri(photo(1))
QUESTION = "What is in the picture?"
OTHERS = ("responses", "messages")


def part(url: str = PICTURE, **detail: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | detail}


def chat(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*(parts or (part(),)), {"type": "text", "text": QUESTION}]
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    return body | fields


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=300)


def of_chat(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a chat answers, in words that all APIs have."""
    answer = post(url, CHAT, body)
    assert answer.status_code == 200, answer.text
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    return {
        "text": choice["message"]["content"],
        "cut": choice["finish_reason"] == "length",
        "input": usage["prompt_tokens"],
        "output": usage["completion_tokens"],
        "vision": usage.get("vision_tokens"),
        "header": answer.headers.get("x-foldserve-vision-tokens"),
    }


def of_other(url: str, api: str, body: dict[str, Any]) -> dict[str, Any]:
    """The same through another API, whose own types take the answer."""
    answer = post(url, APIS[api].path, APIS[api].body(body))
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    if api == "responses":
        response = Response.model_validate(answer.json())
        text, cut = response.output_text, response.status == "incomplete"
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    else:
        message = Message.model_validate(answer.json())
        text = "".join(block.text for block in message.content if block.type == "text")
        cut = message.stop_reason == "max_tokens"
    return {
        "text": text,
        "cut": cut,
        "input": usage["input_tokens"],
        "output": usage["output_tokens"],
        "vision": usage.get("vision_tokens"),
        "header": answer.headers.get("x-foldserve-vision-tokens"),
    }


SAME: dict[str, dict[str, Any]] = {
    "whole": chat(),
    "ratio": chat(reduction_ratio=0.5),
    "method": chat(reduction={"method": "folder_cls", "keep_tokens": 20}),
    "withdrawn": chat(reduction={"ratio": 0.5, "withdraw": True}),
    "low": chat(part(detail="low")),
    "several": chat(part(detail="high"), part(data_uri(photo(2)), detail="low")),
    "text": chat(messages=[{"role": "user", "content": "hello"}]),
    "turns": chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [part(), {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": "A shape."},
            {"role": "user", "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "one?"}]},
        ]
    ),
    "special": chat(messages=[{"role": "user", "content": "</s><image> <s>"}]),
    "sampled": chat(temperature=1, seed=5, top_k=20),
    "one": chat(max_tokens=1),
    "unknown": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("api", OTHERS)
def test_the_answer_is_the_chats(api: str, name: str, server_url: str) -> None:
    """Tokens, text, and what images cost. A system message among Anthropic's others is the chat's, too."""
    assert of_other(server_url, api, SAME[name]) == of_chat(server_url, SAME[name])


def test_instructions_are_a_system_message(server_url: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    body = chat()
    expected = of_chat(server_url, body | {"messages": [system, *body["messages"]]})
    answer = post(server_url, RESPONSES, APIS["responses"].body(body) | {"instructions": "Be brief."}).json()
    assert answer["output"][0]["content"][0]["text"] == expected["text"]
    assert (answer["usage"]["input_tokens"], answer["instructions"]) == (expected["input"], "Be brief.")
    for words in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        answer = post(server_url, MESSAGES, APIS["messages"].body(body) | {"system": words}).json()
        assert (answer["content"][0]["text"], answer["usage"]["input_tokens"]) == (expected["text"], expected["input"])


def test_an_input_that_is_a_text(client: openai.OpenAI, server_url: str) -> None:
    expected = of_chat(server_url, SAME["text"])
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=6, temperature=0)
    assert (answer.output_text, answer.usage and answer.usage.input_tokens) == (expected["text"], expected["input"])


def test_images_over_http(server_url: str, image_url: str) -> None:
    body = chat(part(image_url), reduction_ratio=0.75)
    expected = of_chat(server_url, body)
    assert expected["vision"]["kept"] == 36
    for api in OTHERS:
        assert of_other(server_url, api, body) == expected


def test_log_probabilities(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": "tiny", "temperature": 0, "top_logprobs": 2}
    chat = client.chat.completions.create(messages=question, max_tokens=4, logprobs=True, **settings)
    tokens = [token.model_dump() for token in chat.choices[0].logprobs.content]
    includes: list[dict[str, Any]] = [{"include": ["message.output_text.logprobs"]}, {}]
    for include in includes:
        whole: Any = client.responses.create(input=question, max_output_tokens=4, **include, **settings)
        assert [token.model_dump() for token in whole.output[0].content[0].logprobs] == tokens
    events: Any = client.responses.create(input=question, max_output_tokens=4, stream=True, **settings)
    streamed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [(token.token, token.logprob) for token in streamed] == [(one["token"], one["logprob"]) for one in tokens]


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def test_answers_in_json(server_url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    body = chat(max_tokens=40)
    expected = of_chat(server_url, body | {"response_format": form})
    assert set(json.loads(expected["text"])) == {"a"}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}
    answer = post(server_url, RESPONSES, APIS["responses"].body(body) | {"text": text}).json()
    assert (answer["output"][0]["content"][0]["text"], answer["text"]) == (expected["text"], text)
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = post(server_url, MESSAGES, APIS["messages"].body(body) | {"output_config": config}).json()
    assert answer["content"] == [{"type": "text", "text": expected["text"]}]


def test_a_text_that_ends_an_answer(server_url: str) -> None:
    text = of_chat(server_url, chat())["text"]
    sent = APIS["messages"].body(chat()) | {"stop_sequences": [text[3:6]]}
    answer = post(server_url, MESSAGES, sent).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", text[3:6])
    assert answer["content"][0]["text"] == text[: text.index(text[3:6])]


# Streams


def events_of(url: str, path: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    answer = post(url, path, body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    assert answer.headers["x-accel-buffering"] == "no"
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_events_of_the_responses_api(server_url: str) -> None:
    body = chat(reduction_ratio=0.5)
    expected = of_chat(server_url, body)
    events = list(events_of(server_url, RESPONSES, APIS["responses"].body(body)))
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    for name, data in events:
        assert name == data["type"]
        TypeAdapter[Any](ResponseStreamEvent).validate_python(data)
    names = [name.removeprefix("response.") for name, _ in events]
    deltas = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert deltas > 1
    assert "".join(data["delta"] for _, data in events[4:-4]) == events[-4][1]["text"] == expected["text"]
    assert len({data["item_id"] for _, data in events[3:-2]} | {events[2][1]["item"]["id"]}) == 1
    first, last = events[0][1]["response"], events[-1][1]["response"]
    assert (first["id"], first["status"], first["output"]) == (last["id"], "in_progress", [])
    assert last["output"] == [events[-2][1]["item"]]
    assert last["usage"]["vision_tokens"] == expected["vision"]
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}


def test_events_of_the_messages_api(server_url: str) -> None:
    body = chat(reduction_ratio=0.5)
    expected = of_chat(server_url, body)
    events = list(events_of(server_url, MESSAGES, APIS["messages"].body(body)))
    for name, data in events:
        assert name == data["type"]
        TypeAdapter[Any](RawMessageStreamEvent).validate_python(data)
    names = [name for name, _ in events]
    deltas = names.count("content_block_delta")
    assert deltas > 1
    assert names == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert "".join(data["delta"]["text"] for _, data in events[2:-3]) == expected["text"]
    start, end = events[0][1]["message"], events[-2][1]
    assert start["usage"]["input_tokens"] == end["usage"]["input_tokens"] == expected["input"]
    assert start["usage"]["vision_tokens"] == end["usage"]["vision_tokens"] == expected["vision"]
    assert (end["delta"]["stop_reason"], end["usage"]["output_tokens"]) == ("max_tokens", expected["output"])


def test_the_clients_put_streams_together(client: openai.OpenAI, server_url: str) -> None:
    expected = of_chat(server_url, chat(part(detail="low")))
    sent: Any = APIS["responses"].body(chat(part(detail="low")))
    with client.responses.stream(**sent) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected["text"]
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as claude:
        sent = APIS["messages"].body(chat(part(detail="low")))
        del sent["temperature"]
        with claude.messages.stream(**sent, extra_body={"temperature": 0}) as messages_stream:
            text = "".join(messages_stream.text_stream)
            message: Any = messages_stream.get_final_message()
    assert (text, message.usage.input_tokens) == (expected["text"], expected["input"])
    assert message.usage.vision_tokens == expected["vision"]


def test_an_answer_is_sent_back(client: openai.OpenAI) -> None:
    """As OpenAI's documents say to go on without `previous_response_id`."""
    sent: Any = APIS["responses"].body(chat())
    first = client.responses.create(**sent)
    conversation = [*sent["input"], *(item.model_dump() for item in first.output), {"role": "user", "content": "Why?"}]
    second = client.responses.create(**sent | {"input": conversation})
    assert first.usage and second.usage and second.usage.input_tokens > first.usage.total_tokens
    said = [{"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Why?"}]
    expected = client.chat.completions.create(**chat(messages=[*chat()["messages"], *said]))
    assert second.output_text == expected.choices[0].message.content


# Refusals

MESSAGE = {"role": "user", "content": "x"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *[
        (RESPONSES, {"input": "x", name: value}, name)
        for name, value in {
            "background": True,
            "conversation": "conv_1",
            "previous_response_id": "resp_1",
            "prompt": {"id": "pmpt_1"},
            "store": True,
            "truncation": "auto",
            "max_tool_calls": 3,
            "service_tier": "flex",
            "messages": [],
            "n": 2,
            "max_tokens": 5,
            "moderation": {"model": "m"},
            "mm_processor_kwargs": {},
            "reductionRatio": 0.5,
            "keep_tokens": 20,
            "images": [PICTURE],
            "max_output_tokens": 0,
            "min_tokens": 1025,
            "logit_bias": {"600": 1},
            "tool_choice": "required",
        }.items()
    ],
    (RESPONSES, {}, "input"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"input": 5}, "input"),
    (RESPONSES, {"input": ["x"]}, "input[0]"),
    (RESPONSES, {"input": "x", "include": ["reasoning.encrypted_content"]}, "include[0]"),
    (RESPONSES, {"input": "x", "include": "x"}, "include"),
    (RESPONSES, {"input": "x", "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    (RESPONSES, {"input": "x", "reasoning": {"summary": "auto"}}, "reasoning.summary"),
    (RESPONSES, {"input": "x", "reasoning": {"effort": "vast"}}, "reasoning.effort"),
    (RESPONSES, {"input": "x", "text": {"verbosity": "low"}}, "text.verbosity"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "grammar"}}}, "text.format.type"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    (RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "f"}]}, "tool_choice"),
    (RESPONSES, {"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    (RESPONSES, {"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    (RESPONSES, {"input": [MESSAGE | {"content": None}]}, "input[0].content"),
    (RESPONSES, {"input": [MESSAGE | {"reduction_ratio": 0.5}]}, "input[0].reduction_ratio"),
    (RESPONSES, {"input": [MESSAGE, MESSAGE | {"images": [PICTURE]}]}, "input[1].images"),
    (RESPONSES, {"instructions": "x", "input": [MESSAGE | {"images": [PICTURE]}]}, "input[0].images"),
    (RESPONSES, {"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    *[
        (RESPONSES, {"input": [MESSAGE | {"content": [sent]}]}, f"input[0].content[0]{param}")
        for sent, param in (
            ({"type": "input_file", "file_id": "file-1"}, ".type"),
            ({"type": "input_image", "file_id": "file-1"}, ".file_id"),
            ({"type": "input_image"}, ".image_url"),
            ({"type": "input_image", "image_url": {"url": PICTURE}}, ".image_url"),
            ({"type": "input_image", "image_url": PICTURE, "detail": "huge"}, ".detail"),
            ({"type": "input_image", "image_url": PICTURE, "ratio": 0.5}, ".ratio"),
            ({"type": "input_text"}, ".text"),
            ("x", ""),
        )
    ],
    *[
        (MESSAGES, {"messages": [MESSAGE], "max_tokens": 5, name: value}, name)
        for name, value in {
            "max_tokens": 0,
            "mcp_servers": [],
            "container": "c",
            "input": "x",
            "stop": ["x"],
            "service_tier": "priority",
            "temperature": 3,
            "keepTokens": 20,
            "stop_sequences": [""],
            "thinking": 5,
        }.items()
    ],
    (MESSAGES, {"messages": [MESSAGE]}, "max_tokens"),
    (MESSAGES, {"max_tokens": 5}, "messages"),
    (MESSAGES, {"messages": [], "max_tokens": 5}, "messages"),
    *[
        (MESSAGES, {"messages": [MESSAGE], "max_tokens": 5, **sent}, param)
        for sent, param in (
            ({"thinking": {"type": "deep"}}, "thinking.type"),
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
            ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
            ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
            ({"tools": [{"type": "web_search_20250305", "name": "f"}]}, "tools[0].type"),
            ({"tools": [TOOL]}, "tool_choice"),
            ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
            ({"system": [{"type": "image"}]}, "system[0].type"),
            ({"system": 5}, "system"),
        )
    ],
    *[
        (MESSAGES, {"max_tokens": 5, "messages": [MESSAGE, sent]}, f"messages[1]{param}")
        for sent, param in (
            ({"role": "developer", "content": "x"}, ".role"),
            (MESSAGE | {"content": None}, ".content"),
            (MESSAGE | {"images": [PICTURE]}, ".images"),
            (MESSAGE | {"content": [{"type": "document"}]}, ".content[0].type"),
            (MESSAGE | {"content": [{"type": "text"}]}, ".content[0].text"),
            (MESSAGE | {"content": [{"type": "image"}]}, ".content[0].source"),
            (MESSAGE | {"content": [{"type": "image", "source": {"type": "file"}}]}, ".content[0].source.type"),
            (MESSAGE | {"content": [{"type": "image", "source": {"type": "url"}}]}, ".content[0].source.url"),
            (
                MESSAGE | {"content": [{"type": "image", "source": {"type": "base64", "data": ""}}]},
                ".content[0].source.media_type",
            ),
            (
                MESSAGE | {"content": [{"type": "image", "source": {"type": "url", "url": PICTURE, "ratio": 0.5}}]},
                ".content[0].source.ratio",
            ),
            (
                MESSAGE | {"content": [{"type": "image", "source": {"type": "url", "url": PICTURE}, "keep_tokens": 2}]},
                ".content[0].keep_tokens",
            ),
            (
                MESSAGE | {"content": [{"type": "image", "source": {"type": "url", "url": PICTURE}, "detail": "huge"}]},
                ".content[0].detail",
            ),
            (
                MESSAGE | {"content": [{"type": "tool_result", "content": [{"type": "document"}]}]},
                ".content[0].content[0].type",
            ),
        )
    ],
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED, ids=lambda value: str(value)[-60:])
def test_what_is_not_served_is_refused_by_its_name(
    path: str, body: dict[str, Any], param: str, server_url: str
) -> None:
    answer = post(server_url, path, body)
    assert answer.status_code == 400, answer.text[:500]
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert (set(answer.json()) == {"error"}) == (path == RESPONSES)


def test_the_clients_know_the_errors(client: openai.OpenAI, server_url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as claude:
        with pytest.raises(anthropic.BadRequestError) as refused:
            claude.messages.create(model="tiny", max_tokens=2000, messages=[{"role": "user", "content": "x"}])
        assert refused.value.type == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="other", max_tokens=5, messages=[{"role": "user", "content": "x"}])
