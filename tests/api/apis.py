"""The three chat APIs: how the body of a chat and the path of a field look in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.api.live import CHAT

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@dataclass(frozen=True)
class Api:
    """One of them.

    Attributes:
        path: of its route.
        body: makes its body of a chat's.
        param: of a field's path in the chat's body, and that body, the path in its own.
    """

    path: str
    body: Callable[[dict[str, Any]], dict[str, Any]]
    param: Callable[[str, dict[str, Any]], str]


def _translated(body: dict[str, Any], messages: str, most: str, part: Callable[[Any], Any]) -> dict[str, Any]:
    """A body with its messages in `messages`, and the most tokens in `most`."""
    others = {name: value for name, value in body.items() if name not in ("messages", "max_tokens")}
    translated = [
        message | {"content": [part(one) for one in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in body["messages"]
    ]
    return others | {messages: translated, most: body.get("max_tokens", 16)}


def responses_part(part: dict[str, Any]) -> dict[str, Any]:
    """A chat's part as the Responses API has it."""
    if part.get("type") == "text":
        return part | {"type": "input_text"}
    if part.get("type") != "image_url":
        return part
    source = part["image_url"]
    others = {name: value for name, value in part.items() if name not in ("image_url", "type")}
    detail = {"detail": source["detail"]} if "detail" in source else {}
    return others | {"type": "input_image", "image_url": source["url"]} | detail


def is_base64(url: object) -> bool:
    """Whether Anthropic's clients would send an image as base64."""
    return isinstance(url, str) and url.startswith("data:image/") and url.partition(",")[0].endswith(";base64")


def messages_part(part: dict[str, Any]) -> dict[str, Any]:
    """A chat's part as the Messages API has it."""
    if part.get("type") != "image_url":
        return part
    url = part["image_url"]["url"]
    if is_base64(url):
        head, _, data = url.partition(",")
        kind = head.removeprefix("data:").removesuffix(";base64")
        source = {"type": "base64", "media_type": kind, "data": data}
    else:
        source = {"type": "url", "url": url}
    others = {name: value for name, value in part.items() if name not in ("image_url", "type")}
    detail = {"detail": part["image_url"]["detail"]} if "detail" in part["image_url"] else {}
    return others | {"type": "image", "source": source} | detail


def _responses_param(param: str, body: dict[str, Any]) -> str:
    return param.replace("messages", "input").replace(".image_url.url", ".image_url").replace("max_", "max_output_")


def _messages_param(param: str, body: dict[str, Any]) -> str:
    if not param.endswith(".image_url.url"):
        return param
    m, p = (int(piece.partition("]")[0]) for piece in param.split("[")[1:])
    url = body["messages"][m]["content"][p]["image_url"]["url"]
    return param.replace(".image_url.url", ".source.data" if is_base64(url) else ".source.url")


APIS = {
    "chat": Api(CHAT, lambda body: body, lambda param, body: param),
    "responses": Api(
        RESPONSES,
        lambda body: _translated(body, "input", "max_output_tokens", responses_part),
        _responses_param,
    ),
    "messages": Api(
        MESSAGES,
        lambda body: _translated(body, "messages", "max_tokens", messages_part),
        _messages_param,
    ),
}
