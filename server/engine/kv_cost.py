"""Size of a token in the KV cache of the served model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import ParallelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.utils.torch_utils import get_kv_cache_torch_dtype
from vllm.v1.kv_cache_interface import MambaSpec


@dataclass(frozen=True, slots=True)
class KvCost:
    """KV cache of one sequence, over all ranks, without rounding to blocks."""

    token_layer_bytes: int  # keys and values of one token in one layer
    layers: int  # decoder layers that have keys and values
    withdraw_layer: int | None  # K
    state_bytes: int = 0  # recurrent state per sequence, independent of its length

    def sequence_bytes(self, tokens: int, withdrawn: int = 0) -> int:
        """Size of a sequence of `tokens` tokens, of which layers from K on do not hold `withdrawn`."""
        kept = self.token_layer_bytes * tokens * self.layers - self.saved_bytes(0, withdrawn)
        return kept + self.state_bytes

    def saved_bytes(self, removed: int, withdrawn: int) -> int:
        """Bytes saved by reduction: removed tokens are in no layer, withdrawn ones in none from K on."""
        deep_layers = self.layers - self.withdraw_layer if self.withdraw_layer is not None else 0
        return self.token_layer_bytes * (removed * self.layers + withdrawn * deep_layers)


def kv_cost(vllm_config: VllmConfig, withdraw_layer: int | None) -> KvCost:
    """The cost for decoders whose layers have plain attention or a recurrent state."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtype = get_kv_cache_torch_dtype(cache.cache_dtype, model.dtype)
    bytes_ = 2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize
    if not model.is_hybrid:
        return KvCost(bytes_, model.get_total_num_hidden_layers(), withdraw_layer)
    whole = ParallelConfig()  # one pipeline rank has all layers
    layers, others = (model.get_num_layers_by_block_type(whole, kind) for kind in ("attention", "linear_attention"))
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return KvCost(bytes_, layers, withdraw_layer, state_spec(vllm_config).state_content_size_bytes * others * ranks)


def state_spec(vllm_config: VllmConfig) -> MambaSpec:
    """KV spec that a layer with a recurrent state will have in one rank."""
    model_class: Any = get_model_cls(vllm_config.model_config)
    cache = vllm_config.cache_config
    return MambaSpec(
        shapes=model_class.get_mamba_state_shape_from_config(vllm_config),
        dtypes=model_class.get_mamba_state_dtype_from_config(vllm_config),
        block_size=cache.mamba_block_size,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode=cache.mamba_cache_mode,
        num_speculative_blocks=vllm_config.num_speculative_tokens,
    )
