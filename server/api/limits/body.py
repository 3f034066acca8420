"""Refusals that the body's JSON alone decides, before any model of it is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.limits import Limits

_NOT_A_CLIENTS = {
    "chat_template": "the model's own is used",
    "ec_transfer_params": "it is for servers among themselves",
    "kv_transfer_params": "it is for servers among themselves",
    "media_io_kwargs": "see the server's limits on images",
    "mm_processor_kwargs": "use `reduction`",
    "prompt_embeds": "only texts and images are taken",
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


def check_body(body: Mapping[str, Any], limits: Limits) -> None:
    """Refuses what clients may not set, media other than images, and too much of anything.

    Raises:
        InvalidRequest: with the path as `param`.
    """
    for name, reason in _NOT_A_CLIENTS.items():
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} can't be set by a request: {reason}", name)
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > limits.max_stop_strings:
        raise LimitExceeded(f"stop may have {limits.max_stop_strings} entries at most, not {len(stop)}", "stop")
    _check_template_switches(body.get("chat_template_kwargs"))
    for name in _SCHEMAS:
        if body.get(name) is not None and len(json.dumps(body[name])) > limits.max_schema_kb * 1000:
            raise LimitExceeded(f"{name} is longer than {limits.max_schema_kb:g} kB", name)
    if isinstance(body.get("messages"), list):
        _check_messages(body["messages"], limits)


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


def _check_messages(messages: list[Any], limits: Limits) -> None:
    if len(messages) > limits.max_messages:
        raise LimitExceeded(f"a chat may have {limits.max_messages} messages at most, not {len(messages)}", "messages")
    images = 0
    for m, message in enumerate(messages):
        path = f"messages[{m}]"
        if not isinstance(message, dict):
            raise InvalidRequest("a message must be an object", path)
        if not isinstance(message.get("role"), str):
            raise InvalidRequest("a message needs a role", f"{path}.role")
        if not isinstance(message.get("tool_calls", []), list | None):
            raise InvalidRequest("tool_calls must be a list", f"{path}.tool_calls")
        images += _check_content(message.get("content"), f"{path}.content")
    if images > limits.max_images_per_request:
        most = limits.max_images_per_request
        raise LimitExceeded(f"a request may have {most} images at most, not {images}", "messages")


def _check_content(content: object, path: str) -> int:
    """The number of images."""
    if content is None or isinstance(content, str):
        return 0
    if not isinstance(content, list):
        raise InvalidRequest("content must be a text or a list of parts", path)
    return sum(_check_part(part, f"{path}[{p}]") for p, part in enumerate(content))


def _check_part(part: object, path: str) -> int:
    """1 for an image, 0 for a text."""
    if not isinstance(part, dict):
        raise InvalidRequest("a part of a message must be an object", path)
    if part.get("uuid") is not None:
        raise InvalidRequest("an image's identity is its content: leave `uuid` out", f"{path}.uuid")
    kind = part.get("type", "image_url" if "image_url" in part else None)
    if kind == "image_url":
        _check_image(part.get("image_url"), f"{path}.image_url")
        return 1
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest("a part must be of type text or image_url", f"{path}.type")
    field = _TEXT_PARTS[kind]
    if not isinstance(part.get(field), str):
        raise InvalidRequest(f"{field} must be a text", f"{path}.{field}")
    return 0


def _check_image(source: object, path: str) -> None:
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str):
        raise InvalidRequest('an image needs {"url": "https://..."} or a data: URL there', f"{path}.url")
