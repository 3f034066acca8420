"""OpenAPI's description of the bodies: the most common fields. Both APIs' own documents have the rest."""

from __future__ import annotations

from typing import Any

from foldserve.server.api.schema import DETAILS, FoldChatRequest

_DETAIL = {"enum": [*DETAILS, None]}
_OURS = FoldChatRequest.model_json_schema()["properties"]
_SAMPLING: dict[str, Any] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "reduction": _OURS["reduction"],
    "reduction_ratio": _OURS["reduction_ratio"],
}
_TOKENS = {"type": "integer", "minimum": 1}


def _text_or(items: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": items, "minItems": 1}]}


def _part(kind: str, **fields: Any) -> dict[str, Any]:
    required = ["type", *(name for name in fields if name != "detail")]
    return {"type": "object", "properties": {"type": {"const": kind}, **fields}, "required": required}


def _message(roles: list[str], *parts: dict[str, Any]) -> dict[str, Any]:
    properties = {"role": {"enum": roles}, "content": _text_or({"anyOf": list(parts)})}
    return {"type": "object", "properties": properties, "required": ["role", "content"]}


_TEXT = _part("text", text={"type": "string"})
_SOURCES = {
    "anyOf": [
        _part("base64", media_type={"type": "string"}, data={"type": "string"}),
        _part("url", url={"type": "string"}),
    ]
}

RESPONSES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["input"],
    "properties": _SAMPLING
    | {
        "input": _text_or(
            _message(
                ["user", "assistant", "system", "developer"],
                _part("input_text", text={"type": "string"}),
                _part("input_image", image_url={"type": "string"}, detail=_DETAIL),
            )
        ),
        "instructions": {"type": "string"},
        "max_output_tokens": _TOKENS,
    },
}

MESSAGES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["messages", "max_tokens"],
    "properties": _SAMPLING
    | {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": _message(["user", "assistant"], _TEXT, _part("image", source=_SOURCES, detail=_DETAIL)),
        },
        "system": _text_or(_TEXT),
        "max_tokens": _TOKENS,
        "stop_sequences": {"type": "array", "items": {"type": "string"}},
    },
}


def body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
