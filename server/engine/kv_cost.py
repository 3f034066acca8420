"""What a token costs in the KV cache of the served model."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.torch_utils import get_kv_cache_torch_dtype


@dataclass(frozen=True, slots=True)
class KvCost:
    """KV cache of one sequence, over all ranks, without the rounding to blocks.

    Attributes:
        token_layer_bytes: keys and values of one token in one layer.
        layers: decoder layers.
        withdraw_layer: K, or None without withdrawal.
    """

    token_layer_bytes: int
    layers: int
    withdraw_layer: int | None

    def sequence_bytes(self, tokens: int, withdrawn: int = 0) -> int:
        """Of `tokens` tokens, of which the layers from K on don't hold `withdrawn`."""
        return self.token_layer_bytes * tokens * self.layers - self.saved_bytes(0, withdrawn)

    def saved_bytes(self, removed: int, withdrawn: int) -> int:
        """Against the same request unreduced: removed tokens are in no layer, withdrawn ones in none from K on."""
        deep_layers = self.layers - self.withdraw_layer if self.withdraw_layer is not None else 0
        return self.token_layer_bytes * (removed * self.layers + withdrawn * deep_layers)


def kv_cost(vllm_config: VllmConfig, withdraw_layer: int | None) -> KvCost:
    """Of a decoder with plain attention in every layer."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtype = get_kv_cache_torch_dtype(cache.cache_dtype, model.dtype)
    bytes_ = 2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize
    return KvCost(bytes_, model.get_total_num_hidden_layers(), withdraw_layer)
