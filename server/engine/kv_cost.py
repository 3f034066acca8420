"""What a token costs in the KV cache of the served model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import ParallelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.utils.torch_utils import get_kv_cache_torch_dtype
from vllm.v1.kv_cache_interface import MambaSpec


@dataclass(frozen=True, slots=True)
class KvCost:
    """KV cache of one sequence, over all ranks, without the rounding to blocks.

    Attributes:
        token_layer_bytes: keys and values of one token in one layer.
        layers: decoder layers that keep them.
        withdraw_layer: K, or None without withdrawal.
        state_bytes: what other layers keep of a sequence, however long it is.
    """

    token_layer_bytes: int
    layers: int
    withdraw_layer: int | None
    state_bytes: int = 0

    def sequence_bytes(self, tokens: int, withdrawn: int = 0) -> int:
        """Of `tokens` tokens, of which the layers from K on don't hold `withdrawn`."""
        kept = self.token_layer_bytes * tokens * self.layers - self.saved_bytes(0, withdrawn)
        return kept + self.state_bytes

    def saved_bytes(self, removed: int, withdrawn: int) -> int:
        """Against the same request unreduced: removed tokens are in no layer, withdrawn ones in none from K on."""
        deep_layers = self.layers - self.withdraw_layer if self.withdraw_layer is not None else 0
        return self.token_layer_bytes * (removed * self.layers + withdrawn * deep_layers)


def kv_cost(vllm_config: VllmConfig, withdraw_layer: int | None) -> KvCost:
    """Of a decoder whose layers have plain attention, or a recurrent state."""
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
    """KV spec of a layer with a recurrent state in one rank, as the layer will give it."""
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
