"""Anthropic's Messages API -> chat: `POST /v1/messages`."""

from __future__ import annotations

import json
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

_ONLY: Mapping[str, tuple[Collection[Any], str]] = {
    "service_tier": (("auto", "standard_only"), "there is one tier"),
}
_HINTS = ("cache_control", "metadata")  # no effect here, since prompts are always cached
_OWN = ("max_tokens", "messages", "output_config", "stop_sequences", "system", "thinking", "tool_choice", "tools")
_KNOWN = frozenset({*SHARED, *_ONLY, *_HINTS, *_OWN})
_CHOICES = {"any": "required", "auto": "auto", "none": "none"}
_ROLES = ("assistant", "system", "user")
_TYPES = {
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
    "tool": ("text", "image"),
}
"""Types of blocks that a message of each role may hold; `tool` is a tool_result."""


def to_chat(body: Mapping[str, Any], limits: Limits) -> Translation:
    """Translates a request to a chat request; raises InvalidRequest for a field or value that is not served."""
    check_fields(body, _KNOWN)
    check_values(body, _ONLY)
    if body.get("max_tokens") is None:
        raise InvalidRequest("max_tokens is missing", "max_tokens")
    translation = Translation(limits)
    chat, paths = translation.chat, translation.paths
    chat |= {name: body[name] for name in SHARED if body.get(name) is not None}
    chat["max_completion_tokens"] = body["max_tokens"]
    paths |= {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}
    if body.get("stop_sequences") is not None:
        chat["stop"] = translation.entries(body["stop_sequences"], "stop_sequences")
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}  # the first event has counts
    _thinking(body.get("thinking"), translation)
    _output(body.get("output_config"), translation)
    _tools(body, translation)
    if body.get("system") is not None:
        own = translation.add_message({"role": "system"}, "system")
        chat["messages"][-1]["content"] = _content(body["system"], "system", own, "system", translation)
    for i, message in enumerate(translation.entries(body.get("messages"), "messages")):
        _message(message, f"messages[{i}]", translation)
    if not body["messages"]:
        raise InvalidRequest("messages must not be empty", "messages")
    return translation


def _thinking(thinking: object, translation: Translation) -> None:
    if thinking is None:
        return
    kind = object_of(thinking, "thinking").get("type")
    assert isinstance(thinking, dict)
    check_fields(thinking, ("budget_tokens", "type") if kind == "enabled" else ("type",), "thinking")
    if kind == "enabled":
        translation.chat["thinking_token_budget"] = thinking.get("budget_tokens")
        translation.paths["thinking_token_budget"] = "thinking.budget_tokens"
    elif kind == "disabled":
        translation.chat["reasoning_effort"] = "none"
    elif kind != "adaptive":
        raise InvalidRequest("thinking.type must be enabled, disabled or adaptive", "thinking.type")


def _output(config: object, translation: Translation) -> None:
    if config is None:
        return
    check_fields(object_of(config, "output_config"), ("effort", "format"), "output_config")
    assert isinstance(config, dict)
    if config.get("effort") is not None:
        translation.chat["reasoning_effort"] = config["effort"]
        translation.paths["reasoning_effort"] = "output_config.effort"
    if config.get("format") is None:
        return
    path = "output_config.format"
    wanted = object_of(config["format"], path)
    check_fields(wanted, ("schema", "type"), path)
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        raise InvalidRequest(f"{path} must be of type json_schema, with a schema", path)
    schema = {"name": "answer", "schema": wanted["schema"]}
    translation.chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    translation.paths |= {"response_format": path, "response_format.json_schema": path}


def _tools(body: Mapping[str, Any], translation: Translation) -> None:
    tools = [] if body.get("tools") is None else translation.entries(body["tools"], "tools")
    translated = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if object_of(tool, path).get("type") not in (None, "custom"):
            raise InvalidRequest("the server runs no tools itself: only your own are served", f"{path}.type")
        check_fields(tool, ("cache_control", "description", "input_schema", "name", "strict", "type"), path)
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        function |= {name: tool[name] for name in ("description", "strict") if name in tool}
        translated.append({"type": "function", "function": function})
        translation.paths |= {f"{path}.function": path, f"{path}.function.parameters": f"{path}.input_schema"}
    if translated:
        translation.chat |= {"tools": translated, "tool_choice": "auto"}
    if body.get("tool_choice") is not None:
        _choice(object_of(body["tool_choice"], "tool_choice"), translation)


def _choice(choice: Mapping[str, Any], translation: Translation) -> None:
    kind = choice.get("type")
    check_fields(choice, ("disable_parallel_tool_use", "name", "type"), "tool_choice")
    if kind == "tool":
        translation.chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
        translation.paths["tool_choice.function"] = "tool_choice"
    elif kind in _CHOICES:
        translation.chat["tool_choice"] = _CHOICES[kind]
    else:
        raise InvalidRequest("tool_choice.type must be auto, any, tool or none", "tool_choice.type")
    if choice.get("disable_parallel_tool_use") is not None:
        translation.chat["parallel_tool_calls"] = choice["disable_parallel_tool_use"] is False
        translation.paths["parallel_tool_calls"] = "tool_choice.disable_parallel_tool_use"


def _message(message: object, path: str, translation: Translation) -> None:
    """Adds a message; each tool result in a user's message becomes a message of its own."""
    role = object_of(message, path).get("role")
    assert isinstance(message, dict)
    if role not in _ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(_ROLES)}", f"{path}.role")
    others = {name: value for name, value in message.items() if name not in ("content", "role")}
    content = message.get("content")
    is_result = [isinstance(block, dict) and block.get("type") == "tool_result" for block in _blocks(content)]
    if role != "user" or not any(is_result):
        own = translation.add_message({"role": role} | others, path)
        said = _content(content, role, own, f"{path}.content", translation)
        if said or "tool_calls" not in translation.chat["messages"][-1]:
            translation.chat["messages"][-1]["content"] = said
        return
    own = ""
    parts: list[dict[str, Any]] = []
    for b, block in enumerate(translation.entries(content, f"{path}.content")):
        if is_result[b]:
            own = ""
            _result(block, f"{path}.content[{b}]", translation)
            continue
        if not own:
            parts = []
            own = translation.add_message({"role": role, "content": parts} | others, path)
        _block(block, role, own, f"{path}.content[{b}]", parts, translation)


def _blocks(content: object) -> list[Any]:
    return content if isinstance(content, list) else []


def _content(content: object, role: str, own: str, path: str, translation: Translation) -> str | list[dict[str, Any]]:
    """The content of the last message; tool calls and reasoning go into the message itself."""
    translation.paths[f"{own}.content"] = path
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("content must be a text or a list of blocks", path)
    parts: list[dict[str, Any]] = []
    for b, block in enumerate(translation.entries(content, path)):
        _block(block, role, own, f"{path}[{b}]", parts, translation)
    return parts


def _block(
    block: object, role: str, own: str, path: str, parts: list[dict[str, Any]], translation: Translation
) -> None:
    """Adds a block of the last message to its parts, or to the message itself."""
    kind = object_of(block, path).get("type")
    assert isinstance(block, dict)
    if kind not in _TYPES[role]:
        raise InvalidRequest(f"a block must be of type {' or '.join(_TYPES[role])} here", f"{path}.type")
    message = translation.chat["messages"][-1]
    if kind == "tool_use":
        calls = message.setdefault("tool_calls", [])
        translation.paths |= {
            f"{own}.tool_calls[{len(calls)}]": path,
            f"{own}.tool_calls[{len(calls)}].function": path,
            f"{own}.tool_calls[{len(calls)}].function.arguments": f"{path}.input",
        }
        calls.append(_call(block, path))
    elif kind == "thinking":
        if not isinstance(block.get("thinking"), str):
            raise InvalidRequest("thinking must be a text", f"{path}.thinking")
        message["reasoning"] = message.get("reasoning", "") + block["thinking"]
    else:
        own = f"{own}.content[{len(parts)}]"
        translation.paths[own] = path
        parts.append(_image(block, path, own, translation) if kind == "image" else block)


def _image(block: Mapping[str, Any], path: str, own: str, translation: Translation) -> dict[str, Any]:
    source = object_of(block.get("source"), f"{path}.source")
    kind = source.get("type")
    if kind == "base64":
        check_fields(source, ("data", "media_type", "type"), f"{path}.source")
        for name in ("media_type", "data"):
            if not isinstance(source.get(name), str):
                raise InvalidRequest(f"{name} must be a text", f"{path}.source.{name}")
        url, field = f"data:{source['media_type']};base64,{source['data']}", "data"
    elif kind == "url":
        check_fields(source, ("type", "url"), f"{path}.source")
        url, field = source.get("url", ""), "url"
    else:
        raise InvalidRequest("an image's source must be of type base64 or url", f"{path}.source.type")
    translation.paths |= {
        f"{own}.image_url": f"{path}.source",
        f"{own}.image_url.url": f"{path}.source.{field}",
        f"{own}.image_url.detail": f"{path}.detail",
    }
    return image_part(block, url, ("source",))


def _call(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    arguments = json.dumps(object_of(block.get("input"), at(path, "input")), ensure_ascii=False)
    return {
        "id": block.get("id"),
        "type": "function",
        "function": {"name": block.get("name"), "arguments": arguments},
    }


def _result(block: Mapping[str, Any], path: str, translation: Translation) -> None:
    """Adds a tool's result as a message. Only its text says whether it is an error."""
    own = translation.add_message({"role": "tool", "tool_call_id": block.get("tool_use_id")}, path)
    content = block.get("content")
    translation.paths[f"{own}.tool_call_id"] = f"{path}.tool_use_id"
    translation.chat["messages"][-1]["content"] = _content(
        "" if content is None else content, "tool", own, f"{path}.content", translation
    )
