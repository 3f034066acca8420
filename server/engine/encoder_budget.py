"""How much the vision tower takes at once: what start-up measured, for the model and for the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from foldserve.server.engine.families.registry import family_of


class EncoderBudget(NamedTuple):
    """What vLLM's profile run measures, of images or of videos: of what has most tokens.

    Attributes:
        tokens: that it encodes at once, before reduction.
        images: of the largest size in a batch of so many tokens; frames of a model that takes videos alone.
        cache_rows: embeddings that the encoder cache holds.
    """

    tokens: int
    images: int
    cache_rows: int


def encoder_budget(vllm_config: VllmConfig) -> EncoderBudget:
    """By the class that the profile run itself asks.

    It has to process a dummy image for that: ask once, and where a first image may take 0.1 s.
    """
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    modality = budget.get_modality_with_max_tokens()
    tokens = budget.mm_max_toks_per_item[modality] * max(1, budget.mm_max_items_per_batch[modality])
    image = budget.mm_max_toks_per_item.get("image")
    if image is None and (family := family_of(vllm_config.model_config)) is not None:
        image = family.largest.tokens
    return EncoderBudget(tokens, max(1, tokens // image) if image else 1, budget.encoder_cache_size)


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
