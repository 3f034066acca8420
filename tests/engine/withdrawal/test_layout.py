"""KV cache groups as vLLM itself makes them from our specs: no K loses memory to padding."""

from __future__ import annotations

import math

import pytest
import torch

TEXT, VISION, BLOCK = 80, 576, 16


def pages(layers: int, withdraw_layer: int) -> tuple[int, int, int]:
    """Pages (one layer, one block) that a request costs in vLLM's groups, without padding, and without withdrawal."""
    from foldserve.server.engine.moved import get_kv_cache_groups
    from foldserve.server.engine.withdrawal.layout import bucket_of
    from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec, ShallowAttentionSpec

    def spec(i: int) -> object:
        cls = ShallowAttentionSpec if i < withdraw_layer else DeepAttentionSpec
        shape = {"block_size": BLOCK, "num_kv_heads": 32, "head_size": 128, "dtype": torch.float16}
        return cls(**shape, bucket=bucket_of(i, layers, withdraw_layer))

    make_groups = get_kv_cache_groups.__globals__["_get_kv_cache_groups_uniform_page_size"]
    groups = make_groups({f"layers.{i}": spec(i) for i in range(layers)})
    width = max(len(group.layer_names) for group in groups)
    full, text = math.ceil((TEXT + VISION) / BLOCK), math.ceil(TEXT / BLOCK)
    deep = [isinstance(group.kv_cache_spec, DeepAttentionSpec) for group in groups]
    used = sum(width * (text if is_deep else full) for is_deep in deep)
    return used, withdraw_layer * full + (layers - withdraw_layer) * text, layers * full


@pytest.mark.parametrize("layers", [2, 8, 28, 32, 40])
def test_any_k_is_within_the_waste_that_layout_promises(layers: int) -> None:
    from foldserve.server.engine.withdrawal.layout import MAX_WASTE, choose_grouping

    for k in range(1, layers):
        used, ideal, without = pages(layers, k)
        assert used - ideal <= MAX_WASTE * without, k
        assert choose_grouping(layers, k).groups <= layers


@pytest.mark.parametrize(
    ("layers", "k", "saving"),
    [
        *[(32, 8, 65.9), (32, 12, 54.9), (32, 15, 45.5), (32, 16, 43.9), (32, 20, 32.9), (32, 24, 22.0)],
        *[(40, 20, 43.9), (40, 24, 35.1), (40, 28, 25.7)],
    ],
    ids=str,
)
def test_pages_saved_for_one_llava_image(layers: int, k: int, saving: float) -> None:
    used, _, without = pages(layers, k)
    assert round(100 * (1 - used / without), 1) == saving
