"""A chat's answer in the form of OpenAI's Responses API: one `response` object, or its events."""

from __future__ import annotations

import time
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
from foldserve.server.api.usage import VisionTokens

_PREFIXES = {"reasoning": "rs", "text": "msg", "tool_call": "fc"}
_COMPLETED, _INCOMPLETE, _IN_PROGRESS = "completed", "incomplete", "in_progress"
_BY_DEFAULT: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
}


class ResponsesWriter(StreamWriter):
    """Writes an answer, or the numbered events of a stream."""

    def __init__(self, translation: Translation, vision: VisionTokens | None = None) -> None:
        super().__init__(translation, vision)
        self._number = -1
        self._response = _Response("", 0, "", {})

    @staticmethod
    def whole(answer: ChatCompletionResponse, translation: Translation) -> Json:
        blocks = blocks_of(answer)
        response = _Response(own_id("resp", answer.id), answer.created, answer.model, translation.echo)
        return response.finished(blocks, answer_end(answer, blocks))

    def begin(self, chunk: Mapping[str, Any]) -> str:
        sent = self.translation.echo
        self._response = _Response(own_id("resp", chunk["id"]), chunk["created"], chunk["model"], sent)
        started = {"response": self._response.body(_IN_PROGRESS)}
        return self._event("response.created", started) + self._event("response.in_progress", started)

    def open_block(self, block: AnswerBlock) -> str:
        item = self._item(AnswerBlock(block.kind, "", block.call_id, block.name), _IN_PROGRESS)
        if block.kind != "tool_call":
            item["content"] = []
        events = self._event("response.output_item.added", {"output_index": self._index, "item": item})
        if block.kind != "tool_call":
            events += self._event("response.content_part.added", self._place | {"part": _part(AnswerBlock(block.kind))})
        return events

    def add(self, block: AnswerBlock, text: str, logprobs: list[Json]) -> str:
        place = self._place | {"delta": text}
        if block.kind == "text":
            return self._event("response.output_text.delta", place | {"logprobs": logprobs})
        if block.kind == "reasoning":
            return self._event("response.reasoning_text.delta", place)
        del place["content_index"]
        return self._event("response.function_call_arguments.delta", place)

    def close_block(self, block: AnswerBlock, cut: bool) -> str:
        place = self._place
        if block.kind == "tool_call":
            del place["content_index"]
            call = {"arguments": block.text, "name": block.name}
            events = self._event("response.function_call_arguments.done", place | call)
        else:
            kind = "output_text" if block.kind == "text" else "reasoning_text"
            done: Json = {"text": block.text} | ({"logprobs": block.logprobs} if block.kind == "text" else {})
            events = self._event(f"response.{kind}.done", place | done)
            events += self._event("response.content_part.done", place | {"part": _part(block)})
        item = self._item(block, _INCOMPLETE if cut else _COMPLETED)
        return events + self._event("response.output_item.done", {"output_index": self._index, "item": item})

    def end(self, how: AnswerEnd) -> str:
        response = self._response.finished(self.blocks, how)
        return self._event(f"response.{response['status']}", {"response": response})

    def fail(self, error: Json) -> str:
        """OpenAI's clients read `error`; its documents have the fields beside `type`."""
        fields = {name: error[name] for name in ("code", "message", "param")}
        return self._event("error", fields | {"error": error})

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1

    @property
    def _place(self) -> Json:
        block = self.blocks[-1]
        return {"item_id": self._response.item_id(block, self._index), "output_index": self._index, "content_index": 0}

    def _item(self, block: AnswerBlock, status: str) -> Json:
        return self._response.item(block, self._index, status)

    def _event(self, name: str, fields: Json) -> str:
        self._number += 1
        return event(name, {"type": name, "sequence_number": self._number} | fields)


class _Response:
    """The `response` object; `created` is in seconds, `echo` is repeated from the request."""

    def __init__(self, key: str, created: int, model: str, echo: Mapping[str, Any]) -> None:
        self._key = key
        self._created = created
        self._model = model
        self._echo = echo

    def body(self, status: str) -> Json:
        """The object without output."""
        return {
            **_BY_DEFAULT,
            **self._echo,
            "id": self._key,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": status,
            "output": [],
            "usage": None,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def finished(self, blocks: list[AnswerBlock], how: AnswerEnd) -> Json:
        """The object with output. If the answer was cut, its last item is incomplete."""
        status = _INCOMPLETE if how.reason == "length" else _COMPLETED
        statuses = [_COMPLETED] * (len(blocks) - 1) + [status]
        output = [self.item(block, i, each) for i, (block, each) in enumerate(zip(blocks, statuses, strict=True))]
        ending: Json = {"output": output, "usage": _usage(how.usage)}
        if status == _COMPLETED:
            ending["completed_at"] = int(time.time())
        else:
            ending["incomplete_details"] = {"reason": "max_output_tokens"}
        return self.body(status) | ending

    def item_id(self, block: AnswerBlock, index: int) -> str:
        return f"{_PREFIXES[block.kind]}_{self._key.removeprefix('resp_')}_{index}"

    def item(self, block: AnswerBlock, index: int, status: str) -> Json:
        own = {"id": self.item_id(block, index), "status": status}
        if block.kind == "tool_call":
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return own | {"type": "function_call"} | call
        content = {"content": [_part(block)]}
        if block.kind == "reasoning":
            return own | {"type": "reasoning", "summary": []} | content
        return own | {"type": "message", "role": "assistant"} | content


def _part(block: AnswerBlock) -> Json:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": block.logprobs}


def _usage(usage: Mapping[str, Any]) -> Json:
    prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    written: Json = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": prompt.get("cached_tokens") or 0,
            "cache_write_tokens": prompt.get("created_cache_tokens") or 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens") or 0},
        "total_tokens": usage["total_tokens"],
    }
    return written | ({"vision_tokens": usage["vision_tokens"]} if "vision_tokens" in usage else {})
