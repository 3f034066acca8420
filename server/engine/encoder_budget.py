"""How much the vision tower takes at once: what start-up measured, for the model and for the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget


def profiled_images(vllm_config: VllmConfig) -> int:
    """Images of the largest size in a batch of as many tokens as vLLM's profile run measures."""
    budget = _budget(vllm_config)
    return max(1, _tokens(budget) // budget.mm_max_toks_per_item["image"])


def profiled_tokens(vllm_config: VllmConfig) -> int:
    """What that batch encodes, in tokens before reduction."""
    return _tokens(_budget(vllm_config))


def _budget(vllm_config: VllmConfig) -> MultiModalBudget:
    """By the class that the profile run itself asks.

    It has to process a dummy image for that: ask once, and where a first image may take 0.1 s.
    """
    return MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)


def _tokens(budget: MultiModalBudget) -> int:
    """Of what has most of them, image or video."""
    modality = budget.get_modality_with_max_tokens()
    return budget.mm_max_toks_per_item[modality] * max(1, budget.mm_max_items_per_batch[modality])


def batches(plans: Sequence[Hashable], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Places of the images, in batches whose sizes add up to at most `most`, or of one image that is larger.

    Where they don't fit into one batch, equal plans lie side by side.
    """
    places = list(range(len(plans)))
    if sum(sizes) > most:
        first: dict[Hashable, int] = {}
        places.sort(key=lambda i: first.setdefault(plans[i], i))
    together: list[list[int]] = []
    left = 0
    for i in places:
        if sizes[i] > left:
            together.append([])
            left = most
        together[-1].append(i)
        left -= sizes[i]
    return together
