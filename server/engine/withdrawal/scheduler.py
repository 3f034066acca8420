"""vLLM's schedulers, telling the deep KV cache managers which tokens each request withdraws.

`scheduler_cls` is not a stable interface of vLLM (it says so itself); the version is pinned.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from foldserve.server.engine.scheduler import EncoderInputs, FoldScheduler
from foldserve.server.engine.withdrawal.config import check, step_room
from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager
from foldserve.server.engine.withdrawal.prefix import MappedHashes
from foldserve.server.engine.withdrawal.requests import admit


class WithdrawingScheduler(FoldScheduler):
    """Modifications:

    - a request's block hashes carry its `TokenMap`, where the deep managers and cache lookups find it; the map lives
      exactly as long as its request, through preemption too, and nothing has to be cleaned up;
    - a prompt of which image tokens are chosen is scheduled whole, from its first token on: the choice depends on the
      last token and all keys. It may have more images than a step encodes otherwise.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check(vllm_config)  # of our own models, this was done before
        super().__init__(vllm_config, *args, **kwargs)
        self._room = step_room(self.vllm_config)
        self._hashes: WeakValueDictionary[str, MappedHashes] = WeakValueDictionary()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, DeepKVCacheManager):
                manager.hashes = self._hashes

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        token_map = admit(
            request.mm_features,
            request.num_prompt_tokens,
            self._room,
            prompt_logprobs=None if params is None else params.prompt_logprobs,
            resumable=request.resumable,
        )
        if token_map.choices:
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
        """The last place where a request's tokens of a step are cut; 0 tokens make a waiting request wait.

        It then waits at the head of the queue, so the prompts that run get done, and what room decoding requests leave
        suffices (`step_room`).
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
        """Enough for all images of a whole prompt, if the step has none yet: else it might wait forever."""
        left = super()._encoded_left(request, encoder_compute_budget)
        if self._hashes[request.request_id].token_map.whole and left == self._most_encoded:
            return max(left, sum(self._encoded(request, i) for i in range(len(request.mm_features))))
        return left


class WithdrawingAsyncScheduler(WithdrawingScheduler, AsyncScheduler):
    """The same for `async_scheduling=True`, for which vLLM does not pick a custom class itself."""
