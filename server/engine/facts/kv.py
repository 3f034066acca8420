"""Size and groups of the KV cache."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Literal

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec, replace_as

from foldserve.server.engine.facts.attention import PlainAttention, attention_backend, attention_spec
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.kv_cost import kv_cost, state_spec
from foldserve.server.engine.moved import check_enough_kv_cache_memory, get_kv_cache_groups
from foldserve.server.engine.withdrawal.config import withdraw_layer
from foldserve.server.engine.withdrawal.layout import bucket_of
from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec, ShallowAttentionSpec

TEXT_TOKENS = 64  # of the example sequence, beside one largest image


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share a block table."""

    kind: Literal["all", "shallow", "deep", "recurrent"]
    layers: int


@dataclass(frozen=True, slots=True)
class KvFacts:
    """KV cache of a decoder, over all ranks. The example sequence is one largest image and `text_tokens`."""

    token_bytes: int  # in all layers with attention
    text_tokens: int
    sequence_tokens: int
    sequence_bytes: int
    withdrawn_bytes: int | None  # of the sequence if its image is withdrawn at K; None without K
    block_tokens: int
    groups: tuple[KvGroup, ...]
    pool_bytes: int | None  # size of the cache; None: what is free at start-up decides
    sequences: int | None  # that the pool holds, in whole blocks; None if its size is open
    withdrawn_sequences: int | None  # the same if all images are withdrawn


def kv_facts(config: VllmConfig) -> KvFacts | None:
    """None for a model that foldserve does not reduce, whose layers may have unknown kinds of cache.

    Raises:
        ValueError: the configured pool cannot hold one sequence of the maximum length.
    """
    family = family_of(config.model_config)
    if family is None:
        return None
    layer, image = withdraw_layer(config), family.largest.tokens
    cost, tokens, pool = kv_cost(config, layer), image + TEXT_TOKENS, config.cache_config.kv_cache_memory_bytes
    config = _in_blocks(config)
    specs = _specs(config, layer)
    config = _laid_out(config, specs)
    groups = get_kv_cache_groups(config, dict(specs))
    kinds = [_kind(group.kv_cache_spec) for group in groups]
    if pool is not None:
        check_enough_kv_cache_memory(config, specs, pool)
    width = max(len(group.layer_names) for group in groups)
    page = next(iter(specs.values())).page_size_bytes

    def fits(withdrawn: int) -> int | None:
        if pool is None:
            return None
        blocks = sum(_blocks(config, group.kv_cache_spec, tokens, withdrawn) for group in groups)
        return (pool // (page * width) - 1) // blocks  # vLLM keeps one block back

    return KvFacts(
        token_bytes=cost.token_layer_bytes * cost.layers,
        text_tokens=TEXT_TOKENS,
        sequence_tokens=tokens,
        sequence_bytes=cost.sequence_bytes(tokens),
        withdrawn_bytes=None if layer is None else cost.sequence_bytes(tokens, image),
        block_tokens=config.cache_config.block_size,
        groups=tuple(KvGroup(kind, len(group.layer_names)) for kind, group in zip(kinds, groups, strict=True)),
        pool_bytes=pool,
        sequences=fits(0),
        withdrawn_sequences=None if layer is None else fits(image),
    )


def _blocks(config: VllmConfig, spec: KVCacheSpec, tokens: int, withdrawn: int) -> int:
    """Blocks of a sequence in one group."""
    if isinstance(spec, MambaSpec):
        return spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    return cdiv(tokens - withdrawn if _kind(spec) == "deep" else tokens, spec.block_size)


def _in_blocks(config: VllmConfig) -> VllmConfig:
    """A copy with the block size that the engine will choose for its attention backend."""
    config, backend = copy(config), attention_backend(config)
    assert backend is not None  # all reduced decoders have layers with plain attention
    config.cache_config, config.compilation_config = copy(config.cache_config), copy(config.compilation_config)
    config.compilation_config.static_forward_context = {"decoder": PlainAttention(backend)}
    current_platform.update_block_size_for_backend(config)
    return config


def _specs(config: VllmConfig, withdraw_layer: int | None) -> dict[str, KVCacheSpec]:
    """KV specs that the layers of a rank will have."""
    full, layers = attention_spec(config), config.model_config.get_num_layers(config.parallel_config)
    if config.model_config.is_hybrid:
        first, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
        types, state = config.model_config.hf_text_config.layer_types, state_spec(config)
        return {str(i): full if types[i] == "full_attention" else state for i in range(first, end)}
    if withdraw_layer is None:
        return dict.fromkeys(map(str, range(layers)), full)
    not_deep = ("sliding_window", "attention_chunk_size", "non_causal")
    specs: dict[str, KVCacheSpec] = {}
    for i in range(layers):
        bucket = bucket_of(i, layers, withdraw_layer)
        if i < withdraw_layer:
            specs[str(i)] = replace_as(full, ShallowAttentionSpec, bucket=bucket)
        else:
            specs[str(i)] = replace_as(full, DeepAttentionSpec, drop=not_deep, bucket=bucket)
    return specs


def _laid_out(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> VllmConfig:
    """A copy whose KV cache has the layout that the engine will choose."""
    config, backend = copy(config), attention_backend(config)
    assert backend is not None  # as above
    config.cache_config = copy(config.cache_config)
    layouts = [layout.name for layout in get_supported_kv_cache_layouts([backend])]
    resolve_kv_cache_layout(config, [layouts], specs.values())
    return config


def _kind(spec: KVCacheSpec) -> Literal["all", "shallow", "deep", "recurrent"]:
    if isinstance(spec, MambaSpec):
        return "recurrent"
    if isinstance(spec, DeepAttentionSpec):
        return "deep"
    return "shallow" if isinstance(spec, ShallowAttentionSpec) else "all"
