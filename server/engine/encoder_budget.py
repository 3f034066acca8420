"""How many images the vision tower takes at once: what start-up measured, for the model and for the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget


def profiled_images(vllm_config: VllmConfig) -> int:
    """Images in the batch that vLLM's profile run measures, by the class that the profile run itself asks.

    It has to process a dummy image for that: ask once, and where a first image may take 0.1 s.
    """
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    return max(1, budget.mm_max_items_per_batch.get("image", 1))


def batches(plans: Sequence[Hashable], most: int) -> list[list[int]]:
    """Places of the images, in batches of at most `most`; where they don't fit into one, equal plans side by side."""
    places = list(range(len(plans)))
    if len(plans) > most:
        first: dict[Hashable, int] = {}
        places.sort(key=lambda i: first.setdefault(plans[i], i))
    return [places[i : i + most] for i in range(0, len(places), most)]
