"""KV cache manager of the deep layers: vLLM's own, counting kept tokens."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.prefix import MappedHashes, PrefixRegistry, longest_hit
from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec


class DeepKVCacheManager(SingleTypeKVCacheManager):
    """Modifications to vLLM's manager:

    - token counts pass through the request's T before the base class turns them into blocks: a request holds
      ceil(T(n) / block size) blocks, and a prefix hit whose T ends inside a block is copied on write;
    - blocks are registered and found for prefix caching as `prefix.py` describes;
    - a request that hits a tail which this step still writes waits for the next step.

    `WithdrawingScheduler` sets `hashes` and sees every request first.
    """

    hashes: MutableMapping[str, MappedHashes] | None = None

    def __init__(self, kv_cache_spec: DeepAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._prefixes = PrefixRegistry(self.block_pool, self.kv_cache_group_id, self.block_size)

    def token_map(self, request_id: str) -> TokenMap:
        if self.hashes is None:
            raise RuntimeError("the deep KV cache groups need a withdrawing scheduler: start with `foldserve serve`")
        return self.hashes[request_id].token_map

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        kept = self.token_map(request_id).kept
        local = kept(num_local_computed_tokens)
        if self._has_partial_local_hit(new_computed_blocks, local) and self._prefixes.is_fresh(new_computed_blocks[-1]):
            return self.block_pool.num_gpu_blocks + 1  # impossible, so the request waits for the next step
        return super().get_num_blocks_to_allocate(
            request_id,
            kept(num_tokens),
            new_computed_blocks,
            kept(total_computed_tokens),
            local,
            kept(num_tokens_main_model),
            apply_admission_cap,
            prefill_end,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        local = self.token_map(request_id).kept(num_local_computed_tokens)
        super().add_local_computed_blocks(request_id, new_computed_blocks, local, num_external_computed_tokens)
        self._prefixes.adopt(request_id, num_local_computed_tokens)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("KV connectors address blocks by token position, which withdrawal changes")

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        kept = self.token_map(request_id).kept
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, kept(num_tokens), kept(num_tokens_main_model)
        )
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._prefixes.forget(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def new_step_starts(self) -> None:
        self._prefixes.start_step()

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        token_map = self.token_map(request.request_id)
        blocks = self.req_to_blocks[request.request_id]
        num_tokens = min(num_tokens, len(request.block_hashes) * self.block_pool.hash_block_size)
        if token_map.shareable is not None:
            num_tokens = min(num_tokens, token_map.shareable)
        self._prefixes.advance(request, token_map, blocks, num_tokens)
        self.num_cached_block[request.request_id] = len(blocks)  # the base class recognises running requests by it

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: MappedHashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: DeepAttentionSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1  # refused at start-up (config.py)
        assert alignment_tokens == kv_cache_spec.block_size
        return longest_hit(block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec.block_size)
