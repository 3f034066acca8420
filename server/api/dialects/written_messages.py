"""A chat's answer in the form of Anthropic's Messages API: one `message`, its events, or an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from foldserve.server.api.dialects.blocks import (
    AnswerBlock,
    AnswerEnd,
    Json,
    StreamWriter,
    answer_end,
    blocks_of,
    event,
    own_id,
)
from foldserve.server.api.dialects.translation import Translation

_ERRORS = {
    "body_too_large": "request_too_large",
    "concurrency_limit_exceeded": "rate_limit_error",
    "engine_stopped": "overloaded_error",
    "insufficient_permissions": "permission_error",
    "invalid_api_key": "authentication_error",
    "not_found": "not_found_error",
    "overloaded": "overloaded_error",
    "rate_limit_exceeded": "rate_limit_error",
    "shutting_down": "overloaded_error",
}
"""`code` -> Anthropic's type; other codes by their type in OpenAI's shape."""
_OTHERWISE = {"invalid_request_error": "invalid_request_error", "server_error": "api_error"}


def error_body(body: Mapping[str, Json]) -> Json:
    """An error in Anthropic's shape, with OpenAI's `param` and `code` kept."""
    return {"type": "error", "error": _error(body["error"])}


class MessagesWriter(StreamWriter):
    """Writes an answer, or the events of a stream. Clients that assemble a stream take `usage` from its first event."""

    @staticmethod
    def whole(answer: ChatCompletionResponse, translation: Translation) -> Json:
        message = _message(answer.id, answer.model)
        blocks = blocks_of(answer)
        how, content = answer_end(answer, blocks), [_block(block) for block in blocks]
        return message | {"content": content, "usage": _usage(how.usage)} | _stop_fields(how)

    def begin(self, chunk: Mapping[str, Any]) -> str:
        usage = _usage(chunk["usage"] | ({} if self.vision is None else {"vision_tokens": self.vision.to_json()}))
        return _event("message_start", message=_message(chunk["id"], chunk["model"]) | {"usage": usage})

    def open_block(self, block: AnswerBlock) -> str:
        return _event("content_block_start", index=self._index, content_block=_block(block))

    def add(self, block: AnswerBlock, text: str, logprobs: list[Json]) -> str:
        kind, field = {
            "reasoning": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "tool_call": ("input_json_delta", "partial_json"),
        }[block.kind]
        return _event("content_block_delta", index=self._index, delta={"type": kind, field: text})

    def close_block(self, block: AnswerBlock, cut: bool) -> str:
        return _event("content_block_stop", index=self._index)

    def end(self, how: AnswerEnd) -> str:
        return _event("message_delta", delta=_stop_fields(how), usage=_usage(how.usage)) + _event("message_stop")

    def fail(self, error: Json) -> str:
        return _event("error", error=_error(error))

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1


def _event(name: str, **fields: Any) -> str:
    return event(name, {"type": name} | fields)


def _error(error: Mapping[str, Any]) -> Json:
    return {**error, "type": _ERRORS.get(error["code"], _OTHERWISE[error["type"]])}


def _message(chat_id: str, model: str) -> Json:
    unknown: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
    return {"id": own_id("msg", chat_id), "type": "message", "role": "assistant", "model": model} | unknown


def _block(block: AnswerBlock) -> Json:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(block.text)}


def _arguments(text: str) -> Json:
    """A tool call's arguments; empty if their JSON is incomplete."""
    try:
        arguments = json.loads(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _stop_fields(how: AnswerEnd) -> Json:
    if how.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if how.reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": "end_turn" if how.stop is None else "stop_sequence", "stop_sequence": how.stop}


def _usage(usage: Mapping[str, Any]) -> Json:
    """Input tokens exclude those from a cache, if the server reports these."""
    written: Json = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage.get("completion_tokens") or 0}
    details = usage.get("prompt_tokens_details") or {}
    for name, theirs in (("cached_tokens", "cache_read"), ("created_cache_tokens", "cache_creation")):
        if details.get(name) is not None:
            written[f"{theirs}_input_tokens"] = details[name]
            written["input_tokens"] -= details[name]
    return written | ({"vision_tokens": usage["vision_tokens"]} if "vision_tokens" in usage else {})
