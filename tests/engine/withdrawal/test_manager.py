"""The KV cache manager of the deep layers, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

BLOCK = 16


def test_no_block_is_shared_before_its_tokens_have_a_hash() -> None:
    """A later vLLM hashes a block only once it knows the token behind it."""
    from vllm.v1.core.block_pool import BlockPool

    from foldserve.server.engine.withdrawal.core import TokenMap
    from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager
    from foldserve.server.engine.withdrawal.prefix import MappedHashes
    from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec

    pool = BlockPool(8, enable_caching=True, hash_block_size=BLOCK)
    spec = DeepAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, bucket=0)
    manager = DeepKVCacheManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )
    hashes = MappedHashes([b"first", b"second"])
    hashes.token_map = TokenMap([], 3 * BLOCK)
    manager.hashes = {"r": hashes}
    request: Any = SimpleNamespace(request_id="r", block_hashes=hashes)
    blocks = manager.allocate_new_blocks("r", 3 * BLOCK, 3 * BLOCK)

    manager.cache_blocks(request, 3 * BLOCK, replay_boundaries=())
    assert [pool.get_cached_block(name, [0]) for name in (b"first", b"second")] == [[blocks[0]], [blocks[1]]]
    hashes.append(b"third")
    assert pool.get_cached_block(b"third", [0]) is None
    manager.cache_blocks(request, 3 * BLOCK, replay_boundaries=())
    assert pool.get_cached_block(b"third", [0]) == [blocks[2]]
