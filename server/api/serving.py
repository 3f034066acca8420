"""vLLM's chat handler with plans: reads a request's reductions, sends them to the engine, reports what was applied."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.renderers.chat_utils import ConversationMessage

from foldserve.reducers.plan import Reduction
from foldserve.server.api import metrics
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.planner import Planner
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.api.usage import VisionTokens, vision_tokens
from foldserve.server.engine.kv_cost import KvCost
from foldserve.server.engine.processor import KWARG

_ENGINE_ONLY = ("mm_processor_kwargs", "media_io_kwargs")


class FoldServingChat(OpenAIServingChat):
    """Modifications to vLLM's chat handler:

    - the request's reductions become one plan per image and travel in `mm_processor_kwargs`, which clients can't set;
    - `usage.vision_tokens` reports the plans, in the last chunk of a stream too;
    - time to first token and vision tokens are counted.

    Args:
        planner: makes the plans.
        kv_cost: of the served model, for the metrics.
    """

    def __init__(self, *args: Any, planner: Planner, kv_cost: KvCost, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planner = planner
        self.kv_cost = kv_cost

    async def render_chat_request(
        self, request: FoldChatRequest
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        for name in _ENGINE_ONLY:
            if getattr(request, name):
                raise InvalidRequest(f"{name} can't be set by a request: use `reduction`", name)
        reductions, plans = self.planner.plan(request)
        if any(reduction != Reduction() for reduction in reductions):
            request.mm_processor_kwargs = {KWARG: [reduction.to_json() for reduction in reductions]}
        rendered = await super().render_chat_request(request)
        if not isinstance(rendered, ErrorResponse):
            (prompt,) = rendered[1]
            request._vision = vision_tokens(plans, prompt, self.planner.withdraw_layer, self.planner.room)
            metrics.observe_accepted(request._vision, self.kv_cost)
        return rendered

    async def chat_completion_full_generator(
        self,
        request: FoldChatRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        response = await super().chat_completion_full_generator(
            request, _timing_first_token(request, result_generator), *args, **kwargs
        )
        if isinstance(response, ChatCompletionResponse) and request._vision is not None:
            response.usage.vision_tokens = request._vision.to_json()
        return response

    async def chat_completion_stream_generator(
        self, request: FoldChatRequest, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        first = True
        async for event in super().chat_completion_stream_generator(request, *args, **kwargs):
            if first and not event.startswith('data: {"error"'):
                metrics.observe_first_token(request._vision, time.perf_counter() - request._arrived)
            elif request._vision is not None and '"choices":[]' in event:  # unescaped quotes: never inside a text
                event = _with_vision_tokens(event, request._vision)
            first = False
            yield event


async def _timing_first_token(
    request: FoldChatRequest, outputs: AsyncIterator[RequestOutput]
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on; the engine reports the first token's latency since it got the request."""
    started = time.perf_counter()
    async for output in outputs:
        latency = getattr(output.metrics, "first_token_latency", 0.0)
        if output.finished and latency:
            metrics.observe_first_token(request._vision, started - request._arrived + latency)
        yield output


def _with_vision_tokens(event: str, vision: VisionTokens) -> str:
    """The usage chunk of a stream with `vision_tokens`."""
    chunk = json.loads(event.removeprefix("data: "))
    if chunk.get("usage"):
        chunk["usage"]["vision_tokens"] = vision.to_json()
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
