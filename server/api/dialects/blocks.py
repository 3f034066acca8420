"""A chat's answer, whole or streamed, as a sequence of blocks: reasoning, text and tool calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from foldserve.server.api.dialects.translation import Translation
from foldserve.server.api.usage import VisionTokens

Json = dict[str, Any]
_EVENT, _END = "data: ", "[DONE]"


@dataclass(slots=True)
class AnswerBlock:
    """One block of an answer.

    Attributes:
        text: the text or reasoning; of a tool call, its arguments as JSON.
        call_id: of a tool call.
        name: of a tool call's function.
        logprobs: of a text's tokens, as in a chat's answer.
    """

    kind: Literal["reasoning", "text", "tool_call"]
    text: str = ""
    call_id: str = ""
    name: str = ""
    logprobs: list[Json] = field(default_factory=list)


@dataclass(slots=True)
class AnswerEnd:
    """How an answer ended.

    Attributes:
        reason: `finish_reason` of the chat.
        stop: the stop string that it ended at, if any.
        usage: of the chat, with `vision_tokens`.
    """

    reason: str | None
    stop: str | None
    usage: Json


def blocks_of(answer: ChatCompletionResponse) -> list[AnswerBlock]:
    """Blocks of a whole answer; an empty answer is one empty text."""
    choice = answer.choices[0]
    message = choice.message
    blocks = [AnswerBlock("reasoning", message.reasoning)] if message.reasoning else []
    if message.content or not message.tool_calls:
        logprobs = (choice.logprobs.content if choice.logprobs else None) or []
        blocks.append(AnswerBlock("text", message.content or "", logprobs=[token.model_dump() for token in logprobs]))
    for call in message.tool_calls:
        blocks.append(AnswerBlock("tool_call", call.function.arguments, call.id, call.function.name))
    return blocks


def answer_end(answer: ChatCompletionResponse, blocks: Sequence[AnswerBlock]) -> AnswerEnd:
    choice = answer.choices[0]
    return _answer_end(choice.finish_reason, _stop_text(choice.stop_reason), answer.usage.model_dump(), blocks)


class StreamWriter(ABC):
    """Writes a chat's stream in another API's form, as events about blocks, in order.

    `vision` is the cost of the request's images, if it has any.
    """

    def __init__(self, translation: Translation, vision: VisionTokens | None = None) -> None:
        self.translation = translation
        self.vision = vision
        self.blocks: list[AnswerBlock] = []
        self._started = False
        self._call: int | None = None
        self._reason: str | None = None
        self._stop: str | None = None

    async def written(self, pieces: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """The translated stream; one piece of the chat's stream gives one piece."""
        async with aclosing(pieces):
            async for piece in pieces:
                lines = (line.removeprefix(_EVENT) for line in piece.split("\n\n"))
                text = "".join(self._write(json.loads(line)) for line in lines if line and line != _END)
                if text:
                    yield text

    @staticmethod
    @abstractmethod
    def whole(answer: ChatCompletionResponse, translation: Translation) -> Json:
        """The API's object for an answer that is not streamed."""

    @abstractmethod
    def begin(self, chunk: Mapping[str, Any]) -> str:
        """Events at the beginning; `chunk` is the chat's first."""

    @abstractmethod
    def open_block(self, block: AnswerBlock) -> str:
        """Events for the beginning of a block, which is the last one so far."""

    @abstractmethod
    def add(self, block: AnswerBlock, text: str, logprobs: list[Json]) -> str:
        """Events for more of the last block."""

    @abstractmethod
    def close_block(self, block: AnswerBlock, cut: bool) -> str:
        """Events for the end of the last block. `cut`: the answer had no room for all of it."""

    @abstractmethod
    def end(self, how: AnswerEnd) -> str:
        """Events at the end, after the last block."""

    @abstractmethod
    def fail(self, error: Json) -> str:
        """Events of an error, given in OpenAI's shape, which ends the stream."""

    def _write(self, chunk: Json) -> str:
        if (error := chunk.get("error")) is not None:
            message = self.translation.with_client_names(error["message"], error["param"])
            return self.fail({**error, "message": message, "param": self.translation.as_sent(error["param"])})
        events = ""
        if not self._started:
            self._started = True
            events = self.begin(chunk)
        for choice in chunk["choices"]:
            events += self._delta(choice)
            self._reason = choice.get("finish_reason") or self._reason
            self._stop = _stop_text(choice.get("stop_reason")) or self._stop
        if not chunk["choices"]:  # the last chunk, with the usage
            if not self.blocks:
                events += self._open(AnswerBlock("text"))
            events += self.close_block(self.blocks[-1], self._reason == "length")
            events += self.end(_answer_end(self._reason, self._stop, chunk["usage"], self.blocks))
        return events

    def _delta(self, choice: Json) -> str:
        delta, events = choice["delta"], ""
        if delta.get("reasoning"):
            events += self._continue_block("reasoning", delta["reasoning"], [])
        if delta.get("content"):
            events += self._continue_block(
                "text", delta["content"], (choice.get("logprobs") or {}).get("content") or []
            )
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if call["index"] != self._call:
                self._call = call["index"]
                events += self._open(AnswerBlock("tool_call", "", call.get("id") or "", function.get("name") or ""))
            if function.get("arguments"):
                events += self._add(function["arguments"], [])
        return events

    def _continue_block(self, kind: Literal["reasoning", "text"], text: str, logprobs: list[Json]) -> str:
        events = "" if self.blocks and self.blocks[-1].kind == kind else self._open(AnswerBlock(kind))
        return events + self._add(text, logprobs)

    def _open(self, block: AnswerBlock) -> str:
        events = self.close_block(self.blocks[-1], False) if self.blocks else ""
        self.blocks.append(block)
        return events + self.open_block(block)

    def _add(self, text: str, logprobs: list[Json]) -> str:
        block = self.blocks[-1]
        block.text += text
        block.logprobs += logprobs
        return self.add(block, text, logprobs)


def event(name: str, data: Json) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def own_id(prefix: str, chat_id: str) -> str:
    """The answer's id: the chat's id, as in logs and metrics, with another prefix."""
    return f"{prefix}_{chat_id.removeprefix('chatcmpl-')}"


def _answer_end(reason: str | None, stop: str | None, usage: Json, blocks: Sequence[AnswerBlock]) -> AnswerEnd:
    """vLLM reports "stop" for a tool call that the request forced."""
    called = reason == "stop" and stop is None and any(block.kind == "tool_call" for block in blocks)
    return AnswerEnd("tool_calls" if called else reason, stop, usage)


def _stop_text(reason: object) -> str | None:
    """The stop string; vLLM gives either a string or a token's id."""
    return reason if isinstance(reason, str) else None
