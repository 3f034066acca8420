"""Prefix caching of the deep layers.

vLLM's block hash i covers the first i blocks of *tokens* and the images' identities, which include withdrawal. It thus
determines T and the deep KV of that prefix. With block size B, at the boundary x = i*B:

- if T passed a multiple of B since the last boundary (it grows by at most B), a deep block became full: its key is
  hash i;
- if T(x) is not a multiple of B, the last block holds T(x) % B tokens of the prefix: it is a *tail*, with key hash i in
  a separate key space, and copied on write after a hit. A block may be the tail of several boundaries.

Boundaries strictly inside an image need no tail: prompts that share them share the image's first boundary or its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from foldserve.server.engine.withdrawal.core import TokenMap

TAIL_SPACE = 0x10000
"""Added to the KV cache group id in the keys of tails; real group ids are far smaller."""


class MappedHashes(list[bytes]):
    """A request's block hashes with its token map, since vLLM passes only the hashes to cache lookups."""

    token_map: TokenMap


class PrefixRegistry:
    """Registers the deep blocks of running requests for prefix caching, for one KV cache group."""

    def __init__(self, pool: BlockPool, group_id: int, block_size: int) -> None:
        self._pool, self._group_id, self._block_size = pool, group_id, block_size
        self._registered: dict[str, int] = {}  # request -> boundaries done
        self._tails: dict[str, dict[int, list[int]]] = {}  # request -> deep block index -> boundaries (tokens) it ends
        self._fresh: set[int] = set()  # ids of the blocks that became tails in this scheduling step

    def start_step(self) -> None:
        self._fresh.clear()

    def is_fresh(self, block: KVCacheBlock) -> bool:
        """Whether the block became a tail in this step; its KV is not written yet and cannot be copied."""
        return block.block_id in self._fresh

    def adopt(self, request_id: str, tokens: int) -> None:
        """Record that the request starts from a hit of `tokens` tokens, which are registered already."""
        self._registered[request_id] = tokens // self._block_size

    def forget(self, request_id: str) -> None:
        self._registered.pop(request_id, None)
        self._tails.pop(request_id, None)

    def advance(self, request: Request, token_map: TokenMap, blocks: Sequence[KVCacheBlock], tokens: int) -> None:
        """Register full blocks and tails at boundaries up to `tokens`; `blocks` are the request's deep blocks."""
        size = self._block_size
        done = self._registered.get(request.request_id, 0)
        last = tokens // size
        kept = token_map.kept(done * size)
        for i in range(done + 1, last + 1):
            before, kept = kept, token_map.kept(i * size)
            tails = self._tails.setdefault(request.request_id, {})
            if kept // size > before // size:
                index = kept // size - 1
                self._register(request, blocks[index], i * size, self._group_id, tails.pop(index, []))
            if kept % size and token_map.kept((i + 1) * size) != kept:
                index = kept // size
                older = tails.setdefault(index, [])
                self._register(request, blocks[index], i * size, self._group_id + TAIL_SPACE, older)
                older.append(i * size)
                self._fresh.add(blocks[index].block_id)
        self._registered[request.request_id] = max(done, last)

    def _register(self, request: Request, block: KVCacheBlock, tokens: int, space: int, older: Sequence[int]) -> None:
        """Add a key for the block, and the keys of shorter prefixes again, which the pool drops for a longer one."""
        tail_space = self._group_id + TAIL_SPACE
        for end, group in [(tokens, space), *((end, tail_space) for end in reversed(older))]:
            self._pool.cache_partial_block(request, block, end, group, self._block_size)


def longest_hit(
    hashes: MappedHashes, tokens: int, group_ids: Sequence[int], pool: BlockPool, block_size: int
) -> tuple[tuple[list[KVCacheBlock], ...], int]:
    """The longest cached prefix of at most `tokens` tokens: its deep blocks per group, and its length in tokens.

    The blocks are floor(T/B) full ones and, if T % B > 0, a tail to be copied on write.
    """
    token_map, per_block = hashes.token_map, block_size // pool.hash_block_size
    limit = tokens if token_map.shareable is None else min(tokens, token_map.shareable)
    last = min(limit // block_size, len(hashes) // per_block)
    kept = [token_map.kept(i * block_size) for i in range(last + 1)]
    full: list[list[KVCacheBlock]] = []
    for i in range(1, last + 1):
        if kept[i] // block_size > kept[i - 1] // block_size:
            found = pool.get_cached_block(hashes[i * per_block - 1], group_ids)
            if not found:
                break
            full.append(found)
    for i in range(last, 0, -1):
        whole, partial = divmod(kept[i], block_size)
        if whole > len(full):
            continue
        tail_keys = [group + TAIL_SPACE for group in group_ids]
        tail = pool.get_cached_block(hashes[i * per_block - 1], tail_keys) if partial else []
        if tail is not None:
            chain = [*full[:whole], *([tail] if tail else [])]
            return tuple([blocks[g] for blocks in chain] for g in range(len(group_ids))), i * block_size
    return tuple([] for _ in group_ids), 0
