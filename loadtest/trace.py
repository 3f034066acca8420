"""Replays a recorded trace without `vllm bench serve`, which keeps arrival times for text traces only."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foldserve.loadtest import keys
from foldserve.loadtest.record import SentRequests
from foldserve.loadtest.workloads import Messages, MessageSource

_PATIENCE_S = 600


class TraceLine(BaseModel):
    """One line of a trace.

    Attributes:
        timestamp_s: arrival time on any clock.
        output_tokens: length of its answer.
        messages: None: generate a message of `images` images and `words` words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestamp_s: float
    output_tokens: int = Field(ge=1)
    messages: Messages | None = None
    images: int = Field(0, ge=0)
    words: int = Field(16, ge=1)

    def chat(self, source: MessageSource) -> Messages:
        return self.messages or [source.user(self.images, self.words)]


def read_trace(file: Path) -> list[TraceLine]:
    """The lines, sorted by time; ValueError if one is malformed or there is none."""
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), start=1):
        try:
            lines.append(TraceLine.model_validate_json(text))
        except ValidationError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{file} holds no requests: a line each is needed, with timestamp_s and output_tokens")
    return sorted(lines, key=lambda line: line.timestamp_s)


def replay(
    url: str, model: str, trace: Sequence[TraceLine], chats: Sequence[Messages], body: dict[str, Any], speed: float
) -> SentRequests:
    """Sends every chat at its recorded time, `speed` times as fast; RuntimeError if no request was answered."""
    return asyncio.run(_replay(url, model, trace, chats, body, speed))


async def _replay(
    url: str, model: str, trace: Sequence[TraceLine], chats: Sequence[Messages], body: dict[str, Any], speed: float
) -> SentRequests:
    sent = SentRequests(start_s=[], ttft_s=[], e2e_s=[], itl_s=[], prompt_tokens=[], output_tokens=[], errors=[])
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=limits, headers=keys.for_chats()) as client,
        asyncio.TaskGroup() as group,
    ):
        began = time.perf_counter()
        for line, chat in zip(trace, chats, strict=True):
            due = (line.timestamp_s - trace[0].timestamp_s) / speed
            await asyncio.sleep(began + due - time.perf_counter())
            fields = {"model": model, "messages": chat, "max_completion_tokens": line.output_tokens}
            group.create_task(_send(client, fields | body, sent))
    if not sent.e2e_s:
        raise RuntimeError(f"no request was answered; the first error was: {sent.errors[0]}")
    return sent


async def _send(client: httpx.AsyncClient, fields: dict[str, Any], sent: SentRequests) -> None:
    """Streams one answer and adds it to `sent`."""
    start, times, usage = time.perf_counter(), [], None
    try:
        streaming = fields | {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/chat/completions", json=streaming) as response:
            if response.status_code != 200:
                sent.errors.append(f"{response.status_code} {(await response.aread()).decode()}")
                return
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if chunk.get("choices"):
                    times.append(time.perf_counter())
                usage = chunk.get("usage") or usage
    except (httpx.HTTPError, ValueError) as error:
        sent.errors.append(f"{type(error).__name__}: {error}")
        return
    if not times or usage is None:
        sent.errors.append("the stream ended without a token or without usage")
        return
    sent.start_s.append(start)
    sent.ttft_s.append(times[0] - start)
    sent.e2e_s.append(times[-1] - start)
    sent.itl_s.append([after - before for before, after in pairwise(times)])
    sent.prompt_tokens.append(usage["prompt_tokens"])
    sent.output_tokens.append(usage["completion_tokens"])
