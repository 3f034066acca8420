"""OpenAI's Responses API -> chat: `POST /v1/responses`. Answers are not stored, so requests can't refer to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from foldserve.server.api.dialects.translation import (
    SHARED,
    Translation,
    at,
    check_fields,
    check_values,
    image_part,
    object_of,
)
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.limits import Limits

_NOT_KEPT = "answers are not kept"
_SEND_ALL = f"{_NOT_KEPT}: the whole conversation belongs into `input`"
_ONLY: Mapping[str, tuple[Collection[Any], str]] = {
    "background": ((False,), _NOT_KEPT),
    "conversation": ((), _SEND_ALL),
    "max_tool_calls": ((), "the server runs no tools itself"),
    "previous_response_id": ((), _SEND_ALL),
    "prompt": ((), "prompts are not kept here: their text belongs into `instructions` and `input`"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), _NOT_KEPT),
    "truncation": (("disabled",), "a prompt is never cut"),
}
_HINTS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "stream_options",
    "user",
)  # no effect here
_OWN = ("include", "input", "instructions", "reasoning", "text", "tool_choice", "tools")
_AS_IN_CHAT = SHARED | {"parallel_tool_calls", "top_logprobs", "user"}
_KNOWN = frozenset({*_AS_IN_CHAT, *_ONLY, *_HINTS, *_OWN, "max_output_tokens"})
_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
)
_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("assistant", "developer", "system", "user")
_PARTS = ("image_url", "refusal", "text", "video_url")  # types of parts that a chat takes as they are
_OF_ANSWERS = ("annotations", "logprobs")
_OF_ITEMS = ("content", "id", "phase", "role", "status", "type")


def to_chat(body: Mapping[str, Any], limits: Limits) -> Translation:
    """Translates a request to a chat request; raises InvalidRequest for a field or value that is not served."""
    check_fields(body, _KNOWN)
    check_values(body, _ONLY)
    translation = Translation(limits, echo={name: body[name] for name in _ECHOED if body.get(name) is not None})
    chat, paths = translation.chat, translation.paths
    chat |= {name: body[name] for name in _AS_IN_CHAT if body.get(name) is not None}
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    paths |= {"max_completion_tokens": "max_output_tokens", "messages": "input"}
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    _logprobs(body, translation)
    _text(body.get("text"), translation)
    _reasoning(body.get("reasoning"), translation)
    _tools(body, translation)
    if body.get("instructions") is not None:
        own = translation.add_message({"role": "system", "content": body["instructions"]}, "instructions")
        paths[f"{own}.content"] = "instructions"
    _input(body.get("input"), translation)
    return translation


def _logprobs(body: Mapping[str, Any], translation: Translation) -> None:
    include = body.get("include")
    for i, name in enumerate([] if include is None else translation.entries(include, "include")):
        if name != _LOGPROBS:
            raise InvalidRequest(f'include may hold "{_LOGPROBS}" only', f"include[{i}]")
    if include or body.get("top_logprobs"):
        translation.chat["logprobs"] = True
    check = {"include_obfuscation": ((False,), "events have no padding")}
    if (options := body.get("stream_options")) is not None:
        check_fields(object_of(options, "stream_options"), check, "stream_options")
        check_values(options, check, "stream_options")


def _text(text: object, translation: Translation) -> None:
    if text is None:
        return
    check_fields(object_of(text, "text"), ("format", "verbosity"), "text")
    assert isinstance(text, dict)
    check_values(text, {"verbosity": (("medium",), "models are not told how much to say")}, "text")
    if text.get("format") is None:
        return
    wanted = object_of(text["format"], "text.format")
    kind = wanted.get("type")
    if kind == "json_schema":
        form = {"type": kind, "json_schema": {name: value for name, value in wanted.items() if name != "type"}}
    elif kind == "json_object":
        form = {"type": kind}
    elif kind == "text":
        return
    else:
        raise InvalidRequest("text.format.type must be text, json_object or json_schema", "text.format.type")
    translation.chat["response_format"] = form
    translation.paths |= {"response_format": "text.format", "response_format.json_schema": "text.format"}


def _reasoning(reasoning: object, translation: Translation) -> None:
    if reasoning is None:
        return
    check_fields(object_of(reasoning, "reasoning"), ("effort",), "reasoning")
    assert isinstance(reasoning, dict)
    if reasoning.get("effort") is not None:
        translation.chat["reasoning_effort"] = reasoning["effort"]
        translation.paths["reasoning_effort"] = "reasoning.effort"


def _tools(body: Mapping[str, Any], translation: Translation) -> None:
    tools = [] if body.get("tools") is None else translation.entries(body["tools"], "tools")
    known = ("description", "name", "parameters", "strict")
    translated = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if object_of(tool, path).get("type") != "function":
            raise InvalidRequest("only tools of type function are served", f"{path}.type")
        check_fields(tool, (*known, "type"), path)
        translated.append({"type": "function", "function": {name: tool[name] for name in known if name in tool}})
        translation.paths[f"{path}.function"] = path
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise InvalidRequest("only a tool of type function can be chosen", "tool_choice.type")
        check_fields(choice, ("name", "type"), "tool_choice")
        choice = {"type": "function", "function": {"name": choice.get("name")}}
        translation.paths["tool_choice.function"] = "tool_choice"
    if translated:
        translation.chat["tools"] = translated
    if translated or choice not in (None, "auto", "none"):
        translation.chat["tool_choice"] = "auto" if choice is None else choice


def _input(value: object, translation: Translation) -> None:
    if isinstance(value, str):
        own = translation.add_message({"role": "user", "content": value}, "input")
        translation.paths[f"{own}.content"] = "input"
        return
    if not value or not isinstance(value, list):
        raise InvalidRequest("input must be a text or a list of items", "input")
    for i, item in enumerate(translation.entries(value, "input")):
        path = f"input[{i}]"
        kind = object_of(item, path).get("type")
        if kind in ("message", None):
            _message(item, path, translation)
        elif kind == "function_call":
            _call(item, path, translation)
        elif kind == "function_call_output":
            own = translation.add_message({"role": "tool", "tool_call_id": item.get("call_id")}, path)
            _content(item.get("output"), own, f"{path}.output", translation)
            translation.paths[f"{own}.tool_call_id"] = f"{path}.call_id"
        elif kind == "reasoning":
            _thought(item, path, translation)
        else:
            raise InvalidRequest(
                "an item must be of type message, function_call, function_call_output or reasoning", f"{path}.type"
            )


def _message(item: Mapping[str, Any], path: str, translation: Translation) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(_ROLES)}", f"{path}.role")
    message = {"role": role} | {name: value for name, value in item.items() if name not in _OF_ITEMS}
    own = _before(("content", "tool_calls"), translation) if role == "assistant" else None
    if own is None:
        own = translation.add_message(message, path)
    else:
        translation.chat["messages"][-1] |= message
    _content(item.get("content"), own, f"{path}.content", translation)


def _before(empty: Collection[str], translation: Translation) -> str | None:
    """The path of the last message if it is an assistant's without these fields, since one answer has several items."""
    messages = translation.chat.get("messages", [])
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in empty):
        return None
    return f"messages[{len(messages) - 1}]"


def _content(content: object, own: str, path: str, translation: Translation) -> None:
    translation.paths[f"{own}.content"] = path
    if isinstance(content, list):
        parts = translation.entries(content, path)
        content = [_part(part, p, own, path, translation) for p, part in enumerate(parts)]
    elif not isinstance(content, str):
        raise InvalidRequest("content must be a text or a list of parts", path)
    translation.chat["messages"][-1]["content"] = content


def _part(part: object, p: int, own: str, path: str, translation: Translation) -> dict[str, Any]:
    path = f"{path}[{p}]"
    kind = object_of(part, path).get("type")
    assert isinstance(part, dict)
    if kind in ("input_text", "output_text"):
        return {name: value for name, value in part.items() if name not in _OF_ANSWERS} | {"type": "text"}
    if kind != "input_image":
        if kind not in _PARTS:
            raise InvalidRequest("a part must be of type input_text, input_image or video_url", f"{path}.type")
        return part
    if part.get("file_id") is not None:
        raise InvalidRequest("files are not kept here: send the image as `image_url`", f"{path}.file_id")
    translation.paths |= {
        f"{own}.content[{p}].image_url.url": f"{path}.image_url",
        f"{own}.content[{p}].image_url.detail": f"{path}.detail",
    }
    return image_part(part, part.get("image_url"), ("file_id", "image_url"))


def _call(item: Mapping[str, Any], path: str, translation: Translation) -> None:
    own = _before((), translation) or translation.add_message({"role": "assistant"}, path)
    calls = translation.chat["messages"][-1].setdefault("tool_calls", [])
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    translation.paths |= {
        f"{own}.tool_calls[{len(calls)}]": path,
        f"{own}.tool_calls[{len(calls)}].id": f"{path}.call_id",
        f"{own}.tool_calls[{len(calls)}].function": path,
    }
    calls.append({"id": item.get("call_id"), "type": "function", "function": function})


def _thought(item: Mapping[str, Any], path: str, translation: Translation) -> None:
    if item.get("encrypted_content") is not None:
        raise InvalidRequest("nobody here can decrypt it: leave it out", at(path, "encrypted_content"))
    parts = translation.entries(item.get("content") or item.get("summary") or [], f"{path}.content")
    texts = [object_of(part, f"{path}.content[{p}]").get("text") for p, part in enumerate(parts)]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("text must be a text", f"{path}.content")
    if texts:
        own = translation.add_message({"role": "assistant", "reasoning": "".join(map(str, texts))}, path)
        translation.paths[f"{own}.reasoning"] = f"{path}.content"
