"""KV cache specs of the two sides of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class ShallowAttentionSpec(FullAttentionSpec):
    """Layers < K: full attention. Layers of different buckets never share a KV cache group (`layout.py`)."""

    bucket: int = 0

    @classmethod
    def merge(cls, specs: Sequence[ShallowAttentionSpec]) -> ShallowAttentionSpec:
        """The common spec of a group; AssertionError tells vLLM that the layers cannot share one."""
        assert all(isinstance(spec, ShallowAttentionSpec) for spec in specs), "deep and shallow layers are kept apart"
        assert len({spec.bucket for spec in specs}) == 1, "layers of different buckets are kept apart"
        return replace(super().merge(specs), bucket=specs[0].bucket)


@dataclass(frozen=True, kw_only=True)
class DeepAttentionSpec(AttentionSpec):
    """Layers >= K: one slot per kept token.

    Not a `FullAttentionSpec`, whose `merge` would accept it and whose groups vLLM truncates by token position.
    """

    bucket: int = 0

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes per layer of the longest request without withdrawal."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


def register_specs() -> None:
    """Tell vLLM which manager serves which spec. Idempotent."""
    from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager

    # vLLM registers its own specs lazily, and only while nothing is registered: they have to come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ShallowAttentionSpec, FullAttentionManager, FullAttentionSpec)
    KVCacheSpecRegistry.register(DeepAttentionSpec, DeepKVCacheManager, DeepAttentionSpec)
