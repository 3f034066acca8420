"""vLLM's schedulers, changed so that no request waits long for other clients' requests, images or grammars.

`scheduler_cls` is not a stable interface of vLLM (it says so itself); the version is pinned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.fair_queue import FairQueue, key_of
from foldserve.server.engine.fair_steps import FairSteps
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.grammars import GrammarPool, PacedGrammar

_KEPT_FOR_OTHERS = 10  # one in ten places for running requests is out of reach for a key that has all the others
EncoderInputs = tuple[list[int], int, int, list[int], list[int]]
"""What `_try_schedule_encoder_inputs` returns: inputs, tokens, budget left, external inputs, duplicates."""


class CountingCacheManager(EncoderCacheManager):
    """Modification: also limits the tokens before reduction per step, by `encoded_left`; cache space is in kept tokens.

    The first image of a step (`is_first`) may be larger; otherwise it would wait forever.

    Args:
        encoded: (request, index of the image) -> its tokens before reduction.
    """

    def __init__(self, cache_size: int, encoded: Callable[[Request, int], int]) -> None:
        super().__init__(cache_size)
        self.encoded_left = 0
        self.is_first = True
        self._encoded = encoded

    def can_allocate(self, request: Request, input_id: int, *args: Any, **kwargs: Any) -> bool:
        encoded = self._encoded(request, input_id)
        has_room = encoded <= self.encoded_left or self.is_first
        fits = has_room and super().can_allocate(request, input_id, *args, **kwargs)
        if fits:
            self.encoded_left -= encoded
            self.is_first = False
        return fits


class FoldScheduler(Scheduler):
    """Modifications:

    - a step encodes no more than the profile run did, or a single larger image or video. vLLM's budget counts tokens
      that the decoder gets. Reduced images have few, so a step would encode ten times as many images, and all its
      requests would wait;
    - a request with a slow grammar skips steps until the grammar is ready, and is aborted if that takes too long, see
      `grammars`;
    - API keys are served in turn, see `fair_queue`, and keys with few requests get steps of their own if needed, see
      `fair_steps`. Requests of the key with the fewest running requests come first in a step and are preempted last.
    """

    running: list[Request]
    encoder_cache_manager: EncoderCacheManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._family = family_of(self.vllm_config.model_config)
        manager = self.encoder_cache_manager
        if self._family is not None and type(manager) is EncoderCacheManager:
            self._most_encoded = encoder_budget(self.vllm_config).tokens
            self.encoder_cache_manager = CountingCacheManager(manager.cache_size, self._encoded)
        self._grammars = GrammarPool()
        self._steps = FairSteps()
        if self.policy is SchedulingPolicy.FCFS:
            self.waiting = FairQueue(self.max_num_running_reqs - self.max_num_running_reqs // _KEPT_FOR_OTHERS)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        held = self._hold_back() if self._grammars.slow else []
        light = self._take_turns(self.waiting) if isinstance(self.waiting, FairQueue) else None
        if light is not None:
            held += [request for request in self.running if key_of(request) not in light and request not in held]
        output = self._schedule_without(held, *args, **kwargs) if held else super().schedule(*args, **kwargs)
        tokens, requests = output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)
        decodes = tokens <= requests * (1 + self.num_spec_tokens)
        self._steps.note_planned(output, own=light is not None, computes=tokens > 0, decodes=decodes)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, *args)
        self._steps.note_results(scheduler_output)
        return outputs

    def _schedule_without(self, held: list[Request], *args: Any, **kwargs: Any) -> SchedulerOutput:
        names = {request.request_id for request in held}
        self.running = [request for request in self.running if request.request_id not in names]
        self.max_num_running_reqs -= len(held)
        self.max_num_active_reqs -= len(held)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.running = held + self.running
            self.max_num_running_reqs += len(held)
            self.max_num_active_reqs += len(held)

    def _take_turns(self, waiting: FairQueue) -> frozenset[str | None] | None:
        """Keys that the step serves; None for all."""
        running = Counter(map(key_of, self.running))
        light = self._steps.light_keys(running, waiting.keys)
        if light is not None and self.kv_cache_manager.block_pool.get_num_free_blocks() <= len(self.running):
            light = None  # blocks may run out, and keys with few requests must not lose theirs
        waiting.begin_step(running, light)
        if len(running) > 1:
            self.running.sort(key=lambda request: running[key_of(request)])
        return light

    def _hold_back(self) -> list[Request]:
        """Running requests whose grammar is not ready for a step; those whose grammar failed are aborted."""
        self._grammars.settle()
        held = []
        for request in self.running:
            grammar = request.structured_output_request and request.structured_output_request.grammar
            if not isinstance(grammar, PacedGrammar) or not grammar.is_slow:
                continue
            if grammar.has_failed:
                self.encoder_cache_mismatch_reqs.add(request.request_id)  # vLLM aborts these with an error
                held.append(request)
            elif grammar.is_busy or request.num_output_placeholders:  # not ahead: the step would wait for its mask
                held.append(request)
        return held

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        proceeds: bool = super()._handle_blocked_waiting_request(request)
        asked = request.structured_output_request
        grammar = None if asked is None else asked.grammar
        if proceeds and isinstance(grammar, StructuredOutputGrammar) and not isinstance(grammar, PacedGrammar):
            asked.grammar = PacedGrammar(grammar, self._grammars)
        return proceeds

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        **kwargs: Any,
    ) -> EncoderInputs:
        """Charges an image's tokens before reduction to the step's budget.

        If a request is preempted in the step that admitted it, vLLM refunds only kept tokens, so the step encodes fewer
        images.
        """
        if isinstance(self.encoder_cache_manager, CountingCacheManager):
            self.encoder_cache_manager.encoded_left = self._encoded_left(request, encoder_compute_budget)
            self.encoder_cache_manager.is_first = encoder_compute_budget == self.max_num_encoder_input_tokens
        inputs, tokens, _, external, duplicates = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        taken = sum(max(self._encoded(request, i), request.get_num_encoder_embeds(i)) for i in inputs)
        return inputs, tokens, encoder_compute_budget - taken, external, duplicates

    def _encoded_left(self, request: Request, encoder_compute_budget: int) -> int:
        """Tokens before reduction that still fit into the step."""
        return self._most_encoded - (self.max_num_encoder_input_tokens - encoder_compute_budget)

    def _encoded(self, request: Request, input_id: int) -> int:
        """An image's tokens before reduction; 0 for models that are not reduced."""
        if self._family is None:
            return 0
        plan = self._family.plan_of(request.mm_features[input_id]) if self._family.sizes_matter else None
        return self._family.largest.tokens if plan is None else plan.encoded


class FoldAsyncScheduler(FoldScheduler, AsyncScheduler):
    """`FoldScheduler` for `async_scheduling`; vLLM does not combine the two itself."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> FoldScheduler:
    """`scheduler_cls`: picks the class by `async_scheduling`, which vLLM decides if the user does not."""
    runs_ahead = vllm_config.scheduler_config.async_scheduling
    return (FoldAsyncScheduler if runs_ahead else FoldScheduler)(vllm_config=vllm_config, **kwargs)
