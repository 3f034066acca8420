"""Our fields in the wrong place are read or refused; fields of other servers are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionMessage,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_input_image import ResponseInputImage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.chat_utils import CustomChatCompletionMessageParam

from foldserve.reducers.reduction import FIELDS
from foldserve.server.api.auto import AUTO_FIELDS
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits import misplaced
from foldserve.server.api.limits.body import check_body
from foldserve.server.api.media.places import places_of_media
from foldserve.server.api.schema import DETAILS, FoldChatRequest
from foldserve.server.limits import Limits

URL = "https://example.com/a.png"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "What is this?"}


def chat(*parts: object, **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts) or [PICTURE, TEXT]}]} | more


def message(**more: object) -> dict[str, Any]:
    """A second message of a chat with more fields."""
    return {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"} | more]}


SECOND, PART = "messages[1]", "messages[0].content[0]"
RATIO = {"reduction_ratio": 0.5}
ENCODED = "iVBORw0KGgo="

REDUCTIONS: list[tuple[dict[str, Any], str]] = [
    (chat(reductionRatio=0.5), "reductionRatio"),
    (chat(**{"reduction-ratio": 0.5}), "['reduction-ratio']"),
    (chat(**{"reduction.ratio": 0.5}), "['reduction.ratio']"),
    (chat(REDUCTION_RATIO=0), "REDUCTION_RATIO"),
    (chat(Reduction={"ratio": 0.5}), "Reduction"),
    (chat(ratio=0.5), "ratio"),
    (chat(keep_tokens=20), "keep_tokens"),
    (chat(keepTokens=20), "keepTokens"),
    (chat(reduction_method="tome"), "reduction_method"),
    (chat(withdraw=False), "withdraw"),
    (chat(method="tome"), "method"),
    (chat(positions="keep"), "positions"),
    (chat(extra_body=RATIO), "extra_body"),
    (chat(extra_body={"top_k": 5}), "extra_body"),
    (chat(extraBody=RATIO), "extraBody"),
    (chat(options={"num_predict": 5} | RATIO), "options.reduction_ratio"),
    (chat(providerOptions={"any": [{"x": 1}, {"reductionRatio": 0.5}]}), "providerOptions.any[1].reductionRatio"),
    (chat(stream=True, stream_options={"include_usage": True} | RATIO), "stream_options.reduction_ratio"),
    (message(reduction={"ratio": 0.5}), f"{SECOND}.reduction"),
    (message(**RATIO), f"{SECOND}.reduction_ratio"),
    (message(keepTokens=20), f"{SECOND}.keepTokens"),
    (message(decoder_ratio=0.5), f"{SECOND}.decoder_ratio"),
    (message(extra_body=RATIO), f"{SECOND}.extra_body"),
    (chat(PICTURE | {"reduction": {"ratio": 0.5}}), f"{PART}.reduction"),
    (chat(PICTURE | {"ratio": 0.5}), f"{PART}.ratio"),
    (chat({"image_url": URL, "keep_tokens": 20}), f"{PART}.keep_tokens"),
    (chat(TEXT | RATIO), f"{PART}.reduction_ratio"),
    (chat({"type": "image_url", "image_url": {"url": URL} | RATIO}), f"{PART}.image_url.reduction_ratio"),
    (chat({"type": "image_url", "image_url": {"url": URL, "scale": "none"}}), f"{PART}.image_url.scale"),
    (chat({"type": "image_url", "image_url": {"url": URL, "extra_body": RATIO}}), f"{PART}.image_url.extra_body"),
]

MEDIA: list[tuple[dict[str, Any], str]] = [
    (message(images=[ENCODED]), f"{SECOND}.images"),
    (message(image=ENCODED), f"{SECOND}.image"),
    (message(image_url={"url": URL}), f"{SECOND}.image_url"),
    (message(imageUrls=[URL]), f"{SECOND}.imageUrls"),
    (message(input_image=URL), f"{SECOND}.input_image"),
    (message(files=[{"id": "file-1"}]), f"{SECOND}.files"),
    (message(file={"file_id": "file-1"}), f"{SECOND}.file"),
    (message(file_ids=["file-1"]), f"{SECOND}.file_ids"),
    (message(attachments=[{"url": URL}]), f"{SECOND}.attachments"),
    (message(experimental_attachments=[{"url": URL}]), f"{SECOND}.experimental_attachments"),
    (message(audio={"id": "audio-1"}), f"{SECOND}.audio"),  # OpenAI knows it of assistants
    (message(input_audio={"data": ENCODED}), f"{SECOND}.input_audio"),
    (message(video=URL), f"{SECOND}.video"),
    (message(videos=[URL]), f"{SECOND}.videos"),
    (message(role="assistant", images=[PICTURE]), f"{SECOND}.images"),
    (chat(images=[ENCODED]), "images"),
    (chat(attachments=[URL]), "attachments"),
    (chat(TEXT | {"image_url": {"url": URL}}), f"{PART}.image_url"),
    (chat(TEXT | {"image": ENCODED}), f"{PART}.image"),
    (chat(PICTURE | {"text": "What is this?"}), f"{PART}.text"),
    (chat(PICTURE | {"video_url": {"url": URL}}), f"{PART}.video_url"),
]

FUNCTIONS: list[tuple[dict[str, Any], str]] = [
    (chat(functions=[{"name": "f"}]), "functions"),
    (chat(functions=[{"name": "f"}], function_call="auto"), "function_call"),
    (chat(functions=[{"name": "f"}], function_call={"name": "f"}), "function_call"),
    (chat(function_call="auto"), "function_call"),
]


@pytest.mark.parametrize(("body", "param"), [*REDUCTIONS, *MEDIA, *FUNCTIONS], ids=lambda v: str(v)[-60:])
def test_what_would_be_ignored_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_body(body, Limits())
    assert caught.value.param == param


@pytest.mark.parametrize(("body", "param"), REDUCTIONS, ids=lambda v: str(v)[-60:])
def test_a_misplaced_reduction_is_told_its_place(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=r'"reduction|top of the body'):
        check_body(body, Limits())


ECHOES: list[dict[str, Any]] = [
    ChatCompletionMessage(role="assistant", content="a star").model_dump(),
    {"role": "assistant", "content": "", "reasoning_content": "hm", "refusal": None, "annotations": [], "images": []},
    {"role": "assistant", "content": "x", "audio": {"id": "audio-1", "data": ENCODED, "transcript": "x"}},
    {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "user", "content": "x", "files": None, "attachments": [], "image": "", "id": "1", "createdAt": 5},
    {"role": "assistant", "content": "x", "usage": {"vision_tokens": {"ratio": 0.5, "method": "folder"}}},
    {"role": "user", "content": "x", "ratio": "16:9", "method": "GET", "scale": 2, "window": [0, 5], "layers": []},
    {"role": "user", "content": [TEXT | {"cache_control": {"type": "ephemeral"}, "positions": [1], "image_url": None}]},
    {"role": "user", "content": [PICTURE | {"index": 0, "text": "", "reduction": None, "id": "a"}]},
]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda v: str(v)[-60:])
def test_what_clients_send_back_is_taken(echo: dict[str, Any]) -> None:
    check_body({"messages": [echo]}, Limits())


@pytest.mark.parametrize(
    "more",
    [
        {"metadata": {"reduction_ratio": "0.5"}},  # OpenAI's labels, which users make up
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"keep_tokens": {}}}}}},
        {"tools": [{"function": {"name": "f", "parameters": {"properties": {"reduction": {}}}}}]},
        {"audio": {"voice": "alloy", "format": "wav"}, "modalities": ["text"]},
        {"extra_body": {}, "extraBody": None, "ratio": None, "images": []},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"functions": [], "function_call": None},
        {"options": {"ratio": 1, "method": "x", "image": "y"}, "some_field_of_another_server": True},
        {"reduction": {"ratio": 0.5}},
    ],
    ids=str,
)
def test_what_is_not_meant_for_us_is_taken(more: dict[str, Any]) -> None:
    check_body(chat(**more), Limits())


SPELLINGS = [
    str.upper,
    str.title,
    lambda name: name.replace("_", "-"),
    lambda name: name.replace("_", "."),
    lambda name: name.title().replace("_", ""),
    lambda name: name[0] + name.title().replace("_", "")[1:],
]


NAMES = {"reduction", *FIELDS, *(f"reduction_{field}" for field in FIELDS)}


@given(st.sampled_from(sorted(NAMES)), st.sampled_from([str, *SPELLINGS]))
def test_every_field_in_every_spelling(name: str, spell: Any) -> None:
    """A field that a method brings is among them by itself."""
    key = spell(name)
    bodies: list[dict[str, Any]] = [chat(PICTURE | {key: 1}), chat({"image_url": {"url": URL, key: 1}})]
    if key not in ("reduction", "reduction_ratio"):
        bodies.append(chat(**{key: 1}))
    if name not in misplaced.ORDINARY_WORDS:
        bodies += [message(**{key: 1}), chat(TEXT | {key: 1}), chat(options=[{"x": {key: 1}}])]
    for body in bodies:
        with pytest.raises(InvalidRequest):
            check_body(body, Limits())


def test_ordinary_words_are_fields() -> None:
    assert FIELDS.keys() > misplaced.ORDINARY_WORDS
    properties = FoldChatRequest.model_json_schema()["properties"]["reduction"]["properties"]
    assert {*FIELDS, *AUTO_FIELDS} == properties.keys()


# Compared with the installed packages: what they know is theirs.


def test_fields_of_openai_and_vllm_are_theirs() -> None:
    for name in {*get_type_hints(CompletionCreateParamsBase), *ChatCompletionRequest.model_fields}:
        misplaced.check_top({name: "x"})


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("assistant", ChatCompletionAssistantMessageParam),
        ("developer", ChatCompletionDeveloperMessageParam),
        ("function", ChatCompletionFunctionMessageParam),
        ("system", ChatCompletionSystemMessageParam),
        ("tool", ChatCompletionToolMessageParam),
        ("user", ChatCompletionUserMessageParam),
        ("user", CustomChatCompletionMessageParam),
    ],
)
def test_fields_of_messages_are_theirs(role: str, kind: type) -> None:
    misplaced.check_message(dict.fromkeys(get_type_hints(kind), "x") | {"role": role}, None)


def test_fields_of_answers_may_come_back() -> None:
    misplaced.check_message(dict.fromkeys(ChatCompletionMessage.model_fields, "x") | {"role": "assistant"}, None)


def test_fields_of_parts_are_theirs() -> None:
    for kind in (ChatCompletionContentPartTextParam, ChatCompletionContentPartRefusalParam):
        misplaced.check_text(dict.fromkeys(get_type_hints(kind), "x"), None)
    part: dict[str, object] = dict.fromkeys(get_type_hints(ChatCompletionContentPartImageParam), "x")
    misplaced.check_media(part | {"image_url": dict.fromkeys(get_type_hints(ImageURL), "x")}, "image", None)


def test_details_are_those_of_the_openai_client() -> None:
    chats, responses = get_type_hints(ImageURL)["detail"], ResponseInputImage.model_fields["detail"].annotation
    assert set(get_args(chats)) == set(get_args(responses)) == set(DETAILS)


def details(*sources: Mapping[str, object]) -> list[str]:
    parts = [{"type": "image_url", **source} for source in sources]
    return FoldChatRequest.model_validate(chat(*parts)).progress.details.get("image", [])


def test_details_of_images() -> None:
    def inner(detail: object) -> dict[str, object]:
        return {"image_url": {"url": URL, "detail": detail}}

    given = [inner(detail) for detail in (*DETAILS, "", None)]
    assert details(*given) == [*DETAILS, "auto", "auto"]
    given += [inner("") | {"detail": None}, {"image_url": URL, "detail": ""}]
    for source in given:
        request = FoldChatRequest.model_validate(chat({"type": "image_url", **source}))
        assert len(list(places_of_media(request.messages))) == 1  # pydantic reads a content only now
    outer: list[dict[str, object]] = [
        {"image_url": {"url": URL}, "detail": "low"},
        {"image_url": URL, "detail": "low"},
    ]
    assert details(*outer, inner("high") | {"detail": "high"}, inner("low") | {"detail": ""}) == [
        "low",
        "low",
        "high",
        "low",
    ]
    for bad, param in (
        (inner("tiny"), "image_url.detail"),
        (inner(["low"]), "image_url.detail"),
        ({"image_url": URL, "detail": "Low"}, "detail"),
        (inner("high") | {"detail": "low"}, "detail"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            details(bad)
        assert caught.value.param == f"{PART}.{param}"


def test_a_text_with_an_empty_image_is_no_image() -> None:
    body = chat(TEXT | {"image_url": None}, PICTURE)
    check_body(body, Limits())
    request = FoldChatRequest.model_validate(body)
    assert request.progress.details == {"image": ["auto"]}
    assert [place.url for place in places_of_media(request.messages)] == [URL]
