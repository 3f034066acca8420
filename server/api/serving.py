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

from foldserve.reducers.plan import InvalidReduction, Plan, Reduction
from foldserve.server.api import metrics
from foldserve.server.api.errors import FoldserveError, InvalidRequest
from foldserve.server.api.schema import Defaults, FoldChatRequest
from foldserve.server.api.usage import VisionTokens, vision_tokens
from foldserve.server.engine.processor import KWARG, plan_for
from foldserve.server.engine.vision import VisionGeometry

_ENGINE_ONLY = ("mm_processor_kwargs", "media_io_kwargs")


class FoldServingChat(OpenAIServingChat):
    """Modifications to vLLM's chat handler:

    - the request's reductions become one plan per image and travel in `mm_processor_kwargs`, which clients can't set;
    - `usage.vision_tokens` reports the plans, in the last chunk of a stream too;
    - time to first token and vision tokens are counted.

    Args:
        geometry: of the served model; None where it can't reduce.
        defaults: what applies where a request says nothing.
        withdraw_layer: K of the server, or None.
    """

    def __init__(
        self,
        *args: Any,
        geometry: VisionGeometry | None,
        defaults: Defaults,
        withdraw_layer: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.geometry = geometry
        self.defaults = defaults
        self.withdraw_layer = withdraw_layer

    async def render_chat_request(
        self, request: FoldChatRequest
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        for name in _ENGINE_ONLY:
            if getattr(request, name):
                raise InvalidRequest(f"{name} can't be set by a request: use `reduction`", name)
        reductions = request.image_reductions(self.defaults)
        request._vision = self._vision_tokens(request, reductions)
        if any(reduction != Reduction() for reduction in reductions):
            request.mm_processor_kwargs = {KWARG: [reduction.to_json() for reduction in reductions]}
        rendered = await super().render_chat_request(request)
        if not isinstance(rendered, ErrorResponse):
            _check_placeholders(rendered[1], request._vision)
            metrics.observe_accepted(request._vision)
        return rendered

    def _vision_tokens(self, request: FoldChatRequest, reductions: list[Reduction]) -> VisionTokens | None:
        if self.geometry is None:
            if any(reduction != Reduction() for reduction in reductions):
                raise InvalidRequest("this model's vision tower can't reduce: leave `reduction` out", "reduction")
            return None
        plans = [self._plan(request, reduction, self.geometry) for reduction in reductions]
        return vision_tokens(plans, self.withdraw_layer)

    def _plan(self, request: FoldChatRequest, reduction: Reduction, geometry: VisionGeometry) -> Plan:
        if reduction.withdraw and self.withdraw_layer is None:
            raise InvalidRequest(
                "this server does not withdraw vision tokens: start it with --withdraw-layer K", "reduction.withdraw"
            )
        if reduction.withdraw and request.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs can't be had with `reduction.withdraw`: withdrawn tokens have no final state",
                "prompt_logprobs",
            )
        try:
            return plan_for(reduction, geometry)
        except InvalidReduction as error:
            if request.reduction_ratio is not None:
                raise InvalidRequest(str(error), "reduction_ratio") from error
            raise

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


def _check_placeholders(inputs: list[EngineInput], vision: VisionTokens | None) -> None:
    """The prompt holds exactly the planned placeholders: usage and KV blocks can't drift apart unnoticed."""
    for engine_input in inputs:
        ranges = (engine_input.get("mm_placeholders") or {}).get("image", [])
        placeholders = sum(int(r.get_num_embeds()) for r in ranges)
        planned = vision.kept if vision else placeholders
        if placeholders != planned:
            raise FoldserveError(f"the prompt holds {placeholders} vision tokens where {planned} were planned")
