"""Schedulers that tell the deep KV cache managers which tokens each request withdraws.

`scheduler_cls` is not a stable interface of vLLM (it says so itself); the version is pinned.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from foldserve.server.engine.scheduler import EncoderInputs, FoldScheduler
from foldserve.server.engine.withdrawal.config import check_conflicts, step_capacity
from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager
from foldserve.server.engine.withdrawal.prefix import MappedHashes
from foldserve.server.engine.withdrawal.requests import admit


class WithdrawingScheduler(FoldScheduler):
    """Modifications:

    - a request's block hashes carry its `TokenMap` for the deep managers and cache lookups; the map lives as long as
      the request, also through preemption;
    - a prompt with a choice of image tokens is scheduled whole, since the choice depends on the last token and all
      keys. It may have more images than a step encodes otherwise.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_conflicts(vllm_config)  # foldserve's models have done this before
        super().__init__(vllm_config, *args, **kwargs)
        self._step_capacity = step_capacity(self.vllm_config)
        self._hashes: WeakValueDictionary[str, MappedHashes] = WeakValueDictionary()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, DeepKVCacheManager):
                manager.hashes = self._hashes

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        token_map = admit(
            request.mm_features,
            request.num_prompt_tokens,
            self._step_capacity,
            prompt_logprobs=None if params is None else params.prompt_logprobs,
            resumable=request.resumable,
        )
        if token_map.selections:
            request.skip_reading_prefix_cache = True
        if request.request_id not in self.requests:
            request.block_hashes = MappedHashes(request.block_hashes)
            request.block_hashes.token_map = token_map
            self._hashes[request.request_id] = request.block_hashes
        super().add_request(request)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        **kwargs: Any,
    ) -> EncoderInputs:
        """Returns 0 tokens if a prompt that has to be whole does not fit; nothing cuts a request's tokens after this.

        The request then waits at the head of the queue until running prompts are done. Decoding requests leave enough
        room (`step_capacity`).
        """
        whole = self._hashes[request.request_id].token_map.whole
        if num_computed_tokens < whole and num_new_tokens < whole:
            return [], 0, encoder_compute_budget, [], []
        inputs = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        if num_computed_tokens < whole and inputs[1] < whole:  # the encoder's budget or cache is used up
            self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return inputs

    def _encoded_left(self, request: Request, encoder_compute_budget: int) -> int:
        """Room for all images of a whole prompt if the step has none yet, since it might wait forever otherwise."""
        left = super()._encoded_left(request, encoder_compute_budget)
        if self._hashes[request.request_id].token_map.whole and left == self._most_encoded:
            return max(left, sum(self._encoded(request, i) for i in range(len(request.mm_features))))
        return left


class WithdrawingAsyncScheduler(WithdrawingScheduler, AsyncScheduler):
    """`WithdrawingScheduler` for `async_scheduling`; vLLM does not combine the two itself."""
