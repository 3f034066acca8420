"""vLLM's schedulers, telling the deep KV cache managers which tokens each request withdraws.

`scheduler_cls` is not a stable interface of vLLM (it says so itself); the version is pinned.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager
from foldserve.server.engine.withdrawal.prefix import MappedHashes
from foldserve.server.engine.withdrawal.requests import refuse_request


class WithdrawingScheduler(Scheduler):
    """Modifications: a request's block hashes carry its `TokenMap`, where the deep managers and cache lookups find it.

    The map lives exactly as long as its request, through preemption too; nothing has to be cleaned up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hashes: WeakValueDictionary[str, MappedHashes] = WeakValueDictionary()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, DeepKVCacheManager):
                manager.hashes = self._hashes

    def add_request(self, request: Request) -> None:
        token_map = TokenMap.of(request.mm_features, request.num_prompt_tokens)
        params = request.sampling_params
        refuse_request(
            withdraws=token_map.total > 0,
            prompt_logprobs=None if params is None else params.prompt_logprobs,
            resumable=request.resumable,
        )
        if request.request_id not in self.requests:
            request.block_hashes = MappedHashes(request.block_hashes)
            request.block_hashes.token_map = token_map
            self._hashes[request.request_id] = request.block_hashes
        super().add_request(request)


class WithdrawingAsyncScheduler(WithdrawingScheduler, AsyncScheduler):
    """The same for `async_scheduling=True`, for which vLLM does not pick a custom class itself."""
