"""Attention backend and KV spec of a decoder that is not built yet."""

from __future__ import annotations

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import get_kv_cache_torch_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec


def attention_backend(config: VllmConfig) -> type[AttentionBackend] | None:
    """The backend; None if the decoder has no plain attention; ValueError if vLLM has no backend for the options."""
    model = config.model_config
    if model.use_mla or model.is_attention_free:
        return None
    with set_current_vllm_config(config):
        return get_attn_backend(
            model.get_head_size(),
            model.dtype,
            config.cache_config.cache_dtype,
            num_heads=model.get_num_attention_heads(config.parallel_config),
        )


class PlainAttention(AttentionLayerBase):
    """Stand-in for the decoder's layers, which vLLM asks for their backend."""

    def __init__(self, backend: type[AttentionBackend]) -> None:
        self._backend = backend

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return attention_spec(vllm_config)


def attention_spec(config: VllmConfig) -> FullAttentionSpec:
    """KV spec that a layer with plain attention will have in one rank."""
    model, cache = config.model_config, config.cache_config
    return FullAttentionSpec(
        block_size=cache.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=get_kv_cache_torch_dtype(cache.cache_dtype, model.dtype),
    )
