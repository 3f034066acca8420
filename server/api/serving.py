"""vLLM's chat handler with plans: reads a request's reductions, sends them to the engine, reports what was applied."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, cast
from uuid import uuid4

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.inputs import EngineInput
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.outputs import RequestOutput
from vllm.renderers.chat_utils import ConversationMessage
from vllm.sampling_params import SamplingParams

from foldserve.reducers.item import ItemPlan
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.api import metrics, reduction_map
from foldserve.server.api.errors import FoldserveError, InvalidRequest, render_error_event
from foldserve.server.api.image_cache import EngineCacheMirror, PendingImages
from foldserve.server.api.lifecycle.state import Lifecycle
from foldserve.server.api.limits import forms, template
from foldserve.server.api.limits.checks import ChatChecks
from foldserve.server.api.media.guard import DecodedItem, DecodedMedia, MediaGuard
from foldserve.server.api.planner import Planner, with_request_param
from foldserve.server.api.quality_guard import AnswerScore, CheckedAnswer, QualityGuard
from foldserve.server.api.schema import FoldChatRequest, RequestProgress
from foldserve.server.api.usage import VisionTokens, vision_tokens
from foldserve.server.auto import AutoChoice
from foldserve.server.engine.family import Modality
from foldserve.server.engine.grid_map import grid_maps, needs_engine, seconds_of
from foldserve.server.engine.kv_cost import KvCost
from foldserve.server.engine.processor import CAPS, KWARG, PLANS, SETTLED

_NOTHING = Reduction()
_NOT_SCORED = frozenset(
    {
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "n",
        "prompt_logprobs",
        "reduction",
        "reduction_ratio",
        "response_format",
        "stream",
        "stream_options",
        "structured_outputs",
        "top_logprobs",
    }
)
"""Fields of a request that do not change its prompt."""
_Render: TypeAlias = Callable[
    [FoldChatRequest], Awaitable[tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse]
]


class FoldServingChat(OpenAIServingChat):
    """Modifications to vLLM's chat handler:

    - the request's reductions become one plan per image and video and travel in `mm_processor_kwargs`, which clients
      can't set;
    - images and videos are loaded here, under the server's limits: vLLM sees pixels, never a URL;
    - `usage.vision_tokens` reports the plans, also in the last chunk of a stream;
    - time to first token and vision tokens are counted;
    - an error in a stream, or after the engine's end, is rendered as all others are.

    Args:
        kv_cost: of the served model, for the metrics.
        checks: refuse what clients may not ask for.
        media: loads images and videos.
        sent_images: learns which requests reached the engine.
        lifecycle: learns of outputs, and knows the error to show where a request failed.
    """

    def __init__(
        self,
        *args: Any,
        planner: Planner,
        kv_cost: KvCost,
        checks: ChatChecks,
        media: MediaGuard,
        cache_mirror: EngineCacheMirror | None,
        lifecycle: Lifecycle,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checks = checks
        self.media = media
        self.planner = planner
        self.kv_cost = kv_cost
        self.cache_mirror = cache_mirror
        self.lifecycle = lifecycle
        self.quality_guard = QualityGuard(
            planner.settings.check_answers, self._score, lambda: lifecycle.is_idle, planner.chooser.raise_count
        )
        self.form_compiler = forms.FormCompiler(self.engine_client)
        self.token_groups = reduction_map.TokenGroupReader(self.engine_client, lifecycle)

    async def render_chat_request(
        self, request: FoldChatRequest
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        rendered, progress = await self._rendered(request), request.progress
        body, progress.body = progress.body, None
        if isinstance(rendered, ErrorResponse):
            return rendered
        vision = progress.vision
        if body is not None and vision is not None and vision.is_reduced and self.quality_guard.should_check_next():
            progress.answer = CheckedAnswer(body, vision, (request.cache_salt, progress.image_salt))
        metrics.observe_accepted(vision, self.kv_cost)
        return rendered

    async def _score(self, answer: CheckedAnswer) -> AnswerScore | None:
        """Scores an answer for `QualityGuard` in one prefill of the request, with all vision tokens, and answer."""
        kept = {name: value for name, value in answer.body.items() if name not in _NOT_SCORED}
        request = FoldChatRequest.model_validate(kept | {"reduction_ratio": 0, "max_tokens": 1})
        request.cache_salt, request.progress.image_salt = answer.salts
        try:
            rendered = await self._rendered(request)
        except (FoldserveError, InvalidReduction):  # too long with all its tokens, or its image is gone
            return None
        if isinstance(rendered, ErrorResponse):
            return None
        (prompt,) = rendered[1]
        fields: dict[str, Any] = dict(prompt)
        fields["prompt_token_ids"] = [*fields["prompt_token_ids"], *answer.token_ids]
        if len(fields["prompt_token_ids"]) >= self.model_config.max_model_len:
            return None
        outputs = self.engine_client.generate(
            cast(EngineInput, fields),
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            f"foldserve-check-{uuid4().hex}",
        )
        found: list[Any] = []
        async for output in _with_explained_errors(request, outputs, self.lifecycle):
            found = output.prompt_logprobs or found
        tokens = [next(iter(place.values())) for place in found[-len(answer.token_ids) :]]
        return AnswerScore([token.rank for token in tokens], [token.logprob for token in tokens])

    async def _rendered(
        self, request: FoldChatRequest
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        """Renders the prompt, and notes in `request.progress` what its media cost."""
        if (refusal := await self._check_model(request)) is not None:
            return refusal
        clock = 0 if self.cache_mirror is None else self.cache_mirror.clock
        conversation, prompt, _ = await self._planned(request, super().render_chat_request)
        progress, fields = request.progress, dict(prompt)
        if progress.vision is not None and self.cache_mirror is not None:
            hashes = [*chain.from_iterable(fields["mm_hashes"].values())]
            progress.pending_images = PendingImages(self.cache_mirror, hashes, clock)
        return conversation, [prompt]

    async def map_tokens(self, request: FoldChatRequest) -> dict[str, object] | ErrorResponse:
        """Maps where the tokens of a request's images and videos go; generates nothing.

        Raises InvalidRequest as for a chat, or if this model or engine has no map.
        """
        if (refusal := await self._check_model(request)) is not None:
            return refusal
        reduction_map.check(request)
        request.progress.body = None  # nothing is scored
        render = partial(self.online_renderer.render_chat, skip_mm_cache=True)  # the engine needs all pixels
        _, prompt, decoded = await self._planned(request, render)
        vision, fields = request.progress.vision, dict(prompt)
        if vision is None or self.planner.family is None:
            raise InvalidRequest("this model's images can't be reduced: there is no map of them", "messages")
        made: Mapping[Modality, Sequence[MultiModalKwargsItem]] = fields["mm_kwargs"]
        waiting = {modality: iter(zip(made[modality], own, strict=True)) for modality, own in decoded.items()}
        items = [
            await self._mapped(modality, plan, *next(waiting[modality]))
            for modality, plan in zip(vision.modalities, vision.plans, strict=True)
        ]
        is_withdrawn = vision.withdrawn > 0
        return {
            "object": "reduction.map",
            "model": self.models.base_model_paths[0].name,
            "items": [entry | {"vision_tokens": own} for entry, own in zip(items, vision.each, strict=True)],
            "withdraw_layer": vision.withdraw_layer if is_withdrawn else None,
            "decoder": vision.decoder if is_withdrawn else None,
            "layers": self.model_config.get_total_num_hidden_layers(),
        }

    async def _mapped(
        self, modality: Modality, plan: ItemPlan, item: MultiModalKwargsItem, decoded: DecodedItem
    ) -> dict[str, object]:
        family, info = self.planner.family, self.renderer.get_mm_processor().info
        assert family is not None
        regions = family.regions(plan, modality, decoded.size, info)
        found = await self.token_groups.of(item) if needs_engine(regions) else []
        grids = [grid.to_json() for grid in grid_maps(regions, found)]
        width, height = decoded.size
        entry = {"modality": modality, "method": plan.method, "width": width, "height": height, "grids": grids}
        return entry | ({"seconds": seconds_of(decoded.times, len(grids))} if modality == "video" else {})

    async def _planned(
        self, request: FoldChatRequest, render: _Render
    ) -> tuple[list[ConversationMessage], EngineInput, DecodedMedia]:
        """Renders the prompt for the engine, with plans, and checks it."""
        reductions = self.planner.check(request)
        if any(reduction != _NOTHING for reduction in chain.from_iterable(reductions.values())):
            asked = {modality: [one.to_json() for one in each] for modality, each in reductions.items()}
            request.mm_processor_kwargs = {KWARG: asked}
            if caps := [choice.cap for choice in request.progress.auto if choice.cap is not None]:
                request.mm_processor_kwargs[CAPS] = caps
        request.progress.form = await self.form_compiler.build(request)
        media = self.media.loaded(request.messages, request.progress.owner, request.progress.image_salt)
        async with media as decoded:
            try:
                rendered = await render(request)
            except VLLMValidationError as error:
                raise template.refusal(error, len(request.messages)) or error from None
            except InvalidReduction as error:  # an image whose size does not allow the reduction
                raise with_request_param(error, request) from error
        if isinstance(rendered, ErrorResponse):  # vLLM refuses only one thing in this way here
            raise InvalidRequest('this server can\'t call tools: leave `tools` out, or send "none"', "tool_choice")
        conversation, (prompt,) = rendered
        fields: dict[str, Any] = dict(prompt)
        planned: Mapping[Modality, Sequence[ItemPlan]] = fields.get(PLANS, {})
        self.checks.check_prompt(prompt, planned)
        self.planner.check_sizes(planned)
        self.planner.check_positions([*chain.from_iterable(planned.values())], len(fields["prompt_token_ids"]), request)
        layer, choices = self.planner.settings.withdraw_layer, request.progress.auto
        if settled := fields.get(SETTLED):
            choices = [choice.with_step(by) for choice, by in zip(choices, settled, strict=True)]
        request.progress.vision = vision_tokens(
            planned, prompt, layer, self.planner.step_capacity, AutoChoice.combined(choices)
        )
        return conversation, prompt, decoded

    async def _observed(
        self, request: FoldChatRequest, outputs: AsyncIterator[RequestOutput]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on, and collects them if the answer is to be checked."""
        answer = request.progress.answer
        async for output in _with_explained_errors(request, outputs, self.lifecycle):
            if answer is not None:
                answer.add_output(output)
                if output.finished:
                    self.quality_guard.enqueue(answer)
            yield output

    async def chat_completion_full_generator(
        self,
        request: FoldChatRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        progress = request.progress
        outputs = _timing_first_token(progress, self._observed(request, result_generator))
        response = await super().chat_completion_full_generator(request, outputs, *args, **kwargs)
        if isinstance(response, ChatCompletionResponse) and progress.vision is not None:
            response.usage.vision_tokens = progress.vision.to_json()
        return response

    async def chat_completion_stream_generator(
        self, request: FoldChatRequest, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """Sends events that come without a wait between them as one: the role with the first text, and the end."""
        progress = request.progress
        outputs = self._observed(request, result_generator)
        held, first = "", True
        async for event in super().chat_completion_stream_generator(request, outputs, *args, **kwargs):
            is_error = event.startswith('data: {"error"')
            if is_error:
                event = f"data: {render_error_event(progress.failure or _error_in(event))}\n\n"
            if first:
                first, held = False, event
                if not is_error:
                    metrics.observe_first_token(progress.vision, time.perf_counter() - progress.arrived_s)
            elif not progress.is_answered:
                yield held + event
                held = ""
            elif progress.vision is not None and '"choices":[]' in event:  # unescaped quotes: never inside a text
                held += _with_vision_tokens(event, progress.vision)
            else:
                held += event
        if held:
            yield held


async def _with_explained_errors(
    request: FoldChatRequest, outputs: AsyncIterator[RequestOutput], lifecycle: Lifecycle
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on; converts a late refusal into our own error before vLLM logs or sends its own.

    The engine aborts a request, without giving a reason, if it can't compile or follow the form of its answer. The
    first output tells that the request's images are in the engine.
    """
    progress = request.progress
    pending_images = progress.pending_images
    form = forms.field(request)
    try:
        async for output in outputs:
            lifecycle.note_output()
            if any(choice.finish_reason == "error" for choice in output.outputs):
                if pending_images is not None:
                    pending_images.mark_failed()
                if form is not None:
                    raise forms.refusal(form)
            elif pending_images is not None:
                pending_images.mark_arrived()
            pending_images = None
            progress.is_answered = output.finished
            yield output
    except Exception as error:
        progress.failure = shown = _client_error(request, error, lifecycle)
        if shown is error:
            raise
        raise shown from None


def _client_error(request: FoldChatRequest, error: Exception, lifecycle: Lifecycle) -> Exception:
    """The error for the client; the server's own faults stay as they are."""
    if (shown := lifecycle.explain(error)) is not error or isinstance(error, FoldserveError):
        return shown
    return forms.explain(request, error) if isinstance(error, VLLMClientError | ValueError | TypeError) else error


def _error_in(event: str) -> ErrorResponse:
    return ErrorResponse.model_validate_json(event.removeprefix("data: "))


async def _timing_first_token(
    progress: RequestProgress, outputs: AsyncIterator[RequestOutput]
) -> AsyncGenerator[RequestOutput, None]:
    """Passes outputs on; the engine reports the first token's latency from when it got the request."""
    started = time.perf_counter()
    async for output in outputs:
        latency = getattr(output.metrics, "first_token_latency", 0.0)
        if output.finished and latency:
            metrics.observe_first_token(progress.vision, started - progress.arrived_s + latency)
        yield output


def _with_vision_tokens(event: str, vision: VisionTokens) -> str:
    """The usage chunk of a stream with `vision_tokens`, inserted as text, since the chunk holds no text of a user."""
    tokens = json.dumps(vision.to_json(), separators=(",", ":"))
    return event.replace('"usage":{', f'"usage":{{"vision_tokens":{tokens},', 1)
