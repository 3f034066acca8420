"""Refusals that depend on the body's JSON alone, before any model of it is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.limits import misplaced
from foldserve.server.api.limits.misplaced import URL_FIELDS, WITH_ARTICLE
from foldserve.server.api.limits.repetition import check_repetition
from foldserve.server.api.limits.strict_json import Path, parse, to_text
from foldserve.server.engine.family import Modality
from foldserve.server.limits import Limits

_NOT_A_CLIENTS = {
    "chat_template": "the model's own is used",
    "ec_transfer_params": "it is for servers among themselves",
    "kv_transfer_params": "it is for servers among themselves",
    "media_io_kwargs": "the server says which frames of a video are taken, and how images are read",
    "mm_processor_kwargs": "use `reduction`",
    "prompt_embeds": "only texts, images and videos are taken",
    "vllm_xargs": "it is for the server's own extensions",
}
_SAFE_TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}  # type of a part -> its field
_SCHEMAS = ("response_format", "structured_outputs", "tools")


@dataclass(slots=True)
class BodyCounts:
    """Counts over a chat's messages. `parts` includes tool calls; the text of all `characters` goes into the prompt."""

    images: int = 0
    videos: int = 0
    parts: int = 0
    characters: int = 0


def check_body(body: Mapping[str, Any], limits: Limits) -> BodyCounts:
    """Refuses what clients may not set, what would be ignored, media but images and videos, and too much."""
    for name, reason in _NOT_A_CLIENTS.items():
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} can't be set by a request: {reason}", name)
    misplaced.check_top(body)
    _check_functions(body)
    for name, most in _longest(limits):
        entries = body.get(name)
        if isinstance(entries, list | dict) and len(entries) > most:
            raise LimitExceeded(f"{name} may have {most} entries at most, not {len(entries)}", name)
    _check_template_switches(body.get("chat_template_kwargs"))
    for name in _SCHEMAS:
        if body.get(name) is not None and len(json.dumps(body[name])) > limits.max_schema_kb * 1000:
            raise LimitExceeded(f"{name} is longer than {limits.max_schema_kb:g} kB", name)
        check_repetition(body.get(name), (None, name))
    contents = BodyCounts()
    if isinstance(body.get("messages"), list):
        _check_messages(body["messages"], contents, limits)
    return contents


def _longest(limits: Limits) -> Iterator[tuple[str, int]]:
    """Lists and objects of the body that have a bound. Before pydantic, which reports every bad entry."""
    yield "stop", limits.max_stop_strings
    yield "tools", limits.max_tools
    yield "documents", limits.max_parts
    for name in ("allowed_token_ids", "bad_words", "logit_bias", "logprob_token_ids", "stop_token_ids"):
        yield name, limits.max_logit_bias


def _check_template_switches(switches: object) -> None:
    if switches is None:
        return
    path = "chat_template_kwargs"
    if not isinstance(switches, dict):
        raise InvalidRequest(f"{path} must be an object", path)
    for name, value in switches.items():
        if name not in _SAFE_TEMPLATE_SWITCHES or not isinstance(value, bool):
            known = ", ".join(_SAFE_TEMPLATE_SWITCHES)
            raise InvalidRequest(f"{path} can't be set by a request, but for these as true or false: {known}", path)


def _check_functions(body: Mapping[str, Any]) -> None:
    """Refuses `functions`, the form that `tools` had until 2023, which vLLM does not know."""
    choice = body.get("function_call")
    if choice == "none" or (choice is None and not body.get("functions")):
        return
    raise InvalidRequest(
        'functions, the older form of `tools`, can\'t be called: leave them out, or send "none" as `function_call`',
        "functions" if choice is None else "function_call",
    )


def _check_messages(messages: list[Any], contents: BodyCounts, limits: Limits) -> None:
    if len(messages) > limits.max_messages:
        raise LimitExceeded(f"a chat may have {limits.max_messages} messages at most, not {len(messages)}", "messages")
    for m, message in enumerate(messages):
        path: Path = ((None, "messages"), m)
        if not isinstance(message, dict):
            raise InvalidRequest("a message must be an object", to_text(path))
        if not isinstance(message.get("role"), str):
            raise InvalidRequest("a message needs a role", to_text((path, "role")))
        misplaced.check_message(message, path)
        _check_tool_calls(message.get("tool_calls"), (path, "tool_calls"), contents, limits)
        _check_content(message.get("content"), (path, "content"), contents, limits)
    for kind, count, most in (
        ("images", contents.images, limits.max_images_per_request),
        ("videos", contents.videos, limits.max_videos_per_request),
    ):
        if count > most:
            raise LimitExceeded(f"a request may have {most} {kind} at most, not {count}", "messages")


def _check_content(content: object, path: Path, contents: BodyCounts, limits: Limits) -> None:
    if isinstance(content, str):
        contents.characters += len(content)
    elif isinstance(content, list):
        _add_parts(len(content), contents, limits)
        for p, part in enumerate(content):
            _check_part(part, (path, p), contents)
    elif content is not None:
        raise InvalidRequest("content must be a text or a list of parts", to_text(path))


def _add_parts(number: int, contents: BodyCounts, limits: Limits) -> None:
    contents.parts += number
    if contents.parts > limits.max_parts:
        most = limits.max_parts
        raise LimitExceeded(f"a chat may have {most} parts of contents and tool calls at most", "messages")


def _check_tool_calls(calls: object, path: Path, contents: BodyCounts, limits: Limits) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise InvalidRequest("tool_calls must be a list", to_text(path))
    _add_parts(len(calls), contents, limits)
    for c, call in enumerate(calls):
        if not isinstance(call, dict):
            raise InvalidRequest("a tool call must be an object", to_text((path, c)))
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            _check_arguments(arguments, (((path, c), "function"), "arguments"), limits)


def _check_arguments(arguments: str, path: Path, limits: Limits) -> None:
    """Checks JSON in a text, which vLLM parses for the template; vLLM takes anything else for no arguments."""
    try:
        parse(arguments.encode(), limits)
    except LimitExceeded as error:
        raise LimitExceeded(str(error).replace("the body", "the text", 1), to_text(path)) from error
    except InvalidRequest:
        return


def _check_part(part: object, path: Path, contents: BodyCounts) -> None:
    if not isinstance(part, dict):
        raise InvalidRequest("a part of a message must be an object", to_text(path))
    if part.get("uuid") is not None:
        raise InvalidRequest("a picture's identity is its content: leave `uuid` out", to_text((path, "uuid")))
    if (modality := media_of(part)) is not None:
        _check_url(part.get(URL_FIELDS[modality]), (path, URL_FIELDS[modality]), modality)
        misplaced.check_media(part, modality, path)
        contents.images += modality == "image"
        contents.videos += modality == "video"
        return
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest("a part must be of type text, image_url or video_url", to_text((path, "type")))
    field = _TEXT_PARTS[kind]
    text = part.get(field)
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a text", to_text((path, field)))
    misplaced.check_text(part, path)
    contents.characters += len(text)


def media_of(part: Mapping[str, Any]) -> Modality | None:
    """What vLLM takes a part of a message's content for: an image, a video, or neither."""
    for modality, field in URL_FIELDS.items():
        if part.get("type", field if field in part else None) == field:
            return modality
    return None


def _check_url(source: object, path: Path, modality: Modality) -> None:
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str):
        raise InvalidRequest(
            f'{WITH_ARTICLE[modality]} needs {{"url": "https://..."}} or a data: URL there', to_text((path, "url"))
        )
